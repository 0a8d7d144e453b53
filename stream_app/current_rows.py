"""Rows from a store that still has everything which was applied, or none at all."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from stream_app.errors import StoreUnavailableError
from stream_app.ports import AppliedOffsets, RowSource
from stream_app.state import UserRow

StoredProgress = Callable[[Sequence[int]], Awaitable[list[int]]]


class RowCache(RowSource, Protocol):
    """A cache in front of a store."""

    @property
    def generation(self) -> int:
        """Another number after every drop."""
        ...

    def keep(self, rows: Mapping[str, UserRow], generation: int) -> None:
        """Cache rows that were loaded in this generation."""
        ...


class CurrentRows:
    """What candidate lists load from: a Redis that came back empty or older would make every user a stranger.

    The store watch notices that twice a second, a save at once; a list that loads before either must not be ranked
    from rows that lack what its `after` names. So the progress is read after the rows: one more trip to each node, for
    users that are not cached.
    """

    def __init__(
        self,
        cache: RowCache,
        *,
        progress: StoredProgress,
        applied: AppliedOffsets,
        rewind: Callable[[int, int], None],
    ) -> None:
        """Load through `cache`; `rewind(partition, offset)` reads again what the store behind it lost."""
        self._cache = cache
        self._progress = progress
        self._applied = applied
        self._rewind = rewind

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Return the row of each user.

        Raises:
            StoreUnavailableError: the store did not answer, or lost interactions that were applied.
        """
        known = dict(self._applied.offsets)  # before the rows: what is applied meanwhile may be missing in them
        generation = self._cache.generation
        rows = await self._cache.load(user_ids)
        partitions = list(known)
        stored = dict(zip(partitions, await self._progress(partitions), strict=True)) if partitions else {}
        behind = [partition for partition in partitions if stored[partition] < known[partition]]
        for partition in behind:
            if stored[partition] < self._applied.offsets.get(partition, -1):
                self._rewind(partition, stored[partition])
        if behind:
            raise StoreUnavailableError(
                f"Redis lost interactions of partitions {behind} that were applied; its rows are not used; they are "
                "read again"
            )
        self._cache.keep(dict(zip(user_ids, rows, strict=True)), generation)
        return rows
