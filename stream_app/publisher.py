"""The producer: answers and dead letters go out through it, in order, acknowledged by all replicas."""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError, KafkaError, UnknownError
from aiokafka.partitioner import DefaultPartitioner

from stream_app.errors import PublishError, TransientError
from stream_app.ports import OutputRecord
from stream_app.settings import KafkaSettings

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0

# aiokafka's own 16 kB holds some twenty slates: a micro-batch would wait for several round trips.
MAX_BATCH_BYTES = 262_144
BULK_RECORDS = 128
_partition_of_key = DefaultPartitioner()


class KafkaPublisher:
    """An aiokafka producer with acks=all; idempotent where the broker can be."""

    def __init__(self, settings: KafkaSettings) -> None:
        """Remember the settings; `start` connects."""
        self._settings = settings
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
            max_batch_size=min(MAX_BATCH_BYTES, self._settings.max_request_bytes),
        )
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
        """Tell whether the broker answers a question for metadata."""
        if self._producer is None:
            return False
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return bool(await self._producer.client.force_metadata_update())
        except (KafkaError, TimeoutError):
            return False

    async def send(self, records: Sequence[OutputRecord]) -> Awaitable[None]:
        """Enqueue the records in order; await the result to know that all are acknowledged.

        Raises:
            PublishError: a record could not be enqueued; the awaitable raises it for one not acknowledged.
        """
        if self._producer is None:
            raise PublishError("the producer is not started; nothing was sent; call start first")
        try:
            if len(records) >= BULK_RECORDS:
                futures = await _enqueue_bulk(self._producer, records)
            else:
                futures = [await _enqueue(self._producer, record) for record in records]
        except KafkaError as error:
            raise _not_acknowledged(error) from error
        return _acknowledged(futures)

    async def stop(self) -> None:
        """Flush and disconnect."""
        if self._producer is not None:
            await self._producer.stop()
            self._producer = None


async def _enqueue(producer: AIOKafkaProducer, record: OutputRecord) -> "asyncio.Future[object]":
    future: asyncio.Future[object]
    headers = list(record.headers)
    if record.key is not None or record.value is not None:
        future = await producer.send(record.topic, record.value, record.key, headers=headers)
        return future
    # Kafka carries records without key and value, and somebody may send us one; aiokafka's `send` asserts.
    batch = producer.create_batch()
    batch.append(key=None, value=None, timestamp=None, headers=headers)
    future = await producer.send_batch(batch, record.topic, partition=0)
    return future


async def _enqueue_bulk(producer: AIOKafkaProducer, records: Sequence[OutputRecord]) -> "list[asyncio.Future[object]]":
    """Enqueue many records, a batch a partition: one by one most of the cost is aiokafka's (bench_overload.py)."""
    futures: list[asyncio.Future[object]] = []
    builders: dict[tuple[str, int], Any] = {}
    partitions_of = {topic: sorted(await producer.partitions_for(topic)) for topic in {one.topic for one in records}}
    for record in records:
        if record.key is None:
            futures.append(await _enqueue(producer, record))
            continue
        partitions = partitions_of[record.topic]
        place = record.topic, int(_partition_of_key(record.key, partitions, partitions))
        if place not in builders:
            builders[place] = producer.create_batch()
        if not _append(builders[place], record):
            futures.append(await producer.send_batch(builders[place], place[0], partition=place[1]))
            builders[place] = producer.create_batch()
            _append(builders[place], record)
    for (topic, partition), builder in builders.items():
        futures.append(await producer.send_batch(builder, topic, partition=partition))
    return futures


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
