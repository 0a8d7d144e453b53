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

from stream_app.errors import EpochError, StoreBehindError, StoreUnavailableError
from stream_app.settings import RedisSettings
from stream_app.state import (
    ForeignRowError,
    Progress,
    RowError,
    RowUpdate,
    UserRow,
    cold_row,
    fence_of,
    fence_text,
    may_replace,
    offset_text,
    pack_row,
    unpack_row,
)
from stream_app.telemetry import Telemetry

BUCKETS = 256
# Lua's unpack() holds about 8,000 values on its stack; one call stays far below.
KEYS_PER_CALL = 1_000

# One call a micro-batch. A writer of an older epoch gets nothing written and answers {2}. Then the progress of each
# partition: a store behind its base gets nothing written and answers {0, which, what it has}. Then
# `state.may_replace`, row by row; the answer is {1, 1 or 0 for each row}. Progress moves when every row was written: a
# refused one is folded again. Positions are compared as digits in text, so neither 53-bit numbers nor the server's
# locale matter.
# KEYS: log, progress of each partition, rows. ARGV: epoch, number of partitions, 1 if this call completes the
# micro-batch, then base and offset of each partition, then base fence and row of each row.
SAVE_SCRIPT = """
local function covers(a, b)
  local a_epoch, b_epoch = string.sub(a, 1, 6), string.sub(b, 1, 6)
  if a_epoch ~= b_epoch then return b_epoch < a_epoch end
  return string.sub(a, 7, 12) == string.sub(b, 7, 12) and string.sub(b, 13, 32) <= string.sub(a, 13, 32)
end
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and tonumber(epoch) > tonumber(ARGV[1]) then return {2} end
if not epoch then redis.call('HSET', KEYS[1], 'epoch', ARGV[1]) end
local partitions, completes = tonumber(ARGV[2]), ARGV[3] == '1'
local at = {}
for p = 1, partitions do
  at[p] = redis.call('GET', KEYS[p + 1]) or '00000000000000000000'
  if at[p] < ARGV[2 * p + 2] then return {0, p, at[p]} end
end
local answer = {1}
for i = partitions + 2, #KEYS do
  local base, row = ARGV[2 * i], ARGV[2 * i + 1]
  local stored = redis.call('GETRANGE', KEYS[i], 0, 31)
  local write = #stored < 32 or (covers(base, stored) and not covers(stored, row))
  if write then redis.call('SET', KEYS[i], row) else completes = false end
  answer[#answer + 1] = write and 1 or 0
end
for p = 1, partitions do
  if completes and at[p] < ARGV[2 * p + 3] then redis.call('SET', KEYS[p + 1], ARGV[2 * p + 3]) end
end
return answer
"""

# Raises the epoch when the partition count of the log changed: offsets of the old layout mean nothing in the new.
# ARGV: partition count, and the epoch that the caller has written in so far (0: none).
EPOCH_SCRIPT = """
local partitions = redis.call('HGET', KEYS[1], 'partitions')
local epoch = math.max(tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0'), tonumber(ARGV[2]), 1)
if partitions and partitions ~= ARGV[1] then epoch = epoch + 1 end
redis.call('HSET', KEYS[1], 'partitions', ARGV[1], 'epoch', epoch)
return epoch
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
        self._progress: dict[int, int] = {}
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

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        """Write the updates that `state.may_replace` allows; return which were written.

        Raises:
            StoreBehindError: this store has less of a partition than the base of its progress.
        """
        for step in progress:
            if self._progress.get(step.partition, -1) < step.base:
                raise StoreBehindError(step.partition, self._progress.get(step.partition, -1))
        written = []
        for update in updates:
            stored = self._rows.get(update.user_id)
            allowed = may_replace(None if stored is None else fence_of(stored), update)
            if allowed:
                self._rows[update.user_id] = self._codec.pack(update.row)
            written.append(allowed)
        if all(written):
            for step in progress:
                self._progress[step.partition] = max(step.offset, self._progress.get(step.partition, -1))
        return written

    async def progress(self, partitions: Sequence[int]) -> list[int]:
        """Return the offset up to which each partition is applied, -1 for none."""
        return [self._progress.get(partition, -1) for partition in partitions]

    def lose_everything(self) -> None:
        """Become empty, as a Redis that was flushed."""
        self._rows.clear()
        self._progress.clear()

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

    def __init__(self, client: "redis_asyncio.Redis", *, codec: RowCodec, key_prefix: str, log: str) -> None:
        """Use `client`, which the caller closes; `log` is the topic whose progress is kept beside the rows."""
        self.client = client
        self._log = log
        self._epoch = 0
        self._codec = codec
        self._prefix = key_prefix
        self._log_key = f"{key_prefix}:{{log}}:{log}"

    def key(self, user_id: str, kind: str = "u") -> str:
        """Return the key of a user's row; kind "bad": of bytes that were set aside."""
        bucket = zlib.crc32(user_id.encode()) % BUCKETS
        return f"{self._prefix}:{{b{bucket:02x}}}:{kind}:{user_id}"

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Return the row of each user, a cold one where there is none; corrupt bytes are set aside."""
        if not user_ids:
            return []
        keys = [self.key(user_id) for user_id in user_ids]
        with _unavailable("load"):
            answers = await self.client.mget(keys)
        rows = []
        for user_id, data in zip(user_ids, answers, strict=True):
            row = self._codec.unpack(data if isinstance(data, bytes) else None)
            if row is None:
                await self._set_aside(user_id)
                row = self._codec.cold()
            rows.append(row)
        return rows

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        """Write the updates that `state.may_replace` allows; return which were written.

        Raises:
            StoreBehindError: Redis has less of a partition than the base of its progress; nothing was written.
        """
        written: list[bool] = []
        for start in range(0, max(1, len(updates)), KEYS_PER_CALL):
            chunk = updates[start : start + KEYS_PER_CALL]
            completes = start + KEYS_PER_CALL >= len(updates) and all(written)
            written += await self._save(chunk, progress, completes=completes)
        return written

    async def _save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress], *, completes: bool) -> list[bool]:
        keys = [self._log_key, *(self._progress_key(step.partition) for step in progress)]
        keys += [self.key(update.user_id) for update in updates]
        arguments = [b"%d" % number for number in (self._epoch, len(progress), completes)]
        arguments += [offset_text(offset) for step in progress for offset in (step.base, step.offset)]
        arguments += [part for update in updates for part in (fence_text(update.base), self._codec.pack(update.row))]
        verdict, *answers = await self._call(_SAVE, keys, arguments)
        if verdict == _BEHIND:
            which, applied = answers
            raise StoreBehindError(progress[which - 1].partition, int(applied) - 1)
        if verdict == _SUPERSEDED:
            raise EpochError(
                f"epoch {self._epoch} of {self._log} is over: another worker saw its partition count change; "
                "nothing was written; restart this worker"
            )
        return [bool(answer) for answer in answers]

    async def progress(self, partitions: Sequence[int]) -> list[int]:
        """Return the offset up to which each partition is applied, -1 for none."""
        if not partitions:
            return []
        with _unavailable("progress"):
            answers = await self.client.mget([self._progress_key(partition) for partition in partitions])
        return [-1 if answer is None else int(answer) - 1 for answer in answers]

    def _progress_key(self, partition: int) -> str:
        return f"{self._log_key}:{partition}"

    async def enter_epoch(self, partitions: int) -> int:
        """Return the epoch that this store writes in, raised by one when the log's partition count changed.

        Called again after Redis lost it, it restores the epoch rather than starting over.
        """
        arguments = [b"%d" % partitions, b"%d" % self._epoch]
        self._epoch = int(await self._call(_EPOCH, [self._log_key], arguments))
        return self._epoch

    async def _call(self, script: "_Script", keys: list[str], arguments: list[bytes]) -> Any:
        with _unavailable(script.name):
            try:
                return await self.client.evalsha(script.sha, len(keys), *keys, *arguments)
            except NoScriptError:
                return await self.client.eval(script.text, len(keys), *keys, *arguments)

    async def _set_aside(self, user_id: str) -> None:
        with _unavailable("quarantine"):
            await self.client.rename(self.key(user_id), self.key(user_id, "bad"))


@dataclass(frozen=True, slots=True)
class _Script:
    name: str
    text: str

    @property
    def sha(self) -> str:
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_SAVE = _Script("save", SAVE_SCRIPT)
_EPOCH = _Script("enter_epoch", EPOCH_SCRIPT)
_BEHIND, _SUPERSEDED = 0, 2  # verdicts of the save script


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
