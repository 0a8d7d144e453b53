"""The log of interactions from its start to a known end, read outside any consumer group."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from stream_app import lenient_records
from stream_app.errors import TransientError
from stream_app.settings import KafkaSettings

BATCH_RECORDS = 10_000
POLL_MS = 200
FETCH_MAX_WAIT_MS = 50
PARTITION_FETCH_BYTES = 4 * 1_048_576
ANSWER_TIMEOUT_S = 15.0
SILENCE_S = 30.0

lenient_records.install()

ISOLATION_LEVEL = "read_committed"  # of everything that reads our inputs: records of an aborted transaction never were


@dataclass(frozen=True, slots=True)
class LogEnd:
    """Where a partition ends, as one fetch said."""

    high_water: int  # the offset after the last record
    stable: int  # the offset of the first record that waits for its transaction, and nothing from there on is delivered


def stable_offset(high_water: int, last_stable: int | None) -> int:
    """Return up to which offset may be read, from the two ends of a fetch; a broker may not know the second."""
    return high_water if last_stable is None or last_stable < 0 else min(high_water, last_stable)


class KafkaLog:
    """Partitions of one topic. The end is the stable offset of a fetch: some brokers answer other questions wrongly."""

    def __init__(
        self,
        kafka: KafkaSettings,
        topic: str,
        ends: Mapping[int, int],
        until_offsets: Mapping[int, int],
        *,
        in_order: bool,
    ) -> None:
        """Read each partition of `ends` up to there, or up to and with the offset in `until_offsets`.

        `in_order`: partition after partition, which is slower.
        """
        self._in_order = in_order
        self._kafka, self._topic = kafka, topic
        self._until_offsets = until_offsets
        self._ends = {p: min(end, until_offsets.get(p, end) + 1) for p, end in ends.items()}
        self._read_to = dict.fromkeys(ends, 0)
        self._consumer: AIOKafkaConsumer | None = None

    @property
    def read_to(self) -> Mapping[int, int]:
        """Per partition, the offset after the last record that was yielded."""
        return self._read_to

    @property
    def fixed(self) -> Collection[int]:
        """The partitions whose end was set by hand."""
        return self._until_offsets.keys()

    @property
    def total(self) -> int:
        """Return how many offsets lie before the ends."""
        return sum(self._ends.values())

    async def extend(self) -> None:
        """Move the ends to where the log ends by now; those that were set by hand stay."""
        ends = await log_ends(self._kafka, self._topic, self._ends)
        self._ends.update({p: end.stable for p, end in ends.items() if p not in self._until_offsets})

    async def close(self) -> None:
        """Close the connection."""
        if self._consumer is not None:
            await stop_reading(self._consumer)

    async def batches(self) -> AsyncIterator[Sequence[ConsumerRecord]]:
        """Yield what is left up to the ends, in offset order inside each partition.

        Raises:
            TransientError: the broker answers no more.
        """
        try:
            if self._consumer is None:
                self._consumer = await _assigned(self._kafka, self._topic, self._ends)
            heard_s = time.monotonic()
            while self._follow_ends(self._consumer):
                fetched = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=BATCH_RECORDS)
                records = [record for some in fetched.values() for record in self._before_end(some)]
                moved = await self._move(self._consumer)
                if moved:
                    heard_s = time.monotonic()
                elif time.monotonic() - heard_s > SILENCE_S:
                    raise TransientError(
                        f"{self._topic}: nothing came for {SILENCE_S:g} s before its end; the rebuild stops; run it "
                        "again when the broker answers (`rerank doctor`)"
                    )
                if records:
                    yield records
        except KafkaError as error:
            raise TransientError(
                f"{self._topic}: {error!r}; the rebuild stops; run it again when the broker answers (`rerank doctor`)"
            ) from error

    def _follow_ends(self, consumer: AIOKafkaConsumer) -> bool:
        """Let the broker send what lies before an end, and nothing else; tell whether there is any."""
        left = [partition for partition, end in sorted(self._ends.items()) if self._read_to[partition] < end]
        wanted, paused = left[:1] if self._in_order else left, consumer.paused()
        for partition in self._ends:
            tp = TopicPartition(self._topic, partition)
            if partition not in wanted and tp not in paused:
                consumer.pause(tp)
            elif partition in wanted and tp in paused:
                consumer.seek(tp, self._read_to[partition])
                consumer.resume(tp)
        return bool(left)

    def _before_end(self, records: Sequence[ConsumerRecord]) -> Sequence[ConsumerRecord]:
        end = self._ends[records[0].partition]
        return records if records[-1].offset < end else [record for record in records if record.offset < end]

    async def _move(self, consumer: AIOKafkaConsumer) -> bool:
        """Follow the consumer, which also passes offsets that hold no record; tell whether it came further."""
        before = dict(self._read_to)
        for partition, end in self._ends.items():
            position = await consumer.position(TopicPartition(self._topic, partition))
            self._read_to[partition] = max(self._read_to[partition], min(position, end))
        return before != self._read_to


async def log_ends(kafka: KafkaSettings, topic: str, partitions: Iterable[int]) -> dict[int, LogEnd]:
    """Return where each partition ends by now, as a fetch of this moment says.

    Raises:
        TransientError: the broker does not answer.
    """
    wanted = sorted(partitions)
    async with _reading(kafka, topic, wanted) as consumer:
        tps = {partition: TopicPartition(topic, partition) for partition in wanted}
        while any(consumer.highwater(tp) is None for tp in tps.values()):  # noqa: ASYNC110 - aiokafka tells nobody
            await asyncio.sleep(0.005)
        return {partition: _end(consumer, tp) for partition, tp in tps.items()}


def _end(consumer: AIOKafkaConsumer, tp: TopicPartition) -> LogEnd:
    high_water = int(consumer.highwater(tp))
    return LogEnd(high_water, stable_offset(high_water, consumer.last_stable_offset(tp)))


async def start_offsets(kafka: KafkaSettings, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """Return the first offset that each partition still holds.

    Raises:
        TransientError: the broker does not answer.
    """
    async with _reading(kafka, topic, partitions) as consumer:
        found = await consumer.beginning_offsets([TopicPartition(topic, partition) for partition in partitions])
        return {tp.partition: offset for tp, offset in found.items()}


async def stop_reading(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer without a group; aiokafka cancels a task of its own, and raises if it had not begun."""
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise


@asynccontextmanager
async def _reading(kafka: KafkaSettings, topic: str, partitions: Iterable[int]) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = None
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            consumer = await _assigned(kafka, topic, partitions)
            yield consumer
    except (KafkaError, TimeoutError, OSError) as error:
        raise TransientError(
            f"{topic} on {kafka.bootstrap_servers}: no answer in {ANSWER_TIMEOUT_S:g} s ({error!r}); nothing was done; "
            "check the broker (`rerank doctor`)"
        ) from error
    finally:
        if consumer is not None:
            await stop_reading(consumer)


async def _assigned(kafka: KafkaSettings, topic: str, partitions: Iterable[int]) -> AIOKafkaConsumer:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level=ISOLATION_LEVEL,
        fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
        max_partition_fetch_bytes=PARTITION_FETCH_BYTES,
    )
    await consumer.start()
    consumer.assign([TopicPartition(topic, partition) for partition in partitions])
    return consumer
