"""The pure part of a rebuild: what a stored row is, and a fold with few rows in memory."""

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from schemas.limits import Limits
from stream_app.ports import Record
from stream_app.rebuild import Fold, RebuildCounts, Verdict, fold_layout, judge, rebuild
from stream_app.state import Fence, UserRow, pack_row
from stream_app.store import Replacement, RowCodec, home_partition
from stream_app.telemetry import Telemetry
from tests.builders import interaction
from tests.fakes import SPACE, STATE_SIZE, FakeRecord, record_of, serving

READ_TO = {0: 50}
LOG = [record_of(interaction(user_id=f"u-{n % 7}", item_id=f"i-{n % 3}", event_time_ms=n), offset=n) for n in range(50)]


def row_bytes(offset: int, *, epoch: int = 1, partition: int = 0, space: int = SPACE, events: int = 3) -> bytes:
    return pack_row(UserRow(events, 9, Fence(epoch, partition, offset), bytes(4 * STATE_SIZE), b"i-1"), space)


@pytest.mark.parametrize(
    ("stored", "verdict"),
    [
        (None, Verdict.MISSING),
        (row_bytes(20), Verdict.UNCHANGED),
        (b"", Verdict.CORRUPT),
        (b"junk" * 30, Verdict.CORRUPT),
        (row_bytes(20)[:-1], Verdict.CORRUPT),
        (row_bytes(19), Verdict.BEHIND),
        (row_bytes(20, events=4), Verdict.WRONG),
        (row_bytes(20, space=SPACE + 1), Verdict.WRONG),
        (row_bytes(21), Verdict.WRONG),
        (row_bytes(49), Verdict.WRONG),
        (row_bytes(50), Verdict.AHEAD),
        (row_bytes(99, epoch=0), Verdict.BEHIND),
        (row_bytes(1, epoch=2), Verdict.WRONG),
        (row_bytes(99, partition=1), Verdict.WRONG),
    ],
)
def test_a_stored_row_is_judged_by_its_bytes_and_its_fence(stored: bytes | None, verdict: Verdict) -> None:
    assert judge(stored, row_bytes(20), READ_TO) is verdict


def moved_bytes(*fences: tuple[int, int], events: int = 3) -> bytes:
    """Return a row at the first (partition, offset), its user having been at the others before."""
    first, *past = (Fence(1, partition, offset) for partition, offset in fences)
    return pack_row(UserRow(events, 9, first, bytes(4 * STATE_SIZE), b"i-1", tuple(past)), SPACE)


@pytest.mark.parametrize(
    ("stored", "verdict"),
    [
        (moved_bytes((1, 5), (0, 20)), Verdict.UNCHANGED),
        (moved_bytes((1, 5), (0, 20), events=4), Verdict.WRONG),
        (moved_bytes((1, 5)), Verdict.WRONG),  # a worker that caches it would write over the rebuilt one
        (moved_bytes((0, 20)), Verdict.BEHIND),
        (moved_bytes((1, 4), (0, 20)), Verdict.BEHIND),
        (moved_bytes((1, 7), (0, 20)), Verdict.AHEAD),
        (moved_bytes((1, 5), (0, 50)), Verdict.AHEAD),
        (moved_bytes((0, 21), (1, 5)), Verdict.WRONG),
    ],
)
def test_the_row_of_a_moved_user_is_judged_by_all_its_fences(stored: bytes, verdict: Verdict) -> None:
    assert judge(stored, moved_bytes((1, 5), (0, 20)), {0: 50, 1: 7}) is verdict


def test_what_users_did_before_they_moved_is_folded_before_what_they_did_there() -> None:
    names = [f"u-{n}" for n in range(40)]
    before = [
        record_of(
            interaction(user_id=name, item_id="i-1", event_time_ms=1), offset=n, partition=home_partition(name, 2)
        )
        for n, name in enumerate(names)
    ]
    after = [
        record_of(
            interaction(user_id=name, item_id="i-2", event_time_ms=2), offset=100 + n, partition=home_partition(name, 5)
        )
        for n, name in enumerate(names)
    ]
    by_partition = sorted(before + after, key=lambda record: (record.partition, record.offset))
    fold = fold_of()
    fold.feed(by_partition, partition_count=2)
    fold.feed(by_partition)
    codec = RowCodec(state_size=STATE_SIZE, space=SPACE, telemetry=Telemetry())
    rings = {name: row.history() for name, data in fold.rows() if (row := codec.unpack(data)) is not None}
    assert all(rings[name] == ["i-1", "i-2"] for name in names)
    assert (fold.counts.records, fold.counts.users) == (80, 40)
    fold.close()


@dataclass(slots=True)
class ListLog:
    """A log in memory that ends at `end`, and at `later_end` after it was extended."""

    records: Sequence[FakeRecord]
    end: int
    later_end: int
    fixed: Collection[int] = ()
    read_to: dict[int, int] = field(default_factory=lambda: {0: 0})

    @property
    def total(self) -> int:
        return self.end

    async def batches(self) -> AsyncIterator[Sequence[Record]]:
        while self.read_to[0] < self.end:
            start, self.read_to[0] = self.read_to[0], min(self.read_to[0] + 8, self.end)
            yield self.records[start : self.read_to[0]]

    async def extend(self) -> None:
        self.end = self.later_end


@dataclass(slots=True)
class DictStore:
    """Rows in memory; counts how often workers were told to drop their caches."""

    rows: dict[str, bytes] = field(default_factory=dict)
    told: int = 0
    applied_offsets: dict[int, int] = field(default_factory=dict)

    async def read(self, user_ids: Sequence[str]) -> list[bytes | None]:
        return [self.rows.get(user_id) for user_id in user_ids]

    async def replace(self, replacements: Sequence[Replacement]) -> list[bool]:
        same = [self.rows.get(one.user_id) == one.stored for one in replacements]
        self.rows.update({one.user_id: one.data for one, ok in zip(replacements, same, strict=True) if ok})
        return same

    async def rebuilt(self, offsets: Mapping[int, int], *, mended: bool) -> None:
        self.told += mended
        self.applied_offsets.update(offsets)


def fold_of(max_users: int = 100, *, everyone_at_home: bool = True) -> Fold:
    return Fold(
        serving(),
        RowCodec(state_size=STATE_SIZE, space=SPACE, telemetry=Telemetry()),
        epoch=1,
        limits=Limits(),
        future_tolerance_ms=10**15,
        max_users=max_users,
        is_home=lambda *_: everyone_at_home,
    )


def run(store: DictStore, log: ListLog, fold: Fold, user_id: str | None = None) -> RebuildCounts:
    asyncio.run(rebuild(log, fold, store, user_id=user_id, in_order=False, report=lambda _: None))
    fold.close()
    return fold.counts


def rebuilt_rows(end: int = 50) -> dict[str, bytes]:
    store = DictStore()
    run(store, ListLog(LOG, end, end), fold_of())
    return store.rows


@pytest.mark.parametrize("max_users", [1, 2, 6, 7, 100])
def test_how_many_rows_fit_into_memory_changes_nothing(max_users: int) -> None:
    store = DictStore()
    counts = run(store, ListLog(LOG, 50, 50), fold_of(max_users))
    assert store.rows == rebuilt_rows()
    assert (counts.users, counts.written, counts.interactions) == (7, 7, 50)
    assert store.applied_offsets == {0: 49}


def test_a_row_ahead_is_judged_again_after_reading_on() -> None:
    right, wrong = rebuilt_rows(), pack_row(UserRow(1, 1, Fence(1, 0, 44), bytes(8), b"x"), SPACE)
    store = DictStore({**rebuilt_rows(40), "u-1": right["u-1"], "u-2": wrong})
    counts = run(store, ListLog(LOG, 40, 50), fold_of())
    assert (store.rows["u-1"], store.rows["u-2"]) == (right["u-1"], right["u-2"])
    assert (counts.ahead, store.told) == (0, 1)


def test_a_row_that_claims_more_than_the_log_ever_held_is_overwritten() -> None:
    store = DictStore({"u-3": row_bytes(10**9)})
    counts = run(store, ListLog(LOG, 50, 50), fold_of())
    assert store.rows == rebuilt_rows()
    assert (counts.ahead, store.told) == (0, 1)


def test_a_row_ahead_of_an_end_set_by_hand_stays() -> None:
    store = DictStore(dict(rebuilt_rows()))
    counts = run(store, ListLog(LOG, 10, 10, fixed=[0]), fold_of())
    assert store.rows == rebuilt_rows()
    assert (counts.ahead, counts.written) == (7, 0)


@dataclass(slots=True)
class BusyStore(DictStore):
    """Rows that others move on, spoil or lose meanwhile, by seed: before a read, and before a write."""

    states: Sequence[Mapping[str, bytes]] = ()
    seed: int = 0
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)  # noqa: S311 - a workload

    async def read(self, user_ids: Sequence[str]) -> list[bytes | None]:
        self._move(user_ids)
        return await DictStore.read(self, user_ids)

    async def replace(self, replacements: Sequence[Replacement]) -> list[bool]:
        self._move([one.user_id for one in replacements])
        return await DictStore.replace(self, replacements)

    def _move(self, user_ids: Sequence[str]) -> None:
        for user_id in user_ids:
            if self.rng.random() < 0.3:
                state = self.rng.choice(self.states)
                self.rows.pop(user_id, None)
                self.rows |= {user_id: state[user_id]} if user_id in state else {}


@pytest.mark.parametrize("fixed", [[], [0]], ids=["to the end", "to an end set by hand"])
@pytest.mark.parametrize("seed", range(20))
def test_every_user_is_counted_once_whatever_others_write_meanwhile(seed: int, fixed: Collection[int]) -> None:
    spoilt = {f"u-{n}": row_bytes(offset) for n, offset in enumerate([0, 5, 44, 49, 60, 10**9, 10**9])}
    states = [{}, rebuilt_rows(20), rebuilt_rows(40), rebuilt_rows(), rebuilt_rows(), spoilt]
    store = BusyStore(dict(rebuilt_rows(30)), states=states, seed=seed)
    counts = run(store, ListLog(LOG, 40, 40 if fixed else 50, fixed=fixed), fold_of())
    assert (counts.users, counts.judged) == (7, 7)
    assert sum(counts.verdicts.values()) == counts.written


def test_a_row_that_is_written_twice_is_one_written_row() -> None:
    """What a worker held in its cache may come back over a mended row."""
    right, wrong = rebuilt_rows(), row_bytes(45)

    class CachingStore(DictStore):
        async def rebuilt(self, offsets: Mapping[int, int], *, mended: bool) -> None:
            if mended and not self.told:
                self.rows["u-2"] = wrong
            await DictStore.rebuilt(self, offsets, mended=mended)

    store = CachingStore({**right, "u-2": wrong})
    counts = run(store, ListLog(LOG, 50, 50), fold_of())
    assert (store.rows, store.told) == (right, 2)
    assert (counts.written, counts.unchanged, counts.ahead, counts.verdicts) == (1, 6, 0, {"wrong": 1})


def test_what_a_worker_mends_before_us_counts_as_unchanged() -> None:
    right = rebuilt_rows()
    store = DictStore({**rebuilt_rows(40), **{name: right[name] for name in ("u-1", "u-2")}})
    counts = run(store, ListLog(LOG, 40, 50), fold_of())
    assert (counts.written, counts.unchanged, counts.ahead) == (0, 7, 0)


def test_progress_is_shown_while_every_layout_is_read_and_while_rows_are_judged() -> None:
    fold, shown = fold_of(), []

    def report(counts: RebuildCounts) -> None:
        shown.append((counts.offsets_read, counts.judged))

    async def both() -> None:
        await fold_layout(ListLog(LOG, 50, 50), fold, 1, user_id=None, report=report)
        await rebuild(ListLog(LOG, 50, 50), fold, DictStore(), in_order=True, report=report)

    asyncio.run(both())
    fold.close()
    reading = [*range(8, 50, 8), 50]
    offsets = [*reading, 50, *(50 + offset for offset in reading), 100]
    assert [offset for offset, judged in shown if not judged] == offsets
    assert shown[-1] == (100, 7)


def test_one_user_is_written_alone_and_moves_no_progress() -> None:
    store = DictStore()
    run(store, ListLog(LOG, 50, 50), fold_of(), user_id="u-3")
    assert store.rows == {"u-3": rebuilt_rows()["u-3"]}
    assert store.applied_offsets == {}


def test_users_in_several_partitions_are_counted_and_nothing_is_written() -> None:
    store = DictStore()
    counts = run(store, ListLog(LOG, 50, 50), fold_of(everyone_at_home=False))
    assert (counts.stray_users, store.rows) == (7, {})
