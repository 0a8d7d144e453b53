"""A log that was created anew is told from one whose end was fetched a while ago."""

from collections.abc import Mapping
from typing import Any

import pytest

from stream_app.errors import LogRecreatedError
from stream_app.ports import AppliedOffsets
from stream_app.store_watch import LOOKS_BEFORE_RECREATED, HighWater, Hooks, StoreWatch


def watch() -> StoreWatch:
    """Return a watch that is asked only to compare: it needs neither store nor hooks for that."""
    unused: Any = None
    return StoreWatch(unused, unused, AppliedOffsets(), unused)


def look(at: StoreWatch, end_offset: int, fetched_ms: int, applied_offset: int = 99) -> None:
    stored: Mapping[int, int] = {0: applied_offset}
    high_waters: Mapping[int, HighWater] = {0: (end_offset, fetched_ms)}
    at.find_recreated(stored, high_waters)


def test_ends_that_stay_behind_redis_fetch_after_fetch_are_another_log() -> None:
    watching = watch()
    for fetched_ms in range(1, LOOKS_BEFORE_RECREATED):
        look(watching, 10, fetched_ms)
    with pytest.raises(LogRecreatedError):
        look(watching, 10, LOOKS_BEFORE_RECREATED)


def test_an_end_that_is_not_fetched_again_proves_nothing() -> None:
    watching = watch()
    for _ in range(10 * LOOKS_BEFORE_RECREATED):
        look(watching, 10, fetched_ms=1)


def test_one_end_beyond_redis_starts_the_count_again() -> None:
    watching = watch()
    for fetched_ms in range(1, 10 * LOOKS_BEFORE_RECREATED):
        look(watching, 100 if fetched_ms % LOOKS_BEFORE_RECREATED == 0 else 99, fetched_ms)


def test_a_log_that_ends_where_redis_is_has_everything() -> None:
    watching = watch()
    for fetched_ms in range(1, 10 * LOOKS_BEFORE_RECREATED):
        look(watching, 100, fetched_ms, applied_offset=99)


@pytest.mark.parametrize(("end_offset", "ends_there"), [(10, True), (99, True), (100, False), (None, False)])
async def test_an_old_high_water_mark_of_a_broker_that_came_back_is_no_other_log(
    end_offset: int | None, ends_there: bool
) -> None:
    async def log_end(partition: int) -> int | None:
        return end_offset

    unused: Any = None
    hooks = Hooks(rewind=unused, drop_cache=unused, fail=unused, high_waters=unused, log_end=log_end)
    watching = StoreWatch(unused, unused, AppliedOffsets(), hooks)
    assert await watching._is_true(LogRecreatedError(0, 99, 10)) is ends_there
