"""The benchmark's own Kafka client: fills topics, watches how far a group is, reads what came out."""

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.partitioner import DefaultPartitioner

PARTITIONS = 4
_FILL_BATCH_BYTES = 262_144
_partition_of_key = DefaultPartitioner()


def partition_of(key: bytes) -> int:
    """Return the partition of a key, as every producer here places it."""
    partitions = list(range(PARTITIONS))
    return int(_partition_of_key(key, partitions, partitions))


async def fill(bootstrap_servers: str, topic: str, records: Iterable[tuple[bytes, bytes]]) -> int:
    """Append the records, in order inside each partition; return how many are acknowledged."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, max_batch_size=_FILL_BATCH_BYTES, acks="all")
    await producer.start()
    count, pending = 0, []
    builders = {partition: producer.create_batch() for partition in range(PARTITIONS)}
    try:
        for key, value in records:
            partition, count = partition_of(key), count + 1
            while builders[partition].append(timestamp=int(time.time() * 1000), key=key, value=value) is None:
                pending.append(await producer.send_batch(builders[partition], topic, partition=partition))
                builders[partition] = producer.create_batch()
        for partition, builder in builders.items():
            if builder.record_count():
                pending.append(await producer.send_batch(builder, topic, partition=partition))
        for delivery in pending:
            await delivery
    finally:
        await producer.stop()
    return count


@asynccontextmanager
async def group_watcher(bootstrap_servers: str, group_id: str) -> AsyncIterator[AIOKafkaConsumer]:
    """Connect a client that can ask for the group's committed offsets without being a member."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap_servers, group_id=group_id, enable_auto_commit=False)
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def committed_records(watcher: AIOKafkaConsumer, topic: str) -> int:
    """Return how many records of the topic the group has committed."""
    offsets = [await watcher.committed(TopicPartition(topic, partition)) for partition in range(PARTITIONS)]
    return sum(offset or 0 for offset in offsets)


class OutputReader:
    """Reads a topic from where it last stopped: the embedded broker's end offsets are wrong, so none are asked for."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        """Start at the beginning of the topic."""
        self._bootstrap_servers = bootstrap_servers
        self._topic = topic
        self._next_offsets = dict.fromkeys(range(PARTITIONS), 0)

    async def read_new(self, quiet_ms: int = 1_500) -> list[ConsumerRecord]:
        """Return the records since the last call, once nothing more comes for `quiet_ms`."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self._bootstrap_servers, enable_auto_commit=False)
        await consumer.start()
        found: list[ConsumerRecord] = []
        try:
            consumer.assign([TopicPartition(self._topic, partition) for partition in range(PARTITIONS)])
            for partition, offset in self._next_offsets.items():
                consumer.seek(TopicPartition(self._topic, partition), offset)
            while batch := await consumer.getmany(timeout_ms=quiet_ms):
                for records in batch.values():
                    found += records
                    self._next_offsets[records[-1].partition] = records[-1].offset + 1
        finally:
            await consumer.stop()
        return found
