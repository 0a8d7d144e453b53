"""A rebuild leaves the bytes that the live worker wrote, whatever Redis held before."""

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from deploy.local import LocalStack
from schemas.records import Interaction
from stream_app.state import fence_of
from tests.builders import candidate_list, interaction
from tests.tiny_artefact import ITEMS, item_ids, write_tiny_artefact
from tests.worker_health import samples, total
from tests.worker_kit import Client, Site, WorkerProcess, client, site

pytestmark = pytest.mark.integration

USERS, EVENTS, PARTITIONS = 12, 200, 4


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact"))


@pytest.fixture
async def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    made = site(local_stack, artefact, tmp_path)
    await made.create_topics(PARTITIONS)
    return made


@pytest.fixture
def rows(where: Site) -> Iterator["Rows"]:
    with redis.Redis.from_url(where.redis_url) as connection:
        yield Rows(connection, f"{where.prefix}rerank")


class Rows:
    """What lies in Redis under the prefix of a test."""

    def __init__(self, connection: "redis.Redis", prefix: str) -> None:
        self.connection = connection
        self._prefix = prefix

    def all(self) -> dict[bytes, bytes]:
        return {key: self._get(key) for key in self.connection.scan_iter(f"{self._prefix}:{{b*}}:u:*")}

    def progress(self) -> list[bytes]:
        keys = sorted(self.connection.scan_iter(f"{self._prefix}:{{log}}:*interactions:*"))
        found = [self.connection.get(key) for key in keys]
        return [one for one in found if isinstance(one, bytes)]  # a corrupt row may have taken one back meanwhile

    def key(self, user_id: str) -> bytes:
        return next(key for key in self.all() if key.endswith(f":u:{user_id}".encode()))

    def flush(self) -> None:
        for key in self.connection.scan_iter(f"{self._prefix}:*"):
            self.connection.delete(key)

    def applied(self) -> int:
        return sum(int(text) for text in self.progress())

    def _get(self, key: bytes) -> bytes:
        value = self.connection.get(key)
        assert isinstance(value, bytes)
        return value


def log(events: int = EVENTS, start: int = 0) -> list[Interaction]:
    return [
        interaction(
            event_id=f"e-{n}",
            user_id=f"u-{n * 5 % USERS}",
            item_id=f"i-{1 + n % ITEMS}",
            kind="click",
            event_time_ms=n,
        )
        for n in range(start, start + events)
    ]


async def until_applied(rows: Rows, count: int) -> None:
    async with asyncio.timeout(30):
        while rows.applied() < count:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0.05)


async def live(where: Site, rows: Rows, worker_client: Client) -> tuple[dict[bytes, bytes], list[bytes]]:
    """Let a worker apply the log, a bad record and a forgotten user; return rows and progress that it left."""
    with WorkerProcess(where):
        await worker_client.send_many(log())
        await worker_client.send("interactions", b"u-1", b"no json")
        await worker_client.send("interactions", b"u-4", None)
        await worker_client.send_many(log(20, start=EVENTS))
        await until_applied(rows, EVENTS + 22)
    return rows.all(), rows.progress()


def rebuild(where: Site, *arguments: str) -> dict[str, Any]:
    done = where.command("rebuild", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def test_whatever_redis_holds_a_rebuild_leaves_the_bytes_of_the_live_worker(where: Site, rows: Rows) -> None:
    async with client(where) as worker_client:
        expected, progress = await live(where, rows, worker_client)
    assert len(expected) == len({one.user_id for one in log()})

    nothing_to_do = rebuild(where)
    assert nothing_to_do["rows"] == {"written": 0, "unchanged": len(expected), "ahead": 0}
    assert (nothing_to_do["interactions"], nothing_to_do["dead_letters"]) == (EVENTS + 21, 1)
    assert (rows.all(), rows.progress()) == (expected, progress)

    rows.flush()
    assert rebuild(where)["written_because"] == {"missing": len(expected)}
    assert (rows.all(), rows.progress()) == (expected, progress)

    keys = sorted(expected)
    spoil = rows.connection
    spoil.set(keys[0], b"junk" * 30)  # corrupt
    spoil.set(keys[1], b"")  # corrupt
    spoil.set(keys[2], expected[keys[3]])  # another's row, sound
    spoil.delete(keys[4])
    spoil.setrange(keys[5], 70, b"\x01\x02")  # a flipped byte
    rebuild(where, "--processes", "1", "--max-users", "2")
    assert (rows.all(), rows.progress()) == (expected, progress)


async def test_a_rebuild_gives_rows_of_another_model_their_vector(where: Site, rows: Rows, tmp_path: Path) -> None:
    """In place, over the rows of the model before; whoever is of that model is kept out from then on."""
    other = write_tiny_artefact(tmp_path / "other", seed=1, dim=6)
    async with client(where) as worker_client:
        before, progress = await live(where, rows, worker_client)
        done = rebuild(where, "--artefact", str(other))
        assert done["written_because"] == {"wrong": len(before)}
        expected = rows.all()
        assert [fence_of(row) for row in expected.values()] == [fence_of(before[key]) for key in expected]
        assert rows.progress() == progress
        refused = where.command("doctor", "--json")
        assert '"rows","verdict":"fail"' in refused.stdout
        rows.flush()
        rebuild(where, "--artefact", str(other))
        assert rows.all() == expected
        with WorkerProcess(replace(where, artefact=other)):
            slate = await worker_client.ask(
                candidate_list(user_id="u-5", item_ids=item_ids()[:3], after=None, deadline_ms=20_000)
            )
            assert (slate.outcome, slate.reasons, slate.state.events > 0) == ("ranked", [], True)
    rebuild(where)
    assert rows.all() == before


async def test_a_part_of_the_rows_is_not_rebuilt_for_another_model(where: Site, rows: Rows, tmp_path: Path) -> None:
    other = write_tiny_artefact(tmp_path / "other", seed=1)
    async with client(where) as worker_client:
        before, _ = await live(where, rows, worker_client)
    done = where.command("rebuild", "--artefact", str(other), "--user", "u-1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot be rebuilt alone" in done.stderr
    assert rows.all() == before
    rebuild(where, "--user", "u-1")


async def test_one_user_is_rebuilt_alone(where: Site, rows: Rows) -> None:
    async with client(where) as worker_client:
        expected, progress = await live(where, rows, worker_client)
    mine, other = rows.key("u-1"), rows.key("u-9")
    rows.connection.set(mine, b"junk")
    rows.connection.set(other, b"junk")
    done = rebuild(where, "--user", "u-1")
    assert (done["users"], done["rows"]["written"]) == (1, 1)
    assert rows.all() == {**expected, other: b"junk"}
    assert rows.progress() == progress


async def test_until_offset_stops_there_and_leaves_rows_that_are_ahead(where: Site, rows: Rows) -> None:
    async with client(where) as worker_client:
        expected, _ = await live(where, rows, worker_client)
    everything = [argument for p in range(PARTITIONS) for argument in ("--until-offset", f"{p}:3")]
    assert rebuild(where, *everything)["rows"]["written"] == 0
    assert rows.all() == expected
    rows.flush()
    rebuild(where, *everything)
    assert {fence_of(row).offset for row in rows.all().values()} <= {0, 1, 2, 3}
    rebuild(where)
    assert rows.all() == expected


async def test_a_rebuild_beside_a_worker_mends_what_the_worker_had_cached(where: Site, rows: Rows) -> None:
    """The worker holds a wrong row in its cache and writes from it: the rebuild must win, and stay."""
    async with client(where) as worker_client:
        expected, _ = await live(where, rows, worker_client)
        keys = sorted(expected)
        wrong = expected[keys[0]]
        rows.connection.set(keys[1], wrong)
        with WorkerProcess(where):
            more = log(100, start=EVENTS + 20)
            sending = asyncio.create_task(_slowly(worker_client, more))
            await asyncio.to_thread(rebuild, where)
            await sending
            await until_applied(rows, EVENTS + 22 + len(more))
            after = rows.all()
    rows.flush()
    rebuild(where)
    assert rows.all() == after


async def _slowly(worker_client: Client, some: list[Interaction]) -> None:
    for one in some:
        await worker_client.interact(one)
        await asyncio.sleep(0.05)


async def test_a_worker_rebuilds_the_user_of_a_corrupt_row_by_itself(where: Site, rows: Rows) -> None:
    async with client(where) as worker_client:
        expected, _ = await live(where, rows, worker_client)
        key = rows.key("u-5")
        rows.connection.set(key, b"junk" * 30)
        with WorkerProcess(where, RERANK_HTTP__PORT="0") as worker:
            await worker_client.send_many(log(USERS, start=EVENTS + 20))
            await until_applied(rows, EVENTS + 22 + USERS)
            after = rows.all()
            found = await samples(worker.ready()["http_port"])
    assert rows.connection.get(key.replace(b":u:", b":bad:")) == b"junk" * 30
    assert total(found, "rerank_bad_rows_total") == 1
    assert after.keys() == expected.keys()
    rows.flush()
    rebuild(where)
    assert rows.all() == after


async def test_a_partition_that_is_not_there_is_refused(where: Site) -> None:
    done = where.command("rebuild", "--until-offset", "9:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "not [9]" in done.stderr


def test_nobody_is_asked_before_the_place_is_understood(
    local_stack: LocalStack, artefact: Path, tmp_path: Path
) -> None:
    done = site(local_stack, artefact, tmp_path).command("rebuild", "--until-offset", "first")
    assert done.returncode == 1
    assert "not PARTITION:OFFSET" in done.stderr
    assert os.environ.get("RERANK_REDIS__URL", "redis://") not in done.stdout
