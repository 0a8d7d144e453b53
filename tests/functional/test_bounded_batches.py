"""Batches that hold more than a worker unpacks, or what nobody can read: refused there, and nothing beside them.

A newer aiokafka or cramjam that changes what we lean on fails here first.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import DecodeError, ErrorCode, decode_candidate_list, decode_interaction, decode_item
from schemas.limits import DEFAULT_LIMITS
from schemas.refusals import NotUnpacked
from stream_app import bounded_batches, lenient_records
from stream_app.bounded_batches import MOST_REFUSED_RECORDS, BoundedRecords
from stream_app.lenient_records import _LenientRecords, _PartitionRecords
from tests.odd_batches import SLOTS, OddBatch, odd_batches
from tests.raw_batches import HEAD_BYTES, NAME, PACKINGS, batch, claiming, holding, marker

TP = TopicPartition("interactions", 0)
STOCK: Any = (_PartitionRecords.__base__, MemoryRecords)
OURS: Any = (_PartitionRecords, _LenientRecords)
BOUND_BYTES = 10_000
PADDED: list[tuple[str, bytes | None]] = [("padding", bytes(BOUND_BYTES // 2))]
SMALL: list[tuple[str, bytes | None]] = [("plain", b"1")]
ODD: list[tuple[str, bytes | None]] = [(NAME, b"1")]
BOMB: Sequence[list[tuple[str, bytes | None]]] = [PADDED, PADDED, PADDED]
PAIRS = [(b"u-%d" % n, b'{"n":%d}' % n) for n in range(SLOTS)]
ODD_BATCHES = odd_batches(PAIRS)


@pytest.fixture(autouse=True)
def low_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_batches, "MAX_UNPACKED_BYTES", BOUND_BYTES)


def reader(batches: Sequence[bytearray], *, offset: int = 0, aborted: Any = (), stock: bool = False) -> Any:
    partition_records, memory_records = STOCK if stock else OURS
    data = memory_records(b"".join(batches))
    return partition_records(TP, data, aborted, offset, None, None, True, fetcher.READ_COMMITTED)


def read(batches: Sequence[bytearray], *, offset: int = 0, aborted: Any = ()) -> list[ConsumerRecord]:
    """Return all records, fetching again where a fetch ended early, as a consumer does."""
    found: list[ConsumerRecord] = []
    while True:
        records = reader(batches, offset=offset, aborted=aborted)
        found += records
        if records.next_fetch_offset == offset:
            return found
        offset = records.next_fetch_offset
        ends = [int.from_bytes(one[:8], "big") + int.from_bytes(one[23:27], "big") for one in batches]
        batches = [one for one, end in zip(batches, ends, strict=True) if end >= offset]


def refused(records: Sequence[ConsumerRecord]) -> list[int]:
    return [one.offset for one in records if isinstance(one.value, NotUnpacked)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_batch_of_as_many_bytes_as_the_bound_is_read_and_one_of_a_byte_more_is_refused(
    packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = batch(5, BOMB), batch(5, BOMB, compression=packing)
    monkeypatch.setattr(bounded_batches, "MAX_UNPACKED_BYTES", len(plain) - HEAD_BYTES)
    assert read([packed]) == list(reader([plain], stock=True))
    monkeypatch.setattr(bounded_batches, "MAX_UNPACKED_BYTES", len(plain) - HEAD_BYTES - 1)
    assert refused(read([packed])) == [5, 6, 7]


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_neighbours_of_a_batch_beyond_the_bound_are_read_as_ever(packing: str) -> None:
    before, behind = batch(0, [SMALL, SMALL], compression=packing), batch(5, [SMALL, []], compression=packing)
    found = read([before, batch(2, BOMB, compression=packing), behind])
    assert [one.offset for one in found] == list(range(7))
    assert refused(found) == [2, 3, 4]
    assert [one for one in found if one.offset not in (2, 3, 4)] == list(reader([before, behind], stock=True))


def assert_stands_for_one(record: Any, *, offset: int, why: str, code: ErrorCode) -> None:
    """Assert that a record, the only one of its batch, was not unpacked and that every decoder refuses it."""
    text = f"not unpacked: offsets {offset} to {offset}"
    assert (record.key, record.value, record.headers) == (None, text.encode(), ())
    for decode in (decode_interaction, decode_candidate_list, decode_item):
        with pytest.raises(DecodeError, match=rf"b'{text}': .*{why}") as caught:
            decode(record.key, record.value, DEFAULT_LIMITS)
        assert caught.value.code is code


def test_what_stands_for_a_record_is_refused_as_too_large_and_forgets_nobody() -> None:
    [record] = read([batch(3, [PADDED * 3], compression="zstd")])
    assert_stands_for_one(record, offset=3, why="holds more than 67108864", code=ErrorCode.TOO_LARGE)


def test_reading_goes_on_inside_a_batch_beyond_the_bound() -> None:
    batches = [batch(2, BOMB, compression="zstd"), batch(5, [SMALL])]
    assert [one.offset for one in read(batches, offset=4)] == [4, 5]


def test_a_fetch_ends_early_when_its_batches_together_hold_more_than_the_bound_and_the_rest_is_fetched_again() -> None:
    batches = [batch(n, [PADDED], compression="zstd") for n in range(7)]
    records = reader(batches)
    assert [one.offset for one in records] == [0, 1]
    assert records.next_fetch_offset == 2
    assert read(batches) == list(reader(batches, stock=True))


def test_a_fetch_gives_up_one_batch_at_a_time_for_each_costs_as_much_as_the_bound() -> None:
    batches = [batch(3 * n, BOMB, compression="zstd") for n in range(3)]
    records = reader(batches)
    assert [one.offset for one in records] == [0, 1, 2]
    assert refused(read(batches)) == list(range(9))


def test_a_batch_beyond_the_bound_is_given_up_behind_and_with_header_names_that_are_not_utf_8() -> None:
    batches = [
        batch(0, [SMALL, ODD], odd=True),
        batch(2, BOMB, compression="gzip"),
        batch(5, [ODD], odd=True, compression="zstd"),
        batch(6, [*BOMB, ODD], odd=True, compression="lz4"),
        batch(10, [SMALL]),
    ]
    found = read(batches)
    assert [one.offset for one in found] == list(range(11))
    assert refused(found) == [2, 3, 4, 6, 7, 8, 9]


def test_a_batch_beyond_the_bound_in_an_aborted_transaction_never_was() -> None:
    batches = [
        batch(0, BOMB, compression="zstd", producer_id=7),
        marker(3, 7, aborts=True),
        batch(4, BOMB, compression="zstd", producer_id=7),
        marker(7, 7, aborts=False),
        batch(8, [SMALL]),
    ]
    found = read(batches, aborted=[(7, 0)])
    assert ([one.offset for one in found], refused(found)) == ([4, 5, 6, 8], [4, 5, 6])


def test_a_header_that_claims_two_thousand_million_records_makes_no_more_than_a_few_of_them() -> None:
    most = 2**31 - 1
    found = read([claiming(batch(0, BOMB, compression="zstd"), most)])
    assert refused(found) == list(range(most - MOST_REFUSED_RECORDS, most))
    assert found[0].value == b"not unpacked: offsets 0 to %d" % (most - 1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_damaged_batch_is_no_batch_beyond_the_bound(packing: str) -> None:
    damaged = batch(0, BOMB, compression=packing)
    damaged[-1] ^= 1
    with pytest.raises(CorruptRecordException):
        read([damaged])


@pytest.mark.parametrize("odd", ODD_BATCHES.values(), ids=ODD_BATCHES)
def test_an_odd_batch_is_read_as_far_as_it_goes_and_refused_from_there_on(odd: OddBatch) -> None:
    found = read([odd.built])
    assert [(one.offset, one.key, one.value) for one in found[: odd.read]] == [
        (number, *pair) for number, pair in enumerate(PAIRS[: odd.read])
    ]
    assert refused(found) == list(range(odd.read, SLOTS))
    assert {one.value for one in found[odd.read :]} <= {b"not unpacked: offsets 0 to 2"}


@pytest.mark.parametrize("odd", ODD_BATCHES.values(), ids=ODD_BATCHES)
def test_the_neighbours_of_an_odd_batch_are_read_as_ever_and_reading_goes_on_inside_it(odd: OddBatch) -> None:
    before, behind = batch(0, [SMALL, SMALL]), batch(5, [SMALL, []], compression="lz4")
    between = odd.built[:]
    between[:8] = (2).to_bytes(8, "big")  # no part of what the checksum covers
    whole = read([before, between, behind])
    assert [one.offset for one in whole] == list(range(7))
    assert whole[:2] + whole[5:] == list(reader([before, behind], stock=True))
    for offset in range(2, 5):
        assert read([between, behind], offset=offset) == whole[offset:]


def test_what_stands_for_a_record_that_cannot_be_read_is_no_json_and_forgets_nobody() -> None:
    [record] = read([holding(b"garbage", codec=1, claimed=1)])
    assert_stands_for_one(record, offset=0, why="cannot be unpacked.*;.*;", code=ErrorCode.NOT_JSON)


def test_a_record_that_only_says_so_is_not_taken_for_one_that_was_not_unpacked() -> None:
    value = bytes(NotUnpacked.at(3, 5, ErrorCode.TOO_LARGE))
    with pytest.raises(DecodeError) as caught:
        decode_interaction(b"u-1", value, DEFAULT_LIMITS)
    assert (caught.value.code, "batch" in caught.value.message) == (ErrorCode.NOT_JSON, False)


def test_an_odd_batch_in_an_aborted_transaction_never_was() -> None:
    garbage = claiming(batch(0, [SMALL], compression="gzip", producer_id=7), 3)
    found = read([garbage, marker(3, 7, aborts=True), batch(4, [SMALL])], aborted=[(7, 0)])
    assert [one.offset for one in found] == [4]


def test_a_fetch_ends_behind_a_batch_that_cannot_be_unpacked_for_it_may_have_cost_as_much_as_the_bound() -> None:
    records = reader([holding(b"garbage", codec=4, claimed=1), batch(1, [SMALL])])
    assert [one.offset for one in records] == [0]
    assert records.next_fetch_offset == 1


@given(
    codec=st.integers(0, 7),
    body=st.binary(max_size=200),
    damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=5),
    sound=st.sampled_from(["", *PACKINGS]),
    counted=st.sampled_from([3, 3, 3, 0, 1, 2, 4, 2**31 - 1, -(2**31)]),
)
def test_whatever_a_batch_holds_its_offsets_are_passed_in_order_and_nothing_is_raised(
    codec: int, body: bytes, damage: list[tuple[int, int]], sound: str, counted: int
) -> None:
    batches = [holding(body, codec=codec, counted=counted)]
    if damage:
        packed = bytearray(batch(0, [ODD, SMALL, []], odd=True, compression=sound))
        for place, change in damage:
            packed[HEAD_BYTES + place % (len(packed) - HEAD_BYTES)] ^= change
        batches.append(holding(bytes(packed[HEAD_BYTES:]), codec=packed[22] & 7, counted=counted))
    for one in batches:
        records = reader([one])
        offsets = [record.offset for record in records]
        assert offsets == sorted(set(offsets))
        assert set(offsets) <= {0, 1, 2}
        assert records.next_fetch_offset == 3


def test_a_wrong_checksum_is_an_error_that_says_where_and_what_to_do() -> None:
    damaged = batch(2, [SMALL])
    damaged[-1] ^= 1
    records = reader([batch(0, [SMALL, SMALL]), damaged])
    assert [next(records).offset for _ in range(2)] == [0, 1]
    with pytest.raises(CorruptRecordException, match=r"interactions, partition 0, offset 2: .*;.*; read again"):
        next(records)


def test_every_private_name_that_this_leans_on_is_there() -> None:
    lenient_records.install()
    assert issubclass(fetcher.MemoryRecords, BoundedRecords)
    assert "MemoryRecords(part_data[-1])" in inspect.getsource(fetcher.Fetcher._proc_fetch_request)
    wanted = "while records.has_next():\n            next_batch = records.next_batch()"
    assert wanted in inspect.getsource(STOCK[0])
    assert {"_next_slice"} <= vars(_MemoryRecordsPy(b"")).keys()
    head = _DefaultRecordBatchPy.HEADER_STRUCT.size, _DefaultRecordBatchPy.ATTRIBUTES_OFFSET
    assert (*head, _DefaultRecordBatchPy.CODEC_MASK) == (HEAD_BYTES, 21, 7)
    assert [one.offset for one in DefaultRecordBatch(batch(0, [[]]))] == [0]
