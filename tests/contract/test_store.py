"""One suite for every user store: in memory, in Redis, and each behind the cache."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from deploy.local.redis import RedisServer
from schemas.limits import Limits
from stream_app.cache import CachedStore
from stream_app.cluster_store import store_of
from stream_app.connection import check_connection, connect, is_cluster
from stream_app.errors import (
    REBUILDING,
    EpochError,
    ForeignRowsError,
    OtherLogError,
    StoreBehindError,
    StoreUnavailableError,
)
from stream_app.guarded_calls import Call, Caller
from stream_app.pipeline import apply_interactions
from stream_app.ports import UserStore
from stream_app.settings import RedisSettings
from stream_app.state import Fence, Progress, RowUpdate, UserRow, cold_row, fence_of, pack_row
from stream_app.store import MemoryStore, RedisStore, RowCodec, home_partition, space_text
from stream_app.telemetry import Telemetry
from tests.builders import interaction
from tests.fakes import SPACE, STATE_SIZE, FakeRecord, memory_store, record_of, serving
from tests.redis_kit import PASSWORD, USER, Certificates, Cluster, Sentinels, TlsTerminator, permit

LIMITS = Limits()
REDIS_KINDS = ("redis", "redis without scripts", "redis with tls and acl", "redis by sentinel", "redis cluster")
BACKENDS = ["memory", *(pytest.param(kind, marks=pytest.mark.integration) for kind in REDIS_KINDS)]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def redis_behind_tls(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisSettings]:
    certificates = Certificates(tmp_path_factory.mktemp("certificates"))
    permit(redis_server.address)
    certificate, key = certificates.sign("redis", valid=True)
    with TlsTerminator(redis_server, certificate, key) as terminator:
        url = f"rediss://{USER}:{PASSWORD}@127.0.0.1:{terminator.port}/0"
        yield RedisSettings(url=SecretStr(url), ca_file=certificates.ca)


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    started = Sentinels(tmp_path_factory.mktemp("sentinels"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()


def redis_settings(request: pytest.FixtureRequest, kind: str) -> RedisSettings:
    if kind == "redis with tls and acl":
        settings: RedisSettings = request.getfixturevalue("redis_behind_tls")
        return settings
    fixture = {"redis by sentinel": "sentinels", "redis cluster": "cluster"}.get(kind, "redis_server")
    url = SecretStr(request.getfixturevalue(fixture).url)
    return RedisSettings(url=url, scripts="watch" if kind == "redis without scripts" else "lua")


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[MemoryStore | RedisStore]:
    if request.param == "memory":
        yield memory_store()
        return
    settings = redis_settings(request, request.param)
    client = connect(settings)
    await check_connection(client, settings)
    yield redis_store(client, scripts=settings.scripts)
    await client.aclose()


@pytest.fixture(params=["direct", "cached", "cache of one user"])
def store(backend: MemoryStore | RedisStore, request: pytest.FixtureRequest) -> UserStore:
    if request.param == "direct":
        return backend
    return CachedStore(backend, max_users=100 if request.param == "cached" else 1)


def redis_store(
    client: object, prefix: str | None = None, *, scripts: Literal["lua", "watch"] = "lua", space: int = SPACE
) -> RedisStore:
    return store_of(
        client,
        codec=RowCodec(state_size=STATE_SIZE, space=space, telemetry=Telemetry()),
        key_prefix=prefix or f"t-{uuid.uuid4().hex}",
        log="interactions",
        scripts=scripts,
        cluster=is_cluster(client),
    )


def row(offset: int, *, partition: int = 0, epoch: int = 1) -> UserRow:
    return UserRow(offset, 1_000, Fence(epoch, partition, offset), bytes([offset % 256] * 8), b"i-1\ni-2")


def update(offset: int, *, base: Fence | None = None, user_id: str = "u-1", epoch: int = 1) -> RowUpdate:
    return RowUpdate(user_id, base or cold_row(STATE_SIZE).fence, row(offset, epoch=epoch))


async def test_a_user_nobody_has_seen_is_cold(store: UserStore) -> None:
    assert await store.load(["u-1", "u-2"]) == [cold_row(STATE_SIZE), cold_row(STATE_SIZE)]


async def test_loading_nobody_returns_nothing(store: UserStore) -> None:
    assert await store.load([]) == []


async def test_what_was_saved_is_loaded_in_the_order_asked_for(store: UserStore) -> None:
    assert await store.save([update(1, user_id="a"), update(2, user_id="b")]) == [True, True]
    assert await store.load(["b", "a", "c"]) == [row(2), row(1), cold_row(STATE_SIZE)]


async def test_ids_that_look_like_keys_stay_apart(store: UserStore) -> None:
    ids = ["u", "u:u", "{b00}:u", "*", " ", "é", "a" * 256]
    await store.save([update(n, user_id=user_id) for n, user_id in enumerate(ids)])
    assert await store.load(ids) == [row(n) for n in range(len(ids))]


async def test_the_same_save_again_is_refused_and_changes_nothing(store: UserStore) -> None:
    await store.save([update(5)])
    assert await store.save([update(5)]) == [False]
    assert await store.load(["u-1"]) == [row(5)]


async def test_a_zombie_is_refused(store: UserStore) -> None:
    await store.save([update(5)])
    assert await store.save([update(4)]) == [False]
    assert await store.load(["u-1"]) == [row(5)]


async def test_a_fold_from_a_base_that_somebody_overtook_is_refused(store: UserStore) -> None:
    await store.save([update(5)])
    assert await store.save([update(7, base=Fence(1, 0, 3))]) == [False]
    assert await store.load(["u-1"]) == [row(5)]


async def test_a_fold_from_the_stored_row_is_written(store: UserStore) -> None:
    await store.save([update(5)])
    assert await store.save([update(7, base=Fence(1, 0, 5))]) == [True]
    assert await store.load(["u-1"]) == [row(7)]


async def test_a_new_epoch_starts_again_at_small_offsets(store: UserStore) -> None:
    await store.save([update(500)])
    assert await store.save([update(0, base=Fence(1, 0, 500), epoch=2)]) == [True]
    assert await store.save([update(501, base=Fence(1, 0, 500))]) == [False]
    assert await store.load(["u-1"]) == [row(0, epoch=2)]


async def test_one_refused_row_does_not_stop_its_neighbours(store: UserStore) -> None:
    await store.save([update(5, user_id="b")])
    assert await store.save([update(1, user_id="a"), update(4, user_id="b"), update(2, user_id="c")]) == [
        True,
        False,
        True,
    ]


async def test_more_rows_than_one_call_may_carry_are_saved(backend: MemoryStore | RedisStore) -> None:
    ids = [f"u-{n}" for n in range(2_500)]
    updates = [update(n, user_id=user_id) for n, user_id in enumerate(ids)]
    assert await backend.save(updates, [Progress(0, -1, 2_499)]) == [True] * len(ids)
    assert await backend.progress([0]) == [2_499]
    assert [loaded.events for loaded in await backend.load(ids)] == list(range(len(ids)))


async def test_a_corrupt_row_is_set_aside_and_its_user_starts_cold(backend: MemoryStore | RedisStore) -> None:
    await put_bytes(backend, "u-1", b"junk" * 30)
    assert await backend.load(["u-1", "u-2"]) == [cold_row(STATE_SIZE)] * 2
    assert await backend.save([update(3)]) == [True]
    assert await backend.load(["u-1"]) == [row(3)]


async def test_a_row_of_another_model_loses_its_vector_and_keeps_its_fence(backend: MemoryStore | RedisStore) -> None:
    await put_bytes(backend, "u-1", pack_row(row(9), SPACE + 1))
    assert await backend.load(["u-1"]) == [UserRow(0, 0, Fence(1, 0, 9), bytes(4 * STATE_SIZE), b"")]
    assert await backend.save([update(10, base=Fence(1, 0, 9))]) == [True]


@pytest.mark.integration
@pytest.mark.parametrize("scripts", ["lua", "watch"])
async def test_partitions_that_are_added_are_of_the_same_epoch_fewer_are_of_another(
    redis_server: RedisServer, scripts: Literal["lua", "watch"]
) -> None:
    client = connect(RedisSettings(url=SecretStr(redis_server.url)))
    prefix, found = f"t-{uuid.uuid4().hex}", []
    for count in (4, 4, 8, 8, 10, 4):
        store = redis_store(client, prefix, scripts=scripts)
        found.append((await store.enter_epoch(count), list(store.layouts)))
    assert found == [(1, [4]), (1, [4]), (1, [4, 8]), (1, [4, 8]), (1, [4, 8, 10]), (2, [4])]
    await client.aclose()


@pytest.mark.integration
@pytest.mark.parametrize("scripts", ["lua", "watch"])
async def test_a_broker_that_forgot_partitions_of_the_same_topic_begins_no_epoch(
    redis_server: RedisServer, scripts: Literal["lua", "watch"]
) -> None:
    client = connect(RedisSettings(url=SecretStr(redis_server.url)))
    prefix = f"t-{uuid.uuid4().hex}"
    before, after = (redis_store(client, prefix, scripts=scripts) for _ in range(2))
    await before.claim_log("1a")
    await before.enter_epoch(8)
    with pytest.raises(EpochError, match="4 partitions, there were 8"):
        await after.enter_epoch(4)
    assert await redis_store(client, prefix).enter_epoch(8) == 1
    assert await redis_store(client, prefix).reset_epoch(4) == 2
    await after.set_log("")  # a broker that gives no ids
    assert await redis_store(client, prefix, scripts=scripts).enter_epoch(2) == 3
    await client.aclose()


@pytest.mark.integration
async def test_a_flushed_redis_is_told_again_which_partition_counts_there_were(redis_server: RedisServer) -> None:
    client = connect(RedisSettings(url=SecretStr(redis_server.url)))
    prefix = f"t-{uuid.uuid4().hex}"
    backend, later = redis_store(client, prefix), redis_store(client, prefix)
    await backend.enter_epoch(2)
    await backend.enter_epoch(5)
    await client.flushdb()
    await backend.restore_layouts()
    await later.enter_epoch(5)
    assert later.layouts == [2, 5]
    assert later.homes("u-1") == [home_partition("u-1", 2), home_partition("u-1", 5)]
    await client.aclose()


@pytest.mark.integration
async def test_what_a_corrupt_row_lost_is_read_again_wherever_its_user_was(redis_server: RedisServer) -> None:
    client = connect(RedisSettings(url=SecretStr(redis_server.url)))
    backend = redis_store(client)
    await backend.enter_epoch(2)
    await backend.enter_epoch(5)
    await backend.save([], [Progress(partition, -1, 9) for partition in range(5)])
    user_id = next(name for name in map(str, range(100)) if len(backend.homes(name)) == 2)
    await put_bytes(backend, user_id, b"junk" * 30)
    await backend.load([user_id])
    read_again = [partition for partition, offset in enumerate(await backend.progress(range(5))) if offset == -1]
    assert read_again == sorted(backend.homes(user_id))
    await client.aclose()


@pytest.mark.integration
async def test_a_writer_of_an_older_epoch_is_told_so_and_writes_nothing(redis_server: RedisServer) -> None:
    client = connect(RedisSettings(url=SecretStr(redis_server.url)))
    prefix = f"t-{uuid.uuid4().hex}"
    old, new = redis_store(client, prefix), redis_store(client, prefix)
    await old.enter_epoch(8)
    await new.enter_epoch(4)
    with pytest.raises(EpochError, match="restart this worker"):
        await old.save([update(1)])
    assert await new.load(["u-1"]) == [cold_row(STATE_SIZE)]
    await client.aclose()


class Race:
    """Runs calls, but those that write what `meanwhile` is about only after it was done."""

    def __init__(self, caller: Caller, key_part: str, meanwhile: Callable[[], Awaitable[object]]) -> None:
        self._caller, self._key_part, self._meanwhile = caller, key_part, meanwhile

    async def run(self, calls: Sequence[Call]) -> list[list[Any]]:
        if any(self._key_part in key for call in calls for key in call.keys):
            await self._meanwhile()
        return await self._caller.run(calls)


@pytest.mark.integration
async def test_after_a_reset_of_the_epoch_whoever_slept_in_a_write_writes_no_row_and_no_progress(
    two_models: tuple[RedisStore, RedisStore],
) -> None:
    """In a cluster he was told by the log's slot, before he slept, that he may write."""
    zombie, operator = two_models
    await zombie.enter_epoch(2)
    await zombie.save([update(5)], [Progress(0, -1, 5)])
    before = await operator.read(["u-1", "u-2"])

    async def reset() -> None:
        await operator.reset_epoch(2)

    zombie._caller = Race(zombie._caller, ":u:", reset)
    late = [update(8, base=Fence(1, 0, 5)), update(8, user_id="u-2")]
    with pytest.raises(EpochError, match="restart this worker"):
        await zombie.save(late, [Progress(0, 5, 8), Progress(1, -1, 3)])
    assert await operator.read(["u-1", "u-2"]) == before
    assert await operator.progress([0, 1]) == [-1, -1]


@pytest.mark.integration
async def test_what_a_writer_of_an_older_epoch_finds_lost_takes_no_progress_of_the_new_one_back(
    two_models: tuple[RedisStore, RedisStore],
) -> None:
    zombie, operator = two_models
    await zombie.enter_epoch(2)
    assert await zombie.reset_epoch(2) == 2
    assert await operator.reset_epoch(2) == 3
    await operator.rebuilt({0: 7, 1: 9}, mended=False)
    assert not await zombie._take_back({0: 3, 1: -1})
    assert await operator.progress([0, 1]) == [7, 9]
    assert await operator._take_back({0: 3, 1: 11})
    assert await operator.progress([0, 1]) == [3, 9]


@pytest.mark.integration
async def test_a_corrupt_row_that_a_worker_of_an_older_epoch_meets_stays_where_it_is(
    two_models: tuple[RedisStore, RedisStore],
) -> None:
    """Set aside while progress stands, its user would be cold for good."""
    zombie, operator = two_models
    await zombie.enter_epoch(2)
    await operator.reset_epoch(2)
    await put_bytes(operator, "u-1", b"junk" * 30)
    await operator.rebuilt({0: 7, 1: 7}, mended=False)
    with pytest.raises(EpochError, match="restart this worker"):
        await zombie.load(["u-1"])
    assert await operator.progress([0, 1]) == [7, 7]
    assert await operator.read(["u-1"]) == [b"junk" * 30]


@pytest.mark.integration
async def test_of_two_who_claim_the_rows_for_their_topics_at_once_one_is_refused(
    two_models: tuple[RedisStore, RedisStore],
) -> None:
    first, second = two_models

    async def claim() -> None:
        await second.claim_log("2b")

    first._caller = Race(first._caller, "{log}", claim)
    with pytest.raises(OtherLogError, match="Redis was made from 2b"):
        await first.claim_log("1a")


@pytest.mark.integration
async def test_a_flushed_redis_gets_its_epoch_back_from_the_next_save(redis_server: RedisServer) -> None:
    client = connect(RedisSettings(url=SecretStr(redis_server.url)))
    prefix = f"t-{uuid.uuid4().hex}"
    backend = redis_store(client, prefix)
    await backend.enter_epoch(8)
    assert await backend.enter_epoch(4) == 2
    await client.flushdb()
    await backend.save([update(1, epoch=2)])
    assert await redis_store(client, prefix).enter_epoch(4) == 2
    await client.aclose()


@pytest.fixture(params=["lua", "watch", "cluster"])
async def two_models(request: pytest.FixtureRequest) -> AsyncIterator[tuple[RedisStore, RedisStore]]:
    """Two stores over the same keys, for models of two state spaces."""
    url = SecretStr(request.getfixturevalue("cluster" if request.param == "cluster" else "redis_server").url)
    client, prefix = connect(RedisSettings(url=url)), f"t-{uuid.uuid4().hex}"
    scripts: Literal["lua", "watch"] = "watch" if request.param == "watch" else "lua"
    yield (
        redis_store(client, prefix, scripts=scripts, space=SPACE),
        redis_store(client, prefix, scripts=scripts, space=SPACE + 1),
    )
    await client.aclose()


@pytest.mark.integration
async def test_rows_are_claimed_by_the_first_and_for_no_other_state_space(
    two_models: tuple[RedisStore, RedisStore],
) -> None:
    ours, others = two_models
    assert await ours.row_space() == ""
    await ours.claim_rows()
    await ours.claim_rows()
    assert await others.row_space() == space_text(SPACE)
    with pytest.raises(ForeignRowsError, match=r"the rows are of 0000000000000007.*rerank rebuild"):
        await others.claim_rows()
    await others.claim_rows(cold=True)
    assert await ours.row_space() == space_text(SPACE + 1)


@pytest.mark.integration
async def test_rows_belong_to_the_topic_that_claimed_them_until_the_epoch_is_reset(
    two_models: tuple[RedisStore, RedisStore],
) -> None:
    store, _ = two_models
    await store.claim_log("")
    await store.claim_log("1a")
    await store.claim_log("1a")
    await store.claim_log("")
    with pytest.raises(OtherLogError, match=r"has id 2b, but Redis was made from 1a.*rerank reset-epoch"):
        await store.claim_log("2b")
    await store.set_log("2b")
    await store.claim_log("2b")


@pytest.mark.integration
async def test_a_writer_of_another_state_space_writes_nothing_and_is_told_so(
    two_models: tuple[RedisStore, RedisStore],
) -> None:
    ours, others = two_models
    for store in two_models:
        await store.enter_epoch(4)
    await ours.claim_rows()
    await ours.save([update(1)], [Progress(0, -1, 1)])
    before = await ours.read(["u-1"])
    with pytest.raises(ForeignRowsError):
        await others.save([update(2)], [Progress(0, 1, 2)])
    assert (await ours.read(["u-1"]), await ours.progress([0])) == (before, [1])


@pytest.mark.integration
async def test_while_rows_are_rebuilt_for_another_model_no_worker_writes_or_starts(
    two_models: tuple[RedisStore, RedisStore],
) -> None:
    for store in two_models:
        await store.enter_epoch(4)
    await two_models[0].claim_rows()
    await two_models[1].set_row_space(REBUILDING + space_text(SPACE + 1))
    for store in two_models:
        with pytest.raises(ForeignRowsError, match=r"a rebuild into state space 0000000000000008 has not ended"):
            await store.claim_rows()
        with pytest.raises(ForeignRowsError, match="has not ended"):
            await store.save([update(1)])
    await two_models[1].set_row_space(space_text(SPACE + 1))
    await two_models[1].save([update(1)])


@pytest.mark.integration
async def test_a_flushed_redis_gets_its_state_space_back_from_the_next_save(
    two_models: tuple[RedisStore, RedisStore],
) -> None:
    store, _ = two_models
    await store.enter_epoch(4)
    await store.claim_rows()
    await store.client.flushdb()
    await store.save([update(1)], [Progress(0, -1, 1)])
    assert await store.row_space() == space_text(SPACE)


async def test_progress_moves_with_the_rows(store: UserStore, backend: MemoryStore | RedisStore) -> None:
    assert await backend.progress([0, 1]) == [-1, -1]
    await store.save([update(5)], [Progress(0, -1, 5), Progress(1, -1, 9)])
    await store.save([], [Progress(0, 5, 7)])
    assert await backend.progress([0, 1]) == [7, 9]


async def test_progress_never_goes_back(store: UserStore, backend: MemoryStore | RedisStore) -> None:
    await store.save([], [Progress(0, -1, 7)])
    await store.save([], [Progress(0, 2, 4)])
    assert await backend.progress([0]) == [7]


async def test_progress_waits_for_a_refused_row(store: UserStore, backend: MemoryStore | RedisStore) -> None:
    await store.save([update(5)], [Progress(0, -1, 5)])
    assert await store.save([update(7, base=Fence(1, 0, 3))], [Progress(0, 5, 7)]) == [False]
    assert await backend.progress([0]) == [5]


async def test_a_store_that_lost_rows_refuses_to_write_past_the_hole(
    store: UserStore, backend: MemoryStore | RedisStore
) -> None:
    await store.save([update(5)], [Progress(0, -1, 5)])
    with pytest.raises(StoreBehindError) as caught:
        await store.save([update(9, user_id="u-2")], [Progress(0, 8, 9)])
    assert (caught.value.partition, caught.value.applied_offset) == (0, 5)
    assert await backend.load(["u-1", "u-2"]) == [row(5), cold_row(STATE_SIZE)]
    assert await backend.progress([0]) == [5]


async def test_a_retry_after_a_lost_reply_passes_its_own_progress(store: UserStore) -> None:
    progress = [Progress(0, -1, 5)]
    await store.save([update(5)], progress)
    assert await store.save([update(5)], progress) == [False]
    assert await store.save([], progress) == []


async def test_a_dropped_cache_reads_the_store_again(backend: MemoryStore | RedisStore) -> None:
    ours, theirs = CachedStore(backend, max_users=10), CachedStore(backend, max_users=10)
    await ours.save([update(1)])
    theirs.keep({"u-1": row(1)}, theirs.generation)
    await ours.save([update(2, base=Fence(1, 0, 1))])
    assert await theirs.load(["u-1"]) == [row(1)]
    theirs.drop()
    assert await theirs.load(["u-1"]) == [row(2)]


async def test_a_user_evicted_while_another_is_loaded_is_still_answered(backend: MemoryStore | RedisStore) -> None:
    overtaken = Overtaken(backend)
    cache = CachedStore(overtaken, max_users=10)
    overtaken.happens = cache.drop
    await cache.save([update(1, user_id="a")])
    assert await cache.load(["a", "b"]) == [row(1), cold_row(STATE_SIZE)]


class Overtaken:
    """A store during whose loads something happens."""

    def __init__(self, store: UserStore) -> None:
        self._store = store
        self.happens: Callable[[], None] = lambda: None

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        self.happens()
        return await self._store.load(user_ids)

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        return await self._store.save(updates, progress)


async def test_a_refused_save_evicts_the_stale_row(backend: MemoryStore | RedisStore) -> None:
    ours, theirs = CachedStore(backend, max_users=10), CachedStore(backend, max_users=10)
    theirs.keep({"u-1": cold_row(STATE_SIZE)}, theirs.generation)
    await ours.save([update(2)])
    assert await theirs.save([update(1)]) == [False]
    assert await theirs.load(["u-1"]) == [row(2)]


async def put_bytes(backend: MemoryStore | RedisStore, user_id: str, data: bytes) -> None:
    if isinstance(backend, MemoryStore):
        backend.put_bytes(user_id, data)
    else:
        await backend.client.set(backend.key(user_id), data)


# Workers that take turns, overlap and come back from the dead must leave what one pass over the log leaves.

LOG = [record_of(interaction(user_id=f"u-{n % 3}", item_id=f"i-{n % 5}", event_time_ms=n), offset=n) for n in range(40)]
batches = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 39), st.integers(1, 12), st.booleans()), max_size=12)


async def expected_rows() -> dict[str, bytes]:
    store = memory_store()
    await apply(LOG, store)
    return store.dump()


async def apply(records: list[FakeRecord], store: UserStore) -> None:
    await apply_interactions(
        records, serving=serving(), store=store, epoch=1, limits=LIMITS, future_tolerance_ms=10**15
    )


async def run_workers(backend: UserStore, steps: list[tuple[int, int, int, bool]]) -> None:
    """Let three workers with caches of their own apply stretches of the log in any order, then one apply it all.

    A worker reads forward from where the log's committed prefix ends, or re-reads: a stretch never leaves a gap.
    """
    workers = [CachedStore(backend, max_users=2) for _ in range(3)]
    applied = 0
    for worker, start, length, drop in steps:
        first = min(start, applied)
        if drop:
            workers[worker].drop()
        await apply(LOG[first : first + length], workers[worker])
        applied = max(applied, first + length)
    await apply(LOG[min(applied, len(LOG)) :], workers[0])


@given(steps=batches)
def test_any_interleaving_of_workers_leaves_what_one_pass_leaves(steps: list[tuple[int, int, int, bool]]) -> None:
    async def run() -> None:
        backend = memory_store()
        await run_workers(backend, steps)
        assert backend.dump() == await expected_rows()

    asyncio.run(run())


@pytest.mark.integration
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=batches)
def test_any_interleaving_of_workers_on_redis_leaves_what_one_pass_leaves(
    redis_server: RedisServer, steps: list[tuple[int, int, int, bool]]
) -> None:
    async def run() -> None:
        client = connect(RedisSettings(url=SecretStr(redis_server.url)))
        backend = redis_store(client)
        await run_workers(backend, steps)
        for user_id, data in (await expected_rows()).items():
            assert await client.get(backend.key(user_id)) == data
        await client.aclose()

    asyncio.run(run())


@pytest.mark.integration
async def test_redis_away_is_said_in_time_and_heals(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    client = connect(RedisSettings(url=SecretStr(server.url), timeout_ms=200, connect_timeout_ms=200))
    backend = redis_store(client)
    try:
        assert await backend.save([update(1)]) == [True]
        server.pause()
        with pytest.raises(StoreUnavailableError, match="load"):
            async with asyncio.timeout(5):
                await backend.load(["u-1"])
        server.resume()
        assert await backend.load(["u-1"]) == [row(1)]
        server.stop()
        with pytest.raises(StoreUnavailableError, match="save"):
            await backend.save([update(2, base=Fence(1, 0, 1))])
        server.start()
        assert await backend.save([update(2, base=Fence(1, 0, 1))]) == [True]
    finally:
        await client.aclose()
        server.stop()


@pytest.mark.integration
async def test_a_flushed_script_is_sent_again(redis_server: RedisServer) -> None:
    client = connect(RedisSettings(url=SecretStr(redis_server.url)))
    backend = redis_store(client)
    assert await backend.save([update(1)]) == [True]
    await client.script_flush()
    assert await backend.save([update(2, base=Fence(1, 0, 1))]) == [True]
    stored = await client.get(backend.key("u-1"))
    assert isinstance(stored, bytes)
    assert fence_of(stored) == Fence(1, 0, 2)
    await client.aclose()
