"""The user of a worker as docs/operators.md creates it: enough for the whole life of a store, and not more."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import redis
from pydantic import SecretStr

from deploy.local.ports import LOOPBACK
from deploy.local.redis import RedisServer
from stream_app.cluster_store import store_of
from stream_app.commands.doctor_redis import examine_redis
from stream_app.connection import check_connection, connect, is_cluster
from stream_app.errors import SettingsError
from stream_app.settings import RedisSettings, Settings
from stream_app.state import Fence, Progress, RowUpdate, UserRow, cold_row
from stream_app.store import Replacement, RowCodec
from stream_app.telemetry import Telemetry
from tests.fakes import SPACE, STATE_SIZE
from tests.redis_kit import ACL_LINE, COMMANDS, PASSWORD, Cluster, permit

pytestmark = pytest.mark.integration

Scripts = Literal["lua", "watch"]
WATCH = ["watch", "multi", "exec", "unwatch"]
OF_A_CLUSTER = ["hexists", "cluster|slots", "command", "asking"]
OF_A_PIPELINE = ["hgetall"]  # read with WATCH alone


def create_user(port: int, scripts: Scripts, prefix: str = "rerank") -> str:
    """Run the documented line; return user and password of a URL."""
    line = ACL_LINE.replace("PASSWORD", PASSWORD).replace("~rerank:", f"~{prefix}:")
    if scripts == "watch":
        line = line.replace("+eval +evalsha", " ".join(f"+{name}" for name in WATCH))
    with redis.Redis(host=LOOPBACK, port=port) as admin:
        admin.execute_command(*line.split())
    return f"rerank:{PASSWORD}"


async def live(client: Any, settings: RedisSettings, prefix: str, spoil: Any) -> None:
    """Do once everything that workers and commands do with a store."""
    await check_connection(client, settings, prefix=prefix)
    codec = RowCodec(state_size=STATE_SIZE, space=SPACE, telemetry=Telemetry())
    rows = store_of(
        client,
        codec=codec,
        key_prefix=prefix,
        log="interactions",
        scripts=settings.scripts,
        cluster=is_cluster(client),
    )
    assert await rows.enter_epoch(4) == 1
    row = UserRow(1, 1, Fence(1, 0, 5), bytes(4 * STATE_SIZE), b"i-1")
    assert await rows.save([RowUpdate("u-1", cold_row(STATE_SIZE).fence, row)], [Progress(0, -1, 5)]) == [True]
    assert await rows.load(["u-1", "u-2"]) == [row, cold_row(STATE_SIZE)]
    assert await rows.progress([0, 1]) == [5, -1]
    assert await rows.rebuilds() == 0
    await spoil(rows.key("u-1"))
    assert await rows.load(["u-1"]) == [cold_row(STATE_SIZE)]  # set aside
    assert await rows.replace([Replacement("u-1", None, codec.pack(row))]) == [True]
    await rows.rebuilt({0: 5}, mended=True)
    assert await rows.rebuilds() == 1
    assert await rows.reset_epoch(4) == 2
    found = {finding.check: finding.verdict for finding in await examine_redis(settings, prefix=prefix)}
    assert found["redis permissions"] == "ok"
    assert found["redis"] in ("ok", "warn")  # on a busy machine it is far away
    assert "redis info" not in found


@pytest.mark.parametrize("scripts", ["lua", "watch"])
async def test_the_documented_user_may_do_what_a_store_does(tmp_path: Path, scripts: Scripts) -> None:
    topics_of_a_prefix = Settings(topic_prefix="shop-", redis=RedisSettings(scripts=scripts))
    prefix = topics_of_a_prefix.row_prefix()
    assert prefix == "rerank-shop-"
    with RedisServer(tmp_path) as server:
        user = create_user(server.port, scripts, prefix)
        settings = RedisSettings(url=SecretStr(f"redis://{user}@{server.address}/0"), scripts=scripts)

        async def spoil(key: str) -> None:
            with redis.Redis(host=LOOPBACK, port=server.port) as admin:
                admin.set(key, b"no row")

        client = connect(settings)
        try:
            await live(client, settings, prefix, spoil)
        finally:
            await client.aclose()


async def test_the_documented_user_may_do_what_a_store_does_in_a_cluster(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        users = {create_user(node.port, "lua") for node in cluster.nodes}
        url = cluster.url.replace("://", f"://{users.pop()}@")
        settings = RedisSettings(url=SecretStr(url))
        client: Any = connect(settings)

        async def spoil(key: str) -> None:
            slot = int(str(cluster.nodes[0].call("CLUSTER", "KEYSLOT", key)))
            cluster.nodes[min(2, slot // 5_461)].call("SET", key, b"no row")

        try:
            await live(client, settings, "rerank", spoil)
        finally:
            await client.aclose()
    finally:
        cluster.stop()


async def missing(settings: RedisSettings) -> str:
    """Return what the check at start says."""
    client = connect(settings)
    try:
        with pytest.raises(SettingsError) as caught:
            await check_connection(client, settings)
    finally:
        await client.aclose()
    return str(caught.value)


@pytest.mark.parametrize("scripts", ["lua", "watch"])
async def test_each_command_that_is_not_allowed_is_named_at_start(tmp_path: Path, scripts: Scripts) -> None:
    of_scripts = ["eval", "evalsha"]
    common = [name for name in COMMANDS if name not in [*of_scripts, *OF_A_CLUSTER, *OF_A_PIPELINE, "info"]]
    needed = [*common, *(of_scripts if scripts == "lua" else [*OF_A_PIPELINE, *WATCH])]
    with RedisServer(tmp_path) as server:
        url = SecretStr(f"redis://rerank:{PASSWORD}@{server.address}/0")
        for name in needed:
            permit(server.address, commands=without(needed, name))
            told = await missing(RedisSettings(url=url, scripts=scripts))
            assert f"'{name}'" in told, name
            assert "\n" not in told


def without(names: Sequence[str], one: str) -> list[str]:
    return [name for name in names if name != one]
