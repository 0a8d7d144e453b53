"""Read topics from outside the worker's group: no commits, no rebalance, every partition."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from enum import StrEnum

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from schemas.topics import DEAD_LETTERS, TOPICS, topic_name
from stream_app import lenient_records
from stream_app.errors import SettingsError, TransientError
from stream_app.interactions_log import ISOLATION_LEVEL, stop_reading
from stream_app.settings import Settings
from stream_app.topic_admin import admin_client, partition_counts

FETCH_MAX_WAIT_MS = 100
ASK_TIMEOUT_S = 15.0

TOPIC_NAMES = tuple(spec.name for spec in (*TOPICS, *DEAD_LETTERS))

lenient_records.install()


class Start(StrEnum):
    """Where reading starts."""

    EARLIEST = "earliest"
    LATEST = "latest"  # the embedded broker may give some of its last batch again


async def existing_topics(settings: Settings, names: Sequence[str]) -> dict[str, int]:
    """Return the full names of topics of the topic table, and their partition counts.

    Raises:
        SettingsError: a name is not in the topic table, or the broker has no such topic.
        TransientError: the broker does not answer.
    """
    try:
        wanted = [topic_name(settings.topic_prefix, name) for name in names]
    except ValueError as error:
        raise SettingsError(str(error)) from None
    async with admin_client(settings.kafka, ASK_TIMEOUT_S) as admin:
        counts = await partition_counts(admin)
    missing = [topic for topic in wanted if topic not in counts]
    if missing:
        raise SettingsError(
            f"topics {', '.join(missing)}: not on {settings.kafka.bootstrap_servers}; nothing was done; "
            "`rerank topics create --partitions N`, or correct RERANK_TOPIC_PREFIX"
        )
    return {topic: counts[topic] for topic in wanted}


@contextlib.asynccontextmanager
async def reading(settings: Settings, names: Sequence[str], start: Start) -> AsyncIterator[AIOKafkaConsumer]:
    """Yield a consumer of every partition of the topics, placed at their start or end; nothing is ever committed.

    Raises:
        SettingsError, TransientError: as `existing_topics`.
    """
    counts = await existing_topics(settings, names)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # our errors say the same, with a remedy
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset=start.value,
        isolation_level=ISOLATION_LEVEL,
        fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
        max_partition_fetch_bytes=4 * 1_048_576,
    )
    try:
        await consumer.start()
        partitions = [TopicPartition(topic, p) for topic, count in counts.items() for p in range(count)]
        consumer.assign(partitions)
        if start is Start.LATEST:
            await consumer.seek_to_end(*partitions)
        yield consumer
    except KafkaError as error:
        raise TransientError(
            f"kafka {settings.kafka.bootstrap_servers}: {error!r}; reading ended; check the broker (`rerank doctor`)"
        ) from error
    finally:
        await stop_reading(consumer)


def stop_on_signals() -> Callable[[], bool]:
    """Return a question: has SIGINT or SIGTERM asked to stop? Caller: a coroutine of the main thread."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    return asked.is_set
