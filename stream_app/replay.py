"""Replay: the worker's own path over a recorded log. Same log, same artefact: same slates, byte for byte.

The log is read as if its records were processed one by one, in file order. There are no deadlines. A list whose
`after` is not reached waits for it and is answered at that very record; what still waits at the end of the log is
`fallback: stale`. A record at a position that was read before (redelivery) is skipped.

Records are batched for speed, never across anything that matters: an interaction of a user who has a list pending,
or one that a waiting list names, ends the batch. A list is scored alone, so its scores do not depend on
neighbours even where a model's kernels do. Slates come out in the order of their candidate records in the log.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from schemas.dead_letter import DeadLetter
from schemas.limits import Limits
from schemas.topics import CO_PARTITIONED
from stream_app.errors import SettingsError
from stream_app.pipeline import Answer, Deadlines, ListRequest, Ranker, apply_interactions, decode_lists
from stream_app.ports import AppliedOffsets, Record, Serving
from stream_app.scorer import Artefact
from stream_app.state import FoldCounts
from stream_app.store import MemoryStore, RowCodec
from stream_app.telemetry import Telemetry

INTERACTIONS, CANDIDATES = CO_PARTITIONED
MICRO_BATCH_RECORDS = 1_000
NO_DEADLINE_MS = float("inf")
NO_DEADLINES = Deadlines(default_ms=NO_DEADLINE_MS, most_ms=NO_DEADLINE_MS)
EPOCH = 1

SlateSink = Callable[[int, Answer], None]
"""Takes a slate with its number: slates are numbered in the order of their candidate records in the log."""


class TopicRoles:
    """Which topic of a log is `interactions`, which is `candidates`."""

    def __init__(self, prefix: str) -> None:
        """Accept the plain names and the prefixed ones; without a prefix, any prefix."""
        self._prefix = prefix
        self._role_of: dict[str, str | None] = {}

    def role(self, topic: str) -> str | None:
        """Return the plain name of the topic, None for a topic that a replay does not read.

        Raises:
            SettingsError: two topics of the log play one role, so their offsets would be mixed up.
        """
        if topic not in self._role_of:
            role = self._recognise(topic)
            twin = next((name for name, other in self._role_of.items() if role and other == role), None)
            if twin is not None:
                raise SettingsError(
                    f"topics {twin!r} and {topic!r}: both hold {role}; the replay ends here; "
                    "replay one of them: set RERANK_TOPIC_PREFIX, or remove the other's lines"
                )
            self._role_of[topic] = role
        return self._role_of[topic]

    def _recognise(self, topic: str) -> str | None:
        for role in CO_PARTITIONED:
            if topic in {role, self._prefix + role} or (not self._prefix and topic.endswith(role)):
                return role
        return None


@dataclass(slots=True)
class ReplayCounts:
    """What became of the records of a log."""

    records: int = 0
    redelivered: int = 0
    other_topics: int = 0
    interactions: FoldCounts = field(default_factory=FoldCounts)
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    dead_letters: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where a replay stands between two records: all that the rest of the log depends on."""

    rows: Mapping[str, bytes]
    read_offsets: Mapping[tuple[str, int], int]
    waiting: list[tuple[int, ListRequest]]
    lists: int


@dataclass(slots=True)
class _LogClock:
    """Stands at the Kafka time of the list in hand, so that timings are zero and nothing is late."""

    time_ms: float = 0.0

    def now_ms(self) -> float:
        return self.time_ms

    steady_ms = now_ms


class _NobodyWaits:
    """The batch of a list that nobody acks."""

    dropped = False

    def settle(self, count: int = 1) -> None:
        """Do nothing."""


class Replay:
    """The path over the records of a log. Feed it, then `finish`; `counts` says what happened."""

    def __init__(
        self,
        serving: Serving,
        codec: RowCodec,
        sink: SlateSink,
        *,
        prefix: str = "",
        limits: Limits,
        future_tolerance_ms: int,
        micro_batch_records: int = MICRO_BATCH_RECORDS,
        resume: Checkpoint | None = None,
    ) -> None:
        """Start with no users, or at a checkpoint. The micro-batch changes the speed and nothing else."""
        self.counts = ReplayCounts()
        self._serving, self._sink = serving, sink
        self._roles = TopicRoles(prefix)
        self._limits, self._future_tolerance_ms = limits, future_tolerance_ms
        self._micro_batch_records = micro_batch_records
        self._store, self._applied, self._clock = MemoryStore(codec), AppliedOffsets(), _LogClock()
        self._ranker = Ranker(serving=serving, store=self._store, applied=self._applied, clock=self._clock)
        self._interactions: list[Record] = []
        self._lists: list[Record] = []
        self._listed_keys: set[bytes | None] = set()
        self._read_offsets: dict[tuple[str, int], int] = {}
        self._waiting: dict[int, list[tuple[int, int, ListRequest]]] = {}  # partition: heap of (offset, number, list)
        self._numbered = 0
        if resume is not None:
            self._resume(resume)

    async def feed(self, records: Iterable[Record]) -> None:
        """Process records in the order given."""
        for record in records:
            self.counts.records += 1
            role = self._roles.role(record.topic)
            if role is None:
                self.counts.other_topics += 1
                continue
            place = (role, record.partition)
            if record.offset <= self._read_offsets.get(place, -1):
                self.counts.redelivered += 1
                continue
            self._read_offsets[place] = record.offset
            if role == INTERACTIONS:
                await self._take_interaction(record)
            else:
                await self._take_list(record)

    async def finish(self) -> None:
        """Process what is pending and call stale what still waits."""
        await self._flush()
        for number, request in self._all_waiting():
            self._clock.time_ms = request.record.timestamp
            self._answer(number, self._ranker.stale(request))
        self._waiting.clear()

    async def checkpoint(self) -> Checkpoint:
        """Return the place after the last record that was fed."""
        await self._flush()
        return Checkpoint(
            rows=self._store.dump(),
            read_offsets=dict(self._read_offsets),
            waiting=self._all_waiting(),
            lists=self._numbered,
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        for user_id, data in checkpoint.rows.items():
            self._store.put_bytes(user_id, data)
        self._read_offsets.update(checkpoint.read_offsets)
        for (role, partition), offset in checkpoint.read_offsets.items():
            if role == INTERACTIONS:
                self._applied.advance(partition, offset)
        for number, request in checkpoint.waiting:
            self._wait(number, request)
        self._numbered = checkpoint.lists

    async def _take_interaction(self, record: Record) -> None:
        if record.key in self._listed_keys:  # that list comes first
            await self._flush()
        self._interactions.append(record)
        waiting = self._waiting.get(record.partition)
        if (waiting and record.offset >= waiting[0][0]) or len(self._interactions) >= self._micro_batch_records:
            await self._flush()

    async def _take_list(self, record: Record) -> None:
        self._lists.append(record)
        self._listed_keys.add(record.key)
        if len(self._lists) >= self._micro_batch_records:
            await self._flush()

    async def _flush(self) -> None:
        """Apply the pending interactions, then rank the pending lists, whose users have no later ones among them."""
        if self._interactions:
            await self._apply()
        if self._lists:
            await self._rank_pending()
        await self._release()

    async def _apply(self) -> None:
        records, self._interactions = self._interactions, []
        applied = await apply_interactions(
            records,
            serving=self._serving,
            store=self._store,
            epoch=EPOCH,
            limits=self._limits,
            future_tolerance_ms=self._future_tolerance_ms,
        )
        self.counts.interactions.add(applied.counts)
        self._count_dead_letters(applied.dead_letters)
        for partition, offset in {record.partition: record.offset for record in records}.items():
            self._applied.advance(partition, offset)

    async def _rank_pending(self) -> None:
        records, self._lists = self._lists, []
        self._listed_keys.clear()
        requests, dead_letters = decode_lists(records, _NobodyWaits(), limits=self._limits, deadlines=NO_DEADLINES)
        self._count_dead_letters(dead_letters)
        for request in requests:
            number, self._numbered = self._numbered, self._numbered + 1
            await self._rank(number, ListRequest(request.record, request.request, NO_DEADLINE_MS, request.batch))

    async def _rank(self, number: int, request: ListRequest) -> None:
        self._clock.time_ms = request.record.timestamp
        async for ranked in self._ranker.rank([request]):
            for answer in ranked.answers:
                self._answer(number, answer)
            for waiting in ranked.waiting:
                self._wait(number, waiting)

    def _wait(self, number: int, request: ListRequest) -> None:
        after = request.request.after
        if after is not None:
            heapq.heappush(self._waiting.setdefault(after.partition, []), (after.offset, number, request))

    async def _release(self) -> None:
        """Rank the waiting lists whose interaction is applied."""
        for partition, waiting in self._waiting.items():
            while waiting and waiting[0][0] <= self._applied.offsets.get(partition, -1):
                _, number, request = heapq.heappop(waiting)
                await self._rank(number, request)

    def _all_waiting(self) -> list[tuple[int, ListRequest]]:
        return sorted(
            ((number, request) for heap in self._waiting.values() for _, number, request in heap),
            key=lambda numbered: numbered[0],
        )

    def _answer(self, number: int, answer: Answer) -> None:
        self.counts.outcomes[answer.slate.outcome] += 1
        self.counts.reasons.update(answer.slate.reasons)
        self._sink(number, answer)

    def _count_dead_letters(self, dead_letters: Iterable[DeadLetter]) -> None:
        self.counts.dead_letters.update(letter.code for letter in dead_letters)


def replay_of(
    artefact: Artefact,
    sink: SlateSink,
    *,
    prefix: str = "",
    limits: Limits,
    future_tolerance_ms: int,
    micro_batch_records: int = MICRO_BATCH_RECORDS,
    resume: Checkpoint | None = None,
) -> Replay:
    """Return a replay with the artefact in service."""
    codec = RowCodec(state_size=artefact.manifest.dims.S, space=artefact.space, telemetry=Telemetry())
    return Replay(
        artefact.serving(),
        codec,
        sink,
        prefix=prefix,
        limits=limits,
        future_tolerance_ms=future_tolerance_ms,
        micro_batch_records=micro_batch_records,
        resume=resume,
    )
