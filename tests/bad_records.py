"""Two corpora of raw records: bad ones, each with the code it is refused with, and odd ones that are served.

Every case differs from a good record in one thing, which its name says. Limits are the default ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from schemas.codec import ErrorCode
from schemas.limits import DEFAULT_LIMITS

_DEEP = 100_000
_USER = "u-1"
_KEY = b"u-1"
_30_DIGITS = 10**29

_INTERACTION: dict[str, Any] = {
    "event_id": "e-1",
    "user_id": _USER,
    "item_id": "i-1",
    "kind": "click",
    "event_time_ms": 1_699_999_999_999,
    "value": 4.0,
    "request_id": "r-0",
    "position": 3,
    "context": {"surface": "home"},
}
_CANDIDATES: dict[str, Any] = {
    "request_id": "r-1",
    "user_id": _USER,
    "event_time_ms": 1_699_999_999_999,
    "item_ids": ["i-1", "i-2"],
    "retrieval_scores": [0.9, 0.7],
    "k": 10,
    "deadline_ms": 1_000,
    "explain": True,
    "context": {"surface": "home"},
}
_GOOD = {"interactions": _INTERACTION, "candidates": _CANDIDATES}
_ID_FIELDS = {
    "interactions": ("event_id", "user_id", "item_id", "kind", "request_id"),
    "candidates": ("request_id", "user_id"),
}
_REQUIRED = {
    "interactions": ("event_id", "user_id", "item_id", "kind", "event_time_ms"),
    "candidates": ("request_id", "user_id", "event_time_ms", "item_ids"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRecord:
    """A raw record of `topic` and the code that it is refused with."""

    name: str
    topic: str
    key: bytes | None
    value: bytes | None
    code: ErrorCode


@dataclass(frozen=True, slots=True, kw_only=True)
class OddRecord:
    """A raw record of `topic` that looks wrong and is served. A null value on interactions forgets the user."""

    name: str
    topic: str
    key: bytes
    value: bytes | None


def good_value(topic: str, **changes: Any) -> bytes:
    """Return the bytes of a good record of `topic` in which the keywords replace or add fields."""
    return json.dumps(_GOOD[topic] | changes, ensure_ascii=False).encode("utf-8", "surrogatepass")


def bad_records() -> list[BadRecord]:
    """Return the corpus; names are unique."""
    return [
        BadRecord(name=f"{topic}: {name}", topic=topic, key=_KEY, value=value, code=code)
        for topic in _GOOD
        for cases in (_not_json, _too_much, _wrong_types, _out_of_range, _bad_ids, _missing)
        for name, value, code in cases(topic)
    ] + [*_bad_lists(), *_bad_keys()]


_Cases = Iterator[tuple[str, bytes, ErrorCode]]


def _raw(topic: str, field: str, text: bytes) -> bytes:
    """Return a good record in which `text` stands, as it is, for the value of `field`."""
    marker = "\ufdd0"
    return good_value(topic, **{field: marker}).replace(f'"{marker}"'.encode(), text)


def _not_json(topic: str) -> _Cases:
    good = good_value(topic)
    number = "value" if topic == "interactions" else "retrieval_scores"
    open_, close = (b"", b"") if topic == "interactions" else (b"[0.9, ", b"]")
    yield "empty", b"", ErrorCode.NOT_JSON
    yield "blank", b" \n", ErrorCode.NOT_JSON
    yield "truncated", good[:-1], ErrorCode.NOT_JSON
    yield "cut in the middle of a name", good[:7], ErrorCode.NOT_JSON
    yield "plain text", b"click u-1 i-1", ErrorCode.NOT_JSON
    yield "byte order mark", b"\xef\xbb\xbf" + good, ErrorCode.NOT_JSON
    yield "UTF-16", good.decode().encode("utf-16"), ErrorCode.NOT_JSON
    yield "gzip", bytes.fromhex("1f8b0800000000000003ab562a2d4e2d0200"), ErrorCode.NOT_JSON
    yield "Avro with a schema id", b"\x00\x00\x00\x00\x07\x06u-1", ErrorCode.NOT_JSON
    yield "two records", good + b"\n" + good, ErrorCode.NOT_JSON
    yield "trailing comma", good[:-1] + b",}", ErrorCode.NOT_JSON
    yield "single quotes", good.replace(b'"', b"'"), ErrorCode.NOT_JSON
    yield "comment", b"/* x */" + good, ErrorCode.NOT_JSON
    for word in (b"NaN", b"Infinity", b"-Infinity", b"nan", b"+1", b"01", b".5", b"0x1f"):
        yield f"{word.decode()} as a number", _raw(topic, number, open_ + word + close), ErrorCode.NOT_JSON
    yield "NaN in context", _raw(topic, "context", b'{"a": NaN}'), ErrorCode.NOT_JSON
    yield "NaN in an unknown field", _raw(topic, "colour", b"NaN"), ErrorCode.NOT_JSON
    yield "invalid UTF-8 in an id", good.replace(_KEY, b"u-\xff"), ErrorCode.NOT_JSON
    yield "overlong UTF-8 in an id", good.replace(_KEY, b"u-\xc0\x80"), ErrorCode.NOT_JSON
    yield "invalid UTF-8 in context", good.replace(b"home", b"\xe2\x28\xa1"), ErrorCode.NOT_JSON
    yield "invalid UTF-8 in an unknown field", _raw(topic, "colour", b'"\xff"'), ErrorCode.NOT_JSON
    yield "encoded surrogate in an id", good_value(topic, request_id="r\ud800"), ErrorCode.NOT_JSON
    for escape in (b"\\ud800", b"\\udc00", b"\\ud800\\u0041"):
        value = _raw(topic, "request_id", b'"r' + escape + b'"')
        yield f"lone surrogate {escape.decode()} in an id", value, ErrorCode.NOT_JSON
    yield "lone surrogate in context", _raw(topic, "context", b'{"a": "\\ud800"}'), ErrorCode.NOT_JSON
    yield "raw NUL in an id", good.replace(_KEY, b"u-\x00"), ErrorCode.NOT_JSON
    yield "raw newline in an id", good.replace(_KEY, b"u-\n1"), ErrorCode.NOT_JSON


def _too_much(topic: str) -> _Cases:
    half = DEFAULT_LIMITS.max_message_bytes
    yield "one byte too long", good_value(topic).ljust(half + 1), ErrorCode.TOO_LARGE
    yield "huge string in context", good_value(topic, context={"a": "x" * half}), ErrorCode.TOO_LARGE
    yield "huge and not JSON", b"\xff" * (half + 1), ErrorCode.TOO_LARGE
    yield "100k arrays", b"[" * _DEEP + b"]" * _DEEP, ErrorCode.TOO_DEEP
    yield "100k open arrays", b"[" * _DEEP, ErrorCode.TOO_DEEP
    yield "100k objects", b'{"a":' * _DEEP + b"1" + b"}" * _DEEP, ErrorCode.TOO_DEEP
    arrays = b"[" * _DEEP + b"]" * _DEEP
    objects = b'{"a":' * _DEEP + b"1" + b"}" * _DEEP
    for field in ("context", "colour", "item_id"):
        yield f"100k arrays in {field}", _raw(topic, field, arrays), ErrorCode.TOO_DEEP
        yield f"100k objects in {field}", _raw(topic, field, objects), ErrorCode.TOO_DEEP
    in_context = b'{"a":' + b"[" * (DEFAULT_LIMITS.max_nesting - 1) + b"]" * (DEFAULT_LIMITS.max_nesting - 1) + b"}"
    yield "one level too deep in context", _raw(topic, "context", in_context), ErrorCode.TOO_DEEP


def _wrong_types(topic: str) -> _Cases:
    for value in (b"null", b"true", b"1", b'"text"', b"[]", b"[" + good_value(topic) + b"]"):
        yield f"{value[:8].decode()} instead of an object", value, ErrorCode.WRONG_TYPE
    for field in _ID_FIELDS[topic]:
        for wrong in (1, True, ["u-1"], {"id": "u-1"}):
            yield f"{field} is {wrong!r}", good_value(topic, **{field: wrong}), ErrorCode.WRONG_TYPE
    for field in _REQUIRED[topic]:
        yield f"{field} is null", good_value(topic, **{field: None}), ErrorCode.WRONG_TYPE
    wrong_of: dict[str, tuple[Any, ...]] = {
        "event_time_ms": ("1699999999999", True, 1.5, 1e12, "2023-11-14T22:13:19Z", [1], {"ms": 1}),
        "context": ("home", 1, ["home"], True),
    }
    own: dict[str, dict[str, tuple[Any, ...]]] = {
        "interactions": {"value": ("4", True, [4], {}), "position": ("3", True, 3.5, [3])},
        "candidates": {
            "item_ids": ("i-1", 1, {"i-1": 1}, True, ["i-1", 2], ["i-1", None], [["i-1"]], [{"id": "i-1"}]),
            "retrieval_scores": ("0.9", 0.9, True, ["0.9", "0.7"], [0.9, None], [0.9, True], {"i-1": 0.9}),
            "k": ("10", True, 1.5, [10]),
            "deadline_ms": ("80", True, 80.5),
            "explain": ("true", 1, 0, []),
            "after": (1041, "2:1041", [2, 1041], {"partition": "2", "offset": 1041}, {"partition": 2, "offset": True}),
        },
    }
    for field, wrongs in (wrong_of | own[topic]).items():
        for wrong in wrongs:
            yield f"{field} is {wrong!r}", good_value(topic, **{field: wrong}), ErrorCode.WRONG_TYPE


def _out_of_range(topic: str) -> _Cases:
    beyond = (2**53 + 1, -(2**53) - 1, 2**63, 2**64, _30_DIGITS, -_30_DIGITS)
    ranges: dict[str, tuple[Any, ...]] = {"event_time_ms": beyond}
    if topic == "interactions":
        ranges |= {"position": (-1, 2**53 + 1, _30_DIGITS), "value": (_30_DIGITS, -_30_DIGITS, 1e300)}
    else:
        ranges |= {
            "k": (0, -1, -(2**63), _30_DIGITS),
            "deadline_ms": (-1, _30_DIGITS),
            "retrieval_scores": ([0.9, _30_DIGITS], [1e300, 0.7]),
            "after": (
                {"partition": -1, "offset": 1},
                {"partition": 2**31, "offset": 1},
                {"partition": 2, "offset": -1},
                {"partition": 2, "offset": _30_DIGITS},
            ),
        }
    for field, wrongs in ranges.items():
        for wrong in wrongs:
            yield f"{field} is {wrong!r}", good_value(topic, **{field: wrong}), ErrorCode.NUMBER_RANGE
    number, text = ("value", b"1e999") if topic == "interactions" else ("retrieval_scores", b"[0.9, 1e999]")
    yield "1e999 as a number", _raw(topic, number, text), ErrorCode.NUMBER_RANGE
    yield "1e999 in context", _raw(topic, "context", b'{"a": 1e999}'), ErrorCode.NUMBER_RANGE
    yield "400 digits as event time", _raw(topic, "event_time_ms", b"9" * 400), ErrorCode.NUMBER_RANGE
    yield "30 digits in context", good_value(topic, context={"a": _30_DIGITS}), ErrorCode.NUMBER_RANGE
    yield "30 digits deep in context", good_value(topic, context={"a": [{"b": -_30_DIGITS}]}), ErrorCode.NUMBER_RANGE
    yield "5,000 digits in context", _raw(topic, "context", b'{"a": ' + b"9" * 5_000 + b"}"), ErrorCode.NUMBER_RANGE


def _bad_ids(topic: str) -> _Cases:
    limit = DEFAULT_LIMITS.max_id_bytes
    for field in _ID_FIELDS[topic]:
        yield f"{field} is empty", good_value(topic, **{field: ""}), ErrorCode.ID_LENGTH
        yield f"{field} is one byte too long", good_value(topic, **{field: "x" * (limit + 1)}), ErrorCode.ID_LENGTH
        yield f"{field} holds an escaped NUL", _raw(topic, field, b'"u\\u0000"'), ErrorCode.ID_CHARACTERS
    yield "huge id", good_value(topic, request_id="x" * 500_000), ErrorCode.ID_LENGTH
    yield "id too long in bytes alone", good_value(topic, request_id="é" * (limit // 2 + 1)), ErrorCode.ID_LENGTH
    for name, character in _CONTROL_CHARACTERS.items():
        value = _raw(topic, "request_id", json.dumps(f"r{character}0").encode())
        yield f"{name} in an id", value, ErrorCode.ID_CHARACTERS
    yield "raw DEL in an id", good_value(topic, request_id="r\x7f"), ErrorCode.ID_CHARACTERS
    yield "control character and too long", good_value(topic, request_id="\n" * 300), ErrorCode.ID_CHARACTERS


_CONTROL_CHARACTERS = {
    "newline": "\n",
    "carriage return": "\r",
    "tab": "\t",
    "escape": "\x1b",
    "unit separator": "\x1f",
    "DEL": "\x7f",
    "next line": "\x85",
    "application program command": "\x9f",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
}


def _missing(topic: str) -> _Cases:
    yield "empty object", b"{}", ErrorCode.MISSING_FIELD
    for field in _REQUIRED[topic]:
        rest = {name: value for name, value in _GOOD[topic].items() if name != field}
        yield f"{field} is missing", json.dumps(rest).encode(), ErrorCode.MISSING_FIELD
    renamed = good_value(topic).replace(b'"user_id"', b'"userId"')
    yield "user_id in camel case", renamed, ErrorCode.MISSING_FIELD
    if topic == "candidates":
        yield "after without offset", good_value(topic, after={"partition": 2}), ErrorCode.MISSING_FIELD
        yield "after without partition", good_value(topic, after={"offset": 2}), ErrorCode.MISSING_FIELD


def _bad_lists() -> Iterator[BadRecord]:
    limit = DEFAULT_LIMITS.max_candidates
    cases: dict[str, tuple[dict[str, Any], ErrorCode]] = {
        "an item twice": ({"item_ids": ["i-1", "i-1"]}, ErrorCode.DUPLICATE_ITEMS),
        "an item twice, far apart": (
            {"item_ids": [f"i-{n}" for n in range(limit - 1)] + ["i-0"], "retrieval_scores": None},
            ErrorCode.DUPLICATE_ITEMS,
        ),
        "one item too many": (
            {"item_ids": [f"i-{n}" for n in range(limit + 1)], "retrieval_scores": None},
            ErrorCode.TOO_MANY_CANDIDATES,
        ),
        "100k items": ({"item_ids": ["i"] * 100_000, "retrieval_scores": None}, ErrorCode.TOO_MANY_CANDIDATES),
        "fewer scores than items": ({"retrieval_scores": [0.9]}, ErrorCode.LENGTH_MISMATCH),
        "more scores than items": ({"retrieval_scores": [0.9, 0.8, 0.7]}, ErrorCode.LENGTH_MISMATCH),
        "scores without items": ({"item_ids": []}, ErrorCode.LENGTH_MISMATCH),
        "no scores for items": ({"retrieval_scores": []}, ErrorCode.LENGTH_MISMATCH),
        "an empty item id": ({"item_ids": ["i-1", ""]}, ErrorCode.ID_LENGTH),
        "a long item id": ({"item_ids": ["i-1", "x" * 257]}, ErrorCode.ID_LENGTH),
        "a long item id in the middle": (
            {"item_ids": ["i-1", "x" * 257, "i-3"], "retrieval_scores": None},
            ErrorCode.ID_LENGTH,
        ),
        "a newline in an item id": ({"item_ids": ["i-1", "i\n2"]}, ErrorCode.ID_CHARACTERS),
        "a NUL in an item id": ({"item_ids": ["i-1", "i\x00"]}, ErrorCode.ID_CHARACTERS),
        "a newline for an item id": ({"item_ids": ["i-1", "\n"]}, ErrorCode.ID_CHARACTERS),
    }
    for name, (changes, code) in cases.items():
        value = good_value("candidates", **changes)
        yield BadRecord(name=f"candidates: {name}", topic="candidates", key=_KEY, value=value, code=code)


def _bad_keys() -> Iterator[BadRecord]:
    keys: dict[str, tuple[bytes | None, ErrorCode]] = {
        "no key": (None, ErrorCode.KEY_MISSING),
        "empty key": (b"", ErrorCode.KEY_MISMATCH),
        "key of another user": (b"u-2", ErrorCode.KEY_MISMATCH),
        "key with a NUL behind": (b"u-1\x00", ErrorCode.KEY_MISMATCH),
        "key in quotes": (b'"u-1"', ErrorCode.KEY_MISMATCH),
        "key in capitals": (b"U-1", ErrorCode.KEY_MISMATCH),
        "key that is not UTF-8": (b"\xff\xfe", ErrorCode.KEY_MISMATCH),
        "key of a megabyte": (b"u" * 1_000_000, ErrorCode.KEY_MISMATCH),
    }
    for topic in _GOOD:
        for name, (key, code) in keys.items():
            yield BadRecord(name=f"{topic}: {name}", topic=topic, key=key, value=good_value(topic), code=code)
    for name, key in {"null value": _KEY, "null value without key": None}.items():
        code = ErrorCode.VALUE_MISSING
        yield BadRecord(name=f"candidates: {name}", topic="candidates", key=key, value=None, code=code)
    forget: dict[str, tuple[bytes | None, ErrorCode]] = {
        "no key": (None, ErrorCode.KEY_MISSING),
        "empty key": (b"", ErrorCode.ID_LENGTH),
        "long key": (b"u" * 257, ErrorCode.ID_LENGTH),
        "key with a newline": (b"u\n1", ErrorCode.ID_CHARACTERS),
        "key with a NUL": (b"u\x00", ErrorCode.ID_CHARACTERS),
        "key that is not UTF-8": (b"u\xff", ErrorCode.ID_CHARACTERS),
    }
    for name, (key, code) in forget.items():
        yield BadRecord(name=f"interactions: forget, {name}", topic="interactions", key=key, value=None, code=code)


def odd_but_good_records() -> list[OddRecord]:
    """Return raw records that are served although they look wrong; names are unique."""
    both: dict[str, dict[str, Any]] = {
        "far future": {"event_time_ms": 2**53},
        "before 1970": {"event_time_ms": -86_400_000},
        "far past": {"event_time_ms": -(2**53)},
        "time zero": {"event_time_ms": 0},
        "unknown fields": {"colour": "red", "nested": {"a": [1, {"b": None}]}, "event_time": "2023"},
        "a number beyond any float in an unknown field": {"colour": _30_DIGITS},
        "empty context": {"context": {}},
        "null in context": {"context": {"a": None}},
        "64-bit integers in context": {"context": {"low": -(2**63), "high": 2**64 - 1}},
        "brackets in strings": {"context": {"a": '[{"' * 100}},
        "many shallow brackets": {"context": {"a": [[] for _ in range(100)]}},
        "nesting at the limit": {"context": {"a": _nested(DEFAULT_LIMITS.max_nesting - 2)}},
        "NUL in context": {"context": {"a": "\x00"}},
        "id at the limit": {"request_id": "x" * DEFAULT_LIMITS.max_id_bytes},
        "unicode id at the limit": {"request_id": "é" * (DEFAULT_LIMITS.max_id_bytes // 2)},
        "emoji with joiners in an id": {"request_id": "👩\u200d🔬"},
        "right-to-left id": {"request_id": "عميل-٣"},
        "no-break space in an id": {"request_id": "r\u00a00"},
        "blank id": {"request_id": " "},
        "id of punctuation": {"request_id": '{"}:\\/*?[]'},
    }
    records = [
        OddRecord(name=f"{topic}: {name}", topic=topic, key=_KEY, value=good_value(topic, **changes))
        for topic in _GOOD
        for name, changes in both.items()
    ]
    return records + [
        OddRecord(name=f"{topic}: {name}", topic=topic, key=key, value=value)
        for topic, name, key, value in (*_odd_interactions(), *_odd_candidates(), *_odd_json())
    ]


_Odd = Iterator[tuple[str, str, bytes, bytes | None]]


def _odd_interactions() -> _Odd:
    topic = "interactions"
    absent = dict.fromkeys(("value", "request_id", "position", "context"))
    required = {name: _INTERACTION[name] for name in _REQUIRED[topic]}
    yield topic, "unknown item", _KEY, good_value(topic, item_id="never-seen")
    yield topic, "unknown kind", _KEY, good_value(topic, kind="hover")
    yield topic, "null for optional fields", _KEY, good_value(topic, **absent)
    yield topic, "required fields alone", _KEY, json.dumps(required).encode()
    yield topic, "negative value", _KEY, good_value(topic, value=-1.5)
    yield topic, "integer as value", _KEY, good_value(topic, value=4)
    yield topic, "minus zero as value", _KEY, _raw(topic, "value", b"-0")
    yield topic, "a value too small for a float", _KEY, _raw(topic, "value", b"1e-999")
    yield topic, "forget a user", _KEY, None
    yield topic, "unicode user", "ю-1".encode(), good_value(topic, user_id="ю-1")


def _odd_candidates() -> _Odd:
    topic = "candidates"
    absent = dict.fromkeys(("retrieval_scores", "k", "deadline_ms", "after", "context"))
    required = {name: _CANDIDATES[name] for name in _REQUIRED[topic]}
    limit = DEFAULT_LIMITS.max_candidates
    many = [f"i-{n}" for n in range(limit)]
    long_ids = [f"{n:0256}" for n in range(limit)]
    yield topic, "empty list", _KEY, good_value(topic, item_ids=[], retrieval_scores=[])
    yield topic, "empty list without scores", _KEY, good_value(topic, item_ids=[], retrieval_scores=None)
    yield topic, "unknown items", _KEY, good_value(topic, item_ids=["never", "seen"])
    yield topic, "null for optional fields", _KEY, good_value(topic, **absent)
    yield topic, "required fields alone", _KEY, json.dumps(required).encode()
    yield topic, "list at the limit", _KEY, good_value(topic, item_ids=many, retrieval_scores=None)
    yield topic, "list at the limit of long ids", _KEY, good_value(topic, item_ids=long_ids, retrieval_scores=None)
    yield topic, "k longer than the list", _KEY, good_value(topic, k=2**53)
    yield topic, "items that differ in case", _KEY, good_value(topic, item_ids=["a", "A"])
    yield topic, "items that differ in normal form", _KEY, good_value(topic, item_ids=["é", "e\u0301"])
    yield topic, "equal scores", _KEY, good_value(topic, retrieval_scores=[0, 0])
    yield topic, "deadline of zero", _KEY, good_value(topic, deadline_ms=0, explain=False)


def _odd_json() -> _Odd:
    for topic, fields in _GOOD.items():
        good = good_value(topic)
        twice = good.replace(b'"user_id"', b'"user_id": "u-2", "user_id"')
        yield topic, "a field twice, the last wins", _KEY, twice
        yield topic, "white space around", _KEY, b" \r\n\t" + good + b"\n"
        yield topic, "escaped ASCII", _KEY, good.replace(b"u-1", b"\\u0075-1")
        yield topic, "fields in another order", _KEY, json.dumps(fields, sort_keys=True).encode()
        yield topic, "an unknown field of 100 kB", _KEY, good_value(topic, colour="x" * 100_000)


def _nested(levels: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(levels - 1):
        tree = [tree]
    return tree
