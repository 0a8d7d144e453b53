"""A Redis that accepts and never answers: nothing waits longer than a few of the configured timeouts."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from deploy.local.redis import RedisServer
from deploy.local.server import LocalServer
from stream_app.cluster_store import store_of
from stream_app.commands.doctor_redis import examine_redis
from stream_app.connection import check_connection, connect, is_cluster
from stream_app.errors import StoreUnavailableError
from stream_app.settings import RedisSettings
from stream_app.state import Fence, Progress, RowUpdate, UserRow, cold_row
from stream_app.store import RedisStore, Replacement, RowCodec
from stream_app.telemetry import Telemetry
from tests.fakes import SPACE, STATE_SIZE
from tests.redis_kit import Cluster, Sentinels

pytestmark = pytest.mark.integration

TIMEOUT_MS = 50
# A cluster's client asks three nodes for the slots, twice, before it gives up; connecting and asking count each.
MOST_WAITS = 2 * (3 + 1) * 2
SLACK_S = 3.0  # of a busy machine; redis-py's own defaults try again and again
DOCTOR_WAITS_S = 10.0  # then `rerank doctor` goes on without the answer

Servers = tuple[str, list[LocalServer]]


@contextmanager
def one_server(directory: Path) -> Iterator[Servers]:
    with RedisServer(directory) as server:
        yield server.url, [server]


@contextmanager
def behind_sentinels(directory: Path) -> Iterator[Servers]:
    started = Sentinels(directory)
    try:
        yield started.url, [started.primary, started.replica, *started.sentinels]
    finally:
        started.stop()


@contextmanager
def in_a_cluster(directory: Path) -> Iterator[Servers]:
    started = Cluster(directory)
    try:
        yield started.url, list(started.nodes)
    finally:
        started.stop()


def questions(rows: RedisStore, settings: RedisSettings) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return everything that anybody waits for."""
    row = UserRow(1, 1, Fence(1, 0, 5), bytes(4 * STATE_SIZE), b"i-1")
    updates = [RowUpdate(f"u-{n}", cold_row(STATE_SIZE).fence, row) for n in range(20)]
    return {
        "start": lambda: check_connection(rows.client, settings),
        "epoch": lambda: rows.enter_epoch(4),
        "load": lambda: rows.load([update.user_id for update in updates]),
        "save": lambda: rows.save(updates, [Progress(0, -1, 5)]),
        "progress": lambda: rows.progress([0, 1]),
        "rebuilds": rows.rebuilds,
        "replace": lambda: rows.replace([Replacement("u-1", None, b"")]),
        "rebuilt": lambda: rows.rebuilt({0: 5}, mended=True),
        "reset": lambda: rows.reset_epoch(4),
    }


async def took_s(question: Callable[[], Awaitable[object]], *, answered: bool) -> float:
    """Return how long a question took, that ends with an answer or with the news that there is none."""
    started_s = time.monotonic()
    with suppress(StoreUnavailableError) if answered else pytest.raises(StoreUnavailableError):
        await question()
    return time.monotonic() - started_s


@pytest.mark.parametrize("kind", [one_server, behind_sentinels, in_a_cluster])
@pytest.mark.parametrize("known", [True, False], ids=["hangs later", "hangs from the start"])
async def test_no_question_to_a_hung_redis_outlasts_the_configured_timeouts(
    tmp_path: Path, kind: Callable[[Path], Any], known: bool
) -> None:
    with kind(tmp_path) as (url, servers):
        settings = RedisSettings(url=SecretStr(url), timeout_ms=TIMEOUT_MS, connect_timeout_ms=TIMEOUT_MS)
        client: Any = connect(settings)
        codec = RowCodec(state_size=STATE_SIZE, space=SPACE, telemetry=Telemetry())
        rows = store_of(
            client, codec=codec, key_prefix="t", log="interactions", scripts="lua", cluster=is_cluster(client)
        )
        if known:
            await connect_at_last(rows)
        for server in servers:
            server.pause()
        try:
            for name, question in questions(rows, settings).items():
                waited_s = await took_s(question, answered=name == "start")
                assert waited_s < MOST_WAITS * TIMEOUT_MS / 1000.0 + SLACK_S, name
            async with asyncio.timeout(SLACK_S):
                await client.aclose()
        finally:
            for server in servers:
                server.resume()


@pytest.mark.parametrize("kind", [one_server, behind_sentinels, in_a_cluster])
async def test_the_doctor_says_that_redis_hangs_in_its_time(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    with kind(tmp_path) as (url, servers):
        for server in servers:
            server.pause()
        try:
            async with asyncio.timeout(DOCTOR_WAITS_S):
                (finding,) = await examine_redis(RedisSettings(url=SecretStr(url)))
        finally:
            for server in servers:
                server.resume()
    assert finding.verdict == "fail"
    assert "no answer within 1 s" in finding.message


async def connect_at_last(rows: RedisStore) -> None:
    """Enter the epoch, on a machine that may be slower than the short timeout of this test."""
    async with asyncio.timeout(30):
        while True:
            with suppress(StoreUnavailableError):
                await rows.enter_epoch(4)
                return
