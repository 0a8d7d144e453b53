"""How a record is refused: a stable code, and a message of value, consequence and remedy.

A message quotes at most a short piece of the record, so it may be logged and put into a header.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Self

import msgspec

from schemas.limits import MAX_UNPACKED_BYTES

QUOTED_CHARS = 60


class ErrorCode(StrEnum):
    """Why a record was refused. Stable: dashboards and dead letters carry these values."""

    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    NOT_JSON = "not_json"
    WRONG_TYPE = "wrong_type"
    MISSING_FIELD = "missing_field"
    NUMBER_RANGE = "number_range"
    ID_LENGTH = "id_length"
    ID_CHARACTERS = "id_characters"
    TOO_MANY_CANDIDATES = "too_many_candidates"
    DUPLICATE_ITEMS = "duplicate_items"
    LENGTH_MISMATCH = "length_mismatch"
    KEY_MISSING = "key_missing"
    KEY_MISMATCH = "key_mismatch"
    VALUE_MISSING = "value_missing"


_REMEDIES = {
    ErrorCode.TOO_LARGE: "send less in one record, or raise max_message_bytes",
    ErrorCode.TOO_DEEP: "flatten it, or raise max_nesting",
    ErrorCode.NOT_JSON: "send one JSON object in UTF-8, without BOM, NaN or Infinity",
    ErrorCode.WRONG_TYPE: "send the type that the schema in schemas/wire names",
    ErrorCode.MISSING_FIELD: "send every field that the schema in schemas/wire requires",
    ErrorCode.NUMBER_RANGE: "send a number within the range that the schema in schemas/wire names",
    ErrorCode.ID_LENGTH: "send ids of at least one byte, or raise max_id_bytes",
    ErrorCode.ID_CHARACTERS: "send ids in UTF-8 without control characters and line separators",
    ErrorCode.TOO_MANY_CANDIDATES: "send fewer candidates, or raise max_candidates",
    ErrorCode.DUPLICATE_ITEMS: "send each item once",
    ErrorCode.LENGTH_MISMATCH: "send one retrieval score for each item, or none at all",
    ErrorCode.KEY_MISSING: "produce with the id as the record key, so that its records share a partition",
    ErrorCode.KEY_MISMATCH: "produce with the id of the record, as UTF-8 bytes, as its key",
    ErrorCode.VALUE_MISSING: "send a record; a null value means something only on interactions and items",
}


_RULES_OF_BATCHES = {
    ErrorCode.TOO_LARGE: (
        f"its compressed batch holds more than {MAX_UNPACKED_BYTES} bytes",
        "send less in one batch (batch.size of the producer)",
    ),
    ErrorCode.NOT_JSON: (
        "its batch cannot be unpacked, or holds no sound records from there on",
        "send batches as Kafka's client libraries write them",
    ),
}
"""By the code of a record that was not taken out of its batch: what is wrong with the batch, and the remedy."""


class NotUnpacked(bytes):
    """Stands in the place of the value of a record that was not taken out of its batch; `code` says why.

    Its text is no JSON, so no decoder takes it for a record; it is not null either, for null forgets a user. What makes
    it one is its type: a producer may send the same text.
    """

    code: ErrorCode

    def __new__(cls, text: bytes, code: ErrorCode) -> Self:
        """Hold the text, which says where the batch stands; raise ValueError where `code` says nothing of a batch."""
        if code not in _RULES_OF_BATCHES:
            raise ValueError(f"not_unpacked={code.value!r}: not one of {', '.join(_RULES_OF_BATCHES)}")
        made = super().__new__(cls, text)
        made.code = code
        return made

    @classmethod
    def at(cls, first_offset: int, last_offset: int, code: ErrorCode) -> Self:
        """Return the value for the records of a batch."""
        return cls(b"not unpacked: offsets %d to %d" % (first_offset, last_offset), code)


class DecodeError(Exception):
    """Poison: the bytes are no record that we serve. The caller makes a dead letter of it and goes on.

    `code` says why, for machines; `message` says value, consequence and remedy, for people.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[DecodeError], tuple[ErrorCode, str]]:
        return type(self), (self.code, self.message)


def refusal(code: ErrorCode, found: str) -> DecodeError:
    """Build the error for what was found, which names record, field, value and rule."""
    return DecodeError(code, f"{found}; record refused; {_REMEDIES[code]}")


def quote(value: object) -> str:
    """Quote a value by its repr, cut to a length that fits a log line."""
    if isinstance(value, str | bytes):
        value = value[:QUOTED_CHARS]
    elif isinstance(value, int) and value.bit_length() > 200:
        return f"<integer of {value.bit_length()} bits>"
    text = repr(value)
    return text if len(text) <= QUOTED_CHARS else text[: QUOTED_CHARS - 3] + "..."


# The texts of msgspec.ValidationError are all that tells its causes apart: tests/bad_records.py pins them.
_RANGE = re.compile(r"out of range|^Expected `(?:int|float)[^`]*` [<>]")
_UNCUT_QUOTE = re.compile(r" '.*'$", re.DOTALL)
_PATH = re.compile(r" - at `\$([^`]*)`$")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")


def refusal_of(record_name: str, value: bytes, error: Exception) -> DecodeError:
    """Translate what msgspec raised over `value` into a DecodeError."""
    if isinstance(value, NotUnpacked):
        rule, remedy = _RULES_OF_BATCHES[value.code]
        return DecodeError(value.code, f"{record_name} {quote(value)}: {rule}; record refused; {remedy}")
    if isinstance(error, RecursionError):
        return refusal(ErrorCode.TOO_DEEP, f"{record_name} {quote(value)}: nested too deep for the parser")
    if not isinstance(error, msgspec.ValidationError):
        return refusal(ErrorCode.NOT_JSON, f"{record_name} {quote(value)}: {error}")
    return refusal(_code_of(error), f"{record_name}{_describe(value, error)}")


def _code_of(error: msgspec.ValidationError) -> ErrorCode:
    text = str(error)
    if text.startswith("Object missing required field"):
        return ErrorCode.MISSING_FIELD
    return ErrorCode.NUMBER_RANGE if _RANGE.search(text) else ErrorCode.WRONG_TYPE


def _describe(value: bytes, error: msgspec.ValidationError) -> str:
    """Say ` field=value: rule`, or `: rule` where the error names no single field."""
    text = str(error)
    path = _PATH.search(text)
    rule = _UNCUT_QUOTE.sub("", _PATH.sub("", text))
    if path is None:
        return f": {rule}"
    field = path[1].lstrip(".")
    if rule.startswith("Object missing") or "[...]" in field:
        return f" {field}: {rule}"
    return f" {field}{_quoted_at(value, path[1])}: {rule}"


def _quoted_at(value: bytes, path: str) -> str:
    """Say `=value` for the place that msgspec's path names, or nothing where it cannot be read.

    A key that comes twice can make the path miss: typed decoding stops at the first, untyped keeps the last.
    """
    try:
        found = msgspec.json.decode(value)
        for name, index in _STEP.findall(path):
            found = found[name] if name else found[int(index)]
    except (msgspec.MsgspecError, ValueError, RecursionError, LookupError, TypeError):
        return ""
    return f"={quote(found)}"
