"""Topics are created explicitly, once, and checked."""

import asyncio
import json
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from typer.testing import CliRunner

from deploy.local import ApacheKafka, LocalStack
from deploy.local.ports import free_ports
from stream_app.commands.topics import app
from stream_app.errors import SettingsError, TransientError
from stream_app.settings import KafkaSettings, Settings
from stream_app.topic_admin import admin_client, check_topics, create_topics, partition_counts, topic_specs

pytestmark = pytest.mark.integration


def settings_for(bootstrap_servers: str, prefix: str) -> Settings:
    return Settings(kafka=KafkaSettings(bootstrap_servers=bootstrap_servers), topic_prefix=prefix)


@pytest.fixture
def settings(local_stack: LocalStack, topic_prefix: str) -> Settings:
    """Return settings for the shared broker and a prefix of the test's own."""
    return settings_for(local_stack.bootstrap_servers, topic_prefix)


async def counts_on(settings: Settings) -> dict[str, int]:
    async with admin_client(settings.kafka, 10) as admin:
        return await partition_counts(admin)


async def test_create_makes_every_topic_with_the_partitions_asked_for(settings: Settings) -> None:
    reports = await create_topics(settings, 3)
    wanted = list(topic_specs(settings.topic_prefix))
    assert [(report.name, report.partitions, report.created) for report in reports] == [
        (name, 3, True) for name in wanted
    ]
    counts = await counts_on(settings)
    assert {name: counts[name] for name in wanted} == dict.fromkeys(wanted, 3)
    assert await check_topics(settings) == []


async def test_create_twice_leaves_what_exists_as_it_is(settings: Settings) -> None:
    await create_topics(settings, 2)
    reports = await create_topics(settings, 5)
    assert {(report.partitions, report.created) for report in reports} == {(2, False)}


async def test_a_check_does_not_create_what_it_asks_for(settings: Settings) -> None:
    told = [problem.message for problem in await check_topics(settings)]
    assert len(told) == 2
    assert all(any(name in message for message in told) for name in topic_specs(settings.topic_prefix))
    assert not any(name.startswith(settings.topic_prefix) for name in await counts_on(settings))


async def test_an_unreachable_broker_is_transient_and_said_with_its_address(topic_prefix: str) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(TransientError, match=f"kafka {address}: no good answer"):
        await check_topics(settings_for(address, topic_prefix), timeout_s=2)


async def test_a_broker_that_hangs_is_given_up_in_time(tmp_path: Path, topic_prefix: str) -> None:
    with LocalStack(tmp_path, kafka="embedded", redis="local") as stack:
        stack.kafka.pause()
        with pytest.raises(TransientError):
            await asyncio.wait_for(
                check_topics(settings_for(stack.bootstrap_servers, topic_prefix), timeout_s=1), timeout=10
            )


async def create_unequal(settings: Settings) -> None:
    async with admin_client(settings.kafka, 10) as admin:
        await admin.create_topics([NewTopic(f"{settings.topic_prefix}candidates", 3, 1)])
    await create_topics(settings, 2)


def test_the_commands_exit_one_with_the_remedy_on_unequal_counts(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(create_unequal(settings))
    monkeypatch.setenv("RERANK_KAFKA__BOOTSTRAP_SERVERS", settings.kafka.bootstrap_servers)
    monkeypatch.setenv("RERANK_TOPIC_PREFIX", settings.topic_prefix)
    for command in (["create", "--partitions", "2"], ["check"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert "delete the topic that can be lost" in result.stderr


def test_create_reports_in_json(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_KAFKA__BOOTSTRAP_SERVERS", settings.kafka.bootstrap_servers)
    monkeypatch.setenv("RERANK_TOPIC_PREFIX", settings.topic_prefix)
    result = CliRunner().invoke(app, ["create", "--partitions", "2", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "topics": [{"name": name, "partitions": 2, "created": True} for name in topic_specs(settings.topic_prefix)],
        "problems": [],
    }


async def config_of(admin: AIOKafkaAdminClient, name: str) -> dict[str, str]:
    (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
    (resource,) = answer.to_object()["resources"]
    return {entry["config_names"]: entry["config_value"] for entry in resource["config_entries"]}


@pytest.mark.kafka
async def test_apache_kafka_keeps_the_configuration_and_refuses_what_it_cannot_do(
    tmp_path: Path, kafka_home: Path | None
) -> None:
    with ApacheKafka(tmp_path, kafka_home, heap_megabytes=256) as broker:
        settings = settings_for(broker.address, "kept-")
        await create_topics(settings, 1)
        async with admin_client(settings.kafka, 10) as admin:
            for name, spec in topic_specs("kept-").items():
                wanted = spec.kafka_config()
                found = await config_of(admin, name)
                assert {key: found[key] for key in wanted} == wanted
        with pytest.raises(SettingsError, match=r"topic 'more-.*InvalidReplicationFactorError"):
            await create_topics(settings_for(broker.address, "more-"), 1, replication_factor=3)
