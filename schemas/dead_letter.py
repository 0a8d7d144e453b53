"""A refused record as it goes to its dead-letter topic: untouched, with headers that say where and why.

The headers follow Kafka Connect (KIP-298), so that existing tools read them. The value is kept whole: a dead
letter can be produced again as it was. No stack trace, which would publish paths and values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

Header = tuple[str, bytes | None]
"""A Kafka header; its value may be null."""

CONNECT_PREFIX = "__connect.errors."
ERROR_CODE_HEADER = "rerank.error.code"
TRUNCATED_HEADER = "rerank.error.truncated"
"""On a dead letter that no producer could send whole: its sizes and the sha256 of its value."""

KEPT_BYTES = 65_536
_ROOM_BYTES = 16_384  # for the headers we add, and Kafka's framing
_HEADER_LENGTHS_BYTES = 2 * 5  # of name and value, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One refused record: where it stood, its bytes, and why.

    `code` is a stable word (an ErrorCode, or the stage's own), `stage` the stage that refused it (DECODE where
    the codec did), `error_class` the name of the exception, `message` what it said: value, consequence, remedy.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header]
    code: str
    stage: str
    error_class: str
    message: str

    def record_headers(self) -> list[Header]:
        """Return the headers to produce it with: the original ones first and untouched, then where and why.

        A record that was a dead letter before carries the names twice; readers take the last.
        """
        errors = {
            f"{CONNECT_PREFIX}topic": self.topic,
            f"{CONNECT_PREFIX}partition": str(self.partition),
            f"{CONNECT_PREFIX}offset": str(self.offset),
            f"{CONNECT_PREFIX}stage": self.stage,
            f"{CONNECT_PREFIX}exception.class.name": self.error_class,
            f"{CONNECT_PREFIX}exception.message": self.message,
            ERROR_CODE_HEADER: self.code,
        }
        return [
            *self.headers,
            *((name, text.encode("utf-8", "backslashreplace")) for name, text in errors.items()),
        ]

    def within(self, limit_bytes: int) -> DeadLetter:
        """Return the letter itself, or, where it exceeds what may be produced, the head of its key and value.

        What was cut is said in TRUNCATED_HEADER, in place of the original headers: the record itself still
        stands at the topic, partition and offset that the other headers name.
        """
        key, value = self.key or b"", self.value or b""
        header_bytes = sum(len(name.encode()) + len(text or b"") for name, text in self.headers)
        framed_bytes = header_bytes + _HEADER_LENGTHS_BYTES * len(self.headers)  # a header may be nothing but lengths
        if len(key) + len(value) + framed_bytes + _ROOM_BYTES <= limit_bytes:
            return self
        kept_bytes = min(KEPT_BYTES, max(0, limit_bytes - _ROOM_BYTES) // 2)
        sizes = f"key {len(key)}, value {len(value)}, headers {header_bytes} bytes; value sha256 "
        return replace(
            self,
            key=self.key and self.key[:kept_bytes],
            value=self.value and self.value[:kept_bytes],
            headers=[(TRUNCATED_HEADER, (sizes + hashlib.sha256(value).hexdigest()).encode())],
        )


DEAD_LETTER_HEADERS = {
    f"{CONNECT_PREFIX}topic": "Topic that the record was read from.",
    f"{CONNECT_PREFIX}partition": "Its partition, in decimal.",
    f"{CONNECT_PREFIX}offset": "Its offset, in decimal.",
    f"{CONNECT_PREFIX}stage": "Stage that refused it.",
    f"{CONNECT_PREFIX}exception.class.name": "Name of the error's class.",
    f"{CONNECT_PREFIX}exception.message": "What the error says: value, consequence, remedy.",
    ERROR_CODE_HEADER: "Stable word for the cause.",
}
"""What record_headers adds to the original headers, with its meaning."""
