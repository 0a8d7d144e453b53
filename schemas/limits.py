"""What a record may cost before it is refused, and what an id may contain."""

from __future__ import annotations

from dataclasses import dataclass

MAX_EXACT_INT = 2**53
"""Largest integer that every JSON reader and a float64 hold exactly: the bound of numbers we compute with."""

FORBIDDEN_IN_IDS = "[\\x00-\\x1f\\x7f-\\x9f\u2028\u2029]"
"""Regular expression (ECMA 262, Python, Java and RE2 alike) of the characters that no id may contain.

Control characters and line separators: ids are written one a line in `items.txt`, in logs and in Redis keys.
"""

MAX_UNPACKED_BYTES = 67_108_864
"""Bytes that one compressed batch may unpack to, 32 times what a topic takes: our records hardly pack that well.

Producers count what is not packed yet, or estimate what it packs to, and end a batch at a megabyte or less.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that hold before any work is spent on a record. Bytes are UTF-8 bytes."""

    max_message_bytes: int = 1_048_576
    max_candidates: int = 2_000
    max_id_bytes: int = 256
    max_nesting: int = 32


DEFAULT_LIMITS = Limits()
"""The limits that the published schemas state; a worker may be set to others."""
