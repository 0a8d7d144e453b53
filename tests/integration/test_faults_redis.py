"""Faults of Redis under load: emptied, older, hung, full, read-only, without its scripts. Compared with the oracle."""

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from deploy.local import LocalStack, RedisServer
from schemas.records import CandidateList, Slate
from tests.fault_kit import healed, serving, stop_gracefully, under_load, until_log_says
from tests.resp_stub import TROUBLES, RespStub, saying
from tests.tiny_artefact import item_ids, write_tiny_artefact
from tests.worker_health import samples
from tests.worker_kit import Client, Site, WorkerProcess, client, site

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SEED = 11


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def where(local_stack: LocalStack, own_redis: RedisServer, artefact: Path, tmp_path: Path) -> Site:
    return replace(site(local_stack, artefact, tmp_path), redis_url=own_redis.url)


def command(server: RedisServer, *words: str) -> None:
    """Send one command, as an operator would."""
    with redis.Redis.from_url(server.url, socket_timeout=5) as connection:
        connection.execute_command(*words)


async def flushed(server: RedisServer) -> None:
    command(server, "FLUSHDB")


async def restarted_empty(server: RedisServer) -> None:
    await asyncio.to_thread(server.restart, keep_data=False)


async def restarted_older(server: RedisServer) -> None:
    await asyncio.to_thread(server.snapshot)
    await asyncio.sleep(1.5)
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)


async def without_scripts(server: RedisServer, *_: object) -> None:
    command(server, "SCRIPT", "FLUSH")
    with redis.Redis.from_url(server.url, socket_timeout=5) as admin:
        async with asyncio.timeout(60.0):
            while not admin.info("memory")["number_of_cached_scripts"]:  # noqa: ASYNC110 - Redis tells nobody
                await asyncio.sleep(0.05)


async def full(server: RedisServer, worker: WorkerProcess, outsider: Client) -> None:
    command(server, "CONFIG", "SET", "maxmemory", "1kb")
    await until_log_says(worker, "OOM command not allowed")
    assert await outcome_for_a_stranger(outsider) == "ranked"
    command(server, "CONFIG", "SET", "maxmemory", "0")


async def read_only(server: RedisServer, worker: WorkerProcess, outsider: Client) -> None:
    command(server, "REPLICAOF", "127.0.0.1", "1")
    await until_log_says(worker, "READONLY You can't write against a read only replica")
    assert await outcome_for_a_stranger(outsider) == "ranked"
    command(server, "REPLICAOF", "NO", "ONE")


async def down(server: RedisServer, worker: WorkerProcess, outsider: Client) -> None:
    await asyncio.to_thread(server.snapshot)
    await asyncio.to_thread(server.kill)
    await until_log_says(worker, "Connect call failed")
    assert await outcome_for_a_stranger(outsider) == "fallback"
    await asyncio.to_thread(server.start)


async def outcome_for_a_stranger(outsider: Client) -> str:
    """Ask for somebody whom no worker holds: the answer says whether Redis can be read."""
    slate, _ = await asked_alone(outsider, f"r-{uuid.uuid4().hex}", deadline_ms=20_000)
    return slate.outcome


@pytest.mark.parametrize(
    ("loss", "left"),
    [(flushed, "none"), (restarted_empty, "none"), (restarted_older, "some")],
    ids=["flushed", "restarted_empty", "restarted_older"],
)
async def test_what_redis_lost_under_load_comes_back_from_the_log(
    where: Site, own_redis: RedisServer, loss: Callable[[RedisServer], Awaitable[None]], left: str
) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(outsider, SEED) as load:
            await asyncio.sleep(1.5)
            await loss(own_redis)
            await asyncio.sleep(1.0)
        await healed(where, load)
        await stop_gracefully(worker)
        await healed(where, load)
    had = [int(offset) for offset in re.findall(r"event=store_behind partition=\d+ has=(-?\d+):", worker.log())]
    assert max(had) >= 0 if left == "some" else -1 in had


async def test_a_redis_that_cannot_be_written_for_a_while_loses_nothing(where: Site, own_redis: RedisServer) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where, RERANK_REDIS__BUDGET_MS="10000", RERANK_REDIS__TIMEOUT_MS="10000")
        async with under_load(outsider, SEED) as load:
            for fault in (without_scripts, full, read_only, down):
                await asyncio.sleep(1.0)
                await fault(own_redis, worker, outsider)
            await asyncio.sleep(1.0)
        ledger = await healed(where, load)
        await stop_gracefully(worker)
        await healed(where, load)
    assert ledger.shed == 0


async def test_a_hung_redis_costs_lists_their_ranking_and_interactions_nothing(
    where: Site, own_redis: RedisServer
) -> None:
    await where.create_topics()
    deadline_ms = 2_000
    async with client(where) as outsider:
        worker = await serving(where, RERANK_CACHED_USERS="0")
        async with under_load(outsider, SEED, deadline_ms=deadline_ms) as load:
            await asyncio.sleep(1.0)
            own_redis.pause()
            hung_s = time.monotonic()
            asked = [await asked_alone(outsider, f"hung-{n}", deadline_ms) for n in range(3)]
            await asyncio.sleep(max(0.0, hung_s + 3.0 - time.monotonic()))
            own_redis.resume()
            await asyncio.sleep(2.0)
        ledger = await healed(where, load)
        assert worker.process.is_running
        await stop_gracefully(worker)
    for slate, took_ms in asked:
        assert (slate.outcome, slate.reasons) == ("fallback", ["store_unavailable"])
        assert took_ms <= deadline_ms
    assert ledger.fallback > 0
    assert ledger.ranked > 0


async def asked_alone(outsider: Client, request_id: str, deadline_ms: int) -> tuple[Slate, float]:
    """Ask for a user whom nobody knows; return the slate and how long it took to arrive, in ms."""
    started_s = time.monotonic()
    slate = await outsider.ask(
        CandidateList(
            request_id=request_id,
            user_id=f"stranger-{request_id}",
            event_time_ms=int(time.time() * 1000),
            item_ids=item_ids()[:5],
            deadline_ms=deadline_ms,
        )
    )
    return slate, (time.monotonic() - started_s) * 1000.0


async def test_until_an_emptied_redis_is_back_slates_say_degraded(where: Site, own_redis: RedisServer) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        async with under_load(outsider, SEED, interactions_per_tick=40) as load:
            await asyncio.sleep(2.0)
        worker = await serving(where)
        await healed(where, load)
        await stop_gracefully(worker)
        command(own_redis, "FLUSHDB")
        worker = await serving(where, RERANK_MICRO_BATCH_INTERACTIONS="1", RERANK_KAFKA__MAX_POLL_RECORDS="20")
        async with under_load(outsider, SEED + 1) as load_again:
            await until_log_says(worker, "event=store_behind")
            await asyncio.sleep(2.0)
        load_again.ends["interactions"] = load_again.ends["interactions"] | {
            p: max(load_again.ends["interactions"].get(p, -1), end) for p, end in load.ends["interactions"].items()
        }
        load_again.request_ids |= load.request_ids
        await healed(where, load_again)
        await stop_gracefully(worker)
    assert any("degraded" in slate.reasons for slate in outsider.slates)
    assert "degraded" not in outsider.slates[-1].reasons


async def test_sigterm_while_redis_hangs_ends_in_the_grace_period_and_loses_nothing(
    where: Site, own_redis: RedisServer
) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        worker = await serving(where, RERANK_GRACE_S="6")
        async with under_load(outsider, SEED) as load:
            await asyncio.sleep(1.0)
            own_redis.pause()
            await asyncio.sleep(1.0)
        started_s = time.monotonic()
        await stop_gracefully(worker)
        took_s = time.monotonic() - started_s
        own_redis.resume()
        worker = await serving(where)
        await healed(where, load)
        await stop_gracefully(worker)
    assert took_s < 6.0


async def test_whatever_redis_answers_in_place_of_an_answer_costs_no_interaction(
    where: Site, own_redis: RedisServer
) -> None:
    async with RespStub(own_redis.port) as stub:
        direct, where = where, replace(where, redis_url=stub.url)
        await where.create_topics()
        async with client(where) as outsider:
            worker = await serving(where, RERANK_CACHED_USERS="0", RERANK_REDIS__BREAKER_FAILURES="1000000")
            async with under_load(outsider, SEED) as load:
                for name, text in TROUBLES.items():
                    stub.answer = saying(text)
                    slate, took_ms = await asked_alone(outsider, f"r-{name}", deadline_ms=5_000)
                    assert (slate.outcome, slate.reasons) == ("fallback", ["store_unavailable"]), name
                    assert took_ms < 5_000
                    stub.heal()
            ledger = await healed(direct, load)
            assert worker.process.is_running
            await stop_gracefully(worker)
    assert ledger.shed == 0


async def test_saves_whose_replies_are_lost_under_load_are_tried_again_and_change_nothing(
    where: Site, own_redis: RedisServer
) -> None:
    async with RespStub(own_redis.port) as stub:
        direct, where = where, replace(where, redis_url=stub.url)
        await where.create_topics()
        async with client(where) as outsider:
            worker = await serving(where, RERANK_HTTP__PORT="0", RERANK_CACHED_USERS="0")
            async with under_load(outsider, SEED) as load:
                await asyncio.sleep(0.5)
                stub.loses = lambda words: bytes(words[0]).upper() == b"EVALSHA"
                await until_log_says(worker, "event=retry attempt=3 ")
                stub.heal()
            await healed(direct, load)
            found = await samples(worker.ready()["http_port"])
            assert found["rerank_events_total", ("duplicate",)] > 0  # what was tried again was there
            await stop_gracefully(worker)
