"""Rebuild: recreate Redis rows from the log, byte for byte as the workers wrote them.

    read -> decode -> fold (state.advance, as the worker) -> judge against what is stored -> write

A row is written only when its log is folded to the end, so a worker never meets half a row. Workers may run
meanwhile: a stored row that is ahead of what was read is judged again after reading on, and a mended row that a worker
may have cached makes every worker drop its cache. Memory: `max_users` rows; the others wait in a file of their own.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import islice
from typing import Protocol

from schemas.limits import Limits
from stream_app.pipeline import decode_interactions
from stream_app.ports import Record, Serving
from stream_app.row_spill import RowSpill
from stream_app.state import Fence, RowError, UserRow, advance, sound_fences
from stream_app.store import Replacement, RowCodec, home_partition

ROWS_PER_TRIP = 1_000
ROUNDS = 20  # of judging rows that somebody writes meanwhile


class Verdict(StrEnum):
    """What a stored row is, beside the one that was rebuilt."""

    UNCHANGED = "unchanged"
    MISSING = "missing"
    BEHIND = "behind"
    CORRUPT = "corrupt"
    WRONG = "wrong"  # claims to have folded what was read, and disagrees: a worker may hold it in its cache
    AHEAD = "ahead"  # folded more than was read


def _is_ahead_of(partitions: Collection[int], stored: bytes | None) -> bool:
    return stored is not None and any(fence.partition in partitions for fence in sound_fences(stored))


def judge(stored: bytes | None, rebuilt: bytes, read_to: Mapping[int, int]) -> Verdict:
    """Compare stored bytes with rebuilt ones; `read_to`: per partition, the offset after the last record read."""
    if stored is None:
        return Verdict.MISSING
    if stored == rebuilt:
        return Verdict.UNCHANGED
    try:
        found = sound_fences(stored)
    except RowError:
        return Verdict.CORRUPT
    return _judge_fences(found, sound_fences(rebuilt), read_to)


def _judge_fences(found: Sequence[Fence], rebuilt: Sequence[Fence], read_to: Mapping[int, int]) -> Verdict:
    if found[0].epoch != rebuilt[0].epoch:
        return Verdict.WRONG if found[0].epoch > rebuilt[0].epoch else Verdict.BEHIND
    ours = {fence.partition: fence.offset for fence in rebuilt}
    if any(fence.offset >= read_to[fence.partition] for fence in found if fence.partition in read_to):
        return Verdict.AHEAD
    # A worker's save goes by the first fence: a row that shares it with ours may be written over from a cache.
    if found[0] != rebuilt[0] and all(fence.offset <= ours.get(fence.partition, -1) for fence in found):
        return Verdict.BEHIND
    return Verdict.WRONG


@dataclass(slots=True)
class RebuildCounts:
    """What a rebuild did: at its end every user is one of written, unchanged and ahead."""

    offsets_to_read: int = 0  # in all readings: a log that had other partition counts is read once for each
    offsets_read: int = 0
    records: int = 0
    interactions: int = 0
    dead_letters: int = 0
    users: int = 0
    written: int = 0
    unchanged: int = 0
    ahead: int = 0
    stray_users: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)

    @property
    def judged(self) -> int:
        """How many users are done with."""
        return self.written + self.unchanged + self.ahead

    def count_written(self, verdict: Verdict) -> None:
        """Count a user whose row was written, and why at first."""
        self.written += 1
        self.verdicts[verdict.value] = self.verdicts.get(verdict.value, 0) + 1

    def add(self, other: "RebuildCounts") -> None:
        """Count what `other` counted."""
        for name in self.__slots__:
            if name != "verdicts":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        for verdict, count in other.verdicts.items():
            self.verdicts[verdict] = self.verdicts.get(verdict, 0) + count


class RowStore(Protocol):
    """What a rebuild needs of the store."""

    async def read(self, user_ids: Sequence[str]) -> list[bytes | None]:
        """Return the bytes stored for each user."""
        ...

    async def replace(self, replacements: Sequence[Replacement]) -> list[bool]:
        """Write each row whose stored bytes are still those that were read."""
        ...

    async def rebuilt(self, offsets: Mapping[int, int], *, mended: bool) -> None:
        """Bring partitions to at least these offsets; `mended`: make workers drop what they cache."""
        ...


class Log(Protocol):
    """The partitions of `interactions` that are read, each from its start."""

    @property
    def read_to(self) -> Mapping[int, int]:
        """Per partition, the offset after the last record that was yielded."""
        ...

    @property
    def total(self) -> int:
        """How many offsets lie before the ends."""
        ...

    @property
    def fixed(self) -> Collection[int]:
        """The partitions whose end was set by hand: a stored row that is ahead of it may well be right."""
        ...

    def batches(self) -> AsyncIterator[Sequence[Record]]:
        """Yield what is left up to the ends, in offset order inside each partition."""
        ...

    async def extend(self) -> None:
        """Move the ends to where the log ends by now; those that were set by hand stay."""
        ...


class Fold:
    """Rows folded from the log, at most `max_users` of them in memory. Use from one thread at a time."""

    def __init__(
        self,
        serving: Serving,
        codec: RowCodec,
        *,
        epoch: int,
        limits: Limits,
        future_tolerance_ms: int,
        max_users: int,
        is_home: Callable[[str, int], bool],
    ) -> None:
        """Start with no users; `is_home(user, partition)` says where the contract puts a user."""
        self.counts = RebuildCounts()
        self._serving, self._codec = serving, codec
        self._epoch, self._limits, self._future_tolerance_ms = epoch, limits, future_tolerance_ms
        self._max_users = max_users
        self._is_home = is_home
        self._rows: dict[str, UserRow] = {}
        self._spill = RowSpill()

    def close(self) -> None:
        """Remove what was put aside on disk."""
        self._spill.close()

    def feed(
        self, records: Sequence[Record], only: Collection[str] | None = None, *, partition_count: int | None = None
    ) -> None:
        """Fold records, in offset order inside each partition.

        `only`: of these users, and leave the others alone. `partition_count`: what lies where the contract put its user
        when the log had so many, and leave the rest for later.
        """
        if only is not None:
            keys = {user_id.encode() for user_id in only}
            records = [record for record in records if record.key in keys]
        interactions, dead_letters = decode_interactions(records, epoch=self._epoch, limits=self._limits)
        if partition_count is not None:
            interactions = [
                one for one in interactions if home_partition(one.user_id, partition_count) == one.fence.partition
            ]
            records, dead_letters = [], []  # counted when all of them are folded
        partitions = {interaction.user_id: interaction.fence.partition for interaction in interactions}
        self._recall(partitions)
        advanced = advance(
            self._rows,
            interactions,
            model=self._serving.model,
            vocabulary=self._serving.arena,
            future_tolerance_ms=self._future_tolerance_ms,
        )
        for update in advanced.updates:
            del self._rows[update.user_id]  # behind the others: what is longest untouched is put aside first
            self._rows[update.user_id] = update.row
        self.counts.records += len(records)
        self.counts.interactions += advanced.counts.applied + advanced.counts.forgotten
        self.counts.dead_letters += len(dead_letters)
        if len(self._rows) > self._max_users:
            self._put_aside()

    def _recall(self, partitions: Mapping[str, int]) -> None:
        missing = [user_id for user_id in partitions if user_id not in self._rows]
        for user_id, data in self._spill.take(missing).items():
            row = self._codec.unpack(data)
            if row is not None:
                self._rows[user_id] = row
        for user_id in missing:
            if user_id not in self._rows:
                self._rows[user_id] = self._codec.cold()
                self.counts.users += 1
                self.counts.stray_users += not self._is_home(user_id, partitions[user_id])

    def _put_aside(self) -> None:
        oldest = list(islice(self._rows, len(self._rows) - self._max_users // 2))
        self._spill.put((user_id, self._codec.pack(self._rows.pop(user_id))) for user_id in oldest)

    def rows(self, only: Collection[str] | None = None) -> Iterable[tuple[str, bytes]]:
        """Yield user and row bytes of every user, or of these."""
        for user_id, row in self._rows.items():
            if only is None or user_id in only:
                yield user_id, self._codec.pack(row)
        for user_id, data in self._spill.items():
            if only is None or user_id in only:
                yield user_id, data


async def rebuild(
    log: Log,
    fold: Fold,
    store: RowStore,
    *,
    user_id: str | None = None,
    in_order: bool,
    report: Callable[[RebuildCounts], None],
) -> None:
    """Fold the log and bring the stored rows, and the progress beside them, to what it says.

    `user_id`: his row alone, and no progress. `in_order`: the log gives one partition after the other; if not, users
    who are not where the contract puts them are counted, and nothing is written.

    Raises:
        StoreUnavailableError: Redis is away; what was written so far is right.
        ModelError: the model cannot advance; nothing was written.
    """
    only = None if user_id is None else {user_id}
    await _read(log, fold, only, report)
    if fold.counts.stray_users and not in_order:
        return
    doubtful = await _compare(fold, store, log, only, report, seen={})
    for _ in range(ROUNDS):
        if not doubtful:
            break
        total = log.total
        await log.extend()  # after their bytes were read: what is ahead of this end, and the same, is wrong
        fold.counts.offsets_to_read += log.total - total
        await _read(log, fold, only, report)
        doubtful = await _compare(fold, store, log, set(doubtful), report, seen=doubtful)
    fold.counts.ahead += sum(not doubt.written for doubt in doubtful.values())
    if only is None:
        offsets = {partition: offset - 1 for partition, offset in log.read_to.items() if offset}
        await store.rebuilt(offsets, mended=False)
    report(fold.counts)


async def fold_layout(
    log: Log, fold: Fold, partition_count: int, *, user_id: str | None, report: Callable[[RebuildCounts], None]
) -> None:
    """Fold what was written while the log had fewer partitions: before what its users did where they moved to."""
    only = None if user_id is None else {user_id}
    await _read(log, fold, only, report, partition_count=partition_count)


async def _read(
    log: Log,
    fold: Fold,
    only: Collection[str] | None,
    report: Callable[[RebuildCounts], None],
    *,
    partition_count: int | None = None,
) -> None:
    """Fold in a thread while the next records are fetched: at most two batches are in memory."""
    feed = partial(fold.feed, only=only, partition_count=partition_count)
    folding: asyncio.Future[None] | None = None
    offsets_before = fold.counts.offsets_read - sum(log.read_to.values())
    async for records in log.batches():
        if folding is not None:
            await folding
        folding = asyncio.ensure_future(asyncio.to_thread(feed, records))
        fold.counts.offsets_read = offsets_before + sum(log.read_to.values())
        report(fold.counts)
    if folding is not None:
        await folding
    fold.counts.offsets_read = offsets_before + sum(log.read_to.values())
    report(fold.counts)


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A user to be judged again: the bytes that are stored for him, and whether he counts as written."""

    stored: bytes | None
    written: bool


_NO_DOUBT = _Doubt(None, written=False)


async def _compare(
    fold: Fold,
    store: RowStore,
    log: Log,
    only: Collection[str] | None,
    report: Callable[[RebuildCounts], None],
    seen: Mapping[str, _Doubt],
) -> dict[str, _Doubt]:
    """Write what differs, and count each user once; return the users to be judged again.

    Those are rows ahead of what was read, and mended ones: a worker may write again from what it had cached. A row
    that is still ahead, and was so before the end of the log was asked for (`seen`), claims what never was.
    """
    doubtful: dict[str, _Doubt] = {}
    mended = False
    rows = iter(fold.rows(only))
    while chunk := list(islice(rows, ROWS_PER_TRIP)):
        stored = await store.read([user_id for user_id, _ in chunk])
        replacements: list[tuple[Verdict, Replacement]] = []
        for (user_id, data), found in zip(chunk, stored, strict=True):
            verdict = judge(found, data, log.read_to)
            counted = seen.get(user_id, _NO_DOUBT).written
            if verdict is Verdict.AHEAD and _is_ahead_of(log.fixed, found):
                fold.counts.ahead += not counted
            elif verdict is Verdict.AHEAD and (user_id not in seen or seen[user_id].stored != found):
                doubtful[user_id] = _Doubt(found, counted)
            elif verdict is Verdict.UNCHANGED:
                fold.counts.unchanged += not counted
            else:
                replacements.append((verdict, Replacement(user_id, found, data)))
        written = await store.replace([one for _, one in replacements])
        for (verdict, one), ok in zip(replacements, written, strict=True):
            counted = seen.get(one.user_id, _NO_DOUBT).written
            if ok and not counted:
                fold.counts.count_written(verdict)
            if not ok or verdict in (Verdict.WRONG, Verdict.AHEAD):
                doubtful[one.user_id] = _Doubt(one.data if ok else None, counted or ok)
            mended = mended or (ok and verdict in (Verdict.WRONG, Verdict.AHEAD))
        report(fold.counts)
    if mended:
        await store.rebuilt({}, mended=True)
    return doubtful
