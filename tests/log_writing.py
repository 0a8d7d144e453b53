"""Recorded logs of made-up records: offsets and times are counted, a test names users, items and order."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from schemas.codec import encode
from schemas.records import KINDS, After, CandidateList, Interaction
from stream_app.recorded_log import LogRecord, format_line
from tests import builders

START_MS = 1_700_000_000_000
PARTITIONS = 2


class LogWriter:
    """Collects records as a broker would number them; a second passes between two records."""

    def __init__(self, *, prefix: str = "") -> None:
        self.records: list[LogRecord] = []
        self._prefix = prefix
        self._offsets: Counter[tuple[str, int]] = Counter()

    def interaction(self, user_id: str, item_id: str, **changes: Any) -> After:
        """Append an interaction and return its position."""
        time_ms = self._time_ms()
        fields = {"event_id": f"e-{len(self.records)}", "event_time_ms": time_ms} | changes
        return self.append(builders.interaction(user_id=user_id, item_id=item_id, **fields))

    def candidates(self, user_id: str, item_ids: Sequence[str], **changes: Any) -> After:
        """Append a candidate list without `after` and k, and return its position."""
        fields = {
            "request_id": f"r-{len(self.records)}",
            "event_time_ms": self._time_ms(),
            "after": None,
            "k": None,
        } | changes
        return self.append(builders.candidate_list(user_id=user_id, item_ids=list(item_ids), **fields))

    def append(self, record: Interaction | CandidateList) -> After:
        """Append a record under its user's key."""
        name = "interactions" if isinstance(record, Interaction) else "candidates"
        return self.raw(name, record.user_id.encode(), encode(record))

    def forget(self, user_id: str) -> After:
        """Append a tombstone."""
        return self.raw("interactions", user_id.encode(), None)

    def raw(self, name: str, key: bytes | None, value: bytes | None) -> After:
        """Append bytes, sound or not."""
        partition = partition_of(key)
        offset = self._offsets[name, partition]
        self._offsets[name, partition] += 1
        topic = self._prefix + name
        self.records.append(LogRecord(topic, partition, offset, self._time_ms(), key, value, []))
        return After(partition=partition, offset=offset)

    def next_position(self, user_id: str) -> After:
        """Return where the user's next interaction will stand."""
        partition = partition_of(user_id.encode())
        return After(partition=partition, offset=self._offsets["interactions", partition])

    def _time_ms(self) -> int:
        return START_MS + 1_000 * len(self.records)


def partition_of(key: bytes | None) -> int:
    """Return a partition for a key: any function of it will do."""
    return crc32(key or b"") % PARTITIONS


def write_log(path: Path, records: Sequence[LogRecord]) -> Path:
    """Write records as a log file."""
    path.write_bytes(b"".join(map(format_line, records)))
    return path


def seeded_log(
    seed: int, *, records: int, item_ids: Sequence[str], users: int = 6, prefix: str = ""
) -> list[LogRecord]:
    """Return a log of every sort of record: lists with and without `after`, bad bytes, tombstones, odd items."""
    rng, log = random.Random(seed), LogWriter(prefix=prefix)  # noqa: S311 - a seeded test
    known: dict[str, After] = {}
    for _ in range(records):
        user_id, what = f"u-{rng.randrange(users)}", rng.random()
        if what < 0.45:
            item_id = rng.choice([*item_ids, "i-unknown"])
            kind = rng.choice([*KINDS, "odd-kind"])
            value = rng.choice([None, 1.0, 3.0, 5.0])
            known[user_id] = log.interaction(user_id, item_id, kind=kind, value=value)
        elif what < 0.9:
            candidates = rng.sample([*item_ids, "i-cold"], rng.randrange(len(item_ids)))
            after = rng.choice([None, known.get(user_id), log.next_position(user_id), log.next_position("u-0")])
            k = rng.choice([None, 3])
            log.candidates(user_id, candidates, after=after, k=k, explain=rng.random() < 0.3)
        elif what < 0.95:
            log.forget(user_id)
        else:
            log.raw(rng.choice(["interactions", "candidates"]), user_id.encode(), b"\xff{")
    return log.records
