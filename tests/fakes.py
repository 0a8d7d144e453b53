"""Fakes with a known answer, in place of clock, model, Redis and broker."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field

import numpy as np

from schemas.codec import encode
from schemas.dead_letter import Header
from schemas.records import CandidateList, Interaction, SlateModel
from stream_app.errors import ModelError, PublishError, StoreUnavailableError
from stream_app.features import FeatureBatch, ItemArena
from stream_app.ports import OutputRecord, Serving, UserStore
from stream_app.state import FloatArray, IntArray, Progress, RowUpdate, UserRow
from stream_app.store import MemoryStore, RowCodec
from stream_app.telemetry import Telemetry
from stream_app.transport import FetchedBatch

STATE_SIZE = 2
SPACE = 7
RECORD_TIME_MS = 1_700_000_000_000
KINDS = ("unknown", "click", "rating")
ITEM_IDS = ("i-1", "i-2", "i-3")
# Row 0 is the cold-start vector. V = 2 = S: the fake model adds an item's vector to the halved state.
ITEM_VECTORS = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=np.float32)


@dataclass(slots=True)
class FakeClock:
    """Stands still until a test moves it."""

    time_ms: float = float(RECORD_TIME_MS)
    set_ahead_ms: float = 0.0  # by how much somebody set the wall clock

    def now_ms(self) -> float:
        return self.time_ms + self.set_ahead_ms

    def steady_ms(self) -> float:
        return self.time_ms


@dataclass(slots=True)
class HalvingModel:
    """state <- state / 2 + item vector; score = state . item vector. Exact in binary for a few steps."""

    failures: int = 0  # how many calls raise before the first that works
    scores: FloatArray | None = None  # returned in place of the dot products
    calls: int = 0

    def advance(
        self, states: FloatArray, items: FloatArray, kinds: IntArray, values: FloatArray, dt_s: FloatArray
    ) -> FloatArray:
        self._call()
        return states * np.float32(0.5) + items  # (B, S)

    def score(self, batch: FeatureBatch) -> FloatArray:
        self._call()
        if self.scores is not None:
            return self.scores
        scores: FloatArray = (batch.states[:, None, :] * batch.items).sum(axis=2)  # (B, C)
        return scores

    def _call(self) -> None:
        self.calls += 1
        if self.failures > 0:
            self.failures -= 1
            raise ModelError("fake failure; fallback")


def arena() -> ItemArena:
    """Return the three items of the fakes."""
    return ItemArena(ITEM_IDS, ITEM_VECTORS, KINDS)


def serving(model: HalvingModel | None = None) -> Serving:
    """Return a fake model in service."""
    return Serving(
        model=model or HalvingModel(),
        arena=arena(),
        history_size=0,
        feature_names=(),
        name=SlateModel(name="halving", version="1", variant="control"),
    )


def memory_store() -> MemoryStore:
    """Return an empty store for rows of the fake model."""
    return MemoryStore(RowCodec(state_size=STATE_SIZE, space=SPACE, telemetry=Telemetry()))


@dataclass(slots=True)
class FailingStore:
    """A store that is away for so many loads and saves, or that loses the reply to a save that it did."""

    store: UserStore
    failing_loads: int = 0
    failing_saves: int = 0
    lost_replies: int = 0

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        if self.failing_loads > 0:
            self.failing_loads -= 1
            raise StoreUnavailableError("fake: load; nothing was acked")
        return await self.store.load(user_ids)

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        if self.failing_saves > 0:
            self.failing_saves -= 1
            raise StoreUnavailableError("fake: save; nothing was acked")
        written = await self.store.save(updates, progress)
        if self.lost_replies > 0:
            self.lost_replies -= 1
            raise StoreUnavailableError("fake: reply lost; nothing was acked")
        return written


@dataclass(slots=True)
class HungStore:
    """A store that does not answer until `answers` is set."""

    store: UserStore
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    loads: int = 0

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        self.loads += 1
        await self.answers.wait()
        return await self.store.load(user_ids)

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        await self.answers.wait()
        return await self.store.save(updates, progress)


@dataclass(slots=True)
class RecordingPublisher:
    """Keeps what was sent; the first `failures` acknowledgements fail."""

    sent: list[OutputRecord] = field(default_factory=list)
    failures: int = 0

    async def send(self, records: Sequence[OutputRecord]) -> Awaitable[None]:
        self.sent += records
        failed = self.failures > 0
        self.failures -= failed
        return _acknowledge(failed=failed)


async def _acknowledge(*, failed: bool) -> None:
    if failed:
        raise PublishError("fake: not acknowledged")


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRecord:
    """A Kafka record."""

    topic: str
    partition: int = 0
    offset: int = 0
    timestamp: int = RECORD_TIME_MS
    key: bytes | None = b"u-1"
    value: bytes | None = b""
    headers: Sequence[Header] = ()


def record_of(
    item: Interaction | CandidateList,
    *,
    offset: int = 0,
    partition: int = 0,
    headers: Sequence[Header] = (),
    timestamp_ms: int = RECORD_TIME_MS,
) -> FakeRecord:
    """Return the Kafka record that carries an interaction or a candidate list."""
    return FakeRecord(
        topic="interactions" if isinstance(item, Interaction) else "candidates",
        partition=partition,
        offset=offset,
        timestamp=timestamp_ms,
        key=item.user_id.encode(),
        value=encode(item),
        headers=headers,
    )


@dataclass(slots=True)
class CountingBatch:
    """Counts what was settled."""

    settled: int = 0
    dropped: bool = False

    def settle(self, count: int = 1) -> None:
        self.settled += count


class FakeEvent:
    """A Faust event that carries a fetched batch."""

    def __init__(self, batch: FetchedBatch) -> None:
        self.value = batch

    def ack(self) -> None:
        """Faust's own bookkeeping; says nothing about what was done."""


class FakeStream:
    """A Faust stream fed by a test; iteration ends after `end`."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[FakeEvent | None] = asyncio.Queue()
        self._waiting = 0
        self.channel = self.queue = self

    def empty(self) -> bool:
        """Tell whether no event waits; the end is none."""
        return self._waiting == 0

    def put(self, *records: FakeRecord) -> FetchedBatch:
        """Deliver one batch of one partition."""
        batch = FetchedBatch(list(records))
        self._events.put_nowait(FakeEvent(batch))
        self._waiting += 1
        return batch

    def end(self) -> None:
        self._events.put_nowait(None)

    def noack(self) -> "FakeStream":
        return self

    async def events(self) -> AsyncIterator[FakeEvent]:
        while (event := await self._events.get()) is not None:
            self._waiting -= 1
            yield event
