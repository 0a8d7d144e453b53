"""Notice a partition that stands still. Pure: the caller says what time it is and what he sees.

A silent stall is what kills a stream without a word: the partition is assigned, records wait, and nothing comes
or nothing is done with it.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Stall(Generic[P]):
    """A partition whose mark has not changed for so long."""

    partition: P
    for_s: float


class Watchdog(Generic[P]):
    """Remembers when each partition last moved. Owner: one event loop, which observes about once a second."""

    def __init__(self, *, stall_after_s: float) -> None:
        """Call a partition stalled when it has not moved for `stall_after_s`."""
        self._stall_after_s = stall_after_s
        self._marks: dict[P, Hashable] = {}
        self._moved_s: dict[P, float] = {}
        self._observed_s: float | None = None

    def observe(self, now_s: float, marks: Mapping[P, Hashable], excused: Iterable[P] = ()) -> None:
        """Take note of the partitions there are, each with a mark that changes whenever it moves.

        Args:
            now_s: monotonic.
            excused: partitions that have a good reason to stand still.
        """
        # A process that was itself stopped has seen nothing: everybody starts again.
        asleep = self._observed_s is not None and now_s - self._observed_s > self._stall_after_s / 2.0
        excused = set(excused)
        for partition, mark in marks.items():
            moved = partition not in self._marks or self._marks[partition] != mark
            if moved or asleep or partition in excused:
                self._moved_s[partition] = now_s
        self._marks = dict(marks)
        self._moved_s = {partition: self._moved_s[partition] for partition in marks}
        self._observed_s = now_s

    def excuse_all(self, now_s: float) -> None:
        """Start again with every partition: something outside held them."""
        self._moved_s = dict.fromkeys(self._moved_s, now_s)

    def stalls(self, now_s: float) -> list[Stall[P]]:
        """Return what has not moved for `stall_after_s`, longest first."""
        stalls = [Stall(partition, now_s - moved_s) for partition, moved_s in self._moved_s.items()]
        return sorted((s for s in stalls if s.for_s >= self._stall_after_s), key=lambda s: -s.for_s)
