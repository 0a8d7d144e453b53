"""Where user rows live: in memory, or in Redis behind a fence that refuses what a row already covers.

Key layout (a contract, DESIGN.md): `<prefix>:{b<bucket>}:u:<user_id>`. The bucket is a hash tag, so that in a
cluster the users of one bucket share a slot; it comes before the user id, so no id can steer it.
"""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import redis.asyncio as redis_asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from stream_app.errors import StoreUnavailableError
from stream_app.settings import RedisSettings
from stream_app.state import (
    ForeignRowError,
    RowError,
    RowUpdate,
    UserRow,
    cold_row,
    fence_of,
    fence_text,
    may_replace,
    pack_row,
    unpack_row,
)
from stream_app.telemetry import Telemetry

BUCKETS = 256
# Lua's unpack() holds about 8,000 values on its stack; one call stays far below.
KEYS_PER_CALL = 1_000

# One call a micro-batch: `state.may_replace`, row by row. ARGV holds the base fence and the row of each key.
# It compares text, digits only, so the server's locale does not matter. Returns 1 where it wrote, 0 where not.
SAVE_SCRIPT = """
local function covers(a, b)
  local a_epoch, b_epoch = string.sub(a, 1, 6), string.sub(b, 1, 6)
  if a_epoch ~= b_epoch then return b_epoch < a_epoch end
  return string.sub(a, 7, 12) == string.sub(b, 7, 12) and string.sub(b, 13, 32) <= string.sub(a, 13, 32)
end
local written = {}
for i, key in ipairs(KEYS) do
  local base, row = ARGV[2 * i - 1], ARGV[2 * i]
  local stored = redis.call('GETRANGE', key, 0, 31)
  if #stored < 32 or (covers(base, stored) and not covers(stored, row)) then
    redis.call('SET', key, row)
    written[i] = 1
  else
    written[i] = 0
  end
end
return written
"""

# Raises the epoch when the partition count of the log changed: offsets of the old layout mean nothing in the new.
EPOCH_SCRIPT = """
local partitions = redis.call('HGET', KEYS[1], 'partitions')
if partitions ~= ARGV[1] then
  redis.call('HSET', KEYS[1], 'partitions', ARGV[1])
  return redis.call('HINCRBY', KEYS[1], 'epoch', 1)
end
return tonumber(redis.call('HGET', KEYS[1], 'epoch'))
"""


class RowCodec:
    """Rows to bytes and back, for one artefact's state space."""

    def __init__(self, *, state_size: int, space: int, telemetry: Telemetry) -> None:
        """Read rows of (space, S = state_size); count what cannot be read."""
        self._state_size = state_size
        self._space = space
        self._bad_rows = telemetry.bad_rows

    def cold(self) -> UserRow:
        """Return the row of a user nobody has seen."""
        return cold_row(self._state_size)

    def pack(self, row: UserRow) -> bytes:
        """Return the bytes of a row."""
        return pack_row(row, self._space)

    def unpack(self, data: bytes | None) -> UserRow | None:
        """Return the row, a cold one for no bytes, None for bytes that are no row.

        A row of another artefact keeps its fence and loses its vector: `rerank rebuild` recreates it.
        """
        if data is None:
            return self.cold()
        try:
            return unpack_row(data, state_size=self._state_size, space=self._space)
        except ForeignRowError as error:
            self._bad_rows.labels("foreign").inc()
            return UserRow(0, 0, error.fence, bytes(4 * self._state_size), b"")
        except RowError:
            self._bad_rows.labels("corrupt").inc()
            return None


class MemoryStore:
    """Rows in this process, as the same bytes that Redis would hold. For replay and tests."""

    def __init__(self, codec: RowCodec) -> None:
        """Start empty."""
        self._codec = codec
        self._rows: dict[str, bytes] = {}
        self.quarantine: dict[str, bytes] = {}

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Return the row of each user, a cold one where there is none."""
        rows = []
        for user_id in user_ids:
            row = self._codec.unpack(self._rows.get(user_id))
            if row is None:
                self.quarantine[user_id] = self._rows.pop(user_id)
                row = self._codec.cold()
            rows.append(row)
        return rows

    async def save(self, updates: Sequence[RowUpdate]) -> list[bool]:
        """Write the updates that `state.may_replace` allows; return which were written."""
        written = []
        for update in updates:
            stored = self._rows.get(update.user_id)
            allowed = may_replace(None if stored is None else fence_of(stored), update)
            if allowed:
                self._rows[update.user_id] = self._codec.pack(update.row)
            written.append(allowed)
        return written

    async def topic_epoch(self, topic: str, partitions: int) -> int:
        """Return the epoch of a log that never changes its layout."""
        del topic, partitions
        return 1

    def put_bytes(self, user_id: str, data: bytes) -> None:
        """Place bytes as they are, sound or not."""
        self._rows[user_id] = data

    def dump(self) -> dict[str, bytes]:
        """Return the bytes of every row."""
        return dict(self._rows)


class RedisStore:
    """Rows in Redis: one round trip loads a micro-batch, one saves it.

    Every method raises StoreUnavailableError when Redis does not answer in time or cannot serve; a save that
    raised may still have been written, and repeating it is harmless because of the fence.
    """

    def __init__(self, client: "redis_asyncio.Redis", *, codec: RowCodec, key_prefix: str) -> None:
        """Use `client`, which the caller closes."""
        self.client = client
        self._codec = codec
        self._prefix = key_prefix

    def key(self, user_id: str) -> str:
        """Return the key of a user's row."""
        bucket = zlib.crc32(user_id.encode()) % BUCKETS
        return f"{self._prefix}:{{b{bucket:02x}}}:u:{user_id}"

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Return the row of each user, a cold one where there is none; corrupt bytes are set aside."""
        if not user_ids:
            return []
        keys = [self.key(user_id) for user_id in user_ids]
        with _unavailable("load"):
            answers = await self.client.mget(keys)
        rows = []
        for key, data in zip(keys, answers, strict=True):
            row = self._codec.unpack(data if isinstance(data, bytes) else None)
            if row is None:
                await self._quarantine(key)
                row = self._codec.cold()
            rows.append(row)
        return rows

    async def save(self, updates: Sequence[RowUpdate]) -> list[bool]:
        """Write the updates that `state.may_replace` allows; return which were written."""
        written: list[bool] = []
        for start in range(0, len(updates), KEYS_PER_CALL):
            chunk = updates[start : start + KEYS_PER_CALL]
            keys = [self.key(update.user_id) for update in chunk]
            arguments = [part for update in chunk for part in (fence_text(update.base), self._codec.pack(update.row))]
            written += [bool(answer) for answer in await self._call(_SAVE, keys, arguments)]
        return written

    async def topic_epoch(self, topic: str, partitions: int) -> int:
        """Return the epoch of the log, raised by one when its partition count is not the one last seen."""
        return int(await self._call(_EPOCH, [f"{self._prefix}:{{topic}}:{topic}"], [str(partitions).encode()]))

    async def _call(self, script: "_Script", keys: list[str], arguments: list[bytes]) -> Any:
        with _unavailable(script.name):
            try:
                return await self.client.evalsha(script.sha, len(keys), *keys, *arguments)
            except NoScriptError:
                return await self.client.eval(script.text, len(keys), *keys, *arguments)

    async def _quarantine(self, key: str) -> None:
        with _unavailable("quarantine"):
            await self.client.rename(key, f"{key}:bad")


@dataclass(frozen=True, slots=True)
class _Script:
    name: str
    text: str

    @property
    def sha(self) -> str:
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_SAVE = _Script("save", SAVE_SCRIPT)
_EPOCH = _Script("topic_epoch", EPOCH_SCRIPT)


@contextmanager
def _unavailable(stage: str) -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailableError(
            f"Redis {stage}: {type(error).__name__}: {str(error)[:200]}; nothing was acked; "
            "check the server (`rerank doctor`)"
        ) from error


def connect(settings: RedisSettings) -> "redis_asyncio.Redis":
    """Return a client whose every wait is bounded: redis-py's own defaults wait 59 s for a hung server."""
    return redis_asyncio.Redis.from_url(
        settings.url.get_secret_value(),
        socket_timeout=settings.timeout_ms / 1000.0,
        socket_connect_timeout=settings.connect_timeout_ms / 1000.0,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )
