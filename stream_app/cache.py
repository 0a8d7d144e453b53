"""A bounded cache of user rows, in front of a store."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from stream_app.ports import UserStore
from stream_app.state import Progress, RowUpdate, UserRow


class CachedStore:
    """A bounded cache of the users this worker owns, in front of another store.

    Owner: the worker's event loop. Call `drop` on every revoke, for another worker writes those users from then on.
    """

    def __init__(self, store: UserStore, *, max_users: int) -> None:
        """Keep at most `max_users` rows; who was used longest ago makes room."""
        self._store = store
        self._max_users = max_users
        self._rows: OrderedDict[str, UserRow] = OrderedDict()
        self.generation = 0  # of the cached rows: another one after every drop

    def at_hand(self, user_ids: Sequence[str]) -> dict[str, UserRow]:
        """Return the cached rows among these users: nothing is waited for."""
        found = {user_id: self._rows[user_id] for user_id in user_ids if user_id in self._rows}
        self._used(found)
        return found

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Return rows from the cache, and the missing ones from the store in one trip.

        They are not cached: a store that has just come back empty makes every user a stranger, and whoever takes rows
        at hand would believe it. What is saved proves itself; for what was only read, see `keep`.
        """
        known = {user_id: self._rows.get(user_id) for user_id in user_ids}
        missing = [user_id for user_id, row in known.items() if row is None]
        self._used(user_id for user_id in known if known[user_id] is not None)
        if not missing:
            return [self._rows[user_id] for user_id in user_ids]
        loaded = dict(zip(missing, await self._store.load(missing), strict=True))
        # Meanwhile a save may have moved on a user we know or miss, or evicted him: the newest row wins.
        return [self._rows.get(user_id) or known[user_id] or loaded[user_id] for user_id in user_ids]

    def keep(self, rows: Mapping[str, UserRow], generation: int) -> None:
        """Cache rows that were loaded in this generation from a store that has proved to be up to date."""
        if generation == self.generation:
            for user_id, row in rows.items():
                self._rows.setdefault(user_id, row)
            self._evict()

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        """Write through; a user whose update was refused leaves the cache, for somebody else is ahead."""
        generation = self.generation
        written = await self._store.save(updates, progress)
        for update, allowed in zip(updates, written, strict=True):
            if not allowed:
                self._rows.pop(update.user_id, None)
            elif generation == self.generation:
                self._rows[update.user_id] = update.row
                self._rows.move_to_end(update.user_id)
        self._evict()
        return written

    def drop(self) -> None:
        """Forget every cached row; what is being loaded or saved meanwhile is not cached either."""
        self._rows.clear()
        self.generation += 1

    def _used(self, user_ids: Iterable[str]) -> None:
        for user_id in user_ids:
            self._rows.move_to_end(user_id)

    def _evict(self) -> None:
        while len(self._rows) > self._max_users:
            self._rows.popitem(last=False)
