"""Rows that do not fit into memory, in a file of this process that vanishes with it."""

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence

IDS_PER_QUERY = 500


class RowSpill:
    """User id to row bytes, on disk. Use from one thread at a time."""

    def __init__(self) -> None:
        """Open nothing until the first row comes."""
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._database: sqlite3.Connection | None = None

    def put(self, rows: Iterable[tuple[str, bytes]]) -> None:
        """Keep rows; they replace older ones of their users."""
        database = self._opened()
        database.execute("BEGIN")
        database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", rows)
        database.execute("COMMIT")

    def take(self, user_ids: Sequence[str]) -> dict[str, bytes]:
        """Return and forget the rows of those users that have one."""
        found: dict[str, bytes] = {}
        if self._database is None:
            return found
        for start in range(0, len(user_ids), IDS_PER_QUERY):
            some = user_ids[start : start + IDS_PER_QUERY]
            marks = ",".join("?" * len(some))
            # The text is question marks alone; ids are bound.
            query = f"DELETE FROM rows WHERE user_id IN ({marks}) RETURNING user_id, data"  # noqa: S608
            found.update(self._database.execute(query, some).fetchall())
        return found

    def items(self) -> Iterator[tuple[str, bytes]]:
        """Yield every user and row."""
        if self._database is not None:
            yield from self._database.execute("SELECT user_id, data FROM rows")

    def close(self) -> None:
        """Remove the file."""
        if self._database is not None:
            self._database.close()
        if self._directory is not None:
            self._directory.cleanup()
        self._database = self._directory = None

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            self._directory = tempfile.TemporaryDirectory(prefix="rerank-rebuild-")
            path = f"{self._directory.name}/rows.sqlite"
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=OFF")
            self._database.execute("PRAGMA synchronous=OFF")
            self._database.execute("CREATE TABLE rows (user_id TEXT PRIMARY KEY, data BLOB) WITHOUT ROWID")
        return self._database
