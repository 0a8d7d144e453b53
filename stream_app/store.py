"""Where user rows live: in memory, or in Redis behind a fence that refuses what a row already covers.

Key layout (a contract, DESIGN.md): `<prefix>:{b<bucket>}:u:<user_id>`. The bucket is a hash tag, so that in a
cluster the users of one bucket share a slot; it comes before the user id, so no id can steer it.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import msgspec
import redis.asyncio as redis_asyncio
from aiokafka.partitioner import murmur2
from redis.exceptions import InvalidResponse, ReadOnlyError, RedisClusterException, RedisError

from stream_app.errors import EpochError, ForeignRowsError, OtherLogError, StoreBehindError, StoreUnavailableError
from stream_app.guarded_calls import (
    BEHIND,
    FOREIGN,
    REBUILT,
    SUPERSEDED,
    Call,
    Caller,
    LuaCaller,
    WatchCaller,
    claim_call,
    digest_of,
    epoch_call,
    rebuilt_call,
    replace_call,
    save_call,
    take_back_call,
)
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
    offset_of,
    offset_text,
    pack_row,
    unpack_row,
)
from stream_app.telemetry import Telemetry

BUCKETS = 256
# Lua's unpack() holds about 8,000 values on its stack; one call stays far below.
KEYS_PER_CALL = 1_000


class RowCodec:
    """Rows to bytes and back, for one artefact's state space."""

    def __init__(self, *, state_size: int, space: int, telemetry: Telemetry) -> None:
        """Read rows of (space, S = state_size); count what cannot be read."""
        self._state_size = state_size
        self.space = space
        self._bad_rows = telemetry.bad_rows

    def cold(self) -> UserRow:
        """Return the row of a user nobody has seen."""
        return cold_row(self._state_size)

    def pack(self, row: UserRow) -> bytes:
        """Return the bytes of a row."""
        return pack_row(row, self.space)

    def unpack(self, data: bytes | None) -> UserRow | None:
        """Return the row, a cold one for no bytes, None for bytes that are no row.

        A row of another artefact keeps its fence and loses its vector: `rerank rebuild` recreates it.
        """
        if data is None:
            return self.cold()
        try:
            return unpack_row(data, state_size=self._state_size, space=self.space)
        except ForeignRowError as error:
            self._bad_rows.labels("foreign").inc()
            return UserRow(0, 0, error.fence, bytes(4 * self._state_size), b"", error.past)
        except RowError:
            self._bad_rows.labels("corrupt").inc()
            return None


class Replacement(msgspec.Struct, frozen=True):
    """A row to be written if the bytes stored for the user are still `stored`."""

    user_id: str
    stored: bytes | None
    data: bytes


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

    def __init__(
        self,
        client: "redis_asyncio.Redis",
        *,
        codec: RowCodec,
        key_prefix: str,
        log: str,
        scripts: Literal["lua", "watch"] = "lua",
    ) -> None:
        """Use `client`, which the caller closes; `log` is the topic whose progress is kept beside the rows."""
        self.client = client
        self._caller: Caller = LuaCaller(client) if scripts == "lua" else WatchCaller(client)
        self._log = log
        self._epoch = 0
        self._rebuilds = b""
        self._partitions = 0
        self._layouts: list[int] = []
        self._codec = codec
        self._prefix = key_prefix
        self._log_key = f"{key_prefix}:{{log}}:{log}"

    def key(self, user_id: str, kind: str = "u") -> str:
        """Return the key of a user's row; kind "bad": of bytes that were set aside."""
        return f"{self._prefix}:{{{bucket_of(user_id)}}}:{kind}:{user_id}"

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Return the row of each user, a cold one where there is none; corrupt bytes are set aside."""
        rows = []
        for user_id, data in zip(user_ids, await self.read(user_ids), strict=True):
            row = self._codec.unpack(data)
            if row is None:
                await self._set_aside(user_id)
                row = self._codec.cold()
            rows.append(row)
        return rows

    async def read(self, user_ids: Sequence[str]) -> list[bytes | None]:
        """Return the bytes stored for each user, sound or not, None where there are none."""
        if not user_ids:
            return []
        with unavailable("load"):
            return await self._get([self.key(user_id) for user_id in user_ids])

    async def _get(self, keys: list[str]) -> list[bytes | None]:
        answers: Any = await self.client.mget(keys)
        if not isinstance(answers, list) or len(answers) != len(keys):
            await self._look_up_again()
            raise InvalidResponse(f"{len(keys)} keys were asked for, {answers!r:.50} is no answer to that")
        return [answer if isinstance(answer, bytes) else None for answer in answers]

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        """Write the updates that `state.may_replace` allows; return which were written.

        Raises:
            StoreBehindError: Redis has less of a partition than the base of its progress, or rows were rebuilt under
                the caller's feet; nothing was written, and what the caller caches is void.
            EpochError: the epoch of this store is over, or its state space (ForeignRowsError).
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
        arguments = self._save_arguments(progress, completes=completes, rebuilds=self._rebuilds)
        arguments += [part for update in updates for part in (fence_text(update.base), self._codec.pack(update.row))]
        (answer,) = await self._call([save_call(keys, arguments)])
        return self._written(answer, progress)

    def _save_arguments(self, progress: Sequence[Progress], *, completes: bool, rebuilds: bytes) -> list[bytes]:
        numbers = [b"%d" % number for number in (self._epoch, len(progress), completes)]
        # Who asks about no rebuilds asks one bucket of a cluster, and state spaces are told to the log's slot alone.
        space = space_text(self._codec.space).encode() if rebuilds else b""
        return [
            *numbers,
            rebuilds,
            space,
            *(offset_text(offset) for step in progress for offset in (step.base, step.offset)),
        ]

    def _written(self, answer: list[Any], progress: Sequence[Progress]) -> list[bool]:
        verdict, *details = answer
        if verdict == BEHIND:
            which, applied = details
            raise StoreBehindError(progress[which - 1].partition, offset_of(applied))
        if verdict == REBUILT:
            self._rebuilds, at = details[0], [offset_of(has) for has in details[1:]]
            behind = [(step.partition, min(step.base, has)) for step, has in zip(progress, at, strict=True)]
            raise StoreBehindError(*(behind or [(-1, -1)])[0])
        if verdict == FOREIGN:
            raise ForeignRowsError(details[0].decode(), space_text(self._codec.space))
        self._check_epoch(verdict)
        return [bool(detail) for detail in details]

    def _check_epoch(self, verdict: int) -> None:
        if verdict == SUPERSEDED:
            raise EpochError(
                f"epoch {self._epoch} of {self._log} is over: `rerank reset-epoch` was called, or there are fewer "
                "partitions than before; nothing was written; restart this worker"
            )

    async def progress(self, partitions: Sequence[int]) -> list[int]:
        """Return the offset up to which each partition is applied, -1 for none."""
        if not partitions:
            return []
        with unavailable("progress"):
            answers = await self._get([self._progress_key(partition) for partition in partitions])
        return [-1 if answer is None else offset_of(answer) for answer in answers]

    async def rebuilds(self) -> int:
        """Return how many rebuilds mended rows that a worker may have cached."""
        with unavailable("rebuilds"):
            answer: Any = await self.client.hget(self._log_key, "rebuilds")
        return int(answer) if isinstance(answer, bytes) and answer.isdigit() else 0

    def _progress_key(self, partition: int) -> str:
        return f"{self._log_key}:{partition}"

    async def enter_epoch(self, partitions: int) -> int:
        """Return the epoch that this store writes in, raised by one when the log has fewer partitions than it had.

        Called again after Redis lost it, it restores the epoch rather than starting over.

        Raises:
            EpochError: there are fewer partitions although the topic is the same.
        """
        self._partitions = partitions
        epoch = await self._enter_epoch([self._log_key], partitions, new=False)
        if self._layouts[-1] > partitions:
            raise EpochError(
                f"{self._log}: the broker tells of {partitions} partitions, there were {self._layouts[-1]}; nothing "
                "was written; start again, its metadata may be old; if the topic is another one: `rerank reset-epoch`"
            )
        return epoch

    async def claim_log(self, topic_id: str) -> None:
        """Say from which topic the rows are, if nobody has said anything; "" (a broker without ids) says nothing.

        Raises:
            OtherLogError: they are from another topic of this name; nothing was said.
        """
        if not topic_id:
            return
        known = await self._claim("topic_id", topic_id)
        if known not in ("", topic_id):
            raise OtherLogError(self._log, known, topic_id)

    async def set_log(self, topic_id: str) -> None:
        """Say from which topic the rows are, whatever was said before."""
        await self._claim("topic_id", topic_id, whatever=True)

    async def _claim(self, field: str, value: str, *, whatever: bool = False) -> str:
        """Say it as one atom, if nobody has said anything; `whatever`: in any case. Return what was said before."""
        call = claim_call([self._log_key], [field.encode(), value.encode(), b"%d" % whatever])
        ((_, said),) = await self._call([call])
        return str(said.decode())

    async def reset_epoch(self, partitions: int) -> int:
        """Start a new epoch of a log with so many partitions, nothing of it applied; return it."""
        keys = [self._log_key, *(self._progress_key(partition) for partition in range(partitions))]
        return await self._enter_epoch(keys, partitions, new=True)

    async def _enter_epoch(self, keys: list[str], partitions: int, *, new: bool) -> int:
        arguments = [b"%d" % number for number in (partitions, self._epoch, new)]
        arguments.append(",".join(map(str, self._layouts)).encode())
        ((self._epoch, rebuilds, layouts),) = await self._call([epoch_call(keys, arguments)])
        self._rebuilds = b"%d" % rebuilds
        self._layouts = [int(count) for count in layouts.split(b",")]
        return self._epoch

    async def restore_layouts(self) -> None:
        """Say again which partition counts the log has had, if Redis lost it."""
        with unavailable("restore_layouts"):
            told: Any = await self.client.hget(self._log_key, "partitions")
            if told is None and self._layouts:
                await self.client.hset(self._log_key, "partitions", ",".join(map(str, self._layouts)))

    def homes(self, user_id: str) -> list[int]:
        """Return the partitions where the contract has put a user since this epoch began, oldest first.

        Partitions are added, never taken away; what a user did before stays where it was.
        """
        return list(dict.fromkeys(home_partition(user_id, count) for count in self._layouts))

    @property
    def layouts(self) -> Sequence[int]:
        """The partition counts that the log has had since this epoch began, oldest first."""
        return self._layouts

    async def row_space(self) -> str:
        """Return what was said of the state space of the rows, "" for nothing yet."""
        with unavailable("row_space"):
            answer: Any = await self.client.hget(self._log_key, "space")
        return answer.decode() if isinstance(answer, bytes) else ""

    async def claim_rows(self, *, cold: bool = False) -> None:
        """Say that the rows are of this store's state space, if nobody has said anything; `cold`: in any case.

        Raises:
            ForeignRowsError: they are of another one; nothing was said.
        """
        ours = space_text(self._codec.space)
        said = await self._claim("space", ours, whatever=cold)
        if said not in ("", ours) and not cold:
            raise ForeignRowsError(said, ours)

    async def set_row_space(self, space: str) -> None:
        """Say of which state space the rows are, whatever was said before; writers of another one get nothing written.

        `space` is a `space_text`, or REBUILDING and one: then nobody may write but a rebuild.
        """
        await self._claim("space", space, whatever=True)

    async def replace(self, replacements: Sequence[Replacement]) -> list[bool]:
        """Write each row whose stored bytes are still `stored`; return which were written.

        Raises:
            EpochError: the epoch of this store is over; nothing was written.
        """
        written: list[bool] = []
        for start in range(0, len(replacements), KEYS_PER_CALL):
            chunk = replacements[start : start + KEYS_PER_CALL]
            ((verdict, *answers),) = await self._call([self._replace_call(chunk, self._log_key)])
            self._check_epoch(verdict)
            written += [bool(answer) for answer in answers]
        return written

    def _replace_call(self, replacements: Sequence[Replacement], log_key: str) -> Call:
        keys = [log_key, *(self.key(one.user_id) for one in replacements)]
        rows = [part for one in replacements for part in (digest_of(one.stored), one.data)]
        return replace_call(keys, [b"%d" % self._epoch, *rows])

    async def rebuilt(self, offsets: Mapping[int, int], *, mended: bool) -> None:
        """Bring each partition to at least its offset; `mended`: make workers drop what they cache.

        Raises:
            EpochError: the epoch of this store is over; nothing was written.
        """
        keys = [self._log_key, *(self._progress_key(partition) for partition in offsets)]
        arguments = [b"%d" % self._epoch, b"%d" % mended, *map(offset_text, offsets.values())]
        (answer,) = await self._call([rebuilt_call(keys, arguments)])
        self._check_epoch(answer[0])

    async def _call(self, calls: Sequence[Call]) -> list[list[Any]]:
        with unavailable(calls[0].script.name):
            try:
                return await self._caller.run(calls)
            except RedisError as error:
                # A script that writes on a replica is told so in the middle of another error.
                if isinstance(error, ReadOnlyError | InvalidResponse) or "READONLY" in str(error):
                    await self._look_up_again()
                raise

    async def _look_up_again(self) -> None:
        """Leave a server that is no primary any more, or whose answers make no sense: the next call connects anew."""
        await self.client.connection_pool.disconnect(inuse_connections=False)

    async def _set_aside(self, user_id: str) -> None:
        """Move bytes that are no row out of the way, and take back the progress of their user's partitions.

        So they are read again from their start, as after a loss: that rebuilds the user and changes nobody else.
        Progress goes first, for a crash between the two must not leave a user cold whose log counts as applied.

        Raises:
            EpochError: the epoch is over; the bytes stay.
        """
        if not await self._take_back(dict.fromkeys(self.homes(user_id), -1)):
            self._check_epoch(SUPERSEDED)
        with unavailable("quarantine"):
            await self.client.rename(self.key(user_id), self.key(user_id, "bad"))

    async def _take_back(self, offsets: Mapping[int, int]) -> bool:
        """Lower the progress of partitions to what is left of them; False: not in the epoch of this store any more."""
        keys = [self._log_key, *(self._progress_key(partition) for partition in offsets)]
        (answer,) = await self._call([take_back_call(keys, [b"%d" % self._epoch, *map(offset_text, offsets.values())])])
        return bool(answer[0] != SUPERSEDED)


def space_text(space: int) -> str:
    """Return how a state space is written in the hash of the log: 16 hex digits."""
    return f"{space:016x}"


def home_partition(user_id: str, partitions: int) -> int:
    """Return the partition of `interactions` where the contract puts a user: that of Java's partitioner."""
    return int((murmur2(user_id.encode()) & 0x7FFFFFFF) % partitions)


def bucket_of(user_id: str) -> str:
    """Return the hash tag of a user."""
    return f"b{zlib.crc32(user_id.encode()) % BUCKETS:02x}"


@contextmanager
def unavailable(stage: str) -> Iterator[None]:
    """Turn what the client raises into StoreUnavailableError."""
    try:
        yield
    except (RedisError, RedisClusterException, OSError, TimeoutError, AttributeError) as error:
        # AttributeError: redis-py's cluster client closes, after a failure, connections that others are just opening.
        raise StoreUnavailableError(
            f"Redis {stage}: {type(error).__name__}: {str(error)[:200]}; nothing was acked; "
            "check the server (`rerank doctor`)"
        ) from error
