"""The doctor's questions to the broker; each answer within seconds, also from a broker that hangs."""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError
from aiokafka.protocol.admin import ApiVersionRequest

from schemas.topics import TopicSpec
from stream_app.commands.findings import Finding, fail, ok, skip, warn
from stream_app.errors import TransientError
from stream_app.settings import KafkaSettings, Settings
from stream_app.topic_admin import admin_client, partition_counts, topic_configs, topic_problems, topic_specs

_TIMEOUT_S = 3.0
_PRODUCE, _FETCH = 0, 1
_OLDEST_WITH_HEADERS = {_PRODUCE: 3, _FETCH: 4}


async def examine_broker(settings: Settings) -> list[Finding]:
    """Ask the broker everything that the worker relies on; only its absence is reported when it is absent."""
    try:
        async with admin_client(settings.kafka, _TIMEOUT_S) as admin:
            cluster = await admin.describe_cluster()
            nodes = [broker["node_id"] for broker in cluster["brokers"]]
            return [
                ok("broker", f"{settings.kafka.bootstrap_servers}: answers, {len(nodes)} node(s)"),
                await _protocol(settings.kafka),
                await _session_timeout(admin, settings.kafka, nodes[0]),
                await _idempotence(settings.kafka),
                *await _topics(admin, settings.topic_prefix),
            ]
    except TransientError as error:
        return [
            fail(
                "broker",
                f"{settings.kafka.bootstrap_servers}: no answer ({type(error.__cause__).__name__})",
                "start the broker (rerank up starts one), or correct RERANK_KAFKA__BOOTSTRAP_SERVERS",
            )
        ]


async def _protocol(kafka: KafkaSettings) -> Finding:
    client = AIOKafkaClient(bootstrap_servers=kafka.bootstrap_servers, request_timeout_ms=int(_TIMEOUT_S * 1_000))
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await client.bootstrap()
            answer = await client.send(client.get_random_node(), ApiVersionRequest())
    except (KafkaError, TimeoutError) as error:
        return skip("broker version", f"not told ({type(error).__name__})")
    finally:
        await client.close()
    newest = {key: newest for key, _, newest in answer.api_versions}
    message = f"speaks Produce up to {newest.get(_PRODUCE)}, Fetch up to {newest.get(_FETCH)}"
    if any(newest.get(key, -1) < oldest for key, oldest in _OLDEST_WITH_HEADERS.items()):
        return fail(
            "broker version",
            f"{message}: too old for record headers",
            "use Kafka 0.11 or newer, 3.x or 4.x is tested",
        )
    return ok("broker version", message)


async def _session_timeout(admin: AIOKafkaAdminClient, kafka: KafkaSettings, node_id: int) -> Finding:
    check, ours_ms = "session timeout", kafka.session_timeout_ms
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, str(node_id))])
    except (KafkaError, TimeoutError) as error:
        return skip(check, f"the broker does not tell its limits ({type(error).__name__})")
    told = {
        entry["config_names"]: entry["config_value"]
        for resource in answer.to_object()["resources"]
        for entry in resource["config_entries"]
    }
    if "group.min.session.timeout.ms" not in told:
        return skip(check, "the broker does not tell group.min.session.timeout.ms")
    shortest_ms = int(told["group.min.session.timeout.ms"])
    longest_ms = int(told.get("group.max.session.timeout.ms") or ours_ms)
    if shortest_ms <= ours_ms <= longest_ms:
        return ok(check, f"{ours_ms} ms, the broker accepts {shortest_ms} to {longest_ms} ms")
    return fail(
        check,
        f"{ours_ms} ms: the broker accepts {shortest_ms} to {longest_ms} ms, no worker could join its group",
        "set RERANK_KAFKA__SESSION_TIMEOUT_MS inside these limits, or change the limits on the broker",
    )


async def _idempotence(kafka: KafkaSettings) -> Finding:
    producer = AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers,
        enable_idempotence=True,
        request_timeout_ms=int(_TIMEOUT_S * 1_000),
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await producer.start()
    except (KafkaError, TimeoutError) as error:
        return warn(
            "idempotent producer",
            f"refused ({type(error).__name__}): a retry after a lost reply may write a slate twice",
            "use Apache Kafka in production; on a laptop this is harmless",
        )
    finally:
        with contextlib.suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT_S):
                await producer.stop()
    return ok("idempotent producer", "accepted")


async def _topic_configs(admin: AIOKafkaAdminClient, prefix: str) -> list[Finding]:
    """Warn of topics that are not as the contract says; of what the broker does not tell nothing is said."""
    specs = topic_specs(prefix)
    found = await topic_configs(admin, specs)
    return [*_record_times(specs, found), *_message_sizes(specs, found)]


def _record_times(specs: Mapping[str, TopicSpec], found: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    kind = "message.timestamp.type"
    by_workers = [
        name
        for name, config in found.items()
        if specs[name].broker_time and config.get(kind) not in (None, specs[name].kafka_config()[kind])
    ]
    if by_workers:
        yield warn(
            "record times",
            f"topics {', '.join(by_workers)} take a worker's time: a clock that is an hour ahead ends its worker",
            f"set their {kind} to LogAppendTime (docs/operators.md, Topics)",
        )


def _message_sizes(specs: Mapping[str, TopicSpec], found: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    kind = "max.message.bytes"
    for name, config in found.items():
        wanted = specs[name].kafka_config()[kind]
        if int(config.get(kind, wanted)) < int(wanted):
            yield warn(
                "message size",
                f"topic {name!r} takes at most {config[kind]} bytes, not {wanted}: larger records are refused or cut",
                f"set its {kind} to {wanted}",
            )


async def _topics(admin: AIOKafkaAdminClient, prefix: str) -> list[Finding]:
    counts = await partition_counts(admin)
    problems = topic_problems(counts, prefix)
    findings = [
        (fail if problem.stops_workers else warn)("topics", problem.message, problem.remedy) for problem in problems
    ]
    if any(problem.stops_workers for problem in problems):
        return findings
    return [*(findings or [ok("topics", f"all there, prefix {prefix!r}")]), *await _topic_configs(admin, prefix)]
