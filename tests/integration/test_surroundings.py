"""What a worker meets where it runs: a file system it cannot write, a password that changes under it."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import redis

from deploy.local import LocalStack
from deploy.local.redis import RedisServer
from stream_app.store_watch import STORE_WATCH_S
from tests.builders import interaction
from tests.fault_kit import serving, stop_gracefully, until_log_says
from tests.tiny_artefact import item_ids, write_tiny_artefact
from tests.worker_kit import Client, Site, client, site
from tests.worker_kit import ask as ask_for_ten

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

# Every byte to a file is refused from here on, as by a full disk; pipes and sockets are not files.
_WITHOUT_FILES = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
runpy.run_module("stream_app", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    return site(local_stack, artefact, tmp_path)


ask = partial(ask_for_ten, item_ids=item_ids()[:5])


@contextmanager
def worker_without_files(where: Site, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker that can write no file, at home in an empty directory; yield it ready."""
    homes = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(directory))
    python_path = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", _WITHOUT_FILES, "worker"],
        cwd=directory,
        env={**where.worker_environment(), **homes, "PYTHONPATH": python_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_a_worker_that_can_write_no_file_serves_and_ends_as_any_other(where: Site, tmp_path: Path) -> None:
    await where.create_topics()
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o555)
    with worker_without_files(where, empty) as process:
        async with client(where) as outsider:
            at = await outsider.interact(interaction())
            slate = await outsider.ask(ask(after=at))
            assert (slate.outcome, slate.state.events) == ("ranked", 1)
        process.terminate()
        assert await asyncio.to_thread(process.wait, 30) == 0
    assert list(empty.iterdir()) == []


async def until_applied(outsider: Client, interactions: int) -> None:
    """Ask until a slate reflects so many interactions."""
    while (await outsider.ask(ask())).state.events != interactions:
        pass


# Redis is frozen on purpose below: no answer comes too late for that.
_PATIENT = {f"RERANK_REDIS__{name}_MS": "60000" for name in ("TIMEOUT", "CONNECT_TIMEOUT", "BUDGET")}
_USED_AT_ONCE = 4  # by interactions, by lists, by the store watch, by the topic watch


async def until_all_connections_stand(server: RedisServer, admin: "redis.Redis", outsider: Client) -> int:
    """Have a worker wait for Redis at all its places at once; return how many interactions that took."""
    sent = 0
    while len(admin.client_list()) <= _USED_AT_ONCE:  # and ours
        server.pause()
        await outsider.interact(interaction())
        answer = asyncio.create_task(outsider.ask(ask()))
        await asyncio.sleep(2 * STORE_WATCH_S)
        server.resume()
        await answer
        sent += 1
        await until_applied(outsider, sent)
    return sent


async def test_a_rotated_password_costs_nothing_until_connections_break_and_a_restart_heals_it(
    where: Site, tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as server, redis.Redis.from_url(server.url) as admin:
        admin.config_set("requirepass", "first")
        before = replace(where, redis_url=server.url.replace("://", "://:first@"))
        after = replace(where, redis_url=server.url.replace("://", "://:second@"))
        await before.create_topics()
        async with client(before) as outsider:
            worker = await serving(before, RERANK_CACHED_USERS="0", **_PATIENT)
            sent = await until_all_connections_stand(server, admin, outsider)
            logged = worker.log()
            admin.config_set("requirepass", "second")
            for more in range(1, 6):
                await outsider.interact(interaction())
                await until_applied(outsider, sent + more)
            assert {slate.outcome for slate in outsider.slates} == {"ranked"}
            assert worker.log() == logged
            admin.client_kill_filter(_type="normal", skipme=True)
            fallen_back = await outsider.ask(ask())
            assert (fallen_back.outcome, fallen_back.reasons) == ("fallback", ["store_unavailable"])
            at = await outsider.interact(interaction())
            assert worker.process.is_running
            await until_log_says(worker, "invalid username-password pair")
            assert "first" not in worker.log()
            await stop_gracefully(worker)
            worker = await serving(after)
            slate = await outsider.ask(ask(after=at))
            assert (slate.outcome, slate.state.events) == ("ranked", sent + 6)
            await stop_gracefully(worker)
