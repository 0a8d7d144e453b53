"""The producer: answers and dead letters go out through it, in order, acknowledged by all replicas."""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaConnectionError, KafkaError, KafkaTimeoutError, UnknownError
from aiokafka.partitioner import murmur2

from schemas.limits import DEFAULT_LIMITS
from stream_app.errors import PublishError, TransientError
from stream_app.ports import OutputRecord
from stream_app.settings import KafkaSettings

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
ENQUEUE_AGAIN_S = 0.5

# aiokafka's own 16 kB holds some twenty slates: a micro-batch would wait for several round trips.
MAX_BATCH_BYTES = 262_144
BULK_RECORDS = 128
HASHED_KEYS = 16_384
LONGEST_HASHED_KEY_BYTES = DEFAULT_LIMITS.max_id_bytes  # longer ones are of records that we refuse; none is held here

T = TypeVar("T")


class KafkaPublisher:
    """An aiokafka producer with acks=all; idempotent where the broker can be."""

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        patient: bool = False,
        topics: Collection[str] = (),
        max_batch_bytes: int = MAX_BATCH_BYTES,
    ) -> None:
        """Remember the settings; `start` connects.

        Args:
            patient: what may pass (a broker away, a leader not elected, too few replicas) is tried again until it has
                passed, the same records in the same order; otherwise for `request_timeout_ms`.
            topics: those whose leaders `reaches_broker` asks for.
            max_batch_bytes: no topic takes less; a batch that is refused takes all of its records with it.
        """
        self._settings = settings
        self._patient = patient
        self._topics = topics
        self._max_batch_bytes = min(MAX_BATCH_BYTES, max_batch_bytes, settings.max_request_bytes)
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connect; with `idempotence=auto` a broker that refuses an idempotent producer gets a plain one."""
        mode = self._settings.idempotence
        try:
            self._producer = await self._connect(idempotent=mode != "off")
        except UnknownError as error:
            if mode == "on":
                raise PublishError(
                    f"broker {self._settings.bootstrap_servers!r} refuses an idempotent producer ({error}); nothing is "
                    "served; set RERANK_KAFKA__IDEMPOTENCE=auto to accept duplicates after a broker retry"
                ) from error
            logger.warning("event=idempotence_refused broker refuses an idempotent producer; retries may duplicate")
            self._producer = await self._connect(idempotent=False)

    async def _connect(self, *, idempotent: bool) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._settings.bootstrap_servers,
            acks="all",
            enable_idempotence=idempotent,
            request_timeout_ms=self._settings.request_timeout_ms,
            max_request_size=self._settings.max_request_bytes,
            max_batch_size=self._max_batch_bytes,
            partitioner=partition_of_key,
        )
        if self._patient:
            # aiokafka drops batches by age: those of a partition without a leader always, others unless idempotent.
            # A dropped one leaves a hole in the sequence numbers, which the broker then refuses for ever.
            producer._message_accumulator._batch_ttl = math.inf
        try:
            await producer.start()
        except KafkaConnectionError as error:
            await producer.stop()
            raise TransientError(f"broker {self._settings.bootstrap_servers!r}: {error}; nothing is served") from error
        except BaseException:  # cancelled as well: a producer that is not stopped keeps its connections
            await producer.stop()
            raise
        return producer

    async def reaches_broker(self) -> bool:
        """Tell whether the broker takes what is sent, and every leader of our topics can be reached."""
        if self._producer is None or self._is_refused(self._producer):
            return False
        client = self._producer.client
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                if not await client.force_metadata_update():
                    return False
                cluster = await client.fetch_all_metadata()
                leaders = {
                    cluster.leader_for_partition(TopicPartition(topic, partition))
                    for topic in self._topics
                    for partition in cluster.partitions_for_topic(topic) or ()
                }
                return all([leader not in (None, -1) and await client.ready(leader) for leader in leaders])
        except (KafkaError, TimeoutError):
            return False

    def _is_refused(self, producer: AIOKafkaProducer) -> bool:
        """Tell whether something was sent, not taken, and is to be sent once more."""
        accumulator = producer._message_accumulator
        queued = any(batch.retry_count > 0 for batches in accumulator._batches.values() for batch in batches)
        return queued or any(batch.retry_count > 1 for batch in accumulator._pending_batches)

    async def send(self, records: Sequence[OutputRecord]) -> Awaitable[None]:
        """Enqueue the records in order; await the result to know that all are acknowledged.

        Raises:
            PublishError: a record could not be enqueued; the awaitable raises it for one not acknowledged.
        """
        if self._producer is None:
            raise PublishError("the producer is not started; nothing was sent; call start first")
        try:
            if len(records) >= BULK_RECORDS:
                futures = await self._enqueue_bulk(self._producer, records)
            else:
                futures = [await self._enqueue(self._producer, record) for record in records]
        except KafkaError as error:
            raise _not_acknowledged(error) from error
        return _acknowledged(futures)

    async def stop(self) -> None:
        """Flush and disconnect."""
        if self._producer is not None:
            await self._producer.stop()
            self._producer = None

    async def _enqueue(self, producer: AIOKafkaProducer, record: OutputRecord) -> "asyncio.Future[object]":
        headers = list(record.headers)
        if record.key is not None or record.value is not None:
            return await self._persist(lambda: producer.send(record.topic, record.value, record.key, headers=headers))
        # Kafka carries records without key and value, and somebody may send us one; aiokafka's `send` asserts.
        batch = producer.create_batch()
        batch.append(key=None, value=None, timestamp=None, headers=headers)
        return await self._persist(lambda: producer.send_batch(batch, record.topic, partition=0))

    async def _enqueue_bulk(
        self, producer: AIOKafkaProducer, records: Sequence[OutputRecord]
    ) -> "list[asyncio.Future[object]]":
        """Enqueue many records, a batch a partition: one by one most of the cost is aiokafka's (bench_overload.py)."""
        futures: list[asyncio.Future[object]] = []
        builders: dict[tuple[str, int], Any] = {}

        async def send(place: tuple[str, int]) -> None:
            builder, (topic, partition) = builders[place], place
            futures.append(await self._persist(lambda: producer.send_batch(builder, topic, partition=partition)))

        partitions_of: dict[str, list[int]] = {}
        for topic in {one.topic for one in records}:
            partitions_of[topic] = sorted(await self._persist(partial(producer.partitions_for, topic)))
        for record in records:
            if record.key is None:
                futures.append(await self._enqueue(producer, record))
                continue
            partitions = partitions_of[record.topic]
            place = record.topic, partition_of_key(record.key, partitions, partitions)
            if place not in builders:
                builders[place] = producer.create_batch()
            if not _append(builders[place], record):
                await send(place)
                builders[place] = producer.create_batch()
                _append(builders[place], record)
        for place in builders:
            await send(place)
        return futures

    async def _persist(self, enqueue: Callable[[], Awaitable[T]]) -> T:
        """Enqueue; where a broker that is away left no room, and we are patient, again until there is some."""
        while True:
            try:
                return await enqueue()
            except KafkaError as error:
                if not self._patient or not (error.retriable or isinstance(error, KafkaTimeoutError)):
                    raise
                logger.warning("event=publish_waits %r; the broker takes nothing, what is sent waits", error)
            await asyncio.sleep(ENQUEUE_AGAIN_S)


_hash_of_key = lru_cache(maxsize=HASHED_KEYS)(murmur2)  # in Python it is most of what finding a partition costs


def partition_of_key(key: bytes | None, partitions: Sequence[int], available: Sequence[int]) -> int:
    """Return the partition that Java's default partitioner gives a key; without a key, one that can be reached."""
    if key is None:
        return random.choice(available or partitions)  # noqa: S311 - spreads, keeps no secret
    hashed = _hash_of_key(key) if len(key) <= LONGEST_HASHED_KEY_BYTES else murmur2(key)
    return partitions[int(hashed & 0x7FFFFFFF) % len(partitions)]


def _append(builder: Any, record: OutputRecord) -> bool:
    """Add a record to a batch; tell whether there was room."""
    headers = list(record.headers)
    return builder.append(key=record.key, value=record.value, timestamp=None, headers=headers) is not None


async def _acknowledged(futures: "Sequence[asyncio.Future[object]]") -> None:
    try:
        await asyncio.gather(*futures)
    except KafkaError as error:
        raise _not_acknowledged(error) from error


def _not_acknowledged(error: KafkaError) -> PublishError:
    return PublishError(
        f"output not acknowledged: {error!r}; its input stays unacked and comes again; "
        "check the broker (`rerank doctor`)"
    )
