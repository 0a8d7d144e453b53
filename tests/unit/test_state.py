"""The user row: what an interaction does to it, and its bytes."""

import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_app.state import (
    MAX_GAP_S,
    RING_ITEMS,
    Advanced,
    Fence,
    ForeignRowError,
    PositionedInteraction,
    RowError,
    RowUpdate,
    UserRow,
    advance,
    cold_row,
    may_replace,
    pack_row,
    unpack_row,
)
from tests.builders import interaction
from tests.fakes import RECORD_TIME_MS, SPACE, STATE_SIZE, HalvingModel, arena

FUTURE_TOLERANCE_MS = 60_000


def positioned(
    offset: int, *, user_id: str = "u-1", partition: int = 0, epoch: int = 1, **changes: object
) -> PositionedInteraction:
    changes.setdefault("event_time_ms", 1_000 * offset)
    return PositionedInteraction(
        user_id, interaction(user_id=user_id, **changes), Fence(epoch, partition, offset), RECORD_TIME_MS
    )


def forget(offset: int, *, user_id: str = "u-1") -> PositionedInteraction:
    return PositionedInteraction(user_id, None, Fence(1, 0, offset), RECORD_TIME_MS)


def fold(interactions: list[PositionedInteraction], rows: dict[str, UserRow] | None = None) -> Advanced:
    rows = {i.user_id: cold_row(STATE_SIZE) for i in interactions} | (rows or {})
    return advance(
        rows, interactions, model=HalvingModel(), vocabulary=arena(), future_tolerance_ms=FUTURE_TOLERANCE_MS
    )


def only_row(advanced: Advanced) -> UserRow:
    [update] = advanced.updates
    return update.row


def vector(row: UserRow) -> list[float]:
    return [float(x) for x in np.frombuffer(row.vector, dtype=np.float32)]


def test_an_interaction_moves_the_vector_counts_and_fences() -> None:
    row = only_row(fold([positioned(4, item_id="i-3")]))
    assert vector(row) == [1.0, 1.0]
    assert (row.events, row.last_event_time_ms, row.fence) == (1, 4_000, Fence(1, 0, 4))
    assert row.history() == ["i-3"]


def test_two_interactions_of_one_user_in_one_batch_fold_in_order() -> None:
    row = only_row(fold([positioned(1, item_id="i-1"), positioned(2, item_id="i-2")]))
    assert vector(row) == [0.5, 1.0]
    assert row.history() == ["i-1", "i-2"]


def test_users_of_one_batch_do_not_touch_each_other() -> None:
    advanced = fold(
        [
            positioned(1, user_id="a", item_id="i-1"),
            positioned(2, user_id="b", item_id="i-2"),
            positioned(3, user_id="a", item_id="i-2"),
        ]
    )
    rows = {update.user_id: update.row for update in advanced.updates}
    assert vector(rows["a"]) == [0.5, 1.0]
    assert vector(rows["b"]) == [0.0, 1.0]


def test_an_offset_at_or_below_the_fence_changes_nothing() -> None:
    row = only_row(fold([positioned(7)]))
    advanced = fold([positioned(6), positioned(7)], {"u-1": row})
    assert advanced.updates == []
    assert advanced.counts.duplicate == 2


def test_a_duplicate_inside_the_batch_is_applied_once() -> None:
    advanced = fold([positioned(1), positioned(1)])
    assert (advanced.counts.applied, advanced.counts.duplicate) == (1, 1)
    assert only_row(advanced).events == 1


def test_forgetting_leaves_a_cold_row_that_keeps_its_fence() -> None:
    row = only_row(fold([positioned(1), forget(2)]))
    assert (row.events, vector(row), row.history(), row.fence) == (0, [0.0, 0.0], [], Fence(1, 0, 2))


def test_a_replay_of_what_came_before_forgetting_does_not_bring_the_user_back() -> None:
    row = only_row(fold([positioned(1), forget(2)]))
    assert fold([positioned(1)], {"u-1": row}).updates == []


def test_an_interaction_after_forgetting_starts_from_cold() -> None:
    row = only_row(fold([positioned(1, item_id="i-1"), forget(2), positioned(3, item_id="i-2")]))
    assert (row.events, vector(row), row.history()) == (1, [0.0, 1.0], ["i-2"])


def test_a_user_who_moves_to_another_partition_keeps_where_he_was() -> None:
    row = only_row(fold([positioned(7), positioned(0, partition=3), positioned(8), positioned(2, partition=1)]))
    assert (row.fence, row.past) == (Fence(1, 1, 2), (Fence(1, 0, 8), Fence(1, 3, 0)))
    advanced = fold([positioned(n, partition=p) for p, n in ((0, 7), (0, 8), (3, 0), (1, 1), (1, 2))], {"u-1": row})
    assert (advanced.updates, advanced.counts.duplicate) == ([], 5)
    assert only_row(fold([positioned(9)], {"u-1": row})).events == 5


def test_a_new_epoch_forgets_where_the_user_was() -> None:
    row = only_row(fold([positioned(7), positioned(0, partition=3), positioned(0, epoch=2)]))
    assert (row.events, row.fence, row.past) == (3, Fence(2, 0, 0), ())


def test_forgetting_keeps_where_the_user_was() -> None:
    row = only_row(fold([positioned(7, partition=3), forget(2)]))
    assert (row.events, row.fence, row.past) == (0, Fence(1, 0, 2), (Fence(1, 3, 7),))


@given(st.data())
def test_however_often_partitions_are_read_again_a_moved_user_has_each_interaction_once(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    at, row = [0] * len(lengths), cold_row(STATE_SIZE)
    for _ in range(data.draw(st.integers(0, 40))):
        partition = data.draw(st.integers(0, len(lengths) - 1))
        at[partition] = data.draw(st.integers(0, at[partition]))  # read again from here
        count = data.draw(st.integers(0, lengths[partition] - at[partition]))
        some = [positioned(at[partition] + n, partition=partition) for n in range(count)]
        at[partition] += count
        for update in fold(some, {"u-1": row}).updates if some else []:
            row = update.row
    for partition, length in enumerate(lengths):
        for update in fold([positioned(n, partition=partition) for n in range(length)], {"u-1": row}).updates:
            row = update.row
    assert row.events == sum(lengths)


def test_an_unknown_item_and_an_unknown_kind_are_kept_and_counted() -> None:
    advanced = fold([positioned(1, item_id="never-seen", kind="wave")])
    assert (advanced.counts.applied, advanced.counts.unknown_item, advanced.counts.unknown_kind) == (1, 1, 1)
    assert only_row(advanced).history() == ["never-seen"]


def test_an_event_time_far_ahead_is_clamped_to_the_record_time_and_counted() -> None:
    advanced = fold([positioned(1, event_time_ms=RECORD_TIME_MS + 10**12)])
    assert only_row(advanced).last_event_time_ms == RECORD_TIME_MS + FUTURE_TOLERANCE_MS
    assert advanced.counts.future == 1


def test_an_earlier_event_time_is_late_and_has_no_negative_gap() -> None:
    gaps: list[float] = []

    class Recorder(HalvingModel):
        def advance(self, states, items, kinds, values, dt_s):  # type: ignore[no-untyped-def]
            gaps.extend(dt_s.tolist())
            return states

    rows = {"u-1": cold_row(STATE_SIZE)}
    interactions = [
        positioned(1, event_time_ms=5_000),
        positioned(2, event_time_ms=-(2**53)),
        positioned(3, event_time_ms=6_000),
    ]
    advanced = advance(rows, interactions, model=Recorder(), vocabulary=arena(), future_tolerance_ms=0)
    assert gaps == [0.0, 0.0, 1.0]
    assert advanced.counts.late == 1
    assert only_row(advanced).last_event_time_ms == 6_000


def test_a_gap_is_bounded() -> None:
    row = UserRow(1, -(2**53), Fence(1, 0, 0), bytes(8), b"i-1")
    gaps: list[float] = []

    class Recorder(HalvingModel):
        def advance(self, states, items, kinds, values, dt_s):  # type: ignore[no-untyped-def]
            gaps.extend(dt_s.tolist())
            return states

    advance({"u-1": row}, [positioned(1)], model=Recorder(), vocabulary=arena(), future_tolerance_ms=0)
    assert gaps == [MAX_GAP_S]


def test_the_ring_holds_the_last_items_oldest_first() -> None:
    row = only_row(fold([positioned(n, item_id=f"item-{n}") for n in range(1, RING_ITEMS + 4)]))
    assert row.history() == [f"item-{n}" for n in range(4, RING_ITEMS + 4)]


@given(cuts=st.lists(st.integers(0, 30), max_size=6))
def test_any_cut_of_the_log_into_batches_gives_the_same_rows(cuts: list[int]) -> None:
    log = [positioned(n, user_id=f"u-{n % 3}", item_id=f"i-{n % 4}") for n in range(30)]
    whole = {update.user_id: update.row for update in fold(log).updates}
    rows = {f"u-{n}": cold_row(STATE_SIZE) for n in range(3)}
    bounds = [0, *sorted(cuts), len(log)]
    for start, end in pairwise(bounds):
        # Each batch begins a little early: what a restart delivers again must not matter.
        batch = log[max(0, start - 3) : end]
        rows |= {update.user_id: update.row for update in fold(batch, rows).updates}
    assert rows == whole


def test_an_update_replaces_a_missing_row() -> None:
    assert may_replace(None, RowUpdate("u", Fence(0, 0, -1), UserRow(1, 0, Fence(1, 0, 5), b"", b"")))


@pytest.mark.parametrize(
    ("stored", "base", "new", "allowed"),
    [
        (Fence(1, 0, 4), Fence(1, 0, 4), Fence(1, 0, 6), True),  # nobody wrote meanwhile
        (Fence(1, 0, 3), Fence(1, 0, 4), Fence(1, 0, 6), True),  # Redis lost writes, our row is whole
        (Fence(1, 0, 5), Fence(1, 0, 4), Fence(1, 0, 6), False),  # somebody folded 5, our base had not
        (Fence(1, 0, 6), Fence(1, 0, 4), Fence(1, 0, 6), False),  # the same write again
        (Fence(1, 0, 9), Fence(1, 0, 4), Fence(1, 0, 6), False),  # a zombie
        (Fence(1, 0, 9), Fence(0, 0, -1), Fence(1, 0, 6), False),  # a fold from nothing over a row
        (Fence(1, 0, 9), Fence(1, 0, 9), Fence(2, 1, 0), True),  # a new epoch starts at offset 0
        (Fence(2, 1, 0), Fence(1, 0, 9), Fence(1, 0, 10), False),  # a writer of the old epoch
        (Fence(1, 1, 0), Fence(1, 0, 9), Fence(1, 0, 10), False),  # written from another partition meanwhile
        (Fence(1, 1, 0), Fence(1, 1, 0), Fence(1, 0, 10), True),  # a user whose producer changed its partitioner
    ],
)
def test_the_fence(stored: Fence, base: Fence, new: Fence, allowed: bool) -> None:
    assert may_replace(stored, RowUpdate("u", base, UserRow(1, 0, new, b"", b""))) is allowed


partitions, offsets = st.integers(0, 999_999), st.integers(0, 2**63 - 1)
row_strategy = st.builds(
    lambda epoch, past, **fields: UserRow(
        **fields,
        fence=Fence(epoch, *fields_of_fence(past)),
        past=tuple(Fence(epoch, partition, offset) for partition, offset in sorted(past.items())[1:]),
    ),
    epoch=st.integers(0, 999_999),
    past=st.dictionaries(partitions, offsets, max_size=4),
    events=st.integers(0, 2**63),
    last_event_time_ms=st.integers(-(2**63), 2**63 - 1),
    vector=st.binary(min_size=4 * STATE_SIZE, max_size=4 * STATE_SIZE),
    ring=st.binary(max_size=100),
)


def fields_of_fence(offset_of: dict[int, int]) -> tuple[int, int]:
    return min(offset_of.items(), default=(0, -1))


@given(row=row_strategy)
def test_unpack_returns_what_pack_took(row: UserRow) -> None:
    assert unpack_row(pack_row(row, SPACE), state_size=STATE_SIZE, space=SPACE) == row


@given(row=row_strategy, position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(row: UserRow, position: int, bit: int) -> None:
    data = bytearray(pack_row(row, SPACE))
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(RowError):
        unpack_row(bytes(data), state_size=STATE_SIZE, space=SPACE)


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_row_are_refused(data: bytes) -> None:
    with pytest.raises(RowError):
        unpack_row(data, state_size=STATE_SIZE, space=SPACE)


@pytest.mark.parametrize(("state_size", "space"), [(STATE_SIZE, SPACE + 1), (STATE_SIZE + 1, SPACE)])
def test_a_row_of_another_model_keeps_its_fence(state_size: int, space: int) -> None:
    row = only_row(fold([positioned(5)]))
    with pytest.raises(ForeignRowError) as caught:
        unpack_row(pack_row(row, SPACE), state_size=state_size, space=space)
    assert caught.value.fence == row.fence


def test_the_bytes_of_a_moved_user_are_the_documented_ones() -> None:
    row = UserRow(17, 1_699_999_999_999, Fence(1, 2, 1_041), bytes(4), b"i-1", (Fence(1, 0, 6), Fence(1, 5, 0)))
    data = pack_row(row, SPACE)
    assert (data[33], data[64:]) == (
        1,
        bytes(4) + bytes.fromhex("0200 00000000 0700000000000000 05000000 0100000000000000") + b"i-1",
    )


def test_past_fences_cut_short_are_no_row() -> None:
    row = UserRow(1, 1, Fence(1, 2, 3), bytes(8), b"", (Fence(1, 0, 6),))
    head, body = pack_row(row, SPACE)[:64], pack_row(row, SPACE)[64:-1]
    checksum = zlib.crc32(body, zlib.crc32(head[:36] + bytes(4) + head[40:]))
    with pytest.raises(RowError, match="cut short"):
        unpack_row(head[:36] + checksum.to_bytes(4, "little") + head[40:] + body, state_size=2, space=SPACE)


def test_the_row_bytes_are_the_documented_ones() -> None:
    row = UserRow(17, 1_699_999_999_999, Fence(1, 2, 1_041), np.array([1.0, -2.0], np.float32).tobytes(), b"i-1\ni-2")
    assert pack_row(row, 0x1122334455667788) == (
        b"000001"
        b"000002"
        b"00000000000000001042"  # epoch, partition, next offset
        + bytes.fromhex("01 00 0200 0be9b1ce 8877665544332211 1100000000000000 ff67e5cf8b010000")
        + bytes.fromhex("0000803f 000000c0")
        + b"i-1\ni-2"
    )
