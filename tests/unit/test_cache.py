"""Which users the cache keeps."""

from stream_app.cache import CachedStore
from stream_app.state import Fence, RowUpdate, UserRow, cold_row
from tests.fakes import STATE_SIZE, memory_store


def update(user_id: str) -> RowUpdate:
    row = UserRow(1, 1, Fence(1, 0, 0), bytes(4 * STATE_SIZE), b"i-1")
    return RowUpdate(user_id, cold_row(STATE_SIZE).fence, row)


async def test_who_was_used_longest_ago_makes_room() -> None:
    store = CachedStore(memory_store(), max_users=3)
    await store.save([update(user_id) for user_id in ("a", "b", "c")])
    store.at_hand(["a"])
    await store.save([update("d")])
    assert sorted(store.at_hand(["a", "b", "c", "d"])) == ["a", "c", "d"]
    await store.load(["a", "c"])
    store.keep({"e": update("e").row}, store.generation)
    assert sorted(store.at_hand(["a", "b", "c", "d", "e"])) == ["a", "c", "e"]


async def test_a_row_that_was_only_read_is_not_at_hand_until_somebody_vouches_for_it() -> None:
    store = CachedStore(memory_store(), max_users=3)
    [row] = await store.load(["a"])
    assert store.at_hand(["a"]) == {}
    store.keep({"a": row}, store.generation)
    assert store.at_hand(["a"]) == {"a": row}


async def test_a_row_that_was_read_before_a_drop_is_not_kept() -> None:
    store = CachedStore(memory_store(), max_users=3)
    generation = store.generation
    [row] = await store.load(["a"])
    store.drop()
    store.keep({"a": row}, generation)
    assert store.at_hand(["a"]) == {}
