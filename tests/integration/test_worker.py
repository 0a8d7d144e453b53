"""The worker as an outsider meets it: a process, four topics, and nothing else."""

import asyncio
import time
from pathlib import Path

import pytest

from deploy.local import LocalStack
from schemas.codec import encode
from schemas.records import After
from tests.bad_records import bad_records, odd_but_good_records
from tests.builders import interaction
from tests.tiny_artefact import item_ids, write_tiny_artefact
from tests.worker_kit import Client, Site, WorkerProcess, ask, client, site

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    return site(local_stack, artefact, tmp_path)


async def test_a_click_is_in_the_next_slate(where: Site) -> None:
    await where.create_topics()
    with WorkerProcess(where):
        async with client(where) as outsider:
            cold = await outsider.ask(ask())
            assert (cold.outcome, cold.reasons, cold.state.events) == ("ranked", ["cold_user"], 0)
            for click in range(1, 6):
                at = await outsider.interact(interaction(event_id=f"e-{click}", item_id=f"i-{click}"))
                slate = await outsider.ask(ask(after=at))
                assert (slate.outcome, slate.state.events) == ("ranked", click)
                assert (slate.state.partition, slate.state.offset) == (at.partition, at.offset)
                assert sorted(slate.item_ids) == sorted(item_ids()[:10])


async def test_every_bad_record_is_a_dead_letter_and_every_good_one_is_served(where: Site) -> None:
    await where.create_topics()
    bad = bad_records()
    odd = odd_but_good_records()
    with WorkerProcess(where) as worker:
        async with client(where) as outsider:
            for case in bad:
                await outsider.send(case.topic, case.key, case.value, headers=[("traceparent", b"00-1")])
                if case.topic == "candidates":
                    await outsider.send_many([ask()])
            for good in odd:
                await outsider.send(good.topic, good.key, good.value)
            odd_lists = sum(good.topic == "candidates" for good in odd)
            wanted = sum(case.topic == "candidates" for case in bad) + odd_lists
            await outsider.until(lambda: len(outsider.dead_letters) >= len(bad) and len(outsider.slates) >= wanted, 90)
            assert len(outsider.slates) == wanted
            assert {slate.outcome for slate in outsider.slates} <= {"ranked", "shed"}
            for topic in ("interactions", "candidates"):
                sent = sorted((case.code, case.value or b"") for case in bad if case.topic == topic)
                letters = [letter for letter in outsider.dead_letters if letter.topic == f"{topic}.dlq"]
                assert sorted((letter.code, letter.value or b"") for letter in letters) == sent
                assert all(letter.headers["traceparent"] == b"00-1" for letter in letters)
            worker.process.stop()
            assert worker.process.popen.returncode == 0
            assert '"exception"' not in worker.log()


async def test_forgetting_a_user_makes_him_cold_again(where: Site) -> None:
    await where.create_topics()
    with WorkerProcess(where):
        async with client(where) as outsider:
            await outsider.interact(interaction())
            forgotten = await outsider.send("interactions", b"u-1", None)
            slate = await outsider.ask(ask(after=forgotten))
            assert (slate.reasons, slate.state.events) == (["cold_user"], 0)
            again = await outsider.interact(interaction(event_id="e-2"))
            assert (await outsider.ask(ask(after=again))).state.events == 1


async def test_an_after_that_never_comes_is_a_stale_fallback_at_the_deadline(where: Site) -> None:
    await where.create_topics()
    with WorkerProcess(where):
        async with client(where) as outsider:
            await outsider.ask(ask())
            asked_s = time.monotonic()
            request = ask(after=After(partition=0, offset=10_000), deadline_ms=700)
            slate = await outsider.ask(request)
            assert (slate.outcome, slate.reasons) == ("fallback", ["stale"])
            assert slate.item_ids == request.item_ids
            assert time.monotonic() - asked_s >= 0.65


async def test_a_list_past_its_deadline_is_shed(where: Site) -> None:
    await where.create_topics()
    with WorkerProcess(where):
        async with client(where) as outsider:
            request = ask(deadline_ms=50)
            long_ago_ms = int(time.time() * 1000) - 60_000
            await outsider.send("candidates", b"u-1", encode(request), timestamp_ms=long_ago_ms)
            await outsider.until(lambda: bool(outsider.slates))
            assert (outsider.slates[0].outcome, outsider.slates[0].item_ids) == ("shed", [])


async def test_a_restarted_worker_goes_on_where_the_last_one_ended(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        for run in range(1, 4):
            with WorkerProcess(where) as worker:
                at = await outsider.interact(interaction(event_id=f"e-{run}"))
                assert (await outsider.ask(ask(after=at))).state.events == run
                worker.process.stop()
                assert worker.process.popen.returncode == 0
        assert len(outsider.slates) == 3


async def test_interactions_produced_while_no_worker_runs_are_applied(where: Site) -> None:
    await where.create_topics()
    async with client(where) as outsider:
        await outsider.send_many([interaction(event_id=f"e-{n}", user_id=f"u-{n % 7}") for n in range(70)])
        with WorkerProcess(where):
            for n in range(7):
                at = await outsider.interact(interaction(user_id=f"u-{n}"))
                assert (await outsider.ask(ask(f"u-{n}", after=at))).state.events == 11


async def test_two_workers_share_the_partitions_and_nothing_is_lost_or_doubled(where: Site) -> None:
    await where.create_topics()
    users = [f"u-{n}" for n in range(12)]
    async with client(where) as outsider:
        with WorkerProcess(where):
            sending = asyncio.create_task(_interact_slowly(outsider, users, rounds=30))
            with WorkerProcess(where) as second:
                assigned = second.ready()["partitions"]
                await sending
                await _expect(outsider, users, events=31)
            await _interact_slowly(outsider, users, rounds=5)
            await _expect(outsider, users, events=37)
    topics: dict[str, set[int]] = {}
    for topic, partition in assigned:
        topics.setdefault(topic.removeprefix(where.prefix), set()).add(partition)
    assert topics["interactions"] == topics["candidates"] != set()


async def _interact_slowly(outsider: Client, users: list[str], *, rounds: int) -> None:
    for n in range(rounds):
        await outsider.send_many([interaction(event_id=f"e-{n}-{user}", user_id=user) for user in users])
        await asyncio.sleep(0.1)


async def _expect(outsider: Client, users: list[str], *, events: int) -> None:
    """Send one more interaction for each user and expect that many events in the state behind the next slate."""
    for user in users:
        at = await outsider.interact(interaction(user_id=user))
        slate = await outsider.ask(ask(user, after=at))
        assert (slate.outcome, slate.state.events) == ("ranked", events)


async def test_a_worker_without_topics_says_what_to_do(where: Site) -> None:
    worker = WorkerProcess(where)
    worker.start()
    assert await asyncio.to_thread(worker.process.popen.wait, 30) == 1
    assert "rerank topics create" in worker.log()


async def test_a_worker_with_a_broken_artefact_does_not_start(where: Site, tmp_path: Path) -> None:
    await where.create_topics()
    broken = write_tiny_artefact(tmp_path / "broken")
    model = broken / "model.pt"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    worker = WorkerProcess(where, RERANK_ARTEFACT=str(broken))
    worker.start()
    assert await asyncio.to_thread(worker.process.popen.wait, 30) == 1
    assert "sha256" in worker.log()


def test_a_test_that_failed_shows_what_every_worker_logged(where: Site, request: pytest.FixtureRequest) -> None:
    logs = []
    for number in range(2):
        worker = WorkerProcess(where, RERANK_GRACE_S=f"canary-{number}")
        with pytest.raises(AssertionError, match="ended before it was ready"), worker:
            pass
        logs.append((f"log of worker {worker.process.pid}, which ended", worker.log()))
    failure = pytest.CallInfo.from_call(lambda: pytest.fail("as any test may"), when="call")
    report = request.node.ihook.pytest_runtest_makereport(item=request.node, call=failure)
    assert report.failed
    assert [one for one in report.sections if one[0].startswith("log of worker")] == logs
    assert ["canary-0" in logs[0][1], "canary-1" in logs[1][1]] == [True, True]
