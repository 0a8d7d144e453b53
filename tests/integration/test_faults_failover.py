"""Failovers under load: a primary that dies with acknowledged writes, a demoted one, a cluster in motion."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import redis

from deploy.local import LocalStack, RedisServer
from deploy.local.ports import LOOPBACK
from stream_app.store import bucket_of
from tests.fault_kit import healed, launched, serving, stop_gracefully, under_load
from tests.redis_kit import Cluster, ClusterServer, Sentinels
from tests.tiny_artefact import write_tiny_artefact
from tests.worker_kit import Site, client, site

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SEED = 23
LOST_S = 0.7  # for so long nothing reaches the replica; shorter than anybody takes to call it down


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    started = Sentinels(tmp_path)
    yield started
    started.stop()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    started = Cluster(tmp_path, with_replicas=True)
    yield started
    started.stop()


@pytest.fixture
def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    return site(local_stack, artefact, tmp_path)


async def dead_with_what_its_replica_lacks(primary: RedisServer, replica: RedisServer) -> None:
    """Kill a primary that has acknowledged writes for LOST_S which its replica never saw."""
    replica.pause()
    with redis.Redis(host=LOOPBACK, port=primary.port) as admin:
        admin.execute_command("CLIENT", "KILL", "TYPE", "replica")  # what is on its way is lost as well
    await asyncio.sleep(LOST_S)
    primary.kill()
    replica.resume()


async def promoted(server: RedisServer) -> None:
    """Wait until a replica has become a primary."""
    until_s = time.monotonic() + 30.0
    while True:
        with redis.Redis(host=LOOPBACK, port=server.port) as admin:
            if admin.info("replication")["role"] == "master":
                return
        assert time.monotonic() < until_s, "no failover in 30 s"
        await asyncio.sleep(0.05)


async def test_a_failover_that_loses_acknowledged_writes_loses_no_interaction(
    where: Site, sentinels: Sentinels
) -> None:
    where = replace(where, redis_url=sentinels.url)
    await where.create_topics()
    async with client(where) as outsider:
        slow_to_catch_up = {"RERANK_MICRO_BATCH_INTERACTIONS": "1", "RERANK_KAFKA__MAX_POLL_RECORDS": "20"}
        worker = await serving(where, RERANK_CACHED_USERS="0", **slow_to_catch_up)
        async with under_load(outsider, SEED) as load:
            await asyncio.sleep(1.0)
            await dead_with_what_its_replica_lacks(sentinels.primary, sentinels.replica)
            await promoted(sentinels.replica)
            await asyncio.sleep(1.0)
        ledger = await healed(where, load)
        assert worker.process.is_running
        await stop_gracefully(worker)
    assert "event=store_behind" in worker.log()
    assert ledger.fallback > 0


async def test_a_demoted_primary_is_left_for_the_new_one(where: Site, sentinels: Sentinels) -> None:
    where = replace(where, redis_url=sentinels.url)
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            await asyncio.sleep(1.0)
            sentinels.fail_over()
            await promoted(sentinels.replica)
            await asyncio.sleep(1.0)
        await healed(where, load)
        assert worker.process.is_running
        await stop_gracefully(worker)
    assert not sentinels.is_primary(sentinels.primary)


@pytest.mark.parametrize("worker_dies_too", [False, True], ids=["the worker lives", "the worker dies too"])
async def test_a_cluster_failover_that_loses_acknowledged_writes_loses_no_interaction(
    where: Site, cluster: Cluster, worker_dies_too: bool
) -> None:
    """A worker that dies with the primary knows no marks: the one after it reads the durability window again."""
    where = replace(where, redis_url=cluster.url)
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            await asyncio.sleep(1.5)
            victim = away_from_the_log(cluster, where)
            await dead_with_what_its_replica_lacks(cluster.nodes[victim], cluster.replicas[victim])
            if worker_dies_too:
                worker.process.kill()
            await promoted(cluster.replicas[victim])
            if worker_dies_too:
                worker = launched(where)
            await asyncio.sleep(1.0)
        await asyncio.to_thread(worker.ready)
        await healed(where, load)
        assert worker.process.is_running
        await stop_gracefully(worker)


async def test_slots_that_move_under_load_lose_nothing(where: Site, cluster: Cluster) -> None:
    where = replace(where, redis_url=cluster.url)
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED, users=4) as load:
            await asyncio.sleep(1.0)
            for n in range(4):
                slot = slot_of(cluster, f"{where.prefix}rerank:{{{bucket_of(f'u-{n}')}}}:u:u-{n}")
                source = holder(cluster, slot)
                target = cluster.nodes[(cluster.nodes.index(source) + 1) % 3]
                await asyncio.to_thread(cluster.move_slot, slot, source, target, 0.2)
            await asyncio.sleep(1.0)
        ledger = await healed(where, load)
        assert worker.process.is_running
        await stop_gracefully(worker)
    assert ledger.shed == 0
    errors = [cast("dict[str, object]", node.call("INFO", "errorstats")) for node in cluster.nodes]
    assert "errorstat_MOVED" in {name for node in errors for name in node}


def slot_of(cluster: Cluster, key: str) -> int:
    return int(str(cluster.nodes[0].call("CLUSTER", "KEYSLOT", key)))


def holder(cluster: Cluster, slot: int) -> ClusterServer:
    """Return the node that holds a slot, as the slots were dealt."""
    return cluster.nodes[min(2, slot // 5_461)]


def away_from_the_log(cluster: Cluster, where: Site) -> int:
    """Return a node that does not hold the progress of the log: what it loses, no progress tells."""
    log = holder(cluster, slot_of(cluster, f"{where.prefix}rerank:{{log}}:{where.prefix}interactions"))
    return (cluster.nodes.index(log) + 1) % 3
