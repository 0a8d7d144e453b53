"""The recorded log: one Kafka record a line, as `rerank record` writes and `rerank replay` reads it.

    {"topic": "interactions", "partition": 0, "offset": 7, "timestamp_ms": 1699999999999,
     "key": "u-1", "value": "{...}", "headers": [{"key": "traceparent", "value": "00-..."}]}

Keys and values are strings, or `key_base64` and `value_base64` where the bytes are not UTF-8. A null value is a
tombstone. `key` and `headers` may be missing. `not_unpacked` has the code of a record that was not taken out of its
batch; its value says where that stands.
"""

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import orjson
from msgspec import UNSET, Meta, UnsetType

from schemas.dead_letter import Header
from schemas.refusals import ErrorCode, NotUnpacked
from stream_app.errors import SettingsError

# The topics take 2 MiB a record; base64, JSON escapes and headers make at most six times that of it.
MAX_LINE_BYTES = 16 * 1_048_576


class RecordedLogError(SettingsError):
    """The log cannot be used: the file is unreadable, or a line of it is no record."""


class LogRecord(msgspec.Struct, frozen=True):
    """A Kafka record out of a log; msgspec, not dataclass: built once a line."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[Header]


class _HeaderLine(msgspec.Struct):
    key: str
    value: str | UnsetType | None = UNSET
    value_base64: str | UnsetType = UNSET


class _Line(msgspec.Struct):
    topic: Annotated[str, Meta(min_length=1)]
    partition: Annotated[int, Meta(ge=0, le=999_999)]
    offset: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    timestamp_ms: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    key: str | UnsetType | None = UNSET
    key_base64: str | UnsetType = UNSET
    value: str | UnsetType | None = UNSET
    value_base64: str | UnsetType = UNSET
    headers: list[_HeaderLine] = []
    not_unpacked: ErrorCode | UnsetType = UNSET


_DECODER = msgspec.json.Decoder(_Line)


def read_log(path: Path) -> Iterator[LogRecord]:
    """Yield the records of a log in file order, one line in memory at a time; blank lines are skipped.

    Raises:
        RecordedLogError: the file or a line cannot be read; the message names the line.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                try:
                    if not line.isspace():
                        yield parse_line(line)
                except ValueError as error:
                    raise RecordedLogError(
                        f"{path}:{number}: {error}; the replay ends here, nothing was written; mend or remove the line"
                    ) from None
    except OSError as error:
        raise RecordedLogError(
            f"{path}: {error.strerror or error}; nothing was replayed; name a readable log"
        ) from None


def parse_line(line: bytes) -> LogRecord:
    """Return the record of one line; raise ValueError (msgspec's and binascii's errors are ones)."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
    fields = _DECODER.decode(line)
    if fields.value is UNSET and fields.value_base64 is UNSET:
        raise ValueError("neither `value` nor `value_base64` (a tombstone has a null value)")
    return LogRecord(
        fields.topic,
        fields.partition,
        fields.offset,
        fields.timestamp_ms,
        _bytes("key", fields.key, fields.key_base64),
        _value(fields),
        [(one.key, _bytes("header value", one.value, one.value_base64)) for one in fields.headers],
    )


def format_line(record: LogRecord) -> bytes:
    """Return the line of a record, with its newline; `parse_line` of it gives the record again."""
    fields: dict[str, Any] = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp_ms": record.timestamp,
        **_text("key", record.key),
        **_text("value", record.value),
    }
    if isinstance(record.value, NotUnpacked):
        fields["not_unpacked"] = record.value.code
    if record.headers:
        fields["headers"] = [{"key": key, **_text("value", value)} for key, value in record.headers]
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)


def _value(fields: _Line) -> bytes | None:
    value = _bytes("value", fields.value, fields.value_base64)
    return value if fields.not_unpacked is UNSET else NotUnpacked(value or b"", fields.not_unpacked)


def _bytes(name: str, text: str | UnsetType | None, text_base64: str | UnsetType) -> bytes | None:
    if text_base64 is UNSET:
        return text.encode() if isinstance(text, str) else None
    if text is not UNSET:
        raise ValueError(f"both a {name} and its base64")
    try:
        return base64.b64decode(text_base64, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} is not base64 ({error})") from None


def _text(name: str, data: bytes | None) -> dict[str, str | None]:
    if data is None:
        return {name: None}
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}
