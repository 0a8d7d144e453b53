"""The demo's Kafka client: a producer, and one reader that hands every slate to whoever waits for it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError, UnknownError
from aiokafka.structs import RecordMetadata

from deploy.demo.errors import DemoError
from schemas.codec import decode_slate, encode
from schemas.records import After, CandidateList, Interaction, Slate
from schemas.topics import CO_PARTITIONED, dead_letter_name, topic_name

FETCH_MAX_WAIT_MS = 5
_FETCH_BYTES = 4 * 1_048_576
_SEND_CHUNK = 2_000
_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A slate, its bytes as they lay on the topic, and when (monotonic clock) they were read."""

    slate: Slate
    value: bytes
    read_s: float


class Client:
    """Produces interactions and candidate lists, reads slates.

    Owner of its connections and of the table of waiting requests; one event loop.
    """

    def __init__(self, bootstrap_servers: str, topic_prefix: str) -> None:
        """Remember where the broker is; `start` connects."""
        self._bootstrap_servers = bootstrap_servers
        self._interactions, self._candidates = (topic_name(topic_prefix, name) for name in CO_PARTITIONED)
        self._reranked = topic_name(topic_prefix, "reranked")
        self._dead_letters = [dead_letter_name(topic_prefix, name) for name in CO_PARTITIONED]
        self._waiting: dict[str, asyncio.Future[Received]] = {}
        self._producer: AIOKafkaProducer | None = None
        self._consumer: AIOKafkaConsumer | None = None

    async def start(self) -> None:
        """Connect; the reader stands before the first record that will be produced.

        Raises:
            DemoError: the broker cannot be reached.
        """
        try:
            self._producer = await self._new_producer()
            # From the earliest record, not from the end: the embedded broker reports wrong end offsets.
            self._consumer = AIOKafkaConsumer(
                self._reranked,
                *self._dead_letters,
                bootstrap_servers=self._bootstrap_servers,
                auto_offset_reset="earliest",
                fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
                max_partition_fetch_bytes=_FETCH_BYTES,
            )
            await self._consumer.start()
        except KafkaError as error:
            await self.stop()
            raise self._lost(error) from error

    async def stop(self) -> None:
        """Disconnect; from a broker that is gone after a few seconds."""
        connections = [one for one in (self._consumer, self._producer) if one is not None]
        self._consumer = self._producer = None
        # The consumer raises CancelledError of a task of its own when the broker is gone.
        stopping = asyncio.gather(*(one.stop() for one in connections), return_exceptions=True)
        await asyncio.wait({stopping}, timeout=_STOP_TIMEOUT_S)

    async def send_interactions(self, interactions: Sequence[Interaction]) -> list[After]:
        """Produce interactions and return where each one lies, once all are acknowledged."""
        places: list[After] = []
        try:
            for first in range(0, len(interactions), _SEND_CHUNK):
                sent = [await self._send(self._interactions, one) for one in interactions[first : first + _SEND_CHUNK]]
                metadata: list[RecordMetadata] = await asyncio.gather(*sent)
                places += [After(partition=one.partition, offset=one.offset) for one in metadata]
        except KafkaError as error:
            raise self._lost(error) from error
        return places

    async def ask(self, request: CandidateList, timeout_s: float) -> Received:
        """Produce a candidate list and return its slate.

        Raises:
            DemoError: none came in time.
        """
        waiter: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = waiter
        try:
            await (await self._send(self._candidates, request))
            return await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            raise DemoError(
                f"list {request.request_id!r}: no slate within {timeout_s:.0f} s; the numbers would be worth nothing; "
                "run it again on a less busy machine, or read the worker's log"
            ) from None
        except KafkaError as error:
            raise self._lost(error) from error
        finally:
            del self._waiting[request.request_id]

    async def read(self) -> None:
        """Hand slates to those who wait for them, for ever.

        Raises:
            DemoError: a record of ours was refused.
        """
        if self._consumer is None:
            raise RuntimeError("the client is not started: call start first")
        while True:
            batches = await self._consumer.getmany(timeout_ms=1_000)
            read_s = time.perf_counter()
            for tp, records in batches.items():
                for record in records:
                    if tp.topic != self._reranked:
                        raise DemoError(_refused(tp.topic, record.value, record.headers))
                    self._hand_over(record.value, read_s)

    def _hand_over(self, value: bytes, read_s: float) -> None:
        slate = decode_slate(value)
        waiter = self._waiting.get(slate.request_id)
        if waiter is not None and not waiter.done():
            waiter.set_result(Received(slate=slate, value=value, read_s=read_s))

    async def _send(self, topic: str, record: Interaction | CandidateList) -> "asyncio.Future[RecordMetadata]":
        if self._producer is None:
            raise RuntimeError("the client is not started: call start first")
        future: asyncio.Future[RecordMetadata] = await self._producer.send(
            topic, encode(record), record.user_id.encode()
        )
        return future

    def _lost(self, error: KafkaError) -> DemoError:
        return DemoError(
            f"kafka {self._bootstrap_servers}: {error!r}; the replay cannot go on, there are no numbers; run it again, "
            "and look at the broker if it happens again"
        )

    async def _new_producer(self) -> AIOKafkaProducer:
        """Connect a producer that never doubles a record, or a plain one where the broker knows no other."""
        producer = AIOKafkaProducer(bootstrap_servers=self._bootstrap_servers, acks="all", enable_idempotence=True)
        try:
            await producer.start()
        except UnknownError:
            await producer.stop()
            producer = AIOKafkaProducer(bootstrap_servers=self._bootstrap_servers, acks="all")
            await producer.start()
        except KafkaError:
            await producer.stop()
            raise
        return producer


def _refused(topic: str, value: bytes | None, headers: Sequence[tuple[str, bytes]]) -> str:
    code = dict(headers).get("rerank.error.code", b"?").decode(errors="replace")
    return f"{topic}: the worker refused a record ({code}): {(value or b'')[:120]!r}; the numbers would lack it"
