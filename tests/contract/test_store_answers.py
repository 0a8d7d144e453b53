"""What a Redis may answer in place of what was asked: the store says unavailable, and goes on when it can."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from deploy.local.redis import RedisServer
from stream_app.breaker import CircuitBreaker
from stream_app.connection import connect
from stream_app.errors import StoreUnavailableError
from stream_app.guarded_store import GuardedStore
from stream_app.settings import RedisSettings
from stream_app.state import Fence, Progress, RowUpdate, UserRow, cold_row
from stream_app.store import RedisStore, RowCodec
from stream_app.telemetry import Telemetry
from tests.fakes import SPACE, STATE_SIZE, FakeClock
from tests.resp_stub import TROUBLES, Command, RespStub, is_greeting, saying

pytestmark = pytest.mark.integration

USERS = [f"u-{n}" for n in range(8)]
GARBAGE = {
    "bytes of another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a line without end": b"+OK",
    "a length that is none": b"$x\r\n",
    "another answer": b"+OK\r\n",
    "a list too short": b"*1\r\n$-1\r\n",
    "a number": b":7\r\n",
    "nothing": b"$-1\r\n",
}


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def stub(redis_server: RedisServer) -> AsyncIterator[RespStub]:
    async with RespStub(redis_server.port) as started:
        yield started


@pytest.fixture
async def rows(stub: RespStub) -> AsyncIterator[RedisStore]:
    client = connect(RedisSettings(url=SecretStr(stub.url), timeout_ms=500))
    codec = RowCodec(state_size=STATE_SIZE, space=SPACE, telemetry=Telemetry())
    store = RedisStore(client, codec=codec, key_prefix=f"t-{uuid.uuid4().hex}", log="interactions")
    await store.save([update(n) for n in range(len(USERS))], [Progress(0, -1, 0)])
    yield store
    await client.aclose()


def update(n: int, offset: int = 0, base: int = -1) -> RowUpdate:
    row = UserRow(n, 1, Fence(1, 0, offset), bytes(4 * STATE_SIZE), b"i-1")
    return RowUpdate(USERS[n], Fence(1, 0, base) if base >= 0 else cold_row(STATE_SIZE).fence, row)


def guarded(rows: RedisStore, budget_ms: float = 5_000.0) -> GuardedStore:
    breaker = CircuitBreaker(failures=3, probe_after_ms=0.0)
    return GuardedStore(rows, breaker=breaker, budget_ms=budget_ms, clock=FakeClock(), telemetry=Telemetry())


async def assert_nothing_is_served_and_then_everything(stub: RespStub, rows: RedisStore) -> None:
    lists = guarded(rows)
    for _ in range(4):
        with pytest.raises(StoreUnavailableError):
            await lists.load(USERS)
        with pytest.raises(StoreUnavailableError):
            await rows.save([update(0, 1, 0)], [Progress(0, 0, 1)])
        with pytest.raises(StoreUnavailableError):
            await rows.progress([0])
        with pytest.raises(StoreUnavailableError):
            await rows.rebuilds()
        with pytest.raises(StoreUnavailableError):
            await rows.enter_epoch(4)
    stub.heal()
    assert [row.events for row in await lists.load(USERS)] == list(range(len(USERS)))
    assert await rows.save([update(0, 1, 0)], [Progress(0, 0, 1)]) == [True]
    assert await rows.progress([0]) == [1]


@pytest.mark.parametrize("text", TROUBLES.values(), ids=TROUBLES)
async def test_an_error_of_the_server_is_a_store_that_is_away_until_it_is_over(
    stub: RespStub, rows: RedisStore, text: str
) -> None:
    stub.answer = saying(text)
    await assert_nothing_is_served_and_then_everything(stub, rows)


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE)
async def test_an_answer_that_makes_no_sense_is_a_store_that_is_away(
    stub: RespStub, rows: RedisStore, reply: bytes
) -> None:
    def garbage(command: Command) -> bytes | None:
        return reply if command[0] in (b"MGET", b"EVALSHA") else None

    stub.answer = garbage
    for _ in range(4):
        with pytest.raises(StoreUnavailableError):
            await rows.load(USERS)
        with pytest.raises(StoreUnavailableError):
            await rows.save([update(0, 1, 0)], [Progress(0, 0, 1)])
    stub.heal()
    assert [row.events for row in await rows.load(USERS)] == list(range(len(USERS)))
    assert await rows.save([update(0, 1, 0)], [Progress(0, 0, 1)]) == [True]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut_after_bytes=st.integers(0, 700))
async def test_a_reply_that_is_cut_at_any_byte_reaches_nobody_and_no_other_reply_does(
    stub: RespStub, rows: RedisStore, cut_after_bytes: int
) -> None:
    stub.cut_after_bytes = cut_after_bytes
    asked = [rows.load([user_id]) for user_id in USERS]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    stub.heal()
    for n, answer in enumerate(answers):  # a cut after the last byte cuts nothing
        assert isinstance(answer, StoreUnavailableError) or (isinstance(answer, list) and answer[0].events == n)
    for n, user_id in enumerate(USERS):
        assert (await loaded(rows, user_id)).events == n


async def loaded(rows: RedisStore, user_id: str) -> UserRow:
    """Load, over a connection whose end the client may not have noticed yet; each that stands can be such a one."""
    for _ in range(len(USERS) + 1):
        try:
            return (await rows.load([user_id]))[0]
        except StoreUnavailableError:
            continue
    raise AssertionError(f"{user_id}: not served after the server was sound again")


async def test_whoever_gives_up_waiting_leaves_no_reply_for_the_next(stub: RespStub, rows: RedisStore) -> None:
    lists = guarded(rows, budget_ms=50.0)  # shorter than the client's own patience

    def mute(command: Command) -> bytes | None:
        return None if is_greeting(command) else b""  # an answer that never comes

    for _ in range(3):
        stub.answer = mute
        for answer in await asyncio.gather(*(lists.load([user_id]) for user_id in USERS), return_exceptions=True):
            assert isinstance(answer, StoreUnavailableError)
        stub.heal()
        for n, (row,) in enumerate(await asyncio.gather(*(rows.load([user_id]) for user_id in USERS))):
            assert row.events == n


@pytest.mark.parametrize("text", ["readonly", "readonly in a script"])
async def test_a_server_that_became_a_replica_is_looked_up_again(stub: RespStub, rows: RedisStore, text: str) -> None:
    before = stub.connections
    stub.answer = saying(TROUBLES[text])
    with pytest.raises(StoreUnavailableError):
        await rows.save([update(0, 1, 0)], [Progress(0, 0, 1)])
    stub.heal()
    assert await rows.save([update(0, 1, 0)], [Progress(0, 0, 1)]) == [True]
    assert stub.connections == before + 1
