"""No list is ranked from a Redis that lost what was applied, from the first load on."""

from collections.abc import Sequence

import pytest

from schemas.records import After
from stream_app.cache import CachedStore
from stream_app.current_rows import CurrentRows
from stream_app.errors import StoreUnavailableError
from stream_app.pipeline import ListRequest, Ranker
from stream_app.ports import AppliedOffsets
from stream_app.state import Fence, Progress, RowUpdate, UserRow
from stream_app.store import MemoryStore
from tests.builders import candidate_list
from tests.fakes import RECORD_TIME_MS, CountingBatch, FakeClock, memory_store, record_of, serving

ROW = UserRow(6, RECORD_TIME_MS, Fence(1, 0, 5), bytes(8), b"i-1")
OLDER = UserRow(3, RECORD_TIME_MS, Fence(1, 0, 2), bytes(8), b"i-1")


async def applied_store(row: UserRow = ROW) -> tuple[MemoryStore, AppliedOffsets]:
    """Return a store with the row of u-1, and the offsets of a worker that applied it."""
    store, applied = memory_store(), AppliedOffsets()
    await put(store, row)
    applied.advance(0, ROW.fence.offset)
    return store, applied


async def put(store: MemoryStore, row: UserRow) -> None:
    await store.save([RowUpdate("u-1", Fence(0, 0, -1), row)], [Progress(0, -1, row.fence.offset)])


def current(store: MemoryStore, applied: AppliedOffsets) -> CurrentRows:
    return CurrentRows(
        CachedStore(store, max_users=10), progress=store.progress, applied=applied, rewind=applied.rewind
    )


async def test_rows_of_a_store_that_has_everything_are_returned() -> None:
    store, applied = await applied_store()
    assert await current(store, applied).load(["u-1"]) == [ROW]


@pytest.mark.parametrize("left", [None, OLDER])
async def test_rows_of_a_store_that_lost_something_are_refused_and_it_is_read_again(left: UserRow | None) -> None:
    store, applied = await applied_store()
    store.lose_everything()
    if left is not None:
        await put(store, left)
    with pytest.raises(StoreUnavailableError, match="lost interactions"):
        await current(store, applied).load(["u-1"])
    assert applied.offsets == {0: -1 if left is None else left.fence.offset}
    assert applied.degraded(0)


async def test_rows_of_a_store_that_came_back_empty_are_at_hand_for_nobody() -> None:
    store, applied = await applied_store()
    cache = CachedStore(store, max_users=10)
    rows = CurrentRows(cache, progress=store.progress, applied=applied, rewind=applied.rewind)
    assert await rows.load(["u-1"]) == [ROW]
    assert cache.at_hand(["u-1"]) == {"u-1": ROW}
    cache.drop()
    store.lose_everything()
    await cache.load(["u-1"])  # as interactions do, whose save then finds out
    assert cache.at_hand(["u-1"]) == {}
    with pytest.raises(StoreUnavailableError):
        await rows.load(["u-1"])
    assert cache.at_hand(["u-1"]) == {}


async def test_an_after_counts_as_reached_only_while_no_rewind_took_it_back() -> None:
    store, applied = await applied_store()
    rewinding = Rewinding(store, applied)
    one = Ranker(serving=serving(), store=rewinding, applied=applied, clock=FakeClock())
    request = candidate_list(user_id="u-1", after=After(partition=0, offset=5), explain=False)
    asked = ListRequest(record_of(request), request, RECORD_TIME_MS + 1_000.0, CountingBatch())
    parts = [part async for part in one.rank([asked])]
    assert [part.waiting for part in parts] == [[asked]]


class Rewinding:
    """A store that turns out to be empty while its rows are on their way."""

    def __init__(self, store: MemoryStore, applied: AppliedOffsets) -> None:
        self._store, self._applied = store, applied

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Lose everything, be noticed, and answer."""
        self._store.lose_everything()
        self._applied.rewind(0, -1)
        return await self._store.load(user_ids)
