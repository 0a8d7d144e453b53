"""What a worker says of itself over HTTP, and how it ends when it stands still or is given the wrong partitions."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor

from deploy.local import LocalStack
from tests.builders import candidate_list, interaction
from tests.tiny_artefact import item_ids, write_tiny_artefact
from tests.worker_health import ask, samples, total, until_health, until_metrics
from tests.worker_kit import Site, WorkerProcess, client, site

pytestmark = pytest.mark.integration

OPERATORS = Path(__file__).resolve().parents[2] / "docs" / "operators.md"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    return site(local_stack, artefact, tmp_path, RERANK_HTTP__PORT="0")


async def test_a_worker_that_serves_is_live_ready_and_started_and_counts_what_it_does(where: Site) -> None:
    await where.create_topics()
    with WorkerProcess(where) as worker:
        port = worker.ready()["http_port"]
        for path in ("/livez", "/readyz", "/startupz"):
            assert await ask(port, path) == (200, {"status": "ok", "checks": {}})
        async with client(where) as outsider:
            at = await outsider.interact(interaction())
            item_ids_and_one = [*item_ids()[:9], "nobody"]
            slate = await outsider.ask(candidate_list(item_ids=item_ids_and_one, after=at, deadline_ms=20_000))
            assert slate.reasons == ["cold_items"]
        found = await until_metrics(port, lambda found: total(found, "rerank_requests_total") == 1)
    assert found["rerank_events_total", ("applied",)] == 1
    assert found["rerank_requests_total", ("ranked", "cold_items")] == 1
    assert found["rerank_cold_items_total", ()] == 1
    for stage in ("queue", "state", "score", "total"):
        assert found["rerank_request_duration_seconds_count", (stage,)] == 1
    assert found["rerank_freshness_seconds_count", ()] == 1
    assert found["rerank_circuit_state", ("redis",)] == 0
    assert total(found, "rerank_model_info") == 1
    assert found["rerank_partitions_assigned", ()] == 8
    assert found["process_open_fds", ()] > 0


async def test_every_metric_of_a_worker_is_documented(where: Site) -> None:
    await where.create_topics()
    with WorkerProcess(where) as worker:
        port = worker.ready()["http_port"]
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            text = await answer.text()
    served = {name for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE) if not name.endswith("_created")}
    documented = set(re.findall(r"^\| `(rerank_\w+)` \|", OPERATORS.read_text(encoding="utf-8"), re.MULTILINE))
    assert {name for name in served if name.startswith("rerank_")} == documented
    assert all(name.startswith(("rerank_", "process_", "python_gc_")) for name in served)


async def test_without_a_port_nothing_is_served(where: Site) -> None:
    await where.create_topics()
    environment = {name: value for name, value in where.environment.items() if name != "RERANK_HTTP__PORT"}
    with WorkerProcess(replace(where, environment=environment)) as worker:
        assert "http_port" not in worker.ready()


async def test_a_partition_that_stands_still_fails_livez_and_then_ends_the_worker(where: Site) -> None:
    await where.create_topics(1)
    with WorkerProcess(where, "tests.stuck_worker", RERANK_STALL_AFTER_S="6") as worker:
        port = worker.ready()["http_port"]
        async with client(where) as outsider:
            await outsider.ask(candidate_list(item_ids=item_ids()[:3], after=None, deadline_ms=20_000))
            await outsider.send_many([candidate_list(request_id="stuck", item_ids=item_ids()[:3], after=None)])
            body = await until_health(port, "/livez", 503)
            assert f"{where.prefix}candidates-0 for " in body["checks"]["progress"]["told"]
            assert (await ask(port, "/readyz"))[0] == 200
            assert await asyncio.to_thread(worker.process.popen.wait, 60) == 1
    told = rf"topic={where.prefix}candidates partition=0 stands still for \d+ s with 1 records to go"
    assert re.search(told, worker.log())


async def test_a_worker_whose_event_loop_stands_answers_no_probe_and_measures_for_how_long(where: Site) -> None:
    await where.create_topics()
    with WorkerProcess(where) as worker:
        port = worker.ready()["http_port"]
        worker.process.pause()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await ask(port, "/livez")
        worker.process.resume()
        await until_metrics(port, lambda found: found["rerank_event_loop_lag_seconds_sum", ()] >= 1.5)
        assert await until_health(port, "/livez", 200) == {"status": "ok", "checks": {}}


async def test_an_assignment_that_separates_the_inputs_ends_the_worker(where: Site) -> None:
    await where.create_topics(2)
    stranger = AIOKafkaConsumer(
        f"{where.prefix}candidates",
        bootstrap_servers=where.bootstrap_servers,
        group_id=where.worker_environment()["RERANK_GROUP_ID"],
        partition_assignment_strategy=(RangePartitionAssignor,),
        session_timeout_ms=6_000,
        enable_auto_commit=False,
    )
    with WorkerProcess(where) as worker:
        await stranger.start()
        try:
            assert await asyncio.to_thread(worker.process.popen.wait, 60) == 1
        finally:
            await stranger.stop()
    assert f"separates the inputs ({where.prefix}candidates: not " in worker.log()


async def test_an_idle_worker_stands_still_for_no_longer_than_it_waits_for_a_fetch(where: Site) -> None:
    await where.create_topics(1)
    with WorkerProcess(where, RERANK_STALL_AFTER_S="2") as worker:
        port = worker.ready()["http_port"]
        await asyncio.sleep(8.0)
        assert await ask(port, "/livez") == (200, {"status": "ok", "checks": {}})
        assert total(await samples(port), "rerank_consumer_lag_records", f"{where.prefix}interactions") == 0
        assert worker.process.is_running
