"""Twice a second: does Redis still have what was applied, and does the log still reach as far as Redis?"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from stream_app.errors import LogRecreatedError, StoreUnavailableError
from stream_app.guarded_store import GuardedStore
from stream_app.ports import AppliedOffsets
from stream_app.store import RedisStore

STORE_WATCH_S = 0.5
# A high-water offset is as old as its fetch, and a worker that lost its partitions fetches no more while others go on:
# only a fresh one that still stands behind Redis counts, and so many in a row are the log's end.
LOOKS_BEFORE_RECREATED = 3

HighWater = tuple[int, int]  # the offset after the last record, and when it was fetched, in ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the watch may do, and what it asks.

    `high_waters` holds every partition that was fetched from; `log_end` asks for one end, None: not known now.
    """

    rewind: Callable[[int, int], None]
    drop_cache: Callable[[], None]
    fail: Callable[[Exception], None]
    high_waters: Callable[[], Mapping[int, HighWater]]
    log_end: Callable[[int], Awaitable[int | None]]


class StoreWatch:
    """Owner: the worker's event loop. Runs until cancelled, or until the log proves to be another one."""

    def __init__(self, rows: RedisStore, guarded: GuardedStore, applied: AppliedOffsets, hooks: Hooks) -> None:
        """Watch the progress of the partitions in `applied`, and of those that are fetched from."""
        self._rows, self._guarded, self._applied, self._hooks = rows, guarded, applied, hooks
        self._rebuilds: int | None = None
        self._beyond_end: dict[int, tuple[int, int]] = {}  # partition: looks in a row, when the last end was fetched

    async def run(self) -> None:
        """Look, twice a second."""
        while True:
            await asyncio.sleep(STORE_WATCH_S)
            known = dict(self._applied.offsets)  # before asking: what is applied meanwhile is in the answer
            try:
                partitions = sorted(known.keys() | self._hooks.high_waters().keys()) or [0]
                stored = dict(zip(partitions, await self._rows.progress(partitions), strict=True))
                rebuilds = await self._rows.rebuilds()
            except StoreUnavailableError as error:
                self._guarded.failed(str(error))
                continue
            self._guarded.succeeded()
            if self._rebuilds not in (None, rebuilds):
                self._hooks.drop_cache()
            self._rebuilds = rebuilds
            self._find_lost(known, stored)
            try:
                self.find_recreated(stored, self._hooks.high_waters())
            except LogRecreatedError as error:
                if await self._is_true(error):
                    self._hooks.fail(error)
                    return

    async def _is_true(self, error: LogRecreatedError) -> bool:
        """Tell whether the log really ends there: brokers that were killed come back with an old high-water mark."""
        end_offset = await self._hooks.log_end(error.partition)
        if end_offset is not None and end_offset <= error.applied_offset:
            return True
        self._beyond_end.pop(error.partition, None)
        return False

    def _find_lost(self, known: Mapping[int, int], stored: Mapping[int, int]) -> None:
        for partition, offset in known.items():
            if stored[partition] < min(offset, self._applied.offsets.get(partition, -1)):
                self._hooks.rewind(partition, stored[partition])

    def find_recreated(self, stored: Mapping[int, int], high_waters: Mapping[int, HighWater]) -> None:
        """Compare how far Redis has the log with where the log ends.

        Raises:
            LogRecreatedError: Redis was ahead of several ends in a row, each fetched after the one before.
        """
        for partition, (end_offset, fetched_ms) in high_waters.items():
            if stored.get(partition, -1) < end_offset:
                self._beyond_end.pop(partition, None)
                continue
            looks, last_fetched_ms = self._beyond_end.get(partition, (0, -1))
            if fetched_ms > last_fetched_ms:
                self._beyond_end[partition] = looks + 1, fetched_ms
            if self._beyond_end[partition][0] >= LOOKS_BEFORE_RECREATED:
                raise LogRecreatedError(partition, stored[partition], end_offset)
