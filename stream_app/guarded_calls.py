"""The guarded writes of the store: compare and set as one atom, as a Lua script or with WATCH and MULTI.

Each call is data: the keys it reads, its arguments, and one rule that is written twice, as a script for the server
and in Python for servers that forbid scripts. tests/contract/test_store.py holds both to the same suite.
KEYS[1] is always the hash of the log; the other keys are strings. A call touches one hash slot.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from redis.exceptions import InvalidResponse, NoScriptError, WatchError

from stream_app.errors import StoreUnavailableError
from stream_app.state import FENCE_BYTES, Fence, fence_of, may_replace_fence

WATCH_ATTEMPTS = 50

# A writer of an older epoch gets nothing written and answers {2}. One whose rows are of another state space than those
# that are there answers {4, their space}. One that has not noticed a rebuild answers {3, rebuilds, progress of each
# partition}. A store behind its base answers {0, which, what it has}. Then `state.may_replace`, row by row; the answer
# is {1, 1 or 0 for each row}. Progress moves when every row was written: a refused one is folded again. Positions are
# compared as digits in text, so neither 53-bit numbers nor the server's locale matter.
# KEYS: log, progress of each partition, rows. ARGV: epoch, number of partitions, 1 if this call completes the
# micro-batch, rebuilds that the writer knows of ('': any), its state space ('': any), then base and offset of each
# partition, then base fence and row of each row.
SAVE_SCRIPT = """
local function covers(a, b)
  local a_epoch, b_epoch = string.sub(a, 1, 6), string.sub(b, 1, 6)
  if a_epoch ~= b_epoch then return b_epoch < a_epoch end
  return string.sub(a, 7, 12) == string.sub(b, 7, 12) and string.sub(b, 13, 32) <= string.sub(a, 13, 32)
end
local head = redis.call('HMGET', KEYS[1], 'epoch', 'rebuilds', 'space')
local epoch = tonumber(head[1] or '0')
if epoch > tonumber(ARGV[1]) then return {2} end
if ARGV[5] ~= '' and head[3] and head[3] ~= ARGV[5] then return {4, head[3]} end
local partitions, completes = tonumber(ARGV[2]), ARGV[3] == '1'
local at = {}
for p = 1, partitions do at[p] = redis.call('GET', KEYS[p + 1]) or '00000000000000000000' end
if ARGV[4] ~= '' and ARGV[4] ~= (head[2] or '0') then return {3, head[2] or '0', unpack(at)} end
for p = 1, partitions do
  if at[p] < ARGV[2 * p + 4] then return {0, p, at[p]} end
end
if not head[1] or epoch < tonumber(ARGV[1]) then redis.call('HSET', KEYS[1], 'epoch', ARGV[1]) end
if ARGV[5] ~= '' and not head[3] then redis.call('HSET', KEYS[1], 'space', ARGV[5]) end
local answer = {1}
for i = partitions + 2, #KEYS do
  local base, row = ARGV[2 * i + 2], ARGV[2 * i + 3]
  local stored = redis.call('GETRANGE', KEYS[i], 0, 31)
  local write = #stored < 32 or (covers(base, stored) and not covers(stored, row))
  if write then redis.call('SET', KEYS[i], row) else completes = false end
  answer[#answer + 1] = write and 1 or 0
end
for p = 1, partitions do
  if completes and at[p] < ARGV[2 * p + 5] then redis.call('SET', KEYS[p + 1], ARGV[2 * p + 5]) end
end
return answer
"""

# Raises the epoch when the log has fewer partitions than it had (offsets of the old one mean nothing in the new) or
# when asked to; the latter also clears progress. A log whose topic id is known cannot have fewer: then nothing changes.
# Partitions that are added leave every offset what it was. ARGV: partition count, the epoch that the caller has written
# in so far (0: none), 1 to start a new epoch, the counts that the caller knows of ('': none). KEYS: log, progress of
# each partition. Answers {epoch, rebuilds, its counts so far}.
EPOCH_SCRIPT = """
local head = redis.call('HMGET', KEYS[1], 'epoch', 'partitions', 'rebuilds', 'topic_id')
local epoch = math.max(tonumber(head[1] or '0'), tonumber(ARGV[2]), 1)
local counts = head[2] or (ARGV[4] ~= '' and ARGV[4]) or ARGV[1]
local last, count = tonumber(string.match(counts, '%d+$')), tonumber(ARGV[1])
if ARGV[3] == '1' or (count < last and (head[4] or '') == '') then
  epoch, counts = epoch + 1, ARGV[1]
elseif count > last then
  counts = counts .. ',' .. ARGV[1]
end
redis.call('HSET', KEYS[1], 'partitions', counts, 'epoch', epoch)
if ARGV[3] == '1' then
  for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
end
return {epoch, tonumber(head[3] or '0'), counts}
"""

# Says what the rows are of (`space`: a state space, `topic_id`: a topic), if nobody has said so, or if asked to. KEYS:
# log. ARGV: field, value, 1 to say it whatever was said. Answers {1, what was said before, '' for nothing}.
CLAIM_SCRIPT = """
local said = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if said == '' or ARGV[3] == '1' then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return {1, said}
"""

# Takes the progress of each partition back to what is left, where it is beyond. KEYS: log, progress of each partition.
# ARGV: epoch, then each offset. Answers {2}, nothing taken back, or {1}.
TAKE_BACK_SCRIPT = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and tonumber(epoch) > tonumber(ARGV[1]) then return {2} end
for i = 2, #KEYS do
  local at = redis.call('GET', KEYS[i])
  if at and at > ARGV[i] then redis.call('SET', KEYS[i], ARGV[i]) end
end
return {1}
"""

# Writes each row whose stored bytes are still those that were judged. KEYS: log, rows. ARGV: epoch, then the SHA-1 of
# the stored bytes ('': none) and the row, of each. Answers {2}, or {1, 1 or 0 for each row}.
REPLACE_SCRIPT = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and tonumber(epoch) > tonumber(ARGV[1]) then return {2} end
local answer = {1}
for i = 2, #KEYS do
  local stored = redis.call('GET', KEYS[i])
  local write = (stored and redis.sha1hex(stored) or '') == ARGV[2 * i - 2]
  if write then redis.call('SET', KEYS[i], ARGV[2 * i - 1]) end
  answer[#answer + 1] = write and 1 or 0
end
return answer
"""

# After a rebuild: brings each partition to at least its offset, and tells workers to drop their caches if a row was
# mended that they may hold. KEYS: log, progress of each partition. ARGV: epoch, 1 to tell, then each offset.
REBUILT_SCRIPT = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and tonumber(epoch) > tonumber(ARGV[1]) then return {2} end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1])
if ARGV[2] == '1' then redis.call('HINCRBY', KEYS[1], 'rebuilds', 1) end
for i = 2, #KEYS do
  local at = redis.call('GET', KEYS[i])
  if not at or #at ~= 20 or string.find(at, '%D') or at < ARGV[i + 1] then redis.call('SET', KEYS[i], ARGV[i + 1]) end
end
return {1}
"""

SAVED, BEHIND, SUPERSEDED, REBUILT, FOREIGN = 1, 0, 2, 3, 4  # the first number of an answer
NOTHING_APPLIED = b"0" * 20

Head = Mapping[bytes, bytes]
Values = Sequence[bytes | None]


@dataclass(slots=True)
class Decision:
    """What the rule decided: the answer, and what it writes. A value None deletes its key."""

    answer: list[Any]
    head: dict[str, bytes]
    writes: dict[str, bytes | None]


@dataclass(frozen=True, slots=True)
class Script:
    """A script and its digest."""

    name: str
    text: str
    sha: str


def _script(name: str, text: str) -> Script:
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One guarded call: `decide` is the rule of `script`, over the hash of the log and the values of `keys[1:]`."""

    script: Script
    keys: list[str]
    arguments: list[bytes]
    decide: Callable[[Head, Values, "Call"], Decision]


def save_call(keys: list[str], arguments: list[bytes]) -> Call:
    """Return the call of SAVE_SCRIPT."""
    return Call(script=_SAVE, keys=keys, arguments=arguments, decide=_decide_save)


def epoch_call(keys: list[str], arguments: list[bytes]) -> Call:
    """Return the call of EPOCH_SCRIPT."""
    return Call(script=_EPOCH, keys=keys, arguments=arguments, decide=_decide_epoch)


def claim_call(keys: list[str], arguments: list[bytes]) -> Call:
    """Return the call of CLAIM_SCRIPT."""
    return Call(script=_CLAIM, keys=keys, arguments=arguments, decide=_decide_claim)


def take_back_call(keys: list[str], arguments: list[bytes]) -> Call:
    """Return the call of TAKE_BACK_SCRIPT."""
    return Call(script=_TAKE_BACK, keys=keys, arguments=arguments, decide=_decide_take_back)


def replace_call(keys: list[str], arguments: list[bytes]) -> Call:
    """Return the call of REPLACE_SCRIPT."""
    return Call(script=_REPLACE, keys=keys, arguments=arguments, decide=_decide_replace)


def rebuilt_call(keys: list[str], arguments: list[bytes]) -> Call:
    """Return the call of REBUILT_SCRIPT."""
    return Call(script=_REBUILT, keys=keys, arguments=arguments, decide=_decide_rebuilt)


_SAVE = _script("save", SAVE_SCRIPT)
_EPOCH = _script("enter_epoch", EPOCH_SCRIPT)
_CLAIM = _script("claim", CLAIM_SCRIPT)
_TAKE_BACK = _script("take_back", TAKE_BACK_SCRIPT)
_REPLACE = _script("replace", REPLACE_SCRIPT)
_REBUILT = _script("rebuilt", REBUILT_SCRIPT)


def digest_of(stored: bytes | None) -> bytes:
    """Return what REPLACE_SCRIPT compares: the SHA-1 of the bytes in hex, empty for none."""
    return b"" if stored is None else hashlib.sha1(stored, usedforsecurity=False).hexdigest().encode()


def is_offset_text(value: bytes) -> bool:
    """Tell whether progress is 20 digits, as every save writes it."""
    return len(value) == len(NOTHING_APPLIED) and value.isdigit()


def _decide_save(head: Head, values: Values, call: Call) -> Decision:
    epoch, partitions, completes, known, space, *rest = call.arguments
    count = int(partitions)
    at = [value or NOTHING_APPLIED for value in values[:count]]
    if int(head.get(b"epoch", 0)) > int(epoch):
        return Decision([SUPERSEDED], {}, {})
    if space and head.get(b"space", space) != space:
        return Decision([FOREIGN, head[b"space"]], {}, {})
    rebuilds = head.get(b"rebuilds", b"0")
    if known not in (b"", rebuilds):
        return Decision([REBUILT, rebuilds, *at], {}, {})
    bases, offsets = rest[: 2 * count : 2], rest[1 : 2 * count : 2]
    for p, (has, base) in enumerate(zip(at, bases, strict=True), start=1):
        if has < base:
            return Decision([BEHIND, p, has], {}, {})
    written, writes = [], dict[str, bytes | None]()
    rows = zip(call.keys[count + 1 :], values[count:], rest[2 * count :: 2], rest[2 * count + 1 :: 2], strict=True)
    for key, stored, base, row in rows:
        fence = _stored_fence(stored)
        written.append(fence is None or may_replace_fence(fence, base=fence_of(base), new=fence_of(row)))
        if written[-1]:
            writes[key] = row
    if completes == b"1" and all(written):
        steps = zip(call.keys[1 : count + 1], at, offsets, strict=True)
        writes |= {key: offset for key, has, offset in steps if has < offset}
    return Decision([SAVED, *map(int, written)], {"epoch": epoch} | ({"space": space} if space else {}), writes)


def _stored_fence(stored: bytes | None) -> Fence | None:
    return None if stored is None or len(stored) < FENCE_BYTES else fence_of(stored)


def _decide_epoch(head: Head, values: Values, call: Call) -> Decision:
    partitions, written_in, new, known = call.arguments
    epoch = max(int(head.get(b"epoch", 0)), int(written_in), 1)
    counts = head.get(b"partitions", known or partitions)
    count, last = int(partitions), int(counts.rpartition(b",")[2])
    if new == b"1" or (count < last and not head.get(b"topic_id")):
        epoch, counts = epoch + 1, partitions
    elif count > last:
        counts = counts + b"," + partitions
    cleared: dict[str, bytes | None] = dict.fromkeys(call.keys[1:]) if new == b"1" else {}
    fields = {"partitions": counts, "epoch": b"%d" % epoch}
    return Decision([epoch, int(head.get(b"rebuilds", 0)), counts], fields, cleared)


def _decide_claim(head: Head, values: Values, call: Call) -> Decision:
    field, value, whatever = call.arguments
    said = head.get(field, b"")
    return Decision([SAVED, said], {field.decode(): value} if not said or whatever == b"1" else {}, {})


def _decide_take_back(head: Head, values: Values, call: Call) -> Decision:
    epoch, *offsets = call.arguments
    if int(head.get(b"epoch", 0)) > int(epoch):
        return Decision([SUPERSEDED], {}, {})
    steps = zip(call.keys[1:], values, offsets, strict=True)
    return Decision([SAVED], {}, {key: left for key, at, left in steps if at is not None and at > left})


def _decide_replace(head: Head, values: Values, call: Call) -> Decision:
    epoch, *rest = call.arguments
    if int(head.get(b"epoch", 0)) > int(epoch):
        return Decision([SUPERSEDED], {}, {})
    rows = list(zip(call.keys[1:], values, rest[::2], rest[1::2], strict=True))
    same = [digest_of(stored) == digest for _, stored, digest, _ in rows]
    writes: dict[str, bytes | None] = {key: row for ok, (key, _, _, row) in zip(same, rows, strict=True) if ok}
    return Decision([SAVED, *map(int, same)], {}, writes)


def _decide_rebuilt(head: Head, values: Values, call: Call) -> Decision:
    epoch, tell, *offsets = call.arguments
    if int(head.get(b"epoch", 0)) > int(epoch):
        return Decision([SUPERSEDED], {}, {})
    fields = {"epoch": epoch}
    if tell == b"1":
        fields["rebuilds"] = b"%d" % (int(head.get(b"rebuilds", 0)) + 1)
    steps = zip(call.keys[1:], values, offsets, strict=True)
    writes: dict[str, bytes | None] = {
        key: offset for key, at, offset in steps if at is None or not is_offset_text(at) or at < offset
    }
    return Decision([SAVED], fields, writes)


class Caller(Protocol):
    """Runs guarded calls, each as one atom."""

    async def run(self, calls: Sequence[Call]) -> list[list[Any]]:
        """Return the answers, in order; may raise what the client raises."""
        ...


class LuaCaller:
    """Calls as scripts, all of them in one round trip (in a cluster: one to each node)."""

    def __init__(self, client: Any) -> None:
        """Use a client of one server or of a cluster."""
        self._client = client

    async def run(self, calls: Sequence[Call]) -> list[list[Any]]:
        if len(calls) == 1:
            return [await self._one(calls[0])]
        pipe = self._client.pipeline(transaction=False)
        for call in calls:
            # `evalsha` itself is barred in a cluster's pipeline.
            pipe.execute_command("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.arguments)
        answers = await pipe.execute(raise_on_error=False)
        return [await self._settle(call, answer) for call, answer in zip(calls, answers, strict=True)]

    async def _one(self, call: Call) -> list[Any]:
        try:
            answer = await self._client.evalsha(call.script.sha, len(call.keys), *call.keys, *call.arguments)
        except NoScriptError as error:
            answer = error
        return await self._settle(call, answer)

    async def _settle(self, call: Call, answer: Any) -> list[Any]:
        if isinstance(answer, NoScriptError):
            answer = await self._client.eval(call.script.text, len(call.keys), *call.keys, *call.arguments)
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, list) or not answer or answer[0] is None:
            raise InvalidResponse(f"{call.script.name} was asked for, {answer!r:.50} is no answer to that")
        return answer


class WatchCaller:
    """Calls with WATCH and MULTI, for servers where scripts are forbidden: three round trips each, one server only."""

    def __init__(self, client: Any) -> None:
        """Use a client of one server."""
        self._client = client

    async def run(self, calls: Sequence[Call]) -> list[list[Any]]:
        return [await self._one(call) for call in calls]

    async def _one(self, call: Call) -> list[Any]:
        for _ in range(WATCH_ATTEMPTS):
            async with self._client.pipeline(transaction=True) as pipe:
                try:
                    return await self._attempt(pipe, call)
                except WatchError:
                    continue
        raise StoreUnavailableError(
            f"{call.script.name}: others wrote the same keys {WATCH_ATTEMPTS} times in a row; nothing was written; "
            "allow scripts (RERANK_REDIS__SCRIPTS=lua)"
        )

    @staticmethod
    async def _attempt(pipe: Any, call: Call) -> list[Any]:
        await pipe.watch(*call.keys)
        head: Awaitable[Head] = pipe.hgetall(call.keys[0])
        decision = call.decide(await head, await pipe.mget(call.keys[1:]) if call.keys[1:] else [], call)
        pipe.multi()
        if decision.head:
            pipe.hset(call.keys[0], mapping=decision.head)
        for key, value in decision.writes.items():
            if value is None:
                pipe.delete(key)
            else:
                pipe.set(key, value)
        await pipe.execute()
        return decision.answer
