"""The doctor names what is wrong, gives a remedy, never waits long and never shows a secret."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import typer
from aiokafka.admin import NewTopic
from pydantic import SecretStr
from typer.testing import CliRunner

from deploy.local import ApacheKafka, LocalStack, RedisServer
from deploy.local.ports import free_ports
from stream_app.commands.doctor import doctor
from stream_app.commands.doctor_broker import examine_broker
from stream_app.commands.doctor_redis import examine_redis
from stream_app.commands.findings import Finding
from stream_app.settings import KafkaSettings, RedisSettings, Settings
from stream_app.topic_admin import admin_client, create_topics
from tests.redis_kit import (
    COMMANDS,
    PASSWORD,
    USER,
    Certificates,
    Cluster,
    Sentinels,
    TlsTerminator,
    eventually,
    permit,
)
from tests.tiny_artefact import write_tiny_artefact

pytestmark = pytest.mark.integration

_DOCTOR = "import typer; from stream_app.commands.doctor import doctor; typer.run(doctor)"
_LONGEST_S = 15.0
_ROOT = Path(__file__).resolve().parents[2]


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings}


def broker_settings(bootstrap_servers: str, prefix: str, session_timeout_ms: int = 10_000) -> Settings:
    kafka = KafkaSettings(bootstrap_servers=bootstrap_servers, session_timeout_ms=session_timeout_ms)
    return Settings(kafka=kafka, topic_prefix=prefix)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Start a Redis that the test may spoil."""
    with RedisServer(tmp_path) as server:
        yield server


async def redis_verdicts(url: str) -> dict[str, str]:
    return verdicts(await examine_redis(RedisSettings(url=SecretStr(url))))


async def test_a_healthy_redis_passes_every_check(local_stack: LocalStack) -> None:
    found = await redis_verdicts(local_stack.redis_url)
    assert found.pop("redis version") in {"ok", "warn"}  # the wheel's Redis is an old one
    assert found.pop("redis persistence") == "warn"  # what it holds is in the log
    assert found == dict.fromkeys(("redis", "redis role", "redis eviction", "redis memory", "redis permissions"), "ok")


@pytest.mark.parametrize("kind", [Sentinels, Cluster])
async def test_a_redis_of_several_servers_passes_every_check(
    tmp_path: Path, kind: type[Sentinels] | type[Cluster]
) -> None:
    servers = kind(tmp_path)
    try:
        found = await examine_redis(RedisSettings(url=SecretStr(servers.url)))
    finally:
        servers.stop()
    primaries = 3 if kind is Cluster else 1
    warned = [finding for finding in found if finding.verdict != "ok"]
    assert {finding.check for finding in warned} <= {"redis version", "redis persistence"}
    assert len(warned) in (primaries, 2 * primaries)
    assert [finding.message.startswith("3 primaries: ") for finding in found if finding.check == "redis role"] == [
        kind is Cluster
    ]


async def test_a_cluster_node_that_evicts_is_named(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        cluster.nodes[1].call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        found = await examine_redis(RedisSettings(url=SecretStr(cluster.url)))
    finally:
        cluster.stop()
    (finding,) = [finding for finding in found if finding.check == "redis eviction"]
    assert finding.verdict == "fail"
    assert finding.message.startswith(f"{cluster.nodes[1].address}: maxmemory-policy allkeys-lru")


async def test_a_redis_with_tls_and_an_acl_user_passes_and_a_stranger_s_certificate_is_named(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    certificates = Certificates(tmp_path)
    permit(own_redis.address)
    with TlsTerminator(own_redis, *certificates.sign("redis", valid=True)) as terminator:
        url = SecretStr(f"rediss://{USER}:{PASSWORD}@127.0.0.1:{terminator.port}/0")
        found = verdicts(await examine_redis(RedisSettings(url=url, ca_file=certificates.ca)))
        (refused,) = await examine_redis(RedisSettings(url=url))
    assert (found["redis"], found["redis permissions"], found["redis role"]) == ("ok", "ok", "ok")
    assert (refused.verdict, "RERANK_REDIS__CA_FILE" in refused.remedy) == ("fail", True)
    assert PASSWORD not in repr(refused)


async def test_a_redis_that_cannot_write_its_disk_fails(own_redis: RedisServer) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.set("a", "b")
        client.config_set("dir", str(own_redis.directory))
        own_redis.directory.joinpath("taken").mkdir()
        client.config_set("dbfilename", "taken")
        with pytest.raises(redis.ResponseError):
            client.save()
        client.bgsave()
        eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    assert (await redis_verdicts(own_redis.url))["redis persistence"] == "fail"


async def test_a_user_who_may_not_ask_for_info_is_told_what_is_unchecked(own_redis: RedisServer) -> None:
    permit(own_redis.address, commands=[name for name in COMMANDS if name != "info"])
    found = await redis_verdicts(f"redis://{USER}:{PASSWORD}@{own_redis.address}/0")
    assert found == {"redis": "ok", "redis info": "warn", "redis permissions": "ok"}


async def test_a_redis_that_evicts_user_states_fails(own_redis: RedisServer) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    assert (await redis_verdicts(own_redis.url))["redis eviction"] == "fail"


async def test_a_full_redis_fails(own_redis: RedisServer) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("maxmemory", "1mb")
        client.config_set("maxmemory", "100kb")
    assert (await redis_verdicts(own_redis.url))["redis memory"] == "fail"


async def test_a_user_who_may_not_run_scripts_fails(own_redis: RedisServer) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.execute_command("ACL", "SETUSER", "plain", "on", ">pw", "~*", "+@all", "-@scripting")
    assert (await redis_verdicts(f"redis://plain:pw@{own_redis.address}/0"))["redis permissions"] == "fail"


async def test_a_refused_password_fails_and_is_not_shown(own_redis: RedisServer) -> None:
    url = f"redis://somebody:geheim@{own_redis.address}/0"
    (finding,) = await examine_redis(RedisSettings(url=SecretStr(url)))
    assert finding.verdict == "fail"
    assert "refuses our password" in finding.message
    assert "geheim" not in repr(finding)
    assert "somebody" not in repr(finding)


async def test_an_absent_redis_fails_with_its_address() -> None:
    port = free_ports(1)[0]
    (finding,) = await examine_redis(RedisSettings(url=SecretStr(f"redis://:geheim@127.0.0.1:{port}/0")))
    assert finding.verdict == "fail"
    assert finding.message.startswith(f"127.0.0.1:{port}/0: no answer")


async def test_a_healthy_broker_passes_and_its_limits_are_said(local_stack: LocalStack, topic_prefix: str) -> None:
    settings = broker_settings(local_stack.bootstrap_servers, topic_prefix)
    await create_topics(settings, 2)
    embedded = local_stack.broker_kind == "embedded"
    assert verdicts(await examine_broker(settings)) == {
        "broker": "ok",
        "broker version": "ok",
        "session timeout": "skip" if embedded else "ok",
        "idempotent producer": "warn" if embedded else "ok",
        "topics": "ok",
    }


async def test_missing_topics_fail_with_the_remedy(local_stack: LocalStack, topic_prefix: str) -> None:
    findings = await examine_broker(broker_settings(local_stack.bootstrap_servers, topic_prefix))
    missing = [(finding.verdict, finding.remedy) for finding in findings if finding.check == "topics"]
    assert missing == [(verdict, "rerank topics create --partitions N") for verdict in ("fail", "warn")]


async def test_an_absent_broker_is_one_failure() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    (finding,) = await examine_broker(broker_settings(address, ""))
    assert (finding.check, finding.verdict) == ("broker", "fail")
    assert finding.message == f"{address}: no answer (KafkaConnectionError)"


@pytest.mark.kafka
async def test_a_session_timeout_that_the_broker_refuses_fails(tmp_path: Path, kafka_home: Path | None) -> None:
    limits = {"group.min.session.timeout.ms": 6_000}
    with ApacheKafka(tmp_path, kafka_home, heap_megabytes=256, settings=limits) as broker:
        for ours_ms, verdict in ((5_999, "fail"), (6_000, "ok")):
            found = verdicts(await examine_broker(broker_settings(broker.address, "", ours_ms)))
            assert found["session timeout"] == verdict
            assert found["idempotent producer"] == "ok"


@pytest.mark.kafka
async def test_topics_that_take_the_time_of_a_worker_s_clock_are_named(tmp_path: Path, kafka_home: Path | None) -> None:
    with ApacheKafka(tmp_path, kafka_home, heap_megabytes=256) as broker:
        settings = broker_settings(broker.address, "old-")
        async with admin_client(settings.kafka, 10) as admin:
            await admin.create_topics([NewTopic("old-reranked", 1, 1)])
        await create_topics(settings, 1)
        told = {finding.check: finding for finding in await examine_broker(settings)}
    assert told["record times"].verdict == "warn"
    assert told["record times"].message.startswith("topics old-reranked take a worker's time")


def run_doctor(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    app = typer.Typer()
    app.command()(doctor)
    result = CliRunner().invoke(app, ["--json"])
    return result.exit_code, json.loads(result.stdout)


def test_any_failure_makes_the_exit_code_one(
    local_stack: LocalStack, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = local_stack.environment() | {"RERANK_TOPIC_PREFIX": topic_prefix}
    exit_code, answer = run_doctor(environment, monkeypatch)
    assert exit_code == 1
    assert answer["healthy"] is False
    assert all(finding["remedy"] for finding in answer["findings"] if finding["verdict"] in {"warn", "fail"})


def test_servers_that_hang_are_named_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalStack(tmp_path, kafka="embedded", redis="local") as stack:
        stack.kafka.pause()
        stack.redis.pause()
        for name, value in stack.environment().items():
            monkeypatch.setenv(name, value)
        done = subprocess.run(
            [sys.executable, "-c", _DOCTOR, "--json"],
            cwd=_ROOT,
            capture_output=True,
            timeout=_LONGEST_S,
            check=False,
        )
    found = {finding["check"]: finding["verdict"] for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert (found["broker"], found["redis"]) == ("fail", "fail")
    assert done.stderr == b""


async def test_servers_that_answer_are_well_though_the_artefact_brings_torch(
    local_stack: LocalStack, topic_prefix: str, tmp_path: Path
) -> None:
    settings = {"RERANK_TOPIC_PREFIX": topic_prefix, "RERANK_ARTEFACT": str(write_tiny_artefact(tmp_path / "tiny"))}
    await create_topics(broker_settings(local_stack.bootstrap_servers, topic_prefix), 1)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", _DOCTOR, "--json"],  # a process of its own: this one has torch
        cwd=_ROOT,
        env={**os.environ, **local_stack.environment(), **settings},
        capture_output=True,
        timeout=60,
        check=False,
    )
    answer = json.loads(done.stdout)
    assert [finding for finding in answer["findings"] if finding["verdict"] == "fail"] == []
    assert (done.returncode, answer["healthy"]) == (0, True)
