"""A worker whose broker or Redis is away when it starts."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local import LocalStack
from deploy.local.ports import free_ports
from deploy.local.redis import RedisServer
from tests.builders import candidate_list
from tests.tiny_artefact import item_ids, write_tiny_artefact
from tests.worker_kit import Site, WorkerProcess, client, site

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    return site(local_stack, artefact, tmp_path)


def without_broker(where: Site) -> Site:
    return replace(where, bootstrap_servers=f"127.0.0.1:{free_ports(1)[0]}")


def without_redis(where: Site) -> Site:
    return replace(where, redis_url=f"redis://127.0.0.1:{free_ports(1)[0]}/0")


async def until_logged(worker: WorkerProcess, text: str, timeout_s: float = 60.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while text not in worker.log():
        assert worker.process.is_running, worker.log()
        assert time.monotonic() < give_up_s, worker.log()
        await asyncio.sleep(0.1)


async def test_a_worker_waits_for_redis_and_serves_when_it_comes(where: Site, tmp_path: Path) -> None:
    await where.create_topics()
    server = RedisServer(tmp_path)
    server.start()
    url = server.url
    server.stop()
    worker = WorkerProcess(replace(where, redis_url=url))
    worker.start()
    try:
        await until_logged(worker, "event=waiting for=Redis")
        server.start()
        await asyncio.to_thread(worker.ready)
        async with client(where) as outsider:
            slate = await outsider.ask(candidate_list(item_ids=item_ids()[:3], after=None, deadline_ms=20_000))
            assert slate.outcome == "ranked"
    finally:
        worker.process.stop()
        server.stop()


@pytest.mark.parametrize(("away", "what"), [(without_broker, "broker"), (without_redis, "Redis")])
async def test_what_stays_away_ends_the_worker_with_the_remedy(
    where: Site, away: Callable[[Site], Site], what: str
) -> None:
    await where.create_topics()
    worker = WorkerProcess(away(where), RERANK_JOIN_TIMEOUT_S="2")
    worker.start()
    assert await asyncio.to_thread(worker.process.popen.wait, 60) == 1
    assert f"{what} away for 2 s" in worker.log()
    assert "rerank doctor" in worker.log()


@pytest.mark.parametrize("away", [without_broker, without_redis])
async def test_sigterm_ends_a_worker_that_waits_at_once_with_0(where: Site, away: Callable[[Site], Site]) -> None:
    await where.create_topics()
    worker = WorkerProcess(away(where))
    worker.start()
    try:
        await until_logged(worker, "event=waiting")
        worker.process.popen.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.process.popen.wait, 20) == 0
    finally:
        worker.process.stop()


def test_sigterm_before_anything_is_in_hand_ends_with_0() -> None:
    program = """
import os, signal
from stream_app.commands import worker
worker.steady_heap = lambda: os.kill(os.getpid(), signal.SIGTERM)
worker.worker()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
