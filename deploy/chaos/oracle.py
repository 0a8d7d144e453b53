"""The oracle: what one pass over the log must leave behind. No code shared with the store or the worker.

It knows LearnedEma by its formula alone: u <- keep u + gain F[item], c <- keep c + step, in float32.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Record = tuple[int, int, bytes | None, bytes | None]  # partition, offset, key, value
Array = NDArray[np.float32]


@dataclass(slots=True)
class Expected:
    """One user after the log."""

    vector: Array
    events: int = 0
    last_event_time_ms: int = 0
    items: list[str] = field(default_factory=list)
    position: tuple[int, int] = (-1, -1)


def read(key: bytes | None, value: bytes | None) -> tuple[str, str, str, float, int]:
    """Return user, item, kind, value and event time; raise TypeError, ValueError or KeyError for no interaction."""
    act = json.loads(value or b"")
    if act["user_id"].encode() != key:
        raise ValueError(key)
    return act["user_id"], act["item_id"] + "", act["kind"] + "", act.get("value") or 0.0, act["event_time_ms"] + 0


def fold(log: Iterable[Record], moves: Array, rows: Mapping[str, Array], kinds: list[str]) -> dict[str, Expected]:
    """Return every user that occurs in a log in offset order; what is no interaction is passed over.

    `moves` (kinds * 6, 3) is [keep, gain, step], `rows` the item vectors by id, "" the unknown item.
    """
    users: dict[str, Expected] = {}
    cold = np.zeros(rows[""].shape[0] // 2 + 1, np.float32)
    for partition, offset, key, value in log:
        if value is None:  # forget the user of the key
            users[(key or b"").decode()] = Expected(cold, position=(partition, offset))
            continue
        try:
            name, item_id, kind, amount, time_ms = read(key, value)
        except (ValueError, KeyError, TypeError):
            continue
        user = users.setdefault(name, Expected(cold))
        bucket = int(np.clip(np.rint(np.float32(amount)), 0, 5))
        keep, gain, step = moves[(kinds.index(kind) if kind in kinds else 0) * 6 + bucket]
        user.vector = user.vector * keep + np.append(rows.get(item_id, rows[""])[: cold.size - 1] * gain, step)
        user.last_event_time_ms = max(time_ms, user.last_event_time_ms) if user.events else time_ms
        user.events += 1
        user.items = [*user.items, item_id][-50:]
        user.position = (partition, offset)
    return users
