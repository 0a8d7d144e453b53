"""A worker whose artefact is of another state space than the rows in Redis."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from deploy.local import LocalStack
from tests.builders import candidate_list, interaction
from tests.fault_kit import exit_code, stored_rows
from tests.tiny_artefact import item_ids, write_tiny_artefact
from tests.worker_kit import Client, Site, WorkerProcess, client, site

pytestmark = pytest.mark.integration


@pytest.fixture
def where(local_stack: LocalStack, tmp_path: Path) -> Site:
    return site(local_stack, write_tiny_artefact(tmp_path / "before"), tmp_path)


@pytest.fixture
def other(where: Site, tmp_path: Path) -> Site:
    """The same place, with a model of another state space."""
    return replace(where, artefact=write_tiny_artefact(tmp_path / "after", seed=1))


async def know_a_user(outsider: Client) -> None:
    at = await outsider.interact(interaction())
    slate = await outsider.ask(
        candidate_list(request_id="known", item_ids=item_ids()[:3], after=at, deadline_ms=20_000)
    )
    assert slate.state.events == 1


async def test_a_worker_with_another_state_space_does_not_start_over_the_rows(where: Site, other: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        with WorkerProcess(where):
            await know_a_user(outsider)
        rows = stored_rows(where)
        refused = WorkerProcess(other)
        refused.start()
        assert await exit_code(refused) == 1
        assert "so every user would start cold; nothing is served or written; stop the workers" in refused.log()
        assert "rerank rebuild" in refused.log()
        assert stored_rows(where) == rows
        with WorkerProcess(where):
            slate = await outsider.ask(candidate_list(item_ids=item_ids()[:3], after=None, deadline_ms=20_000))
            assert slate.state.events == 1


async def test_foreign_rows_are_read_as_cold_where_that_is_asked_for(where: Site, other: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        with WorkerProcess(where):
            await know_a_user(outsider)
        with WorkerProcess(other, RERANK_REDIS__FOREIGN_ROWS="cold"):
            slate = await outsider.ask(candidate_list(item_ids=item_ids()[:3], after=None, deadline_ms=20_000))
            assert (slate.outcome, slate.reasons) == ("ranked", ["cold_user"])
        with WorkerProcess(other):
            assert doctor(other)["rows"] == "ok"


async def test_a_worker_ends_when_its_rows_become_another_models(where: Site, other: Site) -> None:
    """Somebody rebuilds for another model and forgets to stop the workers."""
    await where.create_topics()
    async with client(where) as outsider:
        with WorkerProcess(where) as worker:
            await know_a_user(outsider)
            rebuilding = await asyncio.to_thread(other.command, "rebuild")
            assert rebuilding.returncode == 0, rebuilding.stderr
            rows = stored_rows(where)
            await outsider.interact(interaction(event_id="e-2"))
            assert await exit_code(worker) == 1
            assert "so every user would start cold" in worker.log()
            assert stored_rows(where) == rows
        with WorkerProcess(other) as worker:
            await until_rows(where, events=2)
            assert worker.process.is_running


async def test_a_rebuild_that_did_not_end_lets_no_worker_start_until_it_has(where: Site, other: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        with WorkerProcess(where):
            await know_a_user(outsider)
        with redis.Redis.from_url(where.redis_url) as connection:
            (key,) = connection.scan_iter(f"{where.prefix}rerank:{{log}}:*interactions", _type="HASH")
            connection.hset(key, "space", "rebuilding 00000000000000ff")
        for one in (where, other):
            refused = WorkerProcess(one)
            refused.start()
            assert await exit_code(refused) == 1
            assert "a rebuild into state space 00000000000000ff has not ended" in refused.log()
        assert doctor(other)["rows"] == "fail"
        assert other.command("rebuild").returncode == 0
        assert doctor(other)["rows"] == "ok"
        with WorkerProcess(other):
            slate = await outsider.ask(candidate_list(item_ids=item_ids()[:3], after=None, deadline_ms=20_000))
            assert (slate.outcome, slate.state.events) == ("ranked", 1)


async def test_rows_under_another_prefix_take_over_without_a_pause(where: Site, other: Site, tmp_path: Path) -> None:
    """Both models serve in one group for a while, each with rows of its own: every user is known to both."""
    await where.create_topics()
    beside = {"RERANK_REDIS__KEY_PREFIX": f"{where.prefix}next"}
    async with client(where) as outsider:
        with WorkerProcess(where) as before:
            await know_a_user(outsider)
            rebuilding = await asyncio.to_thread(other.command, "rebuild", **beside)
            assert rebuilding.returncode == 0, rebuilding.stderr
            await outsider.interact(interaction(event_id="e-2"))
            await until_rows(where, events=2)
            with WorkerProcess(other, **beside):
                await asyncio.to_thread(before.process.stop)
                at = await outsider.interact(interaction(event_id="e-3"))
                slate = await outsider.ask(candidate_list(item_ids=item_ids()[:3], after=at, deadline_ms=20_000))
                assert (slate.outcome, slate.state.events) == ("ranked", 3)


async def until_rows(where: Site, *, events: int) -> None:
    async with asyncio.timeout(60):
        while [row.events for row in stored_rows(where).values()] != [events]:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0.05)


def doctor(where: Site) -> dict[str, str]:
    """Return the verdict of each check."""
    patient = {"RERANK_REDIS__TIMEOUT_MS": "10000", "RERANK_REDIS__CONNECT_TIMEOUT_MS": "10000"}
    findings = json.loads(where.command("doctor", "--json", **patient).stdout)["findings"]
    return {finding["check"]: finding["verdict"] for finding in findings}
