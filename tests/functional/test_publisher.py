"""The publisher over a producer that has no room, or is gone: what it tries again, and what it gives up."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaTimeoutError, MessageSizeTooLargeError, UnknownTopicOrPartitionError
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.producer.message_accumulator import MessageAccumulator, MessageBatch
from hypothesis import given
from hypothesis import strategies as st

from stream_app import publisher as publishing
from stream_app.errors import PublishError
from stream_app.ports import OutputRecord
from stream_app.publisher import KafkaPublisher, partition_of_key
from stream_app.settings import KafkaSettings


class FullProducer:
    """Has no room for the first records, or refuses them; takes the rest."""

    def __init__(self, errors: Sequence[Exception]) -> None:
        self.errors = list(errors)
        self.taken: list[bytes] = []

    async def send(self, topic: str, value: bytes, key: bytes, headers: Any) -> "asyncio.Future[None]":
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append(value)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


def publisher_over(producer: FullProducer, *, patient: bool) -> KafkaPublisher:
    found = KafkaPublisher(KafkaSettings(), patient=patient)
    found._producer = producer
    return found


RECORDS = [OutputRecord("reranked", b"u-1", b"%d" % number, ()) for number in range(3)]


@pytest.mark.parametrize("error", [KafkaTimeoutError(), UnknownTopicOrPartitionError()])
async def test_a_worker_sends_in_order_what_the_producer_had_no_room_for(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "ENQUEUE_AGAIN_S", 0.0)
    producer = FullProducer([error, error])
    await (await publisher_over(producer, patient=True).send(RECORDS))
    assert producer.taken == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    ("error", "patient"),
    [(MessageSizeTooLargeError(), True), (KafkaTimeoutError(), False)],
    ids=["hopeless", "command"],
)
async def test_what_is_hopeless_is_not_tried_again_and_a_command_waits_no_longer_than_its_time(
    error: Exception, patient: bool
) -> None:
    producer = FullProducer([error])
    with pytest.raises(PublishError, match="not acknowledged"):
        await publisher_over(producer, patient=patient).send(RECORDS)
    assert producer.taken == []


async def test_a_patient_producer_never_drops_a_batch_by_its_age() -> None:
    producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1")
    accumulator: MessageAccumulator = producer._message_accumulator
    try:
        assert accumulator._batch_ttl == 40.0  # what the patient one sets to infinity is there, and in seconds
        batch = MessageBatch(("t", 0), accumulator.create_builder(), math.inf, 0.0)
        assert not batch.expired()
        assert batch.retry_count == 0
        assert not accumulator._batches
        assert not accumulator._pending_batches
    finally:
        producer._closed = True


@given(st.binary(max_size=40), st.integers(1, 50))
def test_a_key_goes_where_aiokafka_and_java_send_it(key: bytes, count: int) -> None:
    partitions = list(range(count))
    assert partition_of_key(key, partitions, []) == DefaultPartitioner()(key, partitions, [])


def test_a_long_key_is_not_held_in_memory() -> None:
    held = publishing._hash_of_key.cache_info().currsize
    key = b"k" * (publishing.LONGEST_HASHED_KEY_BYTES + 1)
    assert partition_of_key(key, [0, 1, 2], []) == DefaultPartitioner()(key, [0, 1, 2], [])
    assert publishing._hash_of_key.cache_info().currsize == held


def test_what_has_no_key_goes_to_a_partition_that_can_be_reached() -> None:
    assert partition_of_key(None, [0, 1, 2], [1]) == 1
    assert partition_of_key(None, [2], []) == 2
