"""What an outside world sends: interactions, candidate lists, tombstones and rubbish. Seeded; no I/O."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from schemas.records import KINDS

USERS = 60
HOT_USERS = 3
HOT_SHARE = 0.4
INTERACTIONS_A_STEP = (20, 120)
LISTS_A_STEP = (5, 25)
BAD_SHARE = 0.03
FLOOD_BAD_SHARE = 0.8
TOMBSTONE_SHARE = 0.004
AGAIN_SHARE = 0.03
DEADLINES_MS = (None, None, 80, 500, 3_000)

MARK = "chaos-mark"
GOOD, BAD, FORGET = b"good", b"bad", b"forget"

Place = tuple[int, int]  # partition, offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record to be produced, and what must become of it: its mark travels as a header."""

    topic: str
    key: bytes | None
    value: bytes | None
    mark: bytes


class Load:
    """Makes the records of one step after the other. The same seed makes the same records, but for `after`."""

    def __init__(self, seed: int, items: Sequence[str]) -> None:
        """Draw from `items`, and now and then from items that nobody knows."""
        self._rng = random.Random(f"{seed} load")  # noqa: S311 - reproducible, not secret
        self._items = list(items)
        self._users = [f"u-{number}" for number in range(USERS)]
        self._count = 0
        self._sent: list[Record] = []

    def step(self, now_ms: int, places: Mapping[str, Place], *, flood: bool) -> list[Record]:
        """Return the records of one step; `places` says where the last interaction of each user lies."""
        rng = self._rng
        records = [self._interaction(now_ms) for _ in range(rng.randint(*INTERACTIONS_A_STEP))]
        records += [self._list(now_ms, places) for _ in range(rng.randint(*LISTS_A_STEP))]
        records = [self._or_bad(record, flood=flood) for record in records]
        rng.shuffle(records)
        return records

    def _or_bad(self, record: Record, *, flood: bool) -> Record:
        spoil = self._rng.random() < (FLOOD_BAD_SHARE if flood else BAD_SHARE)
        return self._spoilt(record) if spoil and record.mark == GOOD else record

    def _user(self) -> str:
        hot = self._rng.random() < HOT_SHARE
        return self._rng.choice(self._users[:HOT_USERS] if hot else self._users[HOT_USERS:])

    def _interaction(self, now_ms: int) -> Record:
        rng = self._rng
        if self._sent and rng.random() < AGAIN_SHARE:
            return rng.choice(self._sent)
        user = self._user()
        if user not in self._users[:HOT_USERS] and rng.random() < TOMBSTONE_SHARE:
            return Record(topic="interactions", key=user.encode(), value=None, mark=FORGET)
        self._count += 1
        kind = rng.choice([*KINDS, "rating", "wink"])
        fields: dict[str, Any] = {
            "event_id": f"e-{self._count}",
            "user_id": user,
            "item_id": rng.choice(self._items) if rng.random() < 0.97 else f"new-{rng.randrange(50)}",
            "kind": kind,
            "event_time_ms": now_ms - rng.choice((0, 0, 0, 1, 700, 3_600_000)),
        }
        if kind == "rating":
            fields["value"] = rng.choice((1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0))
        record = Record(topic="interactions", key=user.encode(), value=orjson.dumps(fields), mark=GOOD)
        self._sent = [*self._sent[-99:], record]
        return record

    def _list(self, now_ms: int, places: Mapping[str, Place]) -> Record:
        rng, user = self._rng, self._user()
        self._count += 1
        fields: dict[str, Any] = {
            "request_id": f"r-{self._count}",
            "user_id": user,
            "event_time_ms": now_ms,
            "item_ids": rng.sample(self._items, rng.randint(2, min(18, len(self._items)))),
            "explain": rng.random() < 0.1,
        }
        deadline_ms, wants_after = rng.choice(DEADLINES_MS), rng.random() < 0.4
        if deadline_ms is not None:
            fields["deadline_ms"] = deadline_ms
        if rng.random() < 0.5:
            fields["k"] = rng.randint(1, 20)
        if wants_after and user in places:
            partition, offset = places[user]
            fields["after"] = {"partition": partition, "offset": offset}
        return Record(topic="candidates", key=user.encode(), value=orjson.dumps(fields), mark=GOOD)

    def _spoilt(self, record: Record) -> Record:
        """Return a record that no worker can take: it must become a dead letter with these very bytes."""
        value, key, rng = record.value or b"", record.key, self._rng
        fields = orjson.loads(value)
        named = "item_id" if record.topic == "interactions" else "item_ids"
        kinds: list[tuple[bytes | None, bytes | None]] = [
            (key, value[: rng.randint(0, len(value) - 1)]),
            (key, b"\xff\xfe" + value),
            (key, b"null"),
            (key, orjson.dumps({**fields, named: 7})),
            (key, orjson.dumps({name: field for name, field in fields.items() if name != "event_time_ms"})),
            (key, value.replace(b'"event_time_ms":', b'"event_time_ms":1e400,"x":')),
            (key, b"[" * 5_000),
            (b"someone-else", value),
            (None, value),
        ]
        if record.topic == "candidates":
            kinds += [(key, None), (key, orjson.dumps({**fields, "item_ids": ["i-1", "i-1"]}))]
        bad_key, bad_value = rng.choice(kinds)
        return Record(topic=record.topic, key=bad_key, value=bad_value, mark=BAD)
