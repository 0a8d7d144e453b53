"""Redis frozen under a running worker: lists are answered in time, interactions wait in Kafka, then all is well."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from deploy.local import LocalStack
from deploy.local.redis import RedisServer
from models.networks import NETWORKS
from schemas.records import CandidateList, Slate
from tests.builders import interaction
from tests.fault_kit import exit_code, stored_rows
from tests.moody_network import NOT_FINITE, OTHER_SHAPE, RAISES, STUCK, Moody
from tests.tiny_artefact import write_tiny_artefact
from tests.worker_health import total, until_metrics
from tests.worker_kit import Client, Site, WorkerProcess, client, site
from tests.worker_kit import ask as ask_with_reasons

pytestmark = pytest.mark.integration

DEADLINE_MS = 80
# The worker's own clock says when an answer was ready; a busy machine may stop it between looking at the clock twice.
SLACK_MS = 60.0
PARTITIONS = 4


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def where(local_stack: LocalStack, redis_server: RedisServer, artefact: Path, tmp_path: Path) -> Site:
    return replace(site(local_stack, artefact, tmp_path, RERANK_HTTP__PORT="0"), redis_url=redis_server.url)


ask = partial(ask_with_reasons, explain=False)


async def answers(outsider: Client, requests: list[CandidateList]) -> list[Slate]:
    """Send lists, a few at a time as a feed would, and return their slates."""
    wanted = {request.request_id for request in requests}
    for start in range(0, len(requests), 10):
        await outsider.send_many(requests[start : start + 10])
        await asyncio.sleep(0.02)
    await outsider.until(lambda: wanted <= {slate.request_id for slate in outsider.slates})
    return [slate for slate in outsider.slates if slate.request_id in wanted]


async def test_while_redis_hangs_every_list_is_answered_by_its_deadline_and_afterwards_ranked(
    where: Site, redis_server: RedisServer
) -> None:
    await where.create_topics(PARTITIONS)
    with WorkerProcess(where):
        async with client(where) as outsider:
            assert (await outsider.ask(ask("warm"))).outcome == "ranked"
            redis_server.pause()
            slates = await answers(outsider, [ask(f"u-{n}", deadline_ms=DEADLINE_MS) for n in range(200)])
            assert len(slates) == 200
            assert {slate.outcome for slate in slates} <= {"fallback", "shed"}
            told = {reason for slate in slates for reason in slate.reasons if slate.outcome == "fallback"}
            assert told <= {"store_unavailable", "deadline"}
            late = [s.timing_ms.total for s in slates if s.outcome == "fallback"]
            assert max(late) <= DEADLINE_MS + SLACK_MS
            assert late  # how many are shed instead depends on the machine
            redis_server.resume()
            outcomes: list[str] = []
            while "ranked" not in outcomes:
                outcomes.append((await outsider.ask(ask(f"v-{len(outcomes)}"))).outcome)
                await asyncio.sleep(0.1)
            assert (await outsider.ask(ask("w"))).outcome == "ranked"


async def test_users_held_by_the_worker_are_ranked_while_redis_hangs(where: Site, redis_server: RedisServer) -> None:
    await where.create_topics(PARTITIONS)
    with WorkerProcess(where):
        async with client(where) as outsider:
            at = await outsider.interact(interaction(user_id="known"))
            assert (await outsider.ask(ask("known", after=at))).state.events == 1
            redis_server.pause()
            slates = await answers(outsider, [ask("known") for _ in range(20)])
            redis_server.resume()
            assert [(slate.outcome, slate.state.events) for slate in slates] == [("ranked", 1)] * 20


async def test_while_redis_hangs_interactions_wait_in_kafka_and_lists_are_answered_beside_them(
    where: Site, redis_server: RedisServer
) -> None:
    await where.create_topics(PARTITIONS)
    most = 200
    clicks = [
        interaction(event_id=f"e-{n}", user_id=f"u-{n % 40}", item_id=f"i-{n % 20 + 1}", context=None)
        for n in range(20_000)
    ]
    with WorkerProcess(where, RERANK_KAFKA__MAX_POLL_RECORDS=str(most)) as worker:
        port = worker.ready()["http_port"]
        async with client(where) as outsider:
            assert (await outsider.ask(ask("warm"))).outcome == "ranked"
            redis_server.pause()
            await outsider.send_many(clicks)
            slates = await answers(outsider, [ask(f"v-{n}", deadline_ms=2_000) for n in range(50)])
            assert {(slate.outcome, *slate.reasons) for slate in slates} == {("fallback", "store_unavailable")}
            topic = f"{where.prefix}interactions"
            found = await until_metrics(port, lambda found: total(found, "rerank_unsettled_records", topic) > 4 * most)
            # Four batches a partition, and the poll that was under way when the fourth filled it.
            assert total(found, "rerank_unsettled_records", topic) <= PARTITIONS * 5 * most
            redis_server.resume()
            await until_metrics(port, lambda found: total(found, "rerank_events_total", "applied") == len(clicks))
            for n in range(40):
                at = await outsider.interact(interaction(user_id=f"u-{n}"))
                assert (await outsider.ask(ask(f"u-{n}", after=at))).state.events == 501


async def test_a_model_that_fails_in_flight_costs_lists_their_ranking_and_then_ends_the_worker_with_nothing_lost(
    where: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cast("dict[str, Any]", NETWORKS), "moody", Moody)
    moody = replace(where, artefact=write_tiny_artefact(tmp_path / "moody", model="moody"))
    await where.create_topics(1)
    async with client(where) as outsider:
        with WorkerProcess(moody) as worker:
            for value, reason in (
                (RAISES, "model_error"),
                (OTHER_SHAPE, "model_error"),
                (NOT_FINITE, "model_nonfinite"),
            ):
                user = f"u-{value:g}"
                at = await outsider.interact(interaction(user_id=user, value=value))
                request = ask(user, after=at)
                slate = await outsider.ask(request)
                assert (slate.outcome, slate.reasons, slate.item_ids) == ("fallback", [reason], request.item_ids)
                assert (await outsider.ask(ask("sound"))).outcome == "ranked"
            stuck = [interaction(user_id="stuck", value=value) for value in (STUCK, 1.0)]
            at = [await outsider.interact(one) for one in stuck][-1]
            assert await exit_code(worker) == 1
            assert "the model raised" in worker.log()
        assert "stuck" not in stored_rows(where)
        with WorkerProcess(where):  # a sound model of the same state space goes on from there
            slate = await outsider.ask(ask("stuck", after=at))
            assert (slate.outcome, slate.state.events) == ("ranked", 2)
    assert not outsider.dead_letters
