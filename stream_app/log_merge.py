"""Merge partitions into one order, for a recorded log. Pure: no I/O, no clock.

Kafka keeps order inside a partition and nowhere else. Across partitions the Kafka timestamp decides; in one
millisecond the topic that was named first, then the partition. Where producers' clocks disagree, or two records share
a millisecond, the true order is not in Kafka: `after` tokens carry what matters.
"""

import heapq
from collections import deque
from collections.abc import Collection, Iterator, Sequence

from stream_app.recorded_log import LogRecord

Place = tuple[str, int]
_Key = tuple[int, int, int]  # timestamp, rank of the topic, partition


class LogMerge:
    """Records in, per partition in offset order; records out, in one order. Owner: one reader."""

    def __init__(self, topics: Sequence[str], places: Collection[Place]) -> None:
        """Expect records of these places only; `topics` rank records of one millisecond."""
        self.late = 0
        self._rank = {topic: rank for rank, topic in enumerate(topics)}
        self._queues: dict[Place, deque[tuple[_Key, LogRecord]]] = {place: deque() for place in places}
        self._latest_ms = dict.fromkeys(places, -1)
        self._heads: list[tuple[_Key, Place]] = []
        self._written: _Key = (-1, -1, -1)

    def add(self, record: LogRecord) -> None:
        """Take the next record of a partition. A time that runs backwards counts as the latest before it."""
        place = (record.topic, record.partition)
        self._latest_ms[place] = max(self._latest_ms[place], record.timestamp)
        key = (self._latest_ms[place], self._rank[record.topic], record.partition)
        queue = self._queues[place]
        queue.append((key, record))
        if len(queue) == 1:
            heapq.heappush(self._heads, (key, place))

    def waiting(self, place: Place) -> int:
        """Return how many records of a place wait."""
        return len(self._queues[place])

    def take(self, quiet: Collection[Place]) -> Iterator[LogRecord]:
        """Yield records, in order, as long as every place that is not quiet has one waiting.

        A record that comes from a place after it was called quiet, and that should have stood before one already
        yielded, is counted in `late`.
        """
        lacking = sum(not queue and place not in quiet for place, queue in self._queues.items())
        while self._heads and not lacking:
            key, place = heapq.heappop(self._heads)
            queue = self._queues[place]
            record = queue.popleft()[1]
            if queue:
                heapq.heappush(self._heads, (queue[0][0], place))
            elif place not in quiet:
                lacking += 1
            self.late += key < self._written
            self._written = max(key, self._written)
            yield record
