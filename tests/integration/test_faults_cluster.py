"""Faults of a cluster of three brokers: leaders and coordinators die, replicas are too few, all of them come back."""

import asyncio
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from deploy.chaos.proxy import Proxy, Trouble
from deploy.local import ApacheKafka, ApacheKafkaCluster, RedisServer
from schemas.codec import encode
from stream_app.topic_admin import admin_client, create_topics, message_limits
from stream_app.transport import MOST_UNSETTLED_BATCHES
from tests.builders import candidate_list
from tests.fault_kit import Load, healed, healed_log, read_log, serving, stop_gracefully, under_load
from tests.tiny_artefact import item_ids, write_tiny_artefact
from tests.worker_health import Samples, total, until_metrics
from tests.worker_kit import Client, Site, WorkerProcess, client

pytestmark = [pytest.mark.integration, pytest.mark.kafka, pytest.mark.timeout(600)]

SEED = 29
NODES = (1, 2, 3)
PARTITIONS = 4
MOVES_TIMEOUT_S = 60.0
TIMINGS = {
    "RERANK_KAFKA__SESSION_TIMEOUT_MS": "3000",
    "RERANK_KAFKA__HEARTBEAT_INTERVAL_MS": "500",
    "RERANK_KAFKA__REQUEST_TIMEOUT_MS": "4000",  # outages here last longer: it is for one request, not for an outage
    "RERANK_KAFKA__IDEMPOTENCE": "on",
    "RERANK_STALL_AFTER_S": "5",  # an outage of twice that would end a worker that did not know its broker away
}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture(scope="module")
def servers(kafka_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ApacheKafkaCluster, str]]:
    directory = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        store = stack.enter_context(RedisServer(directory))
        yield stack.enter_context(ApacheKafkaCluster(directory, kafka_home)), store.url


@pytest.fixture
def cluster(servers: tuple[ApacheKafkaCluster, str]) -> Iterator[ApacheKafkaCluster]:
    """Return the cluster whole, and leave it whole."""
    yield servers[0]
    bring_back(servers[0])


@pytest.fixture
async def where(servers: tuple[ApacheKafkaCluster, str], artefact: Path, tmp_path: Path) -> Site:
    found = Site(
        bootstrap_servers=servers[0].bootstrap_servers,
        redis_url=servers[1],
        prefix=f"t{uuid.uuid4().hex[:10]}-",
        artefact=artefact,
        directory=tmp_path,
        environment=TIMINGS,
    )
    await create_topics(found.settings(), PARTITIONS, replication_factor=3)
    return found


def bring_back(cluster: ApacheKafkaCluster) -> None:
    """Start every node that is not there: nodes of a cluster are ready only together."""
    away = [cluster.node(number) for number in NODES if not cluster.node(number).is_running]
    for node in away:
        node.launch()
    for node in away:
        node.wait_until_ready()


async def leaders(where: Site, topic: str) -> dict[int, int]:
    """Return the node that leads each partition of a topic."""
    async with admin_client(where.settings().kafka, 15.0) as admin:
        (found,) = await admin.describe_topics([where.prefix + topic])
    return {one["partition"]: one["leader"] for one in found["partitions"]}


async def coordinator(where: Site) -> int:
    """Return the node that coordinates the workers' group."""
    async with admin_client(where.settings().kafka, 15.0) as admin:
        return int(await admin.find_coordinator(f"{where.prefix}group"))


async def until_sent(load: Load, more: int) -> None:
    """Wait until the broker took so many more interactions."""
    wanted = load.counts["interactions"] + more
    async with asyncio.timeout(MOVES_TIMEOUT_S):
        while load.counts["interactions"] < wanted:  # noqa: ASYNC110 - the load tells nobody
            await asyncio.sleep(0.05)


async def until_answered(load: Load, more: int) -> None:
    """Wait until so many more slates have come."""
    wanted = len(load.outsider.slates) + more
    await load.outsider.until(lambda: len(load.outsider.slates) >= wanted, MOVES_TIMEOUT_S)


def assert_rode_through(worker: WorkerProcess) -> None:
    assert worker.process.is_running, worker.log()[-3000:]
    assert worker.log().count('"event":"ready"') == 1


@pytest.mark.parametrize("topic", ["interactions", "reranked"])
async def test_a_leader_killed_under_load_costs_nothing(cluster: ApacheKafkaCluster, where: Site, topic: str) -> None:
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            await until_answered(load, 50)
            cluster.kill((await leaders(where, topic))[0])
            await until_sent(load, 100)
            await until_answered(load, 50)
        await healed(where, load)
        assert_rode_through(worker)
        await stop_gracefully(worker)


async def test_a_coordinator_stopped_under_load_costs_nothing(cluster: ApacheKafkaCluster, where: Site) -> None:
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            await until_answered(load, 50)
            await asyncio.to_thread(cluster.node(await coordinator(where)).stop)
            await until_sent(load, 100)
            await until_answered(load, 50)
        await healed(where, load)
        assert_rode_through(worker)
        await stop_gracefully(worker)


@pytest.mark.parametrize(("how", "nodes"), [("killed", NODES[:2]), ("stopped", NODES[:2]), ("killed", NODES)])
async def test_brokers_away_cost_a_pause(
    cluster: ApacheKafkaCluster, where: Site, how: str, nodes: tuple[int, ...]
) -> None:
    """Two killed: two of three leaders are gone. Two stopped: they hand over to one that has too few replicas."""
    async with client(where) as outsider:
        backlog = await ask_much(outsider)
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            load.request_ids |= backlog
            await until_answered(load, 50)
            for number in nodes:
                node = cluster.node(number)
                await asyncio.to_thread(node.kill if how == "killed" else node.stop)
            await asyncio.sleep(1.0)
            answered = len(outsider.slates)
            await asyncio.sleep(12.0)  # three request timeouts of the worker
            assert_rode_through(worker)
            assert len(outsider.slates) == answered < len(load.request_ids)
            assert len(worker.log().splitlines()) < 200
            await asyncio.to_thread(bring_back, cluster)
            await until_sent(load, 50)
        await healed(where, load)
        assert_rode_through(worker)
        await stop_gracefully(worker)


@pytest.mark.parametrize("redis_emptied", [False, True], ids=["redis kept", "redis emptied"])
async def test_records_gone_by_retention_are_counted_and_the_rest_is_applied(
    cluster: ApacheKafkaCluster, where: Site, redis_emptied: bool
) -> None:
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            await until_sent(load, 100)
        await healed(where, load)
        await stop_gracefully(worker)
        applied = [] if redis_emptied else await read_log(where, load.ends["interactions"])
        committed = {partition: end + 1 for partition, end in load.ends["interactions"].items()}
        if redis_emptied:
            with redis.Redis.from_url(where.redis_url) as connection:
                connection.flushdb()
        async with under_load(outsider, SEED + 1) as unread:
            await until_sent(unread, 100)
        first_left = {partition: end - 4 for partition, end in unread.ends["interactions"].items()}
        await delete_before(where, first_left)
        left = await read_log(where, unread.ends["interactions"])
        assert len(left) == 5 * PARTITIONS
        worker = await serving(where, RERANK_HTTP__PORT="0")
        async with under_load(outsider, SEED + 2) as load_after:
            await until_answered(load_after, 20)
        more = await read_log(where, unread.ends["interactions"] | load_after.ends["interactions"])
        assert set(left) <= set(more)
        load_after.request_ids |= load.request_ids | unread.request_ids
        await healed_log(where, load_after, applied + more)
        from_start = {partition: (0, left) for partition, left in first_left.items()}
        from_group = {partition: (at, first_left[partition] - at) for partition, at in committed.items()}

        def counted(found: Samples) -> bool:
            told, certain = gaps(worker), from_start if redis_emptied else from_group
            records = sum(times * gap[1] for (_, gap), times in told.items())
            return told.keys() >= set(certain.items()) and total(found, "rerank_gap_records_total") == records

        await until_metrics(worker.ready()["http_port"], counted)
        told = gaps(worker)
        for partition in range(PARTITIONS):
            times = told.pop((partition, from_start[partition]), 0), told.pop((partition, from_group[partition]), 0)
            if redis_emptied:  # whether a partition is read from where the group was before that is noticed is a race
                rewinds = worker.log().count(f"event=store_behind partition={partition} has=-1:")
                assert 1 <= times[0] <= rewinds
                assert times[1] <= 1
            else:
                assert times == (0, 1)
        assert told == {}
        await stop_gracefully(worker)


def gaps(worker: WorkerProcess) -> Counter[tuple[int, tuple[int, int]]]:
    """Count what a worker said is gone of `interactions`: partition, and from which offset how many records."""
    said = re.findall(r"event=gap topic=\S+-interactions partition=(\d+) offset=(\d+) records=(\d+) ", worker.log())
    return Counter((int(partition), (int(offset), int(records))) for partition, offset, records in said)


async def delete_before(where: Site, offsets: dict[int, int]) -> None:
    """Delete the beginning of the log, as retention does."""
    log = f"{where.prefix}interactions"
    async with admin_client(where.settings().kafka, 15.0) as admin:
        await admin.delete_records(
            {TopicPartition(log, partition): RecordsToDelete(offset) for partition, offset in offsets.items()}
        )


async def test_a_slate_that_its_topic_does_not_take_is_a_dead_letter_and_its_neighbours_are_served(
    cluster: ApacheKafkaCluster, where: Site
) -> None:
    await limit_messages(where, "reranked", 20_000)
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            await until_answered(load, 20)
            large = candidate_list(
                request_id="r-large",
                user_id="u-1",
                item_ids=[f"{number:0200}" for number in range(200)],
                after=None,
                k=None,
                deadline_ms=60_000,
            )
            await outsider.send("candidates", b"u-1", encode(large))
            await outsider.until(lambda: bool(outsider.dead_letters))
            await until_answered(load, 20)
        load.counts["bad_lists"] += 1
        await healed(where, load)
        assert_rode_through(worker)
        await stop_gracefully(worker)
    assert [letter.code for letter in outsider.dead_letters] == ["output_too_large"]


async def limit_messages(where: Site, topic: str, most_bytes: int) -> None:
    """Let a topic take no larger batch, as somebody who created it by hand may have."""
    name = where.prefix + topic
    async with admin_client(where.settings().kafka, 15.0) as admin:
        settings = {"max.message.bytes": str(most_bytes)}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, settings)])
        while (await message_limits(admin, [name]))[name] != most_bytes:  # noqa: ASYNC110 - the broker tells nobody
            await asyncio.sleep(0.05)


async def ask_much(outsider: Client) -> set[str]:
    """Ask for more slates than a producer holds back while its broker is away; return the request ids."""
    lists = [
        candidate_list(
            request_id=f"r-much-{number}",
            user_id=f"u-{number % 30}",
            item_ids=[*item_ids()[:20]],
            retrieval_scores=None,
            after=None,
            k=None,
            deadline_ms=600_000,
        )
        for number in range(6_000)
    ]
    await outsider.send_many(lists)
    return {one.request_id for one in lists}


async def test_a_slow_broker_costs_time_and_nothing_else(kafka_home: Path, artefact: Path, tmp_path: Path) -> None:
    proxy = Proxy("broker")
    await proxy.start()
    with RedisServer(tmp_path) as store, ApacheKafka(tmp_path, kafka_home, proxy_port=proxy.port) as broker:
        proxy.target_port = broker.ports[2]
        slow = Site(
            bootstrap_servers=proxy.address,
            redis_url=store.url,
            prefix="slow-",
            artefact=artefact,
            directory=tmp_path,
            environment=TIMINGS | {"RERANK_KAFKA__MAX_POLL_RECORDS": "10", "RERANK_HTTP__PORT": "0"},
        )
        await slow.create_topics()
        async with client(replace(slow, bootstrap_servers=broker.address)) as outsider:
            worker = await serving(slow)
            port = worker.ready()["http_port"]
            proxy.make(Trouble(latency_ms=200.0))
            async with under_load(outsider, SEED) as load:
                await until_answered(load, 100)
                backlog = await until_metrics(port, lambda found: total(found, "rerank_unsettled_records") > 0)
            ledger = await healed(slow, load)
            assert_rode_through(worker)
            proxy.heal()
            await stop_gracefully(worker)
    await proxy.stop()
    each = [value for (name, _), value in backlog.items() if name == "rerank_unsettled_records"]
    assert max(each) <= MOST_UNSETTLED_BATCHES * 10 + 10
    assert ledger.ranked > ledger.requests // 2  # the deadline is five seconds
