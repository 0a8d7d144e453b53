"""A topic that was deleted and created again: its offsets would be taken for old ones, so the worker says so."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from aiokafka.admin import AIOKafkaAdminClient

from deploy.local import LocalStack
from stream_app.state import fence_of
from stream_app.topic_watch import SURE_FOR_S
from tests.builders import candidate_list, interaction
from tests.fault_kit import launched, stored_rows
from tests.tiny_artefact import item_ids, write_tiny_artefact
from tests.worker_kit import Site, WorkerProcess, client, site

pytestmark = [pytest.mark.integration, pytest.mark.kafka]

PARTITIONS = 2


@pytest.fixture(scope="module")
def apache(kafka_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("stack"), kafka="apache", redis="local", kafka_home=kafka_home) as stack:
        yield stack


def applied(where: Site) -> int:
    with redis.Redis.from_url(where.redis_url) as connection:
        keys = list(connection.scan_iter(f"{where.prefix}rerank:{{log}}:*:*"))
        return sum(int(str(connection.get(key), "ascii")) for key in keys)


async def until_applied(where: Site, count: int) -> None:
    async with asyncio.timeout(60):
        while applied(where) != count:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0.05)


async def produce(where: Site, count: int, user: str = "u") -> None:
    async with client(where) as producer:
        for n in range(count):
            await producer.interact(
                interaction(event_id=f"e-{n}", user_id=f"{user}-{n % 4}", item_id="i-1", event_time_ms=n)
            )


async def recreate(where: Site, name: str = "interactions") -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=where.bootstrap_servers)
    await admin.start()
    try:
        await admin.delete_topics([f"{where.prefix}{name}"])
        async with asyncio.timeout(30):
            while f"{where.prefix}{name}" in await admin.list_topics():  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0.1)
    finally:
        await admin.close()
    await where.create_topics(PARTITIONS)


async def ended(worker: WorkerProcess) -> str:
    async with asyncio.timeout(60):
        while worker.process.is_running:  # noqa: ASYNC110 - a process tells nobody
            await asyncio.sleep(0.05)
    return worker.log()


def reset_epoch(where: Site) -> dict[str, object]:
    done = where.command("reset-epoch", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("since", [8, 400], ids=["shorter than it was", "grown past what was applied"])
@pytest.mark.parametrize("running", [False, True], ids=["at start", "while it runs"])
async def test_a_recreated_topic_ends_the_worker_until_the_epoch_is_reset(
    apache: LocalStack, tmp_path: Path, running: bool, since: int
) -> None:
    where = site(apache, write_tiny_artefact(tmp_path / "artefact"), tmp_path)
    await where.create_topics(PARTITIONS)
    with WorkerProcess(where) as worker:
        await produce(where, 40)
        await until_applied(where, 40)
        if running:
            await recreate(where)
            await ended(
                worker
            )  # whichever it meets first: no partitions of the log for a while, or a log that starts again
    if not running:
        await recreate(where)
    await produce(where, since)
    log = await ended(launched(where))
    assert "rerank reset-epoch" in log
    assert "it was deleted and created again" in log

    assert reset_epoch(where) == {"topic": f"{where.prefix}interactions", "epoch": 2}
    with WorkerProcess(where):
        await until_applied(where, since)
    with redis.Redis.from_url(where.redis_url) as connection:
        rows = [connection.get(key) for key in connection.scan_iter(f"{where.prefix}rerank:{{b*}}:u:*")]
    assert {fence_of(row).epoch for row in rows if isinstance(row, bytes)} == {2}
    assert len(rows) == 4


@pytest.mark.parametrize("since", [8, 400], ids=["shorter than it was", "grown past what was applied"])
async def test_a_worker_that_slept_while_the_topic_was_recreated_applies_nothing_of_the_new_one(
    apache: LocalStack, tmp_path: Path, since: int
) -> None:
    """What it applied in the old epoch would be applied once more after `rerank reset-epoch`."""
    where = site(apache, write_tiny_artefact(tmp_path / "artefact"), tmp_path)
    await where.create_topics(PARTITIONS)
    with WorkerProcess(where) as worker:
        await produce(where, 40)
        await until_applied(where, 40)
        before = stored_rows(where)
        worker.process.pause()
        await recreate(where)
        await produce(where, since, user="new")
        await asyncio.sleep(SURE_FOR_S)
        worker.process.resume()
        assert "it was deleted and created again" in await ended(worker)
    assert stored_rows(where) == before

    assert reset_epoch(where)["epoch"] == 2
    with WorkerProcess(where):
        await until_applied(where, since)
    events = {name: row.events for name, row in stored_rows(where).items()}
    assert events == {name: row.events for name, row in before.items()} | {f"new-{n}": since // 4 for n in range(4)}


async def test_lists_of_a_recreated_topic_have_an_outcome_each_though_their_offsets_are_old_ones(
    apache: LocalStack, tmp_path: Path
) -> None:
    where = site(apache, write_tiny_artefact(tmp_path / "artefact"), tmp_path)
    await where.create_topics(PARTITIONS)
    async with client(where) as outsider:
        with WorkerProcess(where) as worker:
            for n in range(20):
                await outsider.ask(candidate_list(request_id=f"old-{n}", user_id=f"u-{n}", item_ids=item_ids()[:3]))
            worker.process.pause()  # so that it never meets the topic without partitions
            await recreate(where, "candidates")
            new = [
                candidate_list(request_id=f"new-{n}", user_id=f"u-{n % 20}", item_ids=item_ids()[:3]) for n in range(60)
            ]
            async with client(where) as producer:  # one that does not remember the topic before
                await producer.send_many(new)
            worker.process.resume()
            wanted = {one.request_id for one in new}
            await outsider.until(lambda: wanted <= {slate.request_id for slate in outsider.slates}, timeout_s=60)
            assert "event=lists_recreated" in worker.log()
