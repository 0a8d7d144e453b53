"""Faults of a cluster of three brokers: leaders and coordinators die, replicas are too few, all of them come back."""

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.local import ApacheKafkaCluster, RedisServer
from stream_app.topic_admin import admin_client, create_topics
from tests.builders import candidate_list
from tests.fault_kit import Load, healed, serving, stop_gracefully, under_load
from tests.tiny_artefact import item_ids, write_tiny_artefact
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
}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture(scope="module")
def servers(kafka_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ApacheKafkaCluster, str]]:
    directory = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(directory))
        yield stack.enter_context(ApacheKafkaCluster(directory, kafka_home)), redis.url


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
