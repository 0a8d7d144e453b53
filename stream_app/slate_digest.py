"""The digest of a replay's slates, in an order that depends on the log alone."""

import hashlib
import tempfile
from typing import IO

from schemas.codec import slate_digest_bytes
from stream_app.pipeline import Answer

HELD_IN_MEMORY_BYTES = 64 * 1_048_576


class SlateDigest:
    """Puts slates in the order of their numbers, writes them, and digests them without `timing_ms`.

    The digest is SHA-256 over `schemas.codec.slate_digest_bytes` of each slate, a newline after each. Slates that come
    before an earlier number are held: in memory at first, beyond that in a temporary file.
    """

    def __init__(self, out: IO[bytes] | None = None) -> None:
        """Write each slate, one a line, to `out`."""
        self.slates = 0
        self._out = out
        self._sha256 = hashlib.sha256()
        self._held: dict[int, tuple[int, int]] = {}  # number: place and length
        self._spool = tempfile.SpooledTemporaryFile(max_size=HELD_IN_MEMORY_BYTES)  # noqa: SIM115 - closed by close

    def put(self, number: int, answer: Answer) -> None:
        """Take the slate of this number, each number once."""
        if number != self.slates:
            self._held[number] = (self._spool.seek(0, 2), len(answer.value))
            self._spool.write(answer.value)
            return
        self._emit(answer.value)
        while (place := self._held.pop(self.slates, None)) is not None:
            self._spool.seek(place[0])
            self._emit(self._spool.read(place[1]))
        if not self._held:
            self._spool.seek(0)
            self._spool.truncate()

    def hexdigest(self) -> str:
        """Return the digest of the slates so far."""
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Give back the temporary file."""
        self._spool.close()

    def _emit(self, value: bytes) -> None:
        self.slates += 1
        self._sha256.update(slate_digest_bytes(value) + b"\n")
        if self._out is not None:
            self._out.write(value + b"\n")
