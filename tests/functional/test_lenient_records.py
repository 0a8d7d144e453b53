"""Header names that are not UTF-8, and markers of no kind: aiokafka ends at them, and we do not. No broker needed.

A newer aiokafka that reads them, or that changes what we lean on, fails here first.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder, _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given
from hypothesis import strategies as st

from schemas.dead_letter import DeadLetter
from schemas.refusals import NotUnpacked
from stream_app import bounded_batches, interactions_log, lenient_records, transport
from stream_app.commands import reading
from stream_app.lenient_records import _LenientRecords, _PartitionRecords, _records
from tests.raw_batches import CODECS, HEAD_BYTES, NAME, READ_NAME, batch, holding, marker, record_bytes

TP = TopicPartition("interactions", 0)
PLAIN: list[tuple[str, bytes | None]] = [("plain", b"1"), ("null", None)]
ODD: list[tuple[str, bytes | None]] = [("plain", b"\xff"), (NAME, b"\0\xff"), (NAME, None)]
STOCK: Any = (_PartitionRecords.__base__, MemoryRecords)
OURS: Any = (_PartitionRecords, _LenientRecords)
MOSTLY_GOOD: Sequence[list[tuple[str, bytes | None]]] = (PLAIN, ODD, [])


def log(*, odd: bool, compression: str = "") -> list[bytearray]:
    """Return batches in which odd ones, some compressed, stand before, between and behind others and markers."""
    return [
        batch(0, [PLAIN, [], PLAIN]),
        marker(3, 7, aborts=False),
        batch(4, [[], PLAIN], compression=compression),
        batch(6, MOSTLY_GOOD, odd=odd),
        marker(9, 7, aborts=False),
        batch(10, [PLAIN, []], compression=compression),
        batch(12, MOSTLY_GOOD, odd=odd, compression=compression),
        batch(15, [ODD, ODD, ODD], odd=odd),
        marker(18, 7, aborts=True),
        batch(19, [PLAIN]),
        batch(20, MOSTLY_GOOD, odd=odd, compression=compression),
    ]


def reader(
    kinds: Any, batches: Sequence[bytearray], *, offset: int = 0, aborted: Any = (), isolation_level: int = 0
) -> Any:
    partition_records, memory_records = kinds
    data = memory_records(b"".join(batches))
    return partition_records(TP, data, aborted, offset, None, None, True, isolation_level)


def as_read(record: ConsumerRecord) -> ConsumerRecord:
    names = {NAME: READ_NAME}
    return replace(record, headers=tuple((names.get(name, name), value) for name, value in record.headers))


def test_aiokafka_ends_at_a_header_name_that_is_not_utf_8() -> None:
    records = reader(STOCK, [batch(0, MOSTLY_GOOD, odd=True)])
    assert next(records).offset == 0
    with pytest.raises(UnicodeDecodeError):
        next(records)


@pytest.mark.parametrize("isolation_level", [fetcher.READ_UNCOMMITTED, fetcher.READ_COMMITTED])
@pytest.mark.parametrize("compression", ["", *CODECS])
def test_records_with_odd_header_names_are_read_as_others_and_none_is_lost_or_doubled(
    compression: str, isolation_level: int
) -> None:
    expected = reader(STOCK, log(odd=False, compression=compression), isolation_level=isolation_level)
    found = reader(OURS, log(odd=True, compression=compression), isolation_level=isolation_level)
    assert list(found) == [as_read(record) for record in expected]
    assert found.next_fetch_offset == expected.next_fetch_offset == 23


def test_a_batch_of_too_many_records_to_be_read_in_python_is_refused_from_the_odd_one_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded_batches, "MOST_READ_AGAIN_RECORDS", 2)
    found = list(reader(OURS, [batch(0, [ODD, ODD], odd=True), batch(2, MOSTLY_GOOD, odd=True), batch(5, [PLAIN])]))
    refused = [record.offset for record in found if isinstance(record.value, NotUnpacked)]
    assert ([record.offset for record in found], refused) == ([0, 1, 2, 3, 4, 5], [3, 4])


def test_reading_goes_on_inside_any_batch() -> None:
    batches, whole = log(odd=True), list(reader(OURS, log(odd=True)))
    starts = [int.from_bytes(one[:8], "big") for one in batches]
    for offset in range(23):
        first = max(number for number, start in enumerate(starts) if start <= offset)
        found = list(reader(OURS, batches[first:], offset=offset))
        assert found == [record for record in whole if record.offset >= offset]


def test_what_was_read_is_counted_record_by_record() -> None:
    records = reader(OURS, log(odd=True))
    for record in records:
        assert records.next_fetch_offset == record.offset + 1


def test_an_aborted_transaction_stays_unread_behind_an_odd_header_name() -> None:
    batches = [
        batch(0, [ODD, ODD], odd=True, producer_id=7),
        batch(2, MOSTLY_GOOD, odd=True),
        batch(5, [ODD], odd=True, producer_id=7),
        marker(6, 7, aborts=True),
        batch(7, [ODD, []], odd=True, producer_id=7),
        marker(9, 7, aborts=False),
    ]
    found = reader(OURS, batches, aborted=[(7, 0)], isolation_level=fetcher.READ_COMMITTED)
    assert [record.offset for record in found] == [2, 3, 4, 7, 8]
    assert found.next_fetch_offset == 10


def test_a_damaged_batch_behind_an_odd_header_name_is_still_refused() -> None:
    damaged = batch(3, [PLAIN])
    damaged[-1] ^= 1
    records = reader(OURS, [batch(0, MOSTLY_GOOD, odd=True), damaged])
    assert [next(records).offset for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CorruptRecordException):
        next(records)


@pytest.mark.parametrize("length", [2**63 - 1, 2**63 - 70, 2**62, -(2**63)])
def test_a_wild_length_is_refused_whatever_aiokafka_makes_of_it(length: int) -> None:
    body = record_bytes(0, b"k", b"sound") + record_bytes(1, b"k" * 90, b"v", value_bytes=length)
    found = list(reader(OURS, [holding(body, claimed=2)]))
    assert [(one.offset, type(one.value)) for one in found] == [(0, bytes), (1, NotUnpacked)]


@pytest.mark.parametrize("attributes", [1, 0x7F, 0x80, 0xFF])
def test_the_attributes_of_a_record_are_a_byte(attributes: int) -> None:
    body = record_bytes(0, b"u-1", b"value", attributes=attributes)
    [found] = reader(OURS, [holding(body, claimed=1)])
    assert (found.offset, found.timestamp, found.key, found.value) == (0, 1_000, b"u-1", b"value")


@pytest.mark.parametrize(
    "body", [b"", b"\xff" * 9, record_bytes(0, b"", b"no type"), record_bytes(0, b"\0\0\0", b"half a type")]
)
def test_a_control_batch_without_a_marker_is_passed(body: bytes) -> None:
    unmarked = holding(body, claimed=1, counted=min(1, len(body)), control=True)
    records = reader(OURS, [unmarked, batch(1, [PLAIN])], isolation_level=fetcher.READ_COMMITTED)
    assert [record.offset for record in records] == [1]
    assert records.next_fetch_offset == 2


_BYTES = st.none() | st.binary(max_size=200)
_RECORDS = st.lists(
    st.tuples(st.integers(0, 2**62), _BYTES, _BYTES, st.lists(st.tuples(st.text(max_size=70), _BYTES), max_size=3)),
    max_size=4,
)


@given(_RECORDS, st.booleans())
def test_what_aiokafka_reads_is_read_as_it_does(records: list[Any], appended: bool) -> None:
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 1 << 20)
    for number, (timestamp, key, value, headers) in enumerate(records):
        builder.append(number, timestamp, key, value, headers)
    built = builder.build()
    if appended:
        built[22] |= _DefaultRecordBatchPy.TIMESTAMP_TYPE_MASK
    found = [
        (one.offset, one.timestamp, one.timestamp_type, one.key, one.value, one.headers) for one in _records(built)
    ]
    assert found == [
        (one.offset, one.timestamp, one.timestamp_type, one.key, one.value, one.headers)
        for one in DefaultRecordBatch(built)
    ]


def test_every_module_that_makes_consumers_reads_leniently_and_twice_is_once() -> None:
    for module in (transport, interactions_log, reading):
        assert "lenient_records.install()" in inspect.getsource(module)
    lenient_records.install()
    assert (fetcher.PartitionRecords, fetcher.MemoryRecords) == OURS


def test_a_dead_letter_with_such_headers_can_be_produced() -> None:
    [record] = reader(OURS, [batch(0, [ODD], odd=True)])
    letter = DeadLetter(
        topic=TP.topic,
        partition=TP.partition,
        offset=record.offset,
        key=record.key,
        value=record.value,
        headers=record.headers,
        code="not_json",
        stage="DECODE",
        error_class="DecodeError",
        message="text",
    )
    headers = letter.within(1_000_000).record_headers()
    [produced] = reader(STOCK, [batch(0, [headers])])
    assert produced.headers[:3] == (("plain", b"\xff"), (READ_NAME, b"\0\xff"), (READ_NAME, None))


def test_every_private_name_that_this_leans_on_is_there() -> None:
    assert DefaultRecordBatch is not _DefaultRecordBatchPy  # compiled: the one that raises UnicodeDecodeError
    assert {"_unpack_records", "_contains_abort_marker"} <= vars(STOCK[0]).keys()
    assert "self._records_iterator = self._unpack_records()" in inspect.getsource(STOCK[0])
    assert {"_tp", "next_fetch_offset"} <= vars(reader(STOCK, [])).keys()
    assert _DefaultRecordBatchPy.HEADER_STRUCT.size == HEAD_BYTES
