"""Bytes to records and back.

A decoder takes a record's key and value and either returns the record, checked, or raises DecodeError,
whatever the bytes are. Checks run cheapest first: size, nesting, JSON with types and number ranges (msgspec),
counts, ids, key.
`tests/bench/bench_codec.py` measures them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import msgspec
import orjson

from schemas.limits import DEFAULT_LIMITS, FORBIDDEN_IN_IDS, Limits
from schemas.records import CandidateList, DeadlineMs, Interaction, Item, Slate
from schemas.refusals import DecodeError, ErrorCode, quote, refusal, refusal_of

__all__ = [
    "DecodeError",
    "ErrorCode",
    "decode_candidate_list",
    "decode_interaction",
    "decode_item",
    "decode_slate",
    "decode_user_id",
    "encode",
    "encode_slate",
    "peek_candidate_list",
    "slate_digest_bytes",
]

Record = Interaction | CandidateList | Item
_T = TypeVar("_T")


class CandidateListHead(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, and until when."""

    request_id: str
    user_id: str
    event_time_ms: int
    deadline_ms: DeadlineMs | None = None


_INTERACTION = msgspec.json.Decoder(Interaction)
_CANDIDATE_LIST = msgspec.json.Decoder(CandidateList)
_CANDIDATE_LIST_HEAD = msgspec.json.Decoder(CandidateListHead)
_ITEM = msgspec.json.Decoder(Item)
_SLATE = msgspec.json.Decoder(Slate)
_SHED_SLATE = msgspec.json.Encoder()

_INTERACTION_IDS = ("event_id", "user_id", "item_id", "kind", "request_id")
_FORBIDDEN = re.compile(FORBIDDEN_IN_IDS)
_PRINTABLE_ASCII = bytes(range(0x20, 0x7F))
_BOMB_PREFIX_BYTES = 4_096
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BRACKET_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")


def decode_interaction(key: bytes | None, value: bytes | None, limits: Limits) -> Interaction:
    """Decode a record of `interactions`; raise DecodeError, also for a null value: see decode_user_id."""
    record = parse("Interaction", _INTERACTION, value, limits)
    check_interaction(record, limits)
    _check_key("Interaction user_id", key, record.user_id)
    return record


def decode_candidate_list(key: bytes | None, value: bytes | None, limits: Limits) -> CandidateList:
    """Decode a record of `candidates`; raise DecodeError."""
    record = parse("CandidateList", _CANDIDATE_LIST, value, limits)
    check_candidate_list(record, limits)
    _check_key("CandidateList user_id", key, record.user_id)
    return record


def peek_candidate_list(key: bytes | None, value: bytes | None, limits: Limits) -> CandidateListHead | None:
    """Return what an answer without items needs of a candidate list, None when that much of it is not sound.

    A tenth of the cost of decode_candidate_list: the rest is neither read nor checked, only skipped.
    """
    if key is None or value is None or len(value) > limits.max_message_bytes:
        return None
    try:
        head = _CANDIDATE_LIST_HEAD.decode(value)
        request_id, user_id = head.request_id, head.user_id
        text = request_id + user_id
        plain = request_id and user_id and len(text) <= limits.max_id_bytes and text.isascii() and text.isprintable()
        if not plain:
            _check_ids("CandidateList", (request_id, user_id), _name_of_candidate_id, limits)
        _check_key("CandidateList user_id", key, user_id)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, DecodeError):
        return None
    return head


def decode_item(key: bytes | None, value: bytes | None, limits: Limits) -> Item:
    """Decode a record of `items`; raise DecodeError, also for a null value, which withdraws the item."""
    record = parse("Item", _ITEM, value, limits)
    check_item(record, limits)
    _check_key("Item item_id", key, record.item_id)
    return record


def decode_slate(value: bytes) -> Slate:
    """Decode a record of `reranked`, for its readers; raise DecodeError."""
    size_is_ours = Limits(max_message_bytes=len(value or b""), max_nesting=DEFAULT_LIMITS.max_nesting)
    return parse("Slate", _SLATE, value, size_is_ours)


def decode_user_id(key: bytes | None, limits: Limits) -> str:
    """Decode the key of a null value on `interactions`: the user to forget; raise DecodeError."""
    if key is None:
        raise refusal(ErrorCode.KEY_MISSING, "Interaction key=None, value=None: names no user to forget")
    if len(key) > limits.max_id_bytes:
        found = f"Interaction key={quote(key)}: {len(key)} bytes, at most {limits.max_id_bytes}"
        raise refusal(ErrorCode.ID_LENGTH, found)
    try:
        user_id = key.decode()
    except UnicodeDecodeError:
        raise refusal(ErrorCode.ID_CHARACTERS, f"Interaction key={quote(key)}: not UTF-8") from None
    _check_ids("Interaction", (user_id,), lambda _index: "key", limits)
    return user_id


def check_interaction(record: Interaction, limits: Limits) -> None:
    """Check what the types cannot: ids and the integers in context; raise DecodeError."""
    ids: tuple[str, ...] = (record.event_id, record.user_id, record.item_id, record.kind)
    if record.request_id is not None:
        ids = (*ids, record.request_id)
    _check_ids("Interaction", ids, _INTERACTION_IDS.__getitem__, limits)
    if record.context is not None:
        _check_open_fields("Interaction context", record.context)


def check_candidate_list(record: CandidateList, limits: Limits) -> None:
    """Check what the types cannot: counts, ids, duplicates, lengths, context; raise DecodeError."""
    item_ids = record.item_ids
    count = len(item_ids)
    if count > limits.max_candidates:
        found = f"CandidateList item_ids: {count} candidates of at most {limits.max_candidates}"
        raise refusal(ErrorCode.TOO_MANY_CANDIDATES, found)
    _check_ids("CandidateList", (record.request_id, record.user_id, *item_ids), _name_of_candidate_id, limits)
    if len(set(item_ids)) != count:
        twice = Counter(item_ids).most_common(1)[0][0]
        raise refusal(ErrorCode.DUPLICATE_ITEMS, f"CandidateList item_ids: {quote(twice)} more than once")
    if record.retrieval_scores is not None and len(record.retrieval_scores) != count:
        found = f"CandidateList retrieval_scores: {len(record.retrieval_scores)} scores for {count} items"
        raise refusal(ErrorCode.LENGTH_MISMATCH, found)
    if record.context is not None:
        _check_open_fields("CandidateList context", record.context)


def _name_of_candidate_id(index: int) -> str:
    return ("request_id", "user_id")[index] if index < 2 else f"item_ids[{index - 2}]"


def check_item(record: Item, limits: Limits) -> None:
    """Check what the types cannot: the id and the integers in attributes; raise DecodeError."""
    _check_ids("Item", (record.item_id,), lambda _index: "item_id", limits)
    if record.attributes is not None:
        _check_open_fields("Item attributes", record.attributes)


def parse(name: str, decoder: msgspec.json.Decoder[_T], value: bytes | None, limits: Limits) -> _T:
    """Decode `value`, within the limits on bytes and nesting, as the decoder's type; raise DecodeError only.

    Caller: whoever checks ids afterwards. `name` is what messages call the record.
    """
    if value is None:
        raise refusal(ErrorCode.VALUE_MISSING, f"{name} value=None")
    if len(value) > limits.max_message_bytes:
        found = f"{name} of {len(value)} bytes, at most {limits.max_message_bytes}"
        raise refusal(ErrorCode.TOO_LARGE, found)
    # Few brackets cannot nest deeply, and counting them is cheap; only a suspect is scanned.
    opening = len(value) - len(value.translate(None, b"[{"))
    if opening > limits.max_nesting and _nests_deeper(value, limits.max_nesting):
        found = f"{name} {quote(value)}: nested deeper than {limits.max_nesting}"
        raise refusal(ErrorCode.TOO_DEEP, found)
    try:
        if not value.isascii():
            value.decode()  # msgspec does not look into the strings of unknown fields
        return decoder.decode(value)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise refusal_of(name, value, error) from None


def _nests_deeper(value: bytes, levels: int) -> bool:
    """Tell whether arrays and objects nest deeper than `levels`; what opens with a bomb is found out at once."""
    return _depth(value[:_BOMB_PREFIX_BYTES]) > levels or _depth(value) > levels


def _depth(value: bytes) -> int:
    """Return the deepest nesting of arrays and objects, brackets inside strings left out.

    Without escapes every other piece between quotes is a string. Linear in C: a megabyte takes milliseconds.
    """
    outside = b"".join(value.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(_BRACKET_STEPS, _NOT_BRACKETS)
    return max(accumulate(memoryview(brackets).cast("b")), default=0)


def _check_ids(record_name: str, ids: Sequence[str], name_of: Callable[[int], str], limits: Limits) -> None:
    """Refuse ids that are empty, too long in UTF-8, or contain a forbidden character.

    The ids come from JSON, whose parser has refused lone surrogates.

    One pass over the ids, joined to lines, clears the common case; only a refusal looks for the id to blame.
    """
    lines = "\n".join(ids).encode()
    unusual = len(lines.translate(None, _PRINTABLE_ASCII)) - (len(ids) - 1)
    if unusual and _FORBIDDEN.search("".join(ids)):
        index = next(index for index, text in enumerate(ids) if _FORBIDDEN.search(text))
        found = f"{record_name} {name_of(index)}={quote(ids[index])}: forbidden character"
        raise refusal(ErrorCode.ID_CHARACTERS, found)
    longest = limits.max_id_bytes
    if all(ids) and (len(lines) <= longest or _lines_within(lines, longest)):
        return
    for index, text in enumerate(ids):
        if not 0 < len(text.encode()) <= limits.max_id_bytes:
            found = f"{record_name} {name_of(index)}={quote(text)}: {len(text.encode())} bytes"
            raise refusal(ErrorCode.ID_LENGTH, f"{found}, at most {limits.max_id_bytes}")


def _lines_within(lines: bytes, length: int) -> bool:
    """Tell whether no line is longer than `length`, hopping from line end to line end as far as that allows.

    For 100 short ids a quarter of the cost of `max(map(len, ids))`, which would put a list of 100 beyond its
    target in tests/bench/bench_codec.py.
    """
    start = 0
    while len(lines) - start > length:
        start = lines.rfind(b"\n", start, start + length + 1) + 1
        if start == 0:
            return False
    return True


def _check_key(name: str, key: bytes | None, expected: str) -> None:
    if key == expected.encode():
        return
    if key is None:
        raise refusal(ErrorCode.KEY_MISSING, f"{name}={quote(expected)} with key=None")
    raise refusal(ErrorCode.KEY_MISMATCH, f"{name}={quote(expected)} with key={quote(key)}")


def _check_open_fields(name: str, tree: dict[str, Any]) -> None:
    """Refuse free-form fields that we could not write again: integers beyond 64 bits, nesting beyond orjson's.

    Encoding them finds out at the speed of C, whatever their size.
    """
    try:
        orjson.dumps(tree)
    except orjson.JSONEncodeError as error:
        for leaf in _leaves(tree):
            if isinstance(leaf, int) and not -(2**63) <= leaf < 2**64:
                raise refusal(ErrorCode.NUMBER_RANGE, f"{name}: {quote(leaf)} does not fit 64 bits") from None
        raise refusal(ErrorCode.TOO_DEEP, f"{name}: {error}") from None


def _leaves(tree: Any) -> Iterator[Any]:
    """Yield every value in nested dicts and lists that is neither, without recursion."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, list | tuple):
            pending.extend(node)
        else:
            yield node


def encode(record: Record) -> bytes:
    """Encode a record in the field order of the wire; optional fields that are None are left out.

    Raises ValueError for a number that is not finite, orjson.JSONEncodeError for what JSON cannot say.
    """
    fields = {name: value for name, value in msgspec.structs.asdict(record).items() if value is not None}
    return _dumps(type(record).__name__, fields)


def encode_slate(slate: Slate) -> bytes:
    """Encode a slate; `scores` and `propensities` may be float32 arrays (K,), but for a shed one, which has none.

    Raises ValueError for a number that is not finite.
    """
    if slate.outcome == "shed":
        return _encode_shed(slate)
    state, model, timing = slate.state, slate.model, slate.timing_ms
    fields: dict[str, Any] = {
        "request_id": slate.request_id,
        "user_id": slate.user_id,
        "event_time_ms": slate.event_time_ms,
        "outcome": slate.outcome,
        "reasons": slate.reasons,
        "item_ids": slate.item_ids,
        "scores": slate.scores,
        "retrieval_positions": slate.retrieval_positions,
        "propensities": slate.propensities,
        "model": {"name": model.name, "version": model.version, "variant": model.variant},
        "state": {
            "events": state.events,
            "partition": state.partition,
            "offset": state.offset,
            "age_ms": state.age_ms,
        },
    }
    if slate.explanations is not None:
        fields["explanations"] = slate.explanations
    fields["timing_ms"] = {
        "queue": timing.queue,
        "state": timing.state,
        "score": timing.score,
        "total": timing.total,
    }
    return _dumps("Slate", fields)


def _encode_shed(slate: Slate) -> bytes:
    """Encode a slate without arrays, which msgspec writes in a third of the time: overload is when it counts."""
    value = _SHED_SLATE.encode(slate)
    if b"null" in value:
        _refuse_non_finite("Slate", msgspec.structs.asdict(slate))
    return value


def slate_digest_bytes(value: bytes) -> bytes:
    """Return the canonical bytes of a slate without timing_ms: what two replays of one log agree on.

    `value` comes from encode_slate. Field order does not matter to the result.
    """
    fields = orjson.loads(value)
    fields.pop("timing_ms", None)
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def _dumps(name: str, fields: dict[str, Any]) -> bytes:
    value = orjson.dumps(fields, default=_to_builtins, option=orjson.OPT_SERIALIZE_NUMPY)
    # orjson writes NaN and Infinity as null, and no field of ours is null: one search of the bytes replaces a
    # test of every number, and only a hit is looked at.
    if b"null" in value:
        _refuse_non_finite(name, fields)
    return value


def _to_builtins(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    return value.tolist()  # an array that is not contiguous, which orjson leaves to us


def _refuse_non_finite(name: str, fields: dict[str, Any]) -> None:
    for field, value in fields.items():
        for leaf in _leaves(msgspec.to_builtins(value, enc_hook=_to_builtins)):
            if isinstance(leaf, float) and not math.isfinite(leaf):
                raise ValueError(f"{name} {field} holds {leaf!r}: not encoded, for JSON; pass finite numbers")
