"""Faults of the log and the broker: poison, redelivery, a broker that is gone, more partitions, a refused join."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import NewPartitions
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest

from deploy.chaos.oracle import Record
from deploy.local import ApacheKafka, EmbeddedKafka, LocalStack
from deploy.local.stack import KafkaChoice
from stream_app.topic_admin import admin_client, partition_counts
from tests.builders import interaction
from tests.fault_kit import (
    Load,
    exit_code,
    healed,
    healed_log,
    is_interaction,
    launched,
    read_log,
    redis_of,
    serving,
    stop_gracefully,
    stored_rows,
    under_load,
    until_log_says,
)
from tests.tiny_artefact import write_tiny_artefact
from tests.worker_health import total, until_metrics
from tests.worker_kit import Site, WorkerProcess, ask, client, site

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SEED = 23
PARTITIONS = 4


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    return site(local_stack, artefact, tmp_path)


async def test_a_flood_of_poison_costs_the_good_records_nothing(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED, bad_share=0.5) as load:
            await asyncio.sleep(3.0)
        ledger = await healed(where, load)
        await stop_gracefully(worker)
    assert ledger.dead_interactions > ledger.interactions // 4
    assert ledger.dead_lists == load.counts["bad_lists"] > 0


async def test_the_whole_log_delivered_again_changes_nothing(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            await asyncio.sleep(2.0)
        await healed(where, load)
        await stop_gracefully(worker)
        await reset_to_earliest(where)
        worker = await serving(where, RERANK_HTTP__PORT="0")
        await until_all_are_duplicates(worker, load.counts["interactions"])
        async with under_load(outsider, SEED + 1) as more:
            await asyncio.sleep(2.0)
        more.request_ids |= load.request_ids
        await healed(where, more)
        await stop_gracefully(worker)
        await healed(where, more)


async def until_all_are_duplicates(worker: WorkerProcess, interactions: int) -> None:
    """Wait until a worker has met so many interactions, and check that it had met each before."""
    port = worker.ready()["http_port"]
    found = await until_metrics(port, lambda found: total(found, "rerank_events_total") >= interactions)
    assert found["rerank_events_total", ("duplicate",)] == interactions


async def test_a_forgotten_user_stays_cold_when_the_whole_log_is_delivered_again(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where)
        for number in range(5):
            await outsider.interact(interaction(event_id=f"e-{number}"))
        forgotten = await outsider.send("interactions", b"u-1", None)
        cold = await outsider.ask(ask(after=forgotten))
        await stop_gracefully(worker)
        await reset_to_earliest(where)
        worker = await serving(where, RERANK_HTTP__PORT="0")
        await until_all_are_duplicates(worker, 6)
        still_cold = await outsider.ask(ask())
        await stop_gracefully(worker)
    assert [(slate.outcome, slate.reasons) for slate in (cold, still_cold)] == [("ranked", ["cold_user"])] * 2
    assert stored_rows(where)["u-1"].position == (forgotten.partition, forgotten.offset)


async def reset_to_earliest(where: Site) -> None:
    """Set the group's committed offsets of `interactions` back to 0, as an operator's tool would."""
    log = f"{where.prefix}interactions"
    consumer = AIOKafkaConsumer(
        log,  # as a member: the embedded broker takes commits from nobody else
        bootstrap_servers=where.bootstrap_servers,
        group_id=f"{where.prefix}group",
        enable_auto_commit=False,
        session_timeout_ms=3_000,
        heartbeat_interval_ms=500,
        partition_assignment_strategy=(RangePartitionAssignor,),
    )
    await consumer.start()
    try:
        await consumer.getmany(timeout_ms=0)
        await consumer.commit({TopicPartition(log, number): 0 for number in range(PARTITIONS)})
    finally:
        await consumer.stop()


@pytest.mark.parametrize("gone", ["killed", "hung"])
async def test_sigterm_with_the_broker_gone_ends_in_the_grace_period(
    test_broker: KafkaChoice, kafka_home: Path | None, artefact: Path, tmp_path: Path, gone: str
) -> None:
    with LocalStack(tmp_path, kafka=test_broker, redis="local", kafka_home=kafka_home) as stack:
        where = site(stack, artefact, tmp_path)
        await where.create_topics()
        worker = await serving(where, RERANK_GRACE_S="6", RERANK_KAFKA__COMMIT_INTERVAL_MS="60000")
        async with client(where) as outsider, under_load(outsider, SEED) as load:
            await asyncio.sleep(1.0)
        (stack.kafka.kill if gone == "killed" else stack.kafka.pause)()
        await asyncio.sleep(1.0)
        started_s = time.monotonic()
        await stop_gracefully(worker)
        assert time.monotonic() - started_s < 6.0
        if gone == "killed" and test_broker == "embedded":
            return  # its log went with it
        await asyncio.to_thread(stack.kafka.start if gone == "killed" else stack.kafka.resume)
        async with client(where) as outsider:
            load.outsider = outsider
            worker = await serving(where)
            await healed(where, load)
            await stop_gracefully(worker)


async def test_a_second_sigterm_ends_at_once(
    test_broker: KafkaChoice, kafka_home: Path | None, artefact: Path, tmp_path: Path
) -> None:
    with LocalStack(tmp_path, kafka=test_broker, redis="local", kafka_home=kafka_home) as stack:
        where = site(stack, artefact, tmp_path)
        await where.create_topics()
        worker = await serving(where, RERANK_GRACE_S="120", RERANK_KAFKA__COMMIT_INTERVAL_MS="60000")
        async with client(where) as outsider, under_load(outsider, SEED):
            await asyncio.sleep(1.0)
        stack.kafka.pause()
        worker.process.popen.send_signal(signal.SIGTERM)
        await until_log_says(worker, "event=stopping")
        await asyncio.sleep(2.0)
        assert worker.process.is_running  # its last commit waits for the broker
        worker.process.popen.send_signal(signal.SIGTERM)
        assert await exit_code(worker, 30.0) == 128 + signal.SIGTERM


async def test_a_log_that_starts_anew_ends_the_worker(
    test_broker: KafkaChoice, kafka_home: Path | None, artefact: Path, tmp_path: Path
) -> None:
    with LocalStack(tmp_path, kafka=test_broker, redis="local", kafka_home=kafka_home) as stack:
        where = site(stack, artefact, tmp_path)
        await where.create_topics()
        async with client(where) as outsider:
            worker = await serving(where)
            async with under_load(outsider, SEED) as load:
                await asyncio.sleep(1.0)
            await healed(where, load)
            await stop_gracefully(worker)
        await empty_the_broker(stack, where)
        await where.create_topics()
        async with client(where) as outsider:
            worker = launched(where)
            for user in range(20):
                await outsider.interact(interaction(user_id=f"u-{user}"))
            assert await exit_code(worker) == 1
    assert "rerank reset-epoch" in worker.log()


async def empty_the_broker(stack: LocalStack, where: Site) -> None:
    """Lose every topic, as somebody who deletes them would."""
    if isinstance(stack.kafka, EmbeddedKafka):
        await asyncio.to_thread(stack.kafka.restart)
        return
    async with admin_client(where.settings().kafka, 15.0) as admin:
        names = [name for name in await partition_counts(admin) if name.startswith(where.prefix)]
        await admin.delete_topics(names)
    await asyncio.sleep(1.0)


async def raise_partitions(where: Site, count: int) -> None:
    async with admin_client(where.settings().kafka, 15.0) as admin:
        grown = {f"{where.prefix}{name}": NewPartitions(total_count=count) for name in ("interactions", "candidates")}
        await admin.create_partitions(grown)


@pytest.mark.kafka
@pytest.mark.parametrize("end", ["stopped", "killed"])
async def test_after_the_partition_count_was_raised_moved_users_go_on(
    kafka_home: Path, artefact: Path, tmp_path: Path, end: str
) -> None:
    with LocalStack(tmp_path, kafka="apache", redis="local", kafka_home=kafka_home) as stack:
        where = site(stack, artefact, tmp_path, RERANK_KAFKA__COMMIT_INTERVAL_MS="60000")  # all of it comes again
        await where.create_topics(2)
        async with client(where) as outsider:
            worker = await serving(where)
            async with under_load(outsider, SEED) as load:
                await asyncio.sleep(2.0)
                if end == "killed":
                    worker.process.kill()
            if end == "stopped":
                await healed(where, load)
                await stop_gracefully(worker)
            before = await read_log(where, load.ends["interactions"])
            await raise_partitions(where, 5)
        async with client(where) as outsider:
            worker = await serving(where)
            load.outsider = outsider
            await healed_log(where, load, before)
            async with under_load(outsider, SEED + 1) as more:
                await asyncio.sleep(3.0)
            after = await read_after(where, more, before)
            more.request_ids |= load.request_ids
            await healed_log(where, more, before + after)
            await stop_gracefully(worker)
        assert {partition for partition, *_ in after} == set(range(5))


async def read_after(where: Site, load: Load, before: Sequence[Record]) -> list[Record]:
    known = set(before)
    return [one for one in await read_log(where, load.ends["interactions"]) if one not in known]


@pytest.mark.kafka
async def test_after_the_partition_count_was_raised_a_corrupt_row_costs_no_event_and_no_neighbour(
    kafka_home: Path, artefact: Path, tmp_path: Path
) -> None:
    with LocalStack(tmp_path, kafka="apache", redis="local", kafka_home=kafka_home) as stack:
        where = site(stack, artefact, tmp_path)
        await where.create_topics(2)
        async with client(where) as outsider:
            worker = await serving(where)
            async with under_load(outsider, SEED) as load:
                await asyncio.sleep(1.0)
            await healed(where, load)
            before = await read_log(where, load.ends["interactions"])
            await stop_gracefully(worker)
            await raise_partitions(where, 5)
        async with client(where) as outsider:
            worker = await serving(where)
            async with under_load(outsider, SEED + 1) as more:
                await asyncio.sleep(1.0)
            log = before + await read_after(where, more, before)
            await healed_log(where, more, log)
            await stop_gracefully(worker)
            for user_id in ("u-1", "u-2", "u-3"):
                corrupt(where, user_id)
            worker = await serving(where)
            async with under_load(outsider, SEED + 2) as last:
                await asyncio.sleep(1.0)
            log += await read_after(where, last, log)
            expected = Counter(key for _, _, key, value in log if is_interaction(key, value))
            async with asyncio.timeout(60):
                while {name.encode(): row.events for name, row in stored_rows(where).items()} != expected:  # noqa: ASYNC110 - Redis tells nobody
                    await asyncio.sleep(0.2)
            await stop_gracefully(worker)
            done = await asyncio.to_thread(where.command, "rebuild")
            assert done.returncode == 0, done.stderr
            await healed_log(where, last, log)


def corrupt(where: Site, user_id: str) -> None:
    """Overwrite the row of a user with junk."""
    with redis_of(where.redis_url) as connection:
        (key,) = connection.scan_iter(f"{where.prefix}rerank:*:u:{user_id}")
        connection.set(key, b"junk" * 30)


@pytest.mark.kafka
async def test_a_join_that_the_broker_refuses_ends_the_worker(kafka_home: Path, artefact: Path, tmp_path: Path) -> None:
    strict = ApacheKafka(tmp_path, kafka_home, settings={"group.min.session.timeout.ms": 6_000})
    with strict, LocalStack(tmp_path, kafka="embedded", redis="local") as stack:
        where = site(stack, artefact, tmp_path, RERANK_JOIN_TIMEOUT_S="8", RERANK_KAFKA__SESSION_TIMEOUT_MS="2000")
        refused = Site(
            bootstrap_servers=strict.address,
            redis_url=where.redis_url,
            prefix=where.prefix,
            artefact=artefact,
            directory=tmp_path,
            environment=where.environment,
        )
        await refused.create_topics()
        worker = launched(refused)
        assert await exit_code(worker, 40.0) == 1
        assert "no partitions assigned in 8 s" in worker.log()


async def forbid_writing(where: Site, topic: str) -> None:
    """Let everybody do everything with a topic but write to it. Without any rule all was allowed."""
    await change_rules(where, CreateAclsRequest, topic, Operation.ALL, Permission.ALLOW)
    await change_rules(where, CreateAclsRequest, topic, Operation.WRITE, Permission.DENY)


async def permit_writing(where: Site, topic: str) -> None:
    await change_rules(where, DeleteAclsRequest, topic, Operation.WRITE, Permission.DENY)


class Operation(IntEnum):
    ALL, WRITE = 2, 4


class Permission(IntEnum):
    DENY, ALLOW = 2, 3


async def change_rules(
    where: Site, change: Callable[..., Any], topic: str, operation: Operation, permission: Permission
) -> None:
    """Create or delete one rule about a topic of this name, for whoever comes without credentials, from anywhere."""
    a_topic, of_this_name = 2, 3
    rule = a_topic, where.prefix + topic, of_this_name, "User:ANONYMOUS", "*", operation, permission
    async with admin_client(where.settings().kafka, 15.0) as admin:
        answer = await admin._send_to_controller(change(*rule))
    assert "error_code=0" in str(answer), answer


@pytest.mark.kafka
@pytest.mark.parametrize("topic", ["interactions.dlq", "reranked"])
async def test_a_topic_that_may_not_be_written_ends_the_worker_with_its_input_unacked(
    kafka_home: Path, artefact: Path, tmp_path: Path, topic: str
) -> None:
    strict = ApacheKafka(
        tmp_path,
        kafka_home,
        settings={
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "true",
        },
    )
    with strict, LocalStack(tmp_path, kafka="embedded", redis="local") as stack:
        where = replace(site(stack, artefact, tmp_path), bootstrap_servers=strict.address)
        await where.create_topics()
        async with client(where) as outsider:
            worker = await serving(where)
            await forbid_writing(where, topic)
            async with under_load(outsider, SEED, bad_share=0.2) as load:
                assert await exit_code(worker) == 1
            assert "TopicAuthorizationFailed" in worker.log()
            await permit_writing(where, topic)
            worker = await serving(where)
            await healed(where, load)
            await stop_gracefully(worker)
