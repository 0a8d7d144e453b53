"""The two agents: they feed micro-batches to the pipeline, publish what it answers, and settle what is safe.

Nothing escapes an agent: a bad record is a dead letter, a record that hits a bug is isolated and becomes one
too, and what may pass (Redis, broker, model) is tried again with its input unsettled.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import chain

from faust.types import StreamT

from schemas.dead_letter import DeadLetter, Header
from schemas.limits import Limits
from schemas.records import SlateModel
from schemas.topics import TRACE_HEADERS
from stream_app import failpoints
from stream_app.errors import (
    ContestedRowsError,
    EpochError,
    StoreBehindError,
    StoreUnavailableError,
    TransientError,
)
from stream_app.pipeline import (
    MODEL_NONFINITE,
    Answer,
    Applied,
    Deadlines,
    ListRequest,
    Ranked,
    Ranker,
    apply_interactions,
    decode_lists,
    refused,
    without_explanations,
)
from stream_app.ports import (
    AppliedOffsets,
    Clock,
    InService,
    LogCheck,
    OutputRecord,
    Publisher,
    Record,
    RowsAtHand,
    RowSource,
    UserStore,
    any_log_is_ours,
    no_rows_at_hand,
    reached,
)
from stream_app.slate import COLD_ITEMS, COLD_USER, NONFINITE_SCORE
from stream_app.state import FoldCounts, Progress
from stream_app.telemetry import Telemetry
from stream_app.transport import FetchedBatch, micro_batches

logger = logging.getLogger(__name__)

INTERNAL_ERROR = "internal_error"
OUTPUT_TOO_LARGE = "output_too_large"
RETRY_FIRST_S = 0.05
RETRY_MOST_S = 2.0
ATTEMPTS = 5
OUTSTANDING_PUBLISHES = 8
LOOK_AGAIN_S = 1.0
STAGES = ("queue", "state", "score", "total")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentContext:
    """What both agents share.

    `rewind(partition, offset)` reads interactions again from after `offset`; `fail` stops the worker with its
    input unsettled.
    """

    in_service: InService
    store: UserStore
    publisher: Publisher
    applied: AppliedOffsets
    clock: Clock
    telemetry: Telemetry
    limits: Limits
    epoch: int
    future_tolerance_ms: int
    deadlines: Deadlines
    reranked_topic: str
    dead_letter_topics: Mapping[str, str]
    max_output_bytes: int
    rewind: Callable[[int, int], None]
    fail: Callable[[Exception], None]
    list_rows: RowSource | None = None  # what lists load from; None: the store
    at_hand: RowsAtHand = no_rows_at_hand
    is_log_ours: LogCheck = any_log_is_ours
    topic_bytes: Mapping[str, int] = field(default_factory=dict)  # what a topic takes, where it takes less

    def most_bytes(self, topic: str) -> int:
        """Return the bytes of the largest record that can be produced to a topic."""
        return min(self.max_output_bytes, self.topic_bytes.get(topic, self.max_output_bytes))


class Agent:
    """What both agents do alike: take micro-batches until asked to stop, never let an exception out."""

    def __init__(self, context: AgentContext, *, max_records: int) -> None:
        """Take at most `max_records` at once, unless one fetched batch is larger."""
        self._context = context
        self._max_records = max_records
        self._stop = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def stop(self) -> None:
        """Finish the micro-batch in hand and take no more."""
        self._stop.set()

    async def drained(self) -> None:
        """Return when nothing is in hand."""
        await self._idle.wait()

    async def run(self, stream: StreamT[FetchedBatch]) -> None:
        """Process the stream until asked to stop."""
        async for batches in micro_batches(stream, max_records=self._max_records, should_stop=self._stop.is_set):
            with self._busy(batches):
                try:
                    await self._process(batches)
                except Exception as error:  # noqa: BLE001 - the one place: the worker stops, nothing is acked
                    self._context.fail(error)
                    self.stop()  # what comes next must not be applied before what failed

    async def _process(self, batches: Sequence[FetchedBatch]) -> None:
        raise NotImplementedError

    @contextmanager
    def _busy(self, batches: Sequence[FetchedBatch]) -> Iterator[None]:
        size = sum(len(batch.records) for batch in batches)
        self._context.telemetry.batch_size.labels(batches[0].topic).observe(size)
        self._idle.clear()
        try:
            yield
        finally:
            self._idle.set()

    async def _pause(self, seconds: float) -> None:
        """Sleep, but no longer than until somebody asks to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return

    async def _publish_dead_letters(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Publish and wait: a dead letter is an outcome, so it must be safe before its input is settled."""
        if not dead_letters:
            return
        context = self._context
        topics = [context.dead_letter_topics[letter.topic] for letter in dead_letters]
        cut = [letter.within(context.most_bytes(topic)) for topic, letter in zip(topics, dead_letters, strict=True)]
        records = [
            OutputRecord(topic, letter.key, letter.value, letter.record_headers())
            for topic, letter in zip(topics, cut, strict=True)
        ]
        await (await self._context.publisher.send(records))
        for letter in dead_letters:
            self._context.telemetry.dead_letters.labels(letter.topic, letter.code).inc()


def _tell_of_a_bug(error: Exception, records: int) -> None:
    """Leave a trace of a bug that may not come again when the records are tried alone."""
    logger.warning("event=bug records=%s are tried again, fewer at a time", records, exc_info=error)


class InteractionsAgent(Agent):
    """decode -> load -> advance -> save, then settle. Interactions are never shed: they wait for Redis."""

    retrying = False  # True while Redis or the model made it wait: its partitions stand still for a reason

    async def _process(self, batches: Sequence[FetchedBatch]) -> None:
        if not await self._is_ours([batch for batch in batches if not batch.dropped]):
            return  # asked to stop before it was known: all of it comes again
        current = [batch for batch in batches if not batch.dropped]
        while current:
            try:
                applied = await self._apply(list(chain.from_iterable(batch.records for batch in current)))
            except StoreBehindError as error:
                self.retrying = False
                self._context.rewind(error.partition, error.applied_offset)
                # The other partitions are not read again: what is in hand of them is all there will be.
                current = [batch for batch in current if batch.partition != error.partition and not batch.dropped]
            else:
                if applied is not None:  # None: asked to stop while Redis was away, all of it comes again
                    await self._finish(current, applied)
                return

    async def _is_ours(self, batches: Sequence[FetchedBatch]) -> bool:
        """Wait until the log is known to be ours; offsets that begin again below what is applied make it doubtful."""
        offsets = self._context.applied.offsets
        doubtful = any(batch.records[0].offset <= offsets.get(batch.partition, -1) for batch in batches)
        while not await self._context.is_log_ours(doubtful):
            self.retrying = True
            await self._pause(RETRY_FIRST_S)
            if self._stop.is_set():
                return False
        self.retrying = False
        return True

    async def _finish(self, batches: Sequence[FetchedBatch], applied: Applied) -> None:
        """Publish the dead letters of applied batches, count, settle."""
        offsets = self._context.applied
        await self._publish_dead_letters(offsets.unfinished(applied.dead_letters))
        for count in fields(applied.counts):
            self._context.telemetry.events.labels(count.name).inc(getattr(applied.counts, count.name))
        now_ms = self._context.clock.now_ms()
        for batch in batches:
            self._context.telemetry.freshness.observe(max(0.0, now_ms - batch.records[0].timestamp) / 1000.0)
            offsets.finish(batch.partition, batch.records[-1].offset)
            batch.settle(len(batch.records))

    async def _apply(self, records: Sequence[Record], *, tried: bool = False) -> Applied | None:
        """Apply the records; isolate one that hits a bug, by halving, until it has hit one twice and stands alone."""
        try:
            return await self._apply_with_retries(records)
        except TransientError:
            raise
        except Exception as error:
            if len(records) == 1 and tried:
                logger.exception("event=internal_error topic=%s offset=%s", records[0].topic, records[0].offset)
                return await self._skip(records[0], error)
            if not tried:
                _tell_of_a_bug(error, len(records))
        if len(records) == 1:
            return await self._apply(records, tried=True)
        middle = len(records) // 2
        first = await self._apply(records[:middle], tried=True)
        second = await self._apply(records[middle:], tried=True)
        if first is None or second is None:
            return None
        first.counts.add(second.counts)
        return Applied(counts=first.counts, dead_letters=first.dead_letters + second.dead_letters)

    async def _skip(self, record: Record, error: Exception) -> Applied | None:
        """Go on past a record that hit a bug: the store must know that no hole is there."""

        async def skip(progress: Sequence[Progress]) -> Applied:
            await self._context.store.save([], progress)
            return Applied(counts=FoldCounts(), dead_letters=[internal_error(record, error)])

        return await self._with_retries([record], skip)

    async def _apply_with_retries(self, records: Sequence[Record]) -> Applied | None:
        context = self._context

        async def apply(progress: Sequence[Progress]) -> Applied:
            failpoints.reach("before_save")
            applied = await apply_interactions(
                records,
                serving=context.in_service.serving,
                store=context.store,
                epoch=context.epoch,
                limits=context.limits,
                future_tolerance_ms=context.future_tolerance_ms,
                progress=progress,
            )
            failpoints.reach("after_save")
            return applied

        return await self._with_retries(records, apply)

    async def _with_retries(
        self, records: Sequence[Record], attempt: Callable[[Sequence[Progress]], Awaitable[Applied]]
    ) -> Applied | None:
        """Attempt until it is done, or until asked to stop (None); then take note of how far the records lead."""
        context, pause_s, attempts, failures = self._context, RETRY_FIRST_S, 0, 0
        progress = context.applied.progress(records)
        while not self._stop.is_set():
            try:
                applied = await attempt(progress)
            except (StoreBehindError, EpochError):
                raise
            except TransientError as error:
                attempts += 1
                # For Redis they wait, and for others who write the same users: of those somebody always comes further.
                failures += not isinstance(error, StoreUnavailableError | ContestedRowsError)
                if failures >= ATTEMPTS:
                    raise
                self.retrying = not isinstance(error, ContestedRowsError)  # who never comes further stands still
                context.telemetry.retries.labels("interactions").inc()
                logger.warning("event=retry attempt=%s records=%s %s", attempts, len(records), error)
            else:
                self.retrying = False
                for step in progress:
                    context.applied.advance(step.partition, step.offset)
                return applied
            await self._pause(pause_s)
            pause_s = min(2.0 * pause_s, RETRY_MOST_S)
        return None


class ListsAgent(Agent):
    """decode -> ... -> encode -> publish, then settle. Lists that wait for their `after` are parked meanwhile."""

    def __init__(self, context: AgentContext, *, max_records: int) -> None:
        """Score at most `max_records` lists in one forward pass."""
        super().__init__(context, max_records=max_records)
        self._last_ranker = self._new_ranker()
        telemetry = context.telemetry
        self._queue, self._state, self._score, self._total = map(telemetry.duration.labels, STAGES)
        self._counters = {
            COLD_USER: telemetry.cold_users,
            COLD_ITEMS: telemetry.cold_items,
            NONFINITE_SCORE: telemetry.nonfinite,
            MODEL_NONFINITE: telemetry.nonfinite,
        }
        self._parked: list[ListRequest] = []
        self._parked_some = asyncio.Event()
        self._none_unparked = asyncio.Event()
        self._none_unparked.set()
        self._publishes: set[asyncio.Task[None]] = set()
        self._free_publishes = asyncio.Semaphore(OUTSTANDING_PUBLISHES)

    def _new_ranker(self) -> Ranker:
        context = self._context
        return Ranker(
            serving=context.in_service.serving,
            store=context.list_rows or context.store,
            applied=context.applied,
            clock=context.clock,
            at_hand=context.at_hand,
        )

    def _ranker(self) -> Ranker:
        """Return the ranker of the model in service; a micro-batch under way keeps its own."""
        if self._last_ranker.serving is not self._context.in_service.serving:
            self._last_ranker = self._new_ranker()
        return self._last_ranker

    def parked_partitions(self) -> set[tuple[str, int]]:
        """Return the topic and partition of every list that waits for its `after`."""
        return {(request.record.topic, request.record.partition) for request in self._parked}

    async def drained(self) -> None:
        """Return when nothing is in hand and every answer is acknowledged; parked lists do not count."""
        await super().drained()
        await self._none_unparked.wait()
        while self._publishes:
            await asyncio.wait(self._publishes)

    def drop_parked(self) -> None:
        """Forget parked lists: after a rebalance they are delivered again, here or elsewhere."""
        self._parked.clear()

    async def _process(self, batches: Sequence[FetchedBatch]) -> None:
        context, requests = self._context, []
        for batch in (batch for batch in batches if not batch.dropped):  # what was revoked is answered elsewhere
            decoded, dead_letters = decode_lists(
                batch.records,
                batch,
                limits=context.limits,
                deadlines=context.deadlines,
                backlog_at_ms=context.clock.now_ms() if len(batch.records) > self._max_records else None,
            )
            requests += decoded
            await self._publish_dead_letters(dead_letters)
            batch.settle(len(dead_letters))
        for some in self._micro_batches(requests):
            await self._rank(some)

    def _micro_batches(self, requests: Iterable[ListRequest]) -> Iterator[list[ListRequest]]:
        """Yield lists that fill a forward pass, and with them the late ones in between, which cost none.

        Cut by number alone, a backlog that is mostly late would leave every pass nearly empty.
        """
        some: list[ListRequest] = []
        due, now_ms = 0, self._context.clock.now_ms()
        for request in requests:
            some.append(request)
            due += request.deadline_ms > now_ms
            if due >= self._max_records:
                yield some
                some, due, now_ms = [], 0, self._context.clock.now_ms()
        if some:
            yield some

    async def _rank(self, requests: Sequence[ListRequest], *, tried: bool = False) -> None:
        """Rank and publish, part by part; isolate a list that hits a bug by ranking each alone, once more."""
        left = {id(request): request for request in requests}
        parts = self._ranker().rank(requests)
        while True:
            try:
                ranked = await anext(parts, None)
            except Exception as error:  # noqa: BLE001 - isolated below, and logged there
                if tried and len(left) == 1:
                    (request,) = left.values()
                    await self._give_up(request, error)
                else:
                    _tell_of_a_bug(error, len(left))
                    for request in left.values():
                        await self._rank([request], tried=True)
                return
            if ranked is None:
                return
            for request in (*ranked.waiting, *(answer.to for answer in ranked.answers)):
                left.pop(id(request))
            self._park(ranked)
            await self._publish(ranked.answers)

    async def _give_up(self, request: ListRequest, error: Exception) -> None:
        record = request.record
        logger.error("event=internal_error topic=%s offset=%s", record.topic, record.offset, exc_info=error)
        await self._publish_dead_letters([internal_error(record, error)])
        request.batch.settle()

    def _park(self, ranked: Ranked) -> None:
        if ranked.waiting:
            self._parked += ranked.waiting
            self._parked_some.set()
            self._context.applied.changed.set()  # what they wait for may have come while their rows were read

    async def _publish(self, answers: Sequence[Answer]) -> None:
        """Enqueue the answers in order; settle their lists when the broker has them all."""
        fitting = await self._that_fit([answer for answer in answers if not answer.to.batch.dropped])
        if not fitting:
            return
        failpoints.reach("before_publish")
        await self._free_publishes.acquire()
        acknowledged = await self._context.publisher.send([output for _, output in fitting])
        produced = [answer for answer, _ in fitting]
        task = asyncio.create_task(self._settle(acknowledged, produced))
        self._publishes.add(task)
        task.add_done_callback(self._publishes.discard)

    async def _that_fit(self, answers: Sequence[Answer]) -> list[tuple[Answer, OutputRecord]]:
        """Return the answers that may be produced, and as what: without explanations, where they make one too large.

        What is too large even so is a dead letter: the broker would refuse it with its neighbours, again and again.
        """
        limit_bytes, fitting = self._context.most_bytes(self._context.reranked_topic), []
        for answer in answers:
            output = self._output(answer)
            if output.most_bytes() <= limit_bytes:
                fitting.append((answer, output))
                continue
            shorter = without_explanations(answer)
            output = self._output(shorter)
            if (size_bytes := output.most_bytes()) <= limit_bytes:
                fitting.append((shorter, output))
                continue
            await self._publish_dead_letters([output_too_large(answer.to.record, size_bytes, limit_bytes)])
            answer.to.batch.settle()
        return fitting

    async def _settle(self, acknowledged: Awaitable[None], answers: Sequence[Answer]) -> None:
        try:
            await acknowledged
            failpoints.reach("after_publish")
        except Exception as error:  # noqa: BLE001 - as in run: the worker stops, nothing is acked
            self._context.fail(error)
            return
        finally:
            self._free_publishes.release()
        for batch, count in Counter(answer.to.batch for answer in answers).items():
            batch.settle(count)
        self._count(answers)

    def _count(self, answers: Sequence[Answer]) -> None:
        telemetry = self._context.telemetry
        for answer in answers:
            slate, timing_ms = answer.slate, answer.slate.timing_ms
            if slate.outcome == "shed":
                continue
            self._queue.observe(timing_ms.queue / 1000.0)
            self._state.observe(timing_ms.state / 1000.0)
            self._score.observe(timing_ms.score / 1000.0)
            self._total.observe(timing_ms.total / 1000.0)
            if slate.outcome == "ranked":
                telemetry.candidates.observe(len(slate.item_ids))
                if slate.state.events:
                    telemetry.staleness.observe(slate.state.age_ms / 1000.0)
        outcomes = Counter((answer.slate.outcome, ",".join(answer.slate.reasons)) for answer in answers)
        for (outcome, reasons), count in outcomes.items():
            telemetry.requests.labels(outcome, reasons).inc(count)
        for reason, count in Counter(reason for answer in answers for reason in answer.slate.reasons).items():
            if reason in self._counters:
                self._counters[reason].inc(count)

    def _output(self, answer: Answer) -> OutputRecord:
        record = answer.to.record
        headers = _headers_of(answer.slate.outcome, answer.slate.model)
        if record.headers:
            headers = [*_copied(record.headers), *headers]
        return OutputRecord(self._context.reranked_topic, record.key, answer.value, headers)

    async def watch_parked(self) -> None:
        """Rank parked lists as soon as the interaction they wait for is applied; at their deadline call them stale.

        Runs beside `run`, until asked to stop: what is parked then comes again.
        """
        applied = self._context.applied
        while not self._stop.is_set():
            await self._parked_some.wait()
            soonest_ms = min((request.deadline_ms for request in self._parked), default=0.0)
            wait_s = max(0.0, soonest_ms - self._context.clock.now_ms()) / 1000.0
            try:
                async with asyncio.timeout(min(wait_s, LOOK_AGAIN_S)):  # the wall clock may be set meanwhile
                    await applied.changed.wait()
            except TimeoutError:
                pass
            applied.changed.clear()
            if self._stop.is_set():
                return
            self._none_unparked.clear()
            try:
                await self._unpark(self._context.clock.now_ms())
            except Exception as error:  # noqa: BLE001 - as in run: the worker stops, nothing is acked
                self._context.fail(error)
                return
            finally:
                self._none_unparked.set()

    async def _unpark(self, now_ms: float) -> None:
        ready, late, waiting = [], [], []
        for request in self._parked:
            after = request.request.after
            if now_ms >= request.deadline_ms:
                late.append(request)
            elif after is None or reached(after, None, self._context.applied.offsets):
                ready.append(request)
            else:
                waiting.append(request)
        self._parked = waiting
        if not waiting:
            self._parked_some.clear()
        for start in range(0, len(ready), self._max_records):
            await self._rank(ready[start : start + self._max_records])
        await self._publish([self._ranker().stale(request) for request in late])


def internal_error(record: Record, error: Exception) -> DeadLetter:
    """Return the dead letter of a record that hit a bug; the traceback goes to the log, not to the topic."""
    return refused(
        record,
        code=INTERNAL_ERROR,
        stage="PROCESS",
        error_class=type(error).__name__,
        message=f"{type(error).__name__} while processing; sent to dead letters; report it with the record",
    )


def output_too_large(record: Record, size_bytes: int, limit_bytes: int) -> DeadLetter:
    """Return the dead letter of a list whose slate no topic takes."""
    return refused(
        record,
        code=OUTPUT_TOO_LARGE,
        stage="PROCESS",
        error_class="OutputTooLarge",
        message=f"slate of {size_bytes} bytes: at most {limit_bytes} may be produced; sent to dead letters; ask for "
        "fewer items (k) or shorter ids, or raise max.message.bytes of reranked and RERANK_KAFKA__MAX_REQUEST_BYTES",
    )


@lru_cache(maxsize=16)
def _headers_of(outcome: str, model: SlateModel) -> Sequence[Header]:
    return ("rerank-outcome", outcome.encode()), ("rerank-model", f"{model.name}:{model.version}".encode())


def _copied(headers: Iterable[Header]) -> Iterator[Header]:
    return (header for header in headers if header[0] in TRACE_HEADERS)
