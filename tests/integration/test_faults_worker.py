"""Faults of workers: killed, frozen, doubled, told to end. The oracle says what must be left, every user, every bit."""

import asyncio
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor

from deploy.chaos.skewed_worker import CLOCK_FILE, set_clock
from deploy.local import LocalStack
from schemas.topics import CO_PARTITIONED
from stream_app.failpoints import POINTS
from tests.builders import interaction
from tests.fault_kit import (
    HEAL_TIMEOUT_S,
    Load,
    exit_code,
    healed,
    launched,
    serving,
    stop_gracefully,
    stored_rows,
    under_load,
    until_log_says,
)
from tests.tiny_artefact import write_tiny_artefact
from tests.worker_health import until_metrics
from tests.worker_kit import Site, WorkerProcess, ask, client, site

KILLS = int(os.environ.get("RERANK_TEST_KILLS", "8"))
SEED = int(os.environ.get("RERANK_TEST_SEED", "7"))
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600 + 10 * KILLS)]
MONTH_S = 30 * 86_400.0
ASSIGNED = "event=assigned "
# A dead member is missed after the session timeout: a short one keeps these tests short.
QUICK = {
    "RERANK_KAFKA__SESSION_TIMEOUT_MS": "2000",
    "RERANK_KAFKA__HEARTBEAT_INTERVAL_MS": "400",
    "RERANK_KAFKA__COMMIT_INTERVAL_MS": "300",
}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    return site(local_stack, artefact, tmp_path, **QUICK)


async def finish(where: Site, load: Load) -> None:
    """Let a fresh worker finish what is left, compare with the oracle, and again after it ended."""
    worker = await serving(where)
    await healed(where, load)
    await stop_gracefully(worker)
    await healed(where, load)


async def test_workers_killed_at_any_moment_lose_nothing_and_apply_nothing_twice(where: Site) -> None:
    await where.create_topics()
    moments = random.Random(SEED)  # noqa: S311 - a seed, not a secret
    async with client(where) as outsider:
        async with under_load(outsider, SEED) as load:
            for _ in range(KILLS):
                worker = launched(where)
                if moments.random() < 0.8:
                    await asyncio.to_thread(worker.ready)
                await asyncio.sleep(moments.uniform(0.0, 1.5))
                worker.process.kill()
        await finish(where, load)


async def test_a_worker_killed_at_each_fail_point_loses_nothing_and_applies_nothing_twice(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        async with under_load(outsider, SEED) as load:
            for point in POINTS:
                worker = await serving(where, RERANK_FAILPOINT=f"{point}:3")
                assert await exit_code(worker) == -signal.SIGKILL, point
        await finish(where, load)
        assert max(Counter(slate.request_id for slate in outsider.slates).values()) > 1  # who died after publishing


async def test_a_bug_at_each_fail_point_is_survived_or_ends_the_worker_with_nothing_lost(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        async with under_load(outsider, SEED) as load:
            for point in ("before_publish", "after_publish", "before_commit", "after_commit"):
                ended = await serving(where, RERANK_FAILPOINT=f"{point}:3:raise")
                assert await exit_code(ended) == 1, point
            for point in ("before_save", "after_save"):
                goes_on = await serving(where, RERANK_FAILPOINT=f"{point}:3:raise")
                await until_log_says(goes_on, "event=bug")
                await stop_gracefully(goes_on)
        await finish(where, load)
        assert outsider.dead_letters == []


async def frozen(worker: WorkerProcess) -> None:
    """Wait until a worker has stopped itself at a fail-point."""
    process = psutil.Process(worker.process.pid)
    while process.status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110 - the state of another process has no event
        await asyncio.sleep(0.05)


async def until_applied(where: Site, ends: Mapping[int, int]) -> None:
    """Wait until the rows reflect each partition up to its offset in `ends`."""
    async with asyncio.timeout(HEAL_TIMEOUT_S):
        while True:
            applied: dict[int, int] = defaultdict(lambda: -1)
            for row in stored_rows(where).values():
                applied[row.position[0]] = max(applied[row.position[0]], row.position[1])
            if all(applied[partition] >= end for partition, end in ends.items()):
                return
            await asyncio.sleep(0.1)


async def test_a_zombie_wakes_up_to_find_its_writes_refused(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        async with under_load(outsider, SEED) as load:
            zombie = await serving(where, RERANK_FAILPOINT="before_save:10:stop", RERANK_HTTP__PORT="0")
            await frozen(zombie)
            in_hand = dict(load.ends["interactions"])
            second = await serving(where)
            await until_applied(where, in_hand)  # what the zombie holds is older than that
            zombie.process.resume()
            port = zombie.ready()["http_port"]
            await until_metrics(port, lambda found: found.get(("rerank_events_total", ("duplicate",)), 0) > 0)
            await until_log_says(zombie, ASSIGNED, times=2)
        await healed(where, load)
        await stop_gracefully(zombie)
        await stop_gracefully(second)
        await healed(where, load)


async def test_workers_that_join_leave_and_die_lose_nothing(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        async with under_load(outsider, SEED) as load:
            first, second, third = [await serving(where) for _ in range(3)]
            await until_log_says(first, ASSIGNED, times=3)
            second.process.kill()
            await until_log_says(first, ASSIGNED, times=4)
            await stop_gracefully(third)
            await until_log_says(first, ASSIGNED, times=5)
        await healed(where, load)
        await stop_gracefully(first)
        await healed(where, load)


async def test_a_member_that_comes_and_goes_costs_nothing(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            for times in (2, 4, 6):
                member = AIOKafkaConsumer(
                    *(where.prefix + name for name in CO_PARTITIONED),
                    bootstrap_servers=where.bootstrap_servers,
                    group_id=where.worker_environment()["RERANK_GROUP_ID"],
                    session_timeout_ms=2_000,
                    heartbeat_interval_ms=400,
                    enable_auto_commit=False,
                    partition_assignment_strategy=(RangePartitionAssignor,),
                )
                await member.start()
                while not member.assignment():  # noqa: ASYNC110 - aiokafka tells nobody
                    await asyncio.sleep(0.05)
                await until_log_says(worker, ASSIGNED, times=times)
                await member.stop()
                await until_log_says(worker, ASSIGNED, times=times + 1)
        await healed(where, load)
        await stop_gracefully(worker)


async def test_a_worker_of_an_older_epoch_is_refused_and_ends(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where)
        at = await outsider.interact(interaction())
        assert (await outsider.ask(ask(after=at))).state.events == 1
        rows = stored_rows(where)
        done = await asyncio.to_thread(where.command, "reset-epoch", "--yes")
        assert done.returncode == 0, done.stderr
        await outsider.interact(interaction(event_id="e-2"))
        assert await exit_code(worker) == 1
        assert "`rerank reset-epoch` was called" in worker.log()
    assert stored_rows(where) == rows


async def test_a_clock_that_jumps_ahead_and_back_moves_no_state_and_ends_no_worker(where: Site) -> None:
    await where.create_topics()
    clock = where.directory / "clock"
    set_clock(clock, ahead_s=0.0)
    async with client(where) as outsider:
        async with under_load(outsider, SEED) as load:
            worker = await serving(where, "deploy.chaos.skewed_worker", **{CLOCK_FILE: str(clock)})
            for ahead_s, outcome in ((MONTH_S, "shed"), (0.0, "ranked"), (-MONTH_S, "ranked"), (0.0, "ranked")):
                set_clock(clock, ahead_s=ahead_s)
                asked_from = len(load.request_ids)
                await outsider.until(
                    lambda asked=asked_from, wanted=outcome: any(  # type: ignore[misc]
                        slate.outcome == wanted and int(slate.request_id.rpartition("-")[2]) > asked
                        for slate in outsider.slates
                    )
                )
        await healed(where, load)
        await stop_gracefully(worker)
        assert outsider.dead_letters == []


async def test_idle_or_busy_sigterm_ends_with_exit_code_0_in_the_grace_period(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        idle = await serving(where, RERANK_GRACE_S="5")
        started_s = time.monotonic()
        await stop_gracefully(idle)
        assert time.monotonic() - started_s < 5.0
        async with under_load(outsider, SEED, interactions_per_tick=30) as load:
            busy = await serving(where, RERANK_GRACE_S="5")
            await asyncio.sleep(1.0)
            started_s = time.monotonic()
            await stop_gracefully(busy)
            assert time.monotonic() - started_s < 5.0
        await finish(where, load)
