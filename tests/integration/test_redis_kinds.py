"""What is particular to one kind of Redis: what its failures say, what a failover loses, what a lost node leaves."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import redis
from pydantic import SecretStr

from deploy.local.redis import RedisServer
from stream_app.cluster_store import store_of
from stream_app.connection import check_connection, connect, is_cluster
from stream_app.errors import SettingsError, StoreBehindError, StoreUnavailableError
from stream_app.guarded_calls import Call, Caller
from stream_app.settings import RedisSettings
from stream_app.state import Fence, Progress, RowUpdate, UserRow, cold_row
from stream_app.store import RedisStore, RowCodec, bucket_of
from stream_app.telemetry import Telemetry
from tests.fakes import SPACE, STATE_SIZE
from tests.redis_kit import COMMANDS, PASSWORD, USER, Certificates, Cluster, Sentinels, TlsTerminator, permit

pytestmark = pytest.mark.integration


@asynccontextmanager
async def connected(settings: RedisSettings) -> AsyncIterator[Any]:
    client = connect(settings)
    try:
        yield client
    finally:
        await client.aclose()


def store(client: Any, scripts: Literal["lua", "watch"] = "lua") -> RedisStore:
    codec = RowCodec(state_size=STATE_SIZE, space=SPACE, telemetry=Telemetry())
    return store_of(
        client, codec=codec, key_prefix="t", log="interactions", scripts=scripts, cluster=is_cluster(client)
    )


def update(user_id: str, offset: int, base: int = -1) -> RowUpdate:
    row = UserRow(offset, 1, Fence(1, 0, offset), bytes(4 * STATE_SIZE), b"i-1")
    return RowUpdate(user_id, Fence(1, 0, base) if base >= 0 else cold_row(STATE_SIZE).fence, row)


async def sentence(settings: RedisSettings) -> str:
    settings = settings.model_copy(update={"timeout_ms": 10_000, "connect_timeout_ms": 10_000})  # slow is no sentence
    async with connected(settings) as client:
        with pytest.raises(SettingsError) as caught:
            await check_connection(client, settings)
    return str(caught.value)


async def test_a_wrong_password_is_one_sentence_without_it(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        permit(server.address)
        url = f"redis://{USER}:wrong-canary@{server.address}/0"
        assert await sentence(RedisSettings(url=SecretStr(url))) == (
            f"Redis {server.address}/0: refuses our user or password; the process does not start; "
            "correct them in RERANK_REDIS__URL"
        )


@pytest.mark.parametrize(
    ("settings", "commands", "keys", "says"),
    [
        ({}, [name for name in COMMANDS if name != "eval"], "*", "RERANK_REDIS__SCRIPTS=watch"),
        ({}, ["ping"], "*", "may not do"),
        ({}, COMMANDS, "other:*", "~rerank:*"),
    ],
)
async def test_a_missing_permission_is_one_sentence(
    tmp_path: Path, settings: dict[str, Any], commands: list[str], keys: str, says: str
) -> None:
    with RedisServer(tmp_path) as server:
        permit(server.address, commands=commands, keys=keys)
        url = SecretStr(f"redis://{USER}:{PASSWORD}@{server.address}/0")
        told = await sentence(RedisSettings(url=url, **settings))
    assert says in told
    assert PASSWORD not in told
    assert "\n" not in told


async def test_a_certificate_that_is_over_or_of_a_stranger_is_one_sentence(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    with RedisServer(tmp_path) as server:
        for valid, trusted, says in ((False, True, "certificate has expired"), (True, False, "RERANK_REDIS__CA_FILE")):
            certificate, key = certificates.sign(f"valid-{valid}", valid=valid)
            with TlsTerminator(server, certificate, key) as terminator:
                url = SecretStr(f"rediss://{USER}:{PASSWORD}@127.0.0.1:{terminator.port}/0")
                told = await sentence(RedisSettings(url=url, ca_file=certificates.ca if trusted else None))
            assert says in told
            assert PASSWORD not in told


async def test_a_server_that_is_away_is_no_wrong_setting(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        settings = RedisSettings(url=SecretStr(server.url))
    async with connected(settings) as client:
        await check_connection(client, settings)


@pytest.mark.parametrize(
    "url", ["http://x", "redis+sentinel://127.0.0.1", "redis+cluster://canary@", "redis+cluster://a:b"]
)
def test_an_address_of_no_kind_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(SettingsError, match="not a Redis address") as caught:
        connect(RedisSettings(url=SecretStr(url)))
    assert url not in str(caught.value)


async def test_after_a_failover_the_store_goes_on_at_the_new_primary_and_says_what_it_lost(tmp_path: Path) -> None:
    sentinels = Sentinels(tmp_path)
    try:
        async with connected(RedisSettings(url=SecretStr(sentinels.url))) as client:
            rows = store(client)
            await rows.save([update("u-1", 5)], [Progress(0, -1, 5)])
            await asyncio.sleep(0.5)  # replicated
            sentinels.replica.pause()
            with redis.Redis(port=sentinels.primary.port) as admin:
                admin.execute_command("CLIENT", "KILL", "TYPE", "replica")
            await rows.save([update("u-1", 6, base=5)], [Progress(0, 5, 6)])  # acknowledged, and lost
            sentinels.primary.kill()
            sentinels.replica.resume()
            with pytest.raises(StoreBehindError) as caught:
                await until_answered(rows, [update("u-1", 7, base=6)], [Progress(0, 6, 7)])
            assert caught.value.applied_offset == 5
            assert await rows.save([update("u-1", 7, base=5)], [Progress(0, 5, 7)]) == [True]
    finally:
        sentinels.stop()


async def until_answered(rows: RedisStore, updates: list[RowUpdate], progress: list[Progress]) -> list[bool]:
    async with asyncio.timeout(30):
        while True:
            try:
                return await rows.save(updates, progress)
            except StoreUnavailableError:
                await asyncio.sleep(0.2)


@pytest.mark.parametrize("by_sentinel", [False, True])
async def test_after_the_password_was_changed_connections_that_stand_serve_on(
    tmp_path: Path, by_sentinel: bool
) -> None:
    sentinels = Sentinels(tmp_path)
    try:
        permit(sentinels.primary.address)
        url = sentinels.url if by_sentinel else sentinels.primary.url
        async with connected(RedisSettings(url=SecretStr(url.replace("://", f"://{USER}:{PASSWORD}@")))) as client:
            rows = store(client)
            await asyncio.gather(*(rows.load(["u-1"]) for _ in range(4)))
            pool = client.connection_pool
            *broken, _ = connections = list(pool._available_connections)
            assert len(connections) > 1
            with redis.Redis.from_url(sentinels.primary.url) as admin:
                admin.execute_command("ACL", "SETUSER", USER, "resetpass", ">another")
            for connection in broken:
                await connection.disconnect()
            pool._available_connections[:] = [connections[-1], *broken]  # what is taken next is broken
            for _ in range(2 * len(connections)):
                assert await rows.load(["u-1"]) == [cold_row(STATE_SIZE)]
            with pytest.raises(StoreUnavailableError, match="invalid username-password pair"):
                await asyncio.gather(*(rows.load(["u-1"]) for _ in range(4)))
    finally:
        sentinels.stop()


async def test_a_cluster_node_that_comes_back_empty_is_noticed_running_and_at_start(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        async with connected(RedisSettings(url=SecretStr(cluster.url))) as client:
            rows = store(client)
            await rows.enter_epoch(1)
            users = [f"u-{n}" for n in range(64)]
            await rows.save([update(user_id, n) for n, user_id in enumerate(users)], [Progress(0, -1, 63)])
            assert await rows.progress([0]) == [63]
            for restarted in (False, True):
                empty(cluster, away_from=client.keyslot("t:{log}:interactions"))
                rows = store(client) if restarted else rows
                if restarted:
                    await rows.enter_epoch(1)
                assert await rows.progress([0]) == [-1]
                lost = [n for n, row in enumerate(await rows.load(users)) if row.fence.offset < 0]
                assert 0 < len(lost) < len(users)
                await rows.save([update(users[n], n) for n in lost], [Progress(0, -1, 63)])
                assert await rows.progress([0]) == [63]
                assert [row.events for row in await rows.load(users)] == list(range(64))
    finally:
        cluster.stop()


def empty(cluster: Cluster, away_from: int) -> None:
    """Flush a node that does not hold a slot."""
    holder = min(2, away_from * 3 // 16_384)
    cluster.nodes[(holder + 1) % 3].call("FLUSHALL")


async def test_a_cluster_bucket_that_lost_what_we_wrote_refuses_the_batch(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        async with connected(RedisSettings(url=SecretStr(cluster.url))) as client:
            rows = store(client)
            await rows.enter_epoch(1)
            await rows.save([update("u-1", 5)], [Progress(0, -1, 5)])
            await rows.save([update("u-1", 8, base=5)], [Progress(0, 5, 8)])
            bucket = f"t:{{{bucket_of('u-1')}}}:log:interactions:1:0"
            await client.set(bucket, b"%020d" % 6)  # an older replica took over
            await client.delete(rows.key("u-1"))
            with pytest.raises(StoreBehindError) as caught:
                await rows.save([update("u-1", 9, base=8)], [Progress(0, 8, 9)])
            assert caught.value.applied_offset == 5
            assert await rows.load(["u-1"]) == [cold_row(STATE_SIZE)]
    finally:
        cluster.stop()


@asynccontextmanager
async def cluster_store(tmp_path: Path) -> AsyncIterator[tuple[Cluster, RedisStore]]:
    cluster = Cluster(tmp_path)
    try:
        async with connected(RedisSettings(url=SecretStr(cluster.url))) as client:
            rows = store(client)
            await rows.enter_epoch(2)
            yield cluster, rows
    finally:
        cluster.stop()


def bucket_key(user_id: str, partition: int) -> str:
    return f"t:{{{bucket_of(user_id)}}}:log:interactions:1:{partition}"


class Mute:
    """Runs calls; whoever writes a row is not told that it was done."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def run(self, calls: Sequence[Call]) -> list[list[Any]]:
        answers = await self._caller.run(calls)
        if any(":u:" in key for call in calls for key in call.keys):
            raise redis.TimeoutError("no answer")
        return answers


async def test_buckets_that_lost_writes_of_different_partitions_are_told_one_after_the_other(tmp_path: Path) -> None:
    async with cluster_store(tmp_path) as (_, rows):
        users = {0: "u-1", 1: "u-2"}  # one of each partition
        for partition, user_id in users.items():
            await rows.save([update(user_id, 5)], [Progress(partition, -1, 5)])
            await rows.save([update(user_id, 8, base=5)], [Progress(partition, 5, 8)])
            await rows.client.set(bucket_key(user_id, partition), b"%020d" % 6)
        batch = [update(user_id, 9, base=8) for user_id in users.values()]
        told = []
        for _ in users:
            with pytest.raises(StoreBehindError) as caught:
                await rows.save(batch, [Progress(partition, 8, 9) for partition in users])
            told.append((caught.value.partition, caught.value.applied_offset))
    assert told == [(0, 5), (1, 5)]


async def test_a_cluster_write_whose_answer_never_came_counts_when_its_batch_is_complete(tmp_path: Path) -> None:
    async with cluster_store(tmp_path) as (_, rows):
        await rows.save([update("u-1", 5)], [Progress(0, -1, 5)])
        caller, rows._caller = rows._caller, Mute(rows._caller)
        with pytest.raises(StoreUnavailableError):
            await rows.save([update("u-1", 8, base=5)], [Progress(0, 5, 8)])
        rows._caller = caller
        assert await rows.save([], [Progress(0, 5, 8)]) == []  # loaded again, and found written
        await rows.client.set(bucket_key("u-1", 0), b"%020d" % 6)
        with pytest.raises(StoreBehindError):
            await rows.save([update("u-1", 9, base=8)], [Progress(0, 8, 9)])


async def test_what_a_failover_took_from_a_quiet_bucket_is_noticed_without_a_write(tmp_path: Path) -> None:
    async with cluster_store(tmp_path) as (cluster, rows):
        await rows.save([update("u-1", 5)], [Progress(0, -1, 5)])
        assert await rows.progress([0, 1]) == [5, -1]
        node = cluster.nodes[
            min(2, int(str(cluster.nodes[0].call("CLUSTER", "KEYSLOT", bucket_key("u-1", 0)))) // 5_461)
        ]
        await asyncio.to_thread(node.snapshot)
        await rows.save([update("u-1", 8, base=5)], [Progress(0, 5, 8)])
        assert await rows.progress([0, 1]) == [8, -1]
        await asyncio.to_thread(node.kill)
        await asyncio.to_thread(node.start)  # with what it had at 5
        assert await until_told(rows) == [5, -1]
        assert await rows.progress([0, 1]) == [5, -1]  # until it is read again


async def until_told(rows: RedisStore) -> list[int]:
    async with asyncio.timeout(30):
        while True:
            try:
                return await rows.progress([0, 1])
            except StoreUnavailableError:
                await asyncio.sleep(0.2)


async def test_scripts_that_a_server_forbids_are_not_needed(tmp_path: Path) -> None:
    without = [name for name in COMMANDS if not name.startswith("eval")] + ["watch", "unwatch", "multi", "exec"]
    with RedisServer(tmp_path) as server:
        permit(server.address, commands=without)
        settings = RedisSettings(url=SecretStr(f"redis://{USER}:{PASSWORD}@{server.address}/0"), scripts="watch")
        async with connected(settings) as client:
            await check_connection(client, settings)
            rows = store(client, "watch")
            assert await rows.enter_epoch(4) == 1
            assert await rows.save([update("u-1", 5)], [Progress(0, -1, 5)]) == [True]
            with pytest.raises(redis.exceptions.NoPermissionError):
                await client.eval("return 1", 0)
