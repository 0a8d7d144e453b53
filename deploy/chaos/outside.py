"""The world outside: produces the load, and reads everything that lies on the topics, for the checks."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from deploy.chaos.load import FORGET, GOOD, MARK, Place, Record
from schemas.codec import decode_slate
from schemas.records import Slate
from schemas.topics import CO_PARTITIONED, dead_letter_name, topic_name

SEND_TIMEOUT_S = 60.0
PENDING_STEPS = 20  # of a broker that takes nothing; what would come on top is not sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A record of an input topic."""

    key: bytes | None
    value: bytes | None
    mark: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A record of a dead-letter topic, and where its original lies."""

    topic: str
    place: Place
    code: str
    key: bytes | None
    value: bytes | None


@dataclass(slots=True)
class Seen:
    """Everything that lies on the topics, by place."""

    inputs: dict[str, dict[Place, Logged]] = field(default_factory=lambda: {name: {} for name in CO_PARTITIONED})
    slates: dict[Place, Slate] = field(default_factory=dict)
    dead_letters: dict[tuple[str, Place], Refused] = field(default_factory=dict)

    def ends(self, name: str) -> dict[int, int]:
        """Return the last offset of each partition of an input topic that holds a record."""
        last: dict[int, int] = {}
        for partition, offset in self.inputs[name]:
            last[partition] = max(offset, last.get(partition, -1))
        return last


class Outside:
    """Owner of a producer and a reader; one event loop. Neither belongs to a group."""

    def __init__(self, bootstrap_servers: str, prefix: str, partitions: int) -> None:
        """Remember where the broker is; `start` connects."""
        self.seen = Seen()
        self.places: dict[str, Place] = {}
        self.acknowledged: dict[str, set[Place]] = {name: set() for name in CO_PARTITIONED}
        self.not_acknowledged = 0
        self.not_sent = 0
        self._servers = bootstrap_servers
        self._topics = {topic_name(prefix, name): name for name in (*CO_PARTITIONED, "reranked")}
        self._topics |= {dead_letter_name(prefix, name): f"{name}.dlq" for name in CO_PARTITIONED}
        self._names = {name: topic for topic, name in self._topics.items()}
        self._partitions = partitions
        self._producer: AIOKafkaProducer | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._reading: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._in_order = asyncio.Lock()

    async def start(self) -> None:
        """Connect, and begin to read every topic from its first record."""
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self._servers, acks="all", request_timeout_ms=10_000, retry_backoff_ms=200
        )
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=self._servers,
            group_id=None,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=50,
            request_timeout_ms=10_000,
            max_partition_fetch_bytes=4 * 1_048_576,
        )
        await self._producer.start()
        await self._consumer.start()
        self._consumer.assign([TopicPartition(topic, p) for topic in self._topics for p in range(self._partitions)])
        self._reading = asyncio.create_task(self._read(self._consumer))

    async def stop(self) -> None:
        """Disconnect."""
        tasks = [*self._sending, *([self._reading] if self._reading else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        stopping = [asyncio.create_task(one.stop()) for one in (self._consumer, self._producer) if one is not None]
        if stopping:
            await asyncio.wait(stopping, timeout=10.0)

    def leader_of(self, name: str, partition: int) -> int | None:
        """Return the node id of the leader of a partition, None when the reader does not know it."""
        if self._consumer is None:
            return None
        leader: int | None = self._consumer._client.cluster.leader_for_partition(
            TopicPartition(self._names[name], partition)
        )
        return leader if leader is not None and leader > 0 else None

    def send(self, records: Sequence[Record]) -> None:
        """Produce the records of a step in order, in the background."""
        if len(self._sending) >= PENDING_STEPS:
            self.not_sent += len(records)
            return
        task = asyncio.create_task(self._send(records))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def sent(self) -> None:
        """Return when nothing is being sent any more."""
        while self._sending:
            await asyncio.wait(self._sending)

    async def _send(self, records: Sequence[Record]) -> None:
        if self._producer is None:
            raise RuntimeError("not started: call start first")
        futures = []
        async with self._in_order:
            for record in records:
                try:
                    sent = self._producer.send(
                        self._names[record.topic], record.value, record.key, headers=[(MARK, record.mark)]
                    )
                    futures.append(await asyncio.wait_for(sent, SEND_TIMEOUT_S))
                except (KafkaError, TimeoutError):
                    self.not_acknowledged += 1
                    futures.append(None)
        for record, future in zip(records, futures, strict=True):
            if future is None:
                continue
            try:
                at = await future
            except KafkaError:
                self.not_acknowledged += 1
                continue
            place = (at.partition, at.offset)
            self.acknowledged[record.topic].add(place)
            if record.topic == "interactions" and record.mark in (GOOD, FORGET) and record.key is not None:
                self.places[record.key.decode()] = place

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            try:
                fetched = await consumer.getmany(timeout_ms=200)
            except KafkaError:
                await asyncio.sleep(0.2)
                continue
            for tp, records in fetched.items():
                for record in records:
                    self._take(self._topics[tp.topic], record)
            await asyncio.sleep(0)

    def _take(self, name: str, record: ConsumerRecord) -> None:
        place = (record.partition, record.offset)
        headers = {key: value or b"" for key, value in record.headers}
        if name in CO_PARTITIONED:
            self.seen.inputs[name][place] = Logged(key=record.key, value=record.value, mark=headers.get(MARK, b""))
        elif name == "reranked":
            self.seen.slates[place] = decode_slate(record.value)
        else:
            origin = (
                int(headers["__connect.errors.partition"]),
                int(headers["__connect.errors.offset"]),
            )
            self.seen.dead_letters[name, place] = Refused(
                topic=name.removesuffix(".dlq"),
                place=origin,
                code=headers["rerank.error.code"].decode(),
                key=record.key,
                value=record.value,
            )
