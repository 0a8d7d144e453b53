"""The oracle: what one pass over the log must leave behind. No code shared with the store or the worker.

It knows the learned moving average by its formula alone (models/networks.py, LearnedEma):
u <- keep u + gain F[item], c <- keep c + step, float32, one interaction after another.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Record = tuple[int, int, bytes | None, bytes | None]  # partition, offset, key, value
FloatArray = NDArray[np.float32]


@dataclass(slots=True)
class Expected:
    """One user after the log."""

    vector: FloatArray
    events: int = 0
    last_event_time_ms: int = 0
    items: list[str] = field(default_factory=list)
    position: tuple[int, int] = (-1, -1)


def fold(
    log: Iterable[Record], moves: FloatArray, rows: Mapping[str, FloatArray], kinds: list[str]
) -> dict[str, Expected]:
    """Return every user that occurs in a log in offset order; records that are not JSON objects are passed over.

    `moves` (kinds * 6, 3) is [keep, gain, step], `rows` the item vectors by id, "" the unknown item.
    """
    users: dict[str, Expected] = {}
    dim = rows[""].shape[0] // 2
    for partition, offset, key, value in log:
        try:
            interaction = None if value is None else json.loads(value)
            name = (key or b"").decode() if interaction is None else interaction["user_id"]
        except (ValueError, KeyError, TypeError):
            continue
        if value is None:
            users[name] = Expected(np.zeros(dim + 1, np.float32), position=(partition, offset))
            continue
        user = users.setdefault(name, Expected(np.zeros(dim + 1, np.float32)))
        kind = kinds.index(interaction["kind"]) if interaction["kind"] in kinds else 0
        bucket = int(np.clip(np.rint(np.float32(interaction.get("value") or 0.0)), 0, 5))
        keep, gain, step = moves[kind * 6 + bucket]
        item = rows.get(interaction["item_id"], rows[""])
        arrived = np.concatenate([item[:dim] * gain, np.array([step], np.float32)])
        user.vector = user.vector * keep + arrived
        time_ms = interaction["event_time_ms"]
        user.last_event_time_ms = max(time_ms, user.last_event_time_ms) if user.events else time_ms
        user.events += 1
        user.items = [*user.items, interaction["item_id"]][-50:]
        user.position = (partition, offset)
    return users
