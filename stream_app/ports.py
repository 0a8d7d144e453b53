"""What the path needs of the world, as protocols and plain records; `app` and `replay` supply the real ones."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from schemas.dead_letter import DeadLetter, Header
from schemas.records import After, SlateModel
from stream_app.features import FeatureBatch, ItemArena
from stream_app.state import FloatArray, Progress, RowUpdate, UserModel, UserRow


class Record(Protocol):
    """What the path reads of a Kafka record; aiokafka's ConsumerRecord is one."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[Header]: ...


class RowSource(Protocol):
    """Where user rows come from."""

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Return the row of each user, a cold one where there is none; raise StoreUnavailableError."""
        ...


RowsAtHand = Callable[[Sequence[str]], Mapping[str, UserRow]]


def no_rows_at_hand(user_ids: Sequence[str]) -> Mapping[str, UserRow]:
    """Return the rows that need no waiting: none."""
    return {}


LogCheck = Callable[[bool], Awaitable[bool]]
"""Tells, of what is `doubtful` or not, whether it is of the log that the epoch belongs to; False: not known now."""


async def any_log_is_ours(doubtful: bool) -> bool:
    """Tell that it is: there is only one."""
    return True


class UserStore(RowSource, Protocol):
    """Where user rows come from and go to."""

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        """Write the updates that the fence allows; return which were written.

        Raises:
            StoreUnavailableError: the store did not answer; it may have written.
            StoreBehindError: the store lost what was applied before; nothing was written.
        """
        ...


class Scorer(UserModel, Protocol):
    """A model: it moves users and scores lists."""

    def score(self, batch: FeatureBatch) -> FloatArray:
        """Return the scores (B, C); raise ModelError."""
        ...


class Clock(Protocol):
    """Processing time."""

    def now_ms(self) -> float:
        """Return wall-clock milliseconds, to compare with times of others; it may be set, ahead or back."""
        ...

    def steady_ms(self) -> float:
        """Return milliseconds since whenever, to measure how long something took; nobody sets it."""
        ...


_LONGEST_VARINT = 5
_BATCH_AND_RECORD_HEAD_BYTES = 61 + 41  # of Kafka's record format 2; a record's own head is varints


class OutputRecord(msgspec.Struct, frozen=True):
    """A record to be produced."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header]

    def most_bytes(self) -> int:
        """Return the most bytes that it takes as a batch of its own, as the broker counts them."""
        size_bytes = _BATCH_AND_RECORD_HEAD_BYTES + len(self.key or b"") + len(self.value or b"")
        for name, text in self.headers:
            size_bytes += 2 * _LONGEST_VARINT + len(name.encode()) + len(text or b"")
        return size_bytes


class Publisher(Protocol):
    """Where answers and dead letters go."""

    async def send(self, records: Sequence[OutputRecord]) -> Awaitable[None]:
        """Enqueue the records in order; what is returned ends when all are acknowledged, or raises PublishError."""
        ...


class Batch(Protocol):
    """Whoever waits for the outcome of a record."""

    @property
    def dropped(self) -> bool:
        """Whether the record is delivered again, here or elsewhere: an outcome of this delivery helps nobody."""
        ...

    def settle(self, count: int = 1) -> None:
        """Take note that the outcome of `count` records is safe."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """One model in service, and what the path must know of it."""

    model: Scorer
    arena: ItemArena
    history_size: int
    feature_names: Sequence[str]
    name: SlateModel


@dataclass(slots=True)
class InService:
    """The model in service. Owner: the model watch, which replaces `serving` whole.

    Who advances or ranks takes it once a micro-batch, so that no micro-batch is half of one model, half of another.
    """

    serving: Serving


@dataclass(slots=True)
class AppliedOffsets:
    """Per partition of `interactions`: everything up to this offset is in the user rows.

    Owner: the interactions agent advances it; the lists agent reads it.
    """

    offsets: dict[int, int] = field(default_factory=dict)
    lost_offsets: dict[int, int] = field(default_factory=dict)
    finished_offsets: dict[int, int] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def advance(self, partition: int, offset: int) -> None:
        """Take note that the partition is applied up to `offset`."""
        self.offsets[partition] = max(offset, self.offsets.get(partition, -1))
        self.changed.set()

    def finish(self, partition: int, offset: int) -> None:
        """Take note that every dead letter of the partition up to `offset` is safe; no rewind takes that back."""
        self.finished_offsets[partition] = max(offset, self.finished_offsets.get(partition, -1))

    def unfinished(self, dead_letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Return those that are not known to be safe: reading the log again makes no dead letter a second time."""
        finished = self.finished_offsets
        return [letter for letter in dead_letters if letter.offset > finished.get(letter.partition, -1)]

    def progress(self, records: Sequence[Record]) -> list[Progress]:
        """Return how far `records`, in log order, bring their partitions."""
        last = {record.partition: record.offset for record in records}
        return [Progress(partition, self.offsets.get(partition, -1), offset) for partition, offset in last.items()]

    def rewind(self, partition: int, offset: int) -> None:
        """Take note that the store lost everything after `offset`: until it is back, slates are degraded."""
        lost = max(self.offsets.get(partition, -1), self.lost_offsets.get(partition, -1))
        self.lost_offsets[partition] = lost
        self.offsets[partition] = offset

    def degraded(self, partition: int) -> bool:
        """Tell whether interactions of the partition that were applied once are being applied again."""
        return self.offsets.get(partition, -1) < self.lost_offsets.get(partition, -1)

    def still(self, known: Mapping[int, int]) -> dict[int, int]:
        """Return what of `known`, an earlier copy of the offsets, no rewind has taken back."""
        return {partition: min(offset, self.offsets.get(partition, -1)) for partition, offset in known.items()}

    def drop(self) -> None:
        """Forget everything: after a rebalance somebody else may apply."""
        self.offsets.clear()
        self.lost_offsets.clear()
        self.finished_offsets.clear()


def reached(after: After, row: UserRow | None, applied_offsets: Mapping[int, int]) -> bool:
    """Tell whether a slate from `row`, read when the interactions were so far, reflects the interaction at `after`."""
    if applied_offsets.get(after.partition, -1) >= after.offset:
        return True
    return row is not None and any(
        fence.partition == after.partition and fence.offset >= after.offset for fence in (row.fence, *row.past)
    )
