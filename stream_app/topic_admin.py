"""Create topics and check them: explicitly, because brokers differ in what auto-creation gives.

The embedded broker creates a topic that a metadata request names, so topics are asked for all at once,
without names.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from schemas.topics import CO_PARTITIONED, DEAD_LETTERS, TOPICS, TopicSpec, dead_letter_name, topic_name
from stream_app.errors import SettingsError, TransientError
from stream_app.settings import KafkaSettings, Settings
from stream_app.topic_identity import topic_ids

_TIMEOUT_S = 15.0
_VISIBLE_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicReport:
    """A topic after `create_topics`; `created` is False when it was there before."""

    name: str
    partitions: int
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicProblem:
    """What is wrong with topics, and what to do; `stops_workers`: they cannot serve."""

    message: str
    remedy: str
    stops_workers: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class OurTopics:
    """What a worker must know of its topics."""

    partitions: int  # of interactions, and of candidates
    log_id: str  # id of the topic of interactions, "" where the broker gives none
    lists_id: str  # the same of candidates
    max_bytes: Mapping[str, int]  # of a batch for each output: a larger one would be refused for ever


async def create_topics(
    settings: Settings, partitions: int, replication_factor: int = 1, timeout_s: float = _TIMEOUT_S
) -> list[TopicReport]:
    """Create the topics that are missing, wait until the broker shows them, and report all of them.

    Raises:
        TransientError: the broker did not answer in time.
        SettingsError: the broker refuses a topic.
    """
    specs = topic_specs(settings.topic_prefix)
    async with admin_client(settings.kafka, timeout_s) as admin:
        before = await partition_counts(admin)
        missing = [
            NewTopic(name, partitions, replication_factor, topic_configs=spec.kafka_config())
            for name, spec in specs.items()
            if name not in before
        ]
        if missing:
            answer = await admin.create_topics(missing, timeout_ms=int(timeout_s * 1_000))
            _refuse_refusals(answer.to_object()["topic_errors"])
        counts = await _wait_until_visible(admin, specs)
    return [TopicReport(name=name, partitions=counts[name], created=name not in before) for name in specs]


async def check_topics(settings: Settings, timeout_s: float = _TIMEOUT_S) -> list[TopicProblem]:
    """Ask the broker and return what is wrong with our topics, [] if nothing.

    Raises:
        TransientError: the broker did not answer in time.
    """
    async with admin_client(settings.kafka, timeout_s) as admin:
        return topic_problems(await partition_counts(admin), settings.topic_prefix)


def topic_problems(counts: Mapping[str, int], prefix: str) -> list[TopicProblem]:
    """Return what is wrong with topics of these partition counts: some are missing, or counts differ."""
    problems = []
    required = _required(prefix)
    missing = [name for name in topic_specs(prefix) if name not in counts]
    for names, consequence, stops_workers in (
        ([name for name in missing if name in required], "no worker starts", True),
        ([name for name in missing if name not in required], "no worker needs them", False),
    ):
        if names:
            problems.append(
                TopicProblem(
                    message=f"topics {', '.join(names)}: not there, {consequence}",
                    remedy="rerank topics create --partitions N",
                    stops_workers=stops_workers,
                )
            )
    found = {name: counts[name] for name in _co_partitioned(prefix) if name in counts}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name!r} has {count}" for name, count in found.items())
        problems.append(
            TopicProblem(
                message=f"partitions: {told}; a click and the next list would part, no worker starts",
                remedy="delete the topic that can be lost, create it with the other's partition count",
            )
        )
    return problems


def topic_specs(prefix: str) -> dict[str, TopicSpec]:
    """Return every topic of the topic table by its full name, dead letters last."""
    return {topic_name(prefix, spec.name): spec for spec in (*TOPICS, *DEAD_LETTERS)}


def _outputs(prefix: str) -> list[str]:
    """Return the full names of the topics that a worker writes."""
    return [topic_name(prefix, "reranked"), *(dead_letter_name(prefix, name) for name in CO_PARTITIONED)]


def _required(prefix: str) -> frozenset[str]:
    """Return the topics without which a worker cannot do its work: the others of the table are for others."""
    return frozenset((*_co_partitioned(prefix), *_outputs(prefix)))


def _co_partitioned(prefix: str) -> list[str]:
    return [topic_name(prefix, name) for name in CO_PARTITIONED]


async def our_topics(settings: Settings) -> OurTopics:
    """Return what a worker must know of its topics.

    Raises:
        SettingsError: they cannot serve; what to do.
        TransientError: the broker did not answer in time.
    """
    log, lists = _co_partitioned(settings.topic_prefix)
    async with admin_client(settings.kafka, settings.kafka.request_timeout_ms / 1000.0) as admin:
        counts = await partition_counts(admin)
        problems = [one for one in topic_problems(counts, settings.topic_prefix) if one.stops_workers]
        if problems:
            raise SettingsError("\n".join(f"{problem.message}; {problem.remedy}" for problem in problems))
        ids = await topic_ids(admin._client, [log, lists])
        return OurTopics(
            partitions=counts[log],
            log_id=ids.get(log, ""),
            lists_id=ids.get(lists, ""),
            max_bytes=await message_limits(admin, _outputs(settings.topic_prefix)),
        )


@contextlib.asynccontextmanager
async def admin_client(kafka: KafkaSettings, timeout_s: float) -> AsyncIterator[AIOKafkaAdminClient]:
    """Connect an admin client; everything inside the block together takes `timeout_s` at most.

    Raises:
        TransientError: the broker did not answer in time, or answered an error.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers, request_timeout_ms=int(timeout_s * 1_000))
    try:
        async with asyncio.timeout(timeout_s):
            await admin.start()
            yield admin
    except (KafkaError, TimeoutError, OSError) as error:
        raise TransientError(
            f"kafka {kafka.bootstrap_servers}: no good answer in {timeout_s:.0f} s ({type(error).__name__}), "
            "topics were neither read nor made; start the broker or correct RERANK_KAFKA__BOOTSTRAP_SERVERS"
        ) from error
    finally:
        await admin.close()


async def partition_counts(admin: AIOKafkaAdminClient) -> dict[str, int]:
    """Return the number of partitions of every topic on the broker."""
    return {topic["topic"]: len(topic["partitions"]) for topic in await admin.describe_topics()}


async def message_limits(admin: AIOKafkaAdminClient, names: Iterable[str]) -> dict[str, int]:
    """Return `max.message.bytes` of topics, without those that the broker does not tell."""
    found = await topic_configs(admin, names)
    return {name: int(config["max.message.bytes"]) for name, config in found.items() if "max.message.bytes" in config}


async def topic_configs(admin: AIOKafkaAdminClient, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the settings of topics under Kafka's names, {} if the broker tells none; who may not ask is told none."""
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    try:
        answers = await admin.describe_configs(resources)
    except KafkaError:
        return {}
    return {
        resource["resource_name"]: {
            entry["config_names"]: entry["config_value"] for entry in resource["config_entries"]
        }
        for answer in answers
        for resource in answer.to_object()["resources"]
    }


async def _wait_until_visible(admin: AIOKafkaAdminClient, names: Iterable[str]) -> dict[str, int]:
    """Ask until every partition has a leader: the broker may answer before it knows them itself."""
    while True:
        topics = await admin.describe_topics()
        counts = {
            topic["topic"]: len(topic["partitions"])
            for topic in topics
            if topic["partitions"] and all(one["leader"] >= 0 for one in topic["partitions"])
        }
        if counts.keys() >= set(names):
            return counts
        await asyncio.sleep(_VISIBLE_POLL_S)


def _refuse_refusals(answers: Iterable[Mapping[str, object]]) -> None:
    for answer in answers:
        error = for_code(answer["error_code"])
        if answer["error_code"] and error is not TopicAlreadyExistsError:
            raise SettingsError(
                f"topic {answer['topic']!r}: the broker refuses to create it "
                f"({error.__name__}: {answer['error_message']}); "
                "change --partitions, --replication-factor or RERANK_TOPIC_PREFIX"
            )
