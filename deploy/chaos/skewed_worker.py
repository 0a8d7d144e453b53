"""`rerank` in a process whose wall clock can be set: `python -m deploy.chaos.skewed_worker worker`.

`time.time` and `time.time_ns` add what a small file says; whoever writes the file moves the clock. Monotonic clocks
stay true, as they do when somebody sets a real one. What reads the wall clock past these two functions is not moved.
"""

import mmap
import os
import runpy
import time
from pathlib import Path
from typing import Any

CLOCK_FILE = "RERANK_CHAOS_CLOCK_FILE"
_NS = 1_000_000_000


def set_clock(path: Path, *, ahead_s: float) -> None:
    """Move the clock of whoever reads this file so far ahead of the true one; negative: behind, 0: make it true."""
    written = int(ahead_s * _NS).to_bytes(8, "little", signed=True)
    with path.open("r+b" if path.exists() else "wb") as file:  # the same file: who runs has it mapped
        file.write(written)


class MovedClock:
    """The wall clock, as a file moves it."""

    def __init__(self, path: Path) -> None:
        """Map the file; it was written by `set_clock`."""
        with path.open("rb") as file:
            self._ahead_ns = memoryview(mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)).cast("q")
        self._true_ns = time.time_ns

    def time_ns(self) -> int:
        """Return nanoseconds since 1970."""
        return self._true_ns() + self._ahead_ns[0]

    def time(self) -> float:
        """Return seconds since 1970."""
        return self.time_ns() / _NS


def main() -> None:
    """Move the clock, then do what `rerank` does: whoever imports `time` from here on gets the moved one."""
    clock = MovedClock(Path(os.environ.pop(CLOCK_FILE)))
    time.time, time.time_ns = clock.time, clock.time_ns
    _stamp_with(clock)
    runpy.run_module("stream_app", run_name="__main__", alter_sys=True)


def _stamp_with(clock: MovedClock) -> None:
    """Let a producer's records have the moved time: aiokafka's compiled code asks the system."""
    from aiokafka.producer.message_accumulator import BatchBuilder  # noqa: PLC0415 - it may keep `time.time`

    append = BatchBuilder.append

    def stamped(self: Any, *, timestamp: int | None, **record: Any) -> Any:
        return append(self, timestamp=int(clock.time() * 1000) if timestamp is None else timestamp, **record)

    BatchBuilder.append = stamped


if __name__ == "__main__":
    main()
