"""Batched delivery for Faust: one event a (partition, poll), committed only as a contiguous, settled prefix.

Faust hands over one record at a time and acks what an agent never finished
(docs/faults.md, "What Faust loses"). This transport leans on private methods of faust-streaming 0.15.3, which
is therefore pinned; tests/functional/test_transport.py guards every one of them.
"""

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from aiokafka import ConsumerRecord
from aiokafka.consumer.fetcher import OffsetResetStrategy
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import KafkaError
from faust.exceptions import ConsumerNotStarted
from faust.serializers import codecs
from faust.transport.consumer import ensure_TP
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, Message, StreamT

from stream_app import failpoints, lenient_records
from stream_app.interactions_log import ISOLATION_LEVEL, stable_offset
from stream_app.topic_identity import topic_ids

BATCH_CODEC = "rerank-batch"

# What a partition may have delivered and unsettled before no more is fetched of it.
MOST_UNSETTLED_BATCHES = 4
MOST_UNSETTLED_BYTES = 16 * 1_048_576
FULL_POLL_S = 0.01
SEEK_AGAIN_S = 0.2
ANSWER_TIMEOUT_S = 5.0
_NO_ANSWER = (KafkaError, TimeoutError, RuntimeError, ConsumerNotStarted)


class _Identity(codecs.Codec):
    """Hand the fetched batch to the agent as it is: decoding is the agent's, one record at a time."""

    def loads(self, s: Any) -> Any:
        return s

    def dumps(self, s: Any) -> Any:
        return s


codecs.register(BATCH_CODEC, _Identity())
lenient_records.install()


class Backlog:
    """What was delivered of one partition, and how much of it is settled."""

    __slots__ = ("records", "settled", "unsettled_bytes")

    def __init__(self) -> None:
        """Start with nothing delivered."""
        self.records = 0
        self.settled = 0
        self.unsettled_bytes = 0

    @property
    def unsettled(self) -> int:
        """Return how many delivered records wait for their outcome."""
        return self.records - self.settled


class FetchedBatch:
    """Records of one partition from one poll, in offset order. Owner: the worker's event loop.

    `settle` once for each record when its outcome is safe; the batch is then done, forgets its records, and its
    offsets may be committed as soon as every earlier batch of the partition is done too.
    """

    __slots__ = (
        "_backlog",
        "_bytes",
        "_unsettled",
        "dropped",
        "next_offset",
        "partition",
        "records",
        "settled_s",
        "topic",
    )

    def __init__(self, records: list[ConsumerRecord], backlog: Backlog | None = None) -> None:
        """Hold at least one record; count them in `backlog` until they are settled."""
        self.topic: str = records[0].topic
        self.partition: int = records[0].partition
        self.records = records
        self.next_offset = int(records[-1].offset) + 1  # what a commit of this batch writes
        self.dropped = False  # True: these records are read again, an agent that has not begun leaves them alone
        self.settled_s = 0.0  # monotonic
        self._unsettled = len(records)
        self._bytes = sum(len(record.value or b"") for record in records)
        self._backlog = backlog or Backlog()
        self._backlog.records += len(records)
        self._backlog.unsettled_bytes += self._bytes

    @property
    def done(self) -> bool:
        """Tell whether every record is settled."""
        return self._unsettled <= 0

    def settle(self, count: int = 1) -> None:
        """Mark `count` more records as safe. Affects: what the consumer commits next, and whether it fetches more."""
        self._unsettled -= count
        self.settled_s = time.monotonic()
        self._backlog.settled += count
        if self.done:  # one list that waits must not keep the records of every batch behind it
            self._backlog.unsettled_bytes -= self._bytes
            self._bytes, self.records = 0, []


# Faust's services log every step they take at INFO, under the module of their class.
_faust_logger = logging.getLogger("faust.transport.batched")


class _ConsumerThread(driver.AIOKafkaConsumerThread):
    logger = _faust_logger

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        # Faust hard-codes 1500 ms, which a broker that polls its log turns into latency.
        consumer._fetch_max_wait_ms = transport.fetch_max_wait_ms
        # Faust reads committed only with its exactly-once mode, which we do not use.
        consumer._isolation_level = ISOLATION_LEVEL
        # Partition p of every topic to the same worker; Faust's own assignor leaves workers empty.
        consumer._partition_assignment_strategy = (RangePartitionAssignor,)
        return consumer

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Seek to the committed offsets, and to the start of the log where nothing was committed."""
        return cast("Mapping[TP, int]", await self.call_thread(self._seek_to_committed))

    async def _seek_to_committed(self) -> Mapping[TP, int]:
        consumer = self._ensure_consumer()
        if not consumer.assignment():
            return {}
        committed: Mapping[TP, int] = await consumer.seek_to_committed()
        # aiokafka leaves what was never committed where it stands: behind what was fetched of it and dropped.
        never = [tp for tp, offset in committed.items() if not offset and tp in consumer.assignment()]
        consumer._fetcher.request_offset_reset(never, OffsetResetStrategy.EARLIEST)
        return committed


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one assigned partition stands."""

    unsettled_records: int  # delivered, their outcome not yet safe
    waiting_records: int  # below the fetched stable offset, not yet delivered
    undecided_records: int  # from there to the high-water mark: a transaction is open, nobody may read them yet
    settled_records: int  # since the assignment
    fetched_ms: int | None  # when the broker last answered a fetch

    @property
    def lag_records(self) -> int:
        """Return how many records may be read and are yet to be settled."""
        return self.unsettled_records + self.waiting_records

    @property
    def mark(self) -> tuple[int, int | None]:
        """Return what changes whenever the partition moves: records are settled, or all are and fetches go on."""
        return self.settled_records, None if self.lag_records else self.fetched_ms


class BatchConsumer(driver.Consumer):
    """Delivers `FetchedBatch` values and commits their contiguous settled prefix."""

    logger = _faust_logger

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._delivered: dict[TP, deque[FetchedBatch]] = defaultdict(deque)
        self._settled_offset: dict[TP, int] = {}
        self._confirmed_offset: dict[TP, int] = {}
        self._rewinds: dict[TP, int] = {}
        self._backlogs: dict[TP, Backlog] = defaultdict(Backlog)
        self._next_offsets: dict[TP, int] = {}  # of the record to be fetched next
        self._gaps: set[asyncio.Task[None]] = set()
        self._seeking = asyncio.Lock()
        self._seeks = 0
        self._lost_place = False  # True: fetched records were dropped, the positions are past them

    def _new_consumer_thread(self) -> _ConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:  # noqa: ASYNC109 - Faust's signature
        """Yield one message a partition, whose value is the batch and whose offset is the last one.

        A poll that a rebalance or a seek overtook is dropped, and reading starts again at the committed offsets:
        its records may be from before the seek, or their partitions somebody else's.
        """
        if not self.flow_active:
            await self.wait(self.can_resume_flow)  # type: ignore[arg-type]  # an asyncio.Event will do
        if self._lost_place and not await self._seek_back():
            await self.sleep(SEEK_AGAIN_S)
            return
        async with self._seeking:
            place = self._place()
        records, active = await self._wait_next_records(timeout)
        if records is None or self.should_stop:
            return
        if not self.flow_active or place != self._place():
            self._lost_place |= bool(records)
            return
        # What this poll fetched before the seek is of the old position, so a rewound partition sits it out.
        rewound = await self._seek_rewound()
        for tp, fetched in records.items():
            if tp in rewound:
                continue
            if not self.flow_active or place != self._place():
                self._lost_place = True
                return
            if fetched and (active is None or tp in active or tp in self._buffered_partitions):
                self._expect_next(tp, fetched)
                for batch in self._batches(tp, fetched):
                    if tp in self._rewinds:
                        break
                    message: Any = self._to_message(tp, batch.records[-1])
                    message.key, message.value = None, batch
                    self._delivered[tp].append(batch)
                    yield tp, message

    def _place(self) -> tuple[int, int]:
        """Return what changes with every rebalance and every seek of all partitions."""
        return self.app.consumer_generation_id, self._seeks

    def _expect_next(self, tp: TP, fetched: list[ConsumerRecord]) -> None:
        """Look into a jump of the offsets, beside the path: it may be records that retention took before we read them.

        Or it is nothing: compaction and the markers of transactions leave holes too.
        """
        expected, first = self._next_offsets.get(tp, fetched[0].offset), fetched[0].offset
        self._next_offsets[tp] = fetched[-1].offset + 1
        if first > expected:
            task = asyncio.create_task(self._look_into_gap(tp, expected, first))
            self._gaps.add(task)
            task.add_done_callback(self._gaps.discard)

    async def _look_into_gap(self, tp: TP, expected: int, first: int) -> None:
        transport: Any = self.transport
        try:
            starts = await self._thread.earliest_offsets(driver.ensure_aiokafka_TP(tp))
        except (KafkaError, TimeoutError, RuntimeError) as error:
            self.log.warning("no answer to where %s-%s begins: %r", tp.topic, tp.partition, error)
            return
        gone = min(first, *starts.values()) - expected
        if gone > 0:
            transport.on_gap(tp, expected, gone)

    def _batches(self, tp: TP, fetched: list[ConsumerRecord]) -> Iterator[FetchedBatch]:
        read_offset = self._read_offset[tp]
        if read_offset is not None and fetched[0].offset < read_offset:
            fetched = [record for record in fetched if record.offset >= read_offset]
        transport: Any = self.transport
        size = transport.max_batch_records
        for start in range(0, len(fetched), size):
            yield FetchedBatch(fetched[start : start + size], self._backlogs[tp])

    async def _getmany(self, active_partitions: Any, timeout: float) -> Any:  # noqa: ASYNC109 - Faust's signature
        """Fetch of no partition more than its agent has yet to settle: input waits in Kafka, not in memory.

        Faust's own limit blocks the fetcher when one agent is behind, and with it the other agent.
        """
        room = {tp for tp in active_partitions if not self._is_full(tp)}
        if not room:
            await self.sleep(FULL_POLL_S)
            return {}
        if len(room) < len(active_partitions):
            timeout = min(timeout, FULL_POLL_S)
        return await super()._getmany(room, timeout)

    def _is_full(self, tp: TP) -> bool:
        backlog = self._backlogs.get(tp)
        transport: Any = self.transport
        return backlog is not None and (
            backlog.unsettled >= MOST_UNSETTLED_BATCHES * transport.max_batch_records
            or backlog.unsettled_bytes >= MOST_UNSETTLED_BYTES
        )

    def _started_consumer(self) -> Any:
        """Return aiokafka's consumer, None before its thread has made one: whoever watches us may be earlier."""
        try:
            return self._thread._ensure_consumer()
        except ConsumerNotStarted:
            return None

    def standings(self) -> dict[TP, Standing]:
        """Return where each assigned partition stands. Reads what the consumer thread writes, a little late."""
        consumer = self._started_consumer()
        fetched = None if consumer is None else consumer._subscription.subscription
        assignment = None if fetched is None else fetched.assignment
        if assignment is None:
            return {}
        standings = {}
        for tp in map(ensure_TP, assignment.tps):
            state, backlog = assignment.state_value(driver.ensure_aiokafka_TP(tp)), self._backlogs[tp]
            if state is not None:
                end, position = state.highwater or 0, state._position or 0
                stable = stable_offset(end, state.lso)
                standings[tp] = Standing(
                    unsettled_records=backlog.unsettled,
                    waiting_records=max(0, stable - position),
                    undecided_records=max(0, end - max(stable, position)),
                    settled_records=backlog.settled,
                    fetched_ms=state.timestamp,
                )
        return standings

    def high_waters(self, topic: str) -> dict[int, tuple[int, int]]:
        """Return where the log of each assigned partition of a topic ended, and when that was fetched, in ms.

        Brokers that were killed tell ends from before what they acknowledged, until their replicas have caught up.
        """
        consumer, high_waters = self._started_consumer(), {}
        for tp in () if consumer is None else self.assignment():
            if tp.topic == topic:
                try:
                    offset = self.highwater(tp)
                    fetched_ms = consumer.last_poll_timestamp(driver.ensure_aiokafka_TP(tp))
                except (RuntimeError, KafkaError):  # a rebalance takes partitions away in another thread
                    continue
                if offset is not None and offset >= 0:
                    high_waters[tp.partition] = (offset, int(fetched_ms or 0))
        return high_waters

    async def log_end(self, topic: str, partition: int) -> int | None:
        """Return where the log of a partition ends, None while the broker does not know: it never tells an old end.

        It is the stable end: nothing from there on was applied, so it is beyond all that was.
        """
        tp = driver.ensure_aiokafka_TP(TP(topic, partition))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                ends = await self._thread.call_thread(self._thread._ensure_consumer().end_offsets, [tp])
        except _NO_ANSWER:
            return None
        return int(ends[tp])

    async def topic_ids(self, topics: Sequence[str]) -> Mapping[str, str]:
        """Return the ids of topics, without those that the broker does not tell now."""
        found: Mapping[str, str] = {}
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                client = self._thread._ensure_consumer()._client
                found = await self._thread.call_thread(topic_ids, client, topics)
        except _NO_ANSWER:
            return {}
        return found

    def rewind(self, topic: str, partition: int, offset: int) -> None:
        """Read a partition again from `offset`, dropping what was delivered of it and is not done.

        Takes effect at the next poll. Affects: commits, which go back with it.
        """
        tp = TP(topic, partition)
        self._forget([tp])
        self._rewinds[tp] = offset

    async def _seek_rewound(self) -> set[TP]:
        rewinds, self._rewinds = self._rewinds, {}
        for tp, offset in rewinds.items():
            await self._thread.call_thread(self._seek_in_thread, tp, offset)
            self._read_offset[tp] = self._next_offsets[tp] = offset
        return set(rewinds)

    async def _seek_in_thread(self, tp: TP, offset: int) -> None:
        if tp in self._thread.assignment():
            self._thread.seek(driver.ensure_aiokafka_TP(tp), offset)

    async def _seek_back(self) -> bool:
        try:
            await self.perform_seek()
        except (TimeoutError, RuntimeError, OSError) as error:
            self.log.warning("no seek to the committed offsets: %r; nothing is read before one succeeds", error)
            return False
        self._lost_place = False
        return True

    async def perform_seek(self) -> None:
        """Start again at the committed offsets; batches delivered before no longer count for commits."""
        async with self._seeking:
            self._seeks += 1
            self._forget(list(self._delivered))
            await super().perform_seek()
            transport: Any = self.transport
            committed = {tp: offset for tp, offset in self._committed_offset.items() if offset}
            self._next_offsets.update(committed)
            transport.on_start_offsets(committed)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Let the agents finish what they hold, commit it, and forget the rest."""
        await super().on_partitions_revoked(revoked)
        self._forget(revoked)

    def _forget(self, partitions: Any) -> None:
        for tp in partitions:
            for batch in self._delivered.pop(tp, ()):
                batch.dropped = True
            self._backlogs.pop(tp, None)
            self._rewinds.pop(tp, None)
            self._settled_offset.pop(tp, None)
            self._next_offsets.pop(tp, None)
            self._confirmed_offset.pop(tp, None)

    def ack(self, message: Message) -> bool:
        """Release Faust's own bookkeeping; only `FetchedBatch.settle` counts for commits.

        Faust acks what it skips during a rebalance, so its acks say nothing about what was done.
        """
        first = not message.acked
        message.acked = True
        self._unacked_messages.discard(message)
        return first

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        return (tp for tp in list(self._delivered) if topics is None or tp in topics or tp.topic in topics)

    def _new_offset(self, tp: TP) -> int | None:
        batches, transport = self._delivered[tp], cast("BatchTransport", self.transport)
        durable_s = time.monotonic() - transport.durable_after_s.get(tp.topic, 0.0)
        while batches and batches[0].done and batches[0].settled_s <= durable_s:
            self._settled_offset[tp] = batches.popleft().next_offset
        return self._settled_offset.get(tp)

    def _should_commit(self, tp: TP, offset: int) -> bool:
        return offset > self._confirmed_offset.get(tp, -1)

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        failpoints.reach("before_commit")
        committed = await super()._commit(offsets)
        failpoints.reach("after_commit")
        if committed:
            self._confirmed_offset.update(offsets)
        return committed

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Look into nothing: ProgressWatch does. Faust's own check raises while a position is sought, and ends us."""

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Ignore gaps: batches know their own offsets."""


class BatchTransport(driver.Transport):
    """The transport an app uses in place of Faust's own."""

    Consumer = BatchConsumer

    def __init__(
        self,
        *args: Any,
        fetch_max_wait_ms: int,
        max_batch_records: int,
        durable_after_s: Mapping[str, float],
        on_start_offsets: Callable[[Mapping[TP, int]], None],
        on_gap: Callable[[TP, int, int], None],
        **kwargs: Any,
    ) -> None:
        """Call `on_start_offsets` before reading starts, with the committed offsets where there are any.

        Call `on_gap` with partition, first offset and number of records that were to be read and are there no more.

        Commits of a topic in `durable_after_s` trail by so much: what was settled since may still be lost by Redis.
        """
        super().__init__(*args, **kwargs)
        self.on_start_offsets = on_start_offsets
        self.on_gap = on_gap
        self.durable_after_s = durable_after_s
        self.fetch_max_wait_ms = fetch_max_wait_ms
        self.max_batch_records = max_batch_records


async def micro_batches(
    stream: StreamT[FetchedBatch], *, max_records: int, should_stop: Callable[[], bool]
) -> AsyncIterator[list[FetchedBatch]]:
    """Yield everything already waiting, up to `max_records`, never waiting for more.

    Ends when `should_stop` says so; what it has not yielded by then stays unsettled and comes again.
    """
    source: Any = stream  # noack() and the queue are Faust's, but not in its types
    events = source.noack().events().__aiter__()
    waiting = source.channel.queue
    batches: list[FetchedBatch] = []
    async for event in events:
        event.ack()
        batches.append(event.value)
        if should_stop():
            return
        if waiting.empty() or sum(len(batch.records) for batch in batches) >= max_records:
            yield batches
            batches = []
