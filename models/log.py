"""An interaction log as columns: read from wire-format JSONL, ordered by event time, split by time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from schemas.codec import DecodeError, decode_interaction
from schemas.limits import Limits
from schemas.records import Interaction

TRAINING_FRACTION = 0.8
POSITIVE_KINDS = frozenset({"click", "like", "add_to_cart", "purchase", "share", "complete"})
POSITIVE_RATING = 4.0


class LogError(Exception):
    """A log file cannot be used; the message names the file, the line and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InteractionLog:
    """N interactions in event-time order. Columns hold indices into the vocabularies; none is ever mutated.

    `values` is 0.0 where the interaction carries none, which is also what the model is given (see `value_given`).
    """

    users: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    value_given: npt.NDArray[np.bool_]
    event_times_ms: npt.NDArray[np.int64]
    event_ids: list[str]
    user_ids: list[str]
    item_ids: list[str]
    kind_names: list[str]

    def __len__(self) -> int:
        """Return the number of interactions."""
        return len(self.users)

    def interaction(self, index: int) -> Interaction:
        """Return one interaction as the record that goes on the wire (context and request are not kept)."""
        return Interaction(
            event_id=self.event_ids[index],
            user_id=self.user_ids[self.users[index]],
            item_id=self.item_ids[self.items[index]],
            kind=self.kind_names[self.kinds[index]],
            event_time_ms=int(self.event_times_ms[index]),
            value=float(self.values[index]) if self.value_given[index] else None,
        )

    def positive(self) -> npt.NDArray[np.bool_]:
        """Return which interactions are what a slate is meant to bring about: (N,) bool."""
        names = np.array([name in POSITIVE_KINDS for name in self.kind_names], dtype=bool)
        ratings = np.array([name == "rating" for name in self.kind_names], dtype=bool)
        positive = names[self.kinds] | (ratings[self.kinds] & (self.values >= POSITIVE_RATING))
        return np.asarray(positive, dtype=np.bool_)


def read_log(path: Path, limits: Limits | None = None) -> InteractionLog:
    """Read wire-format interactions, one JSON object a line, and order them by event time.

    Raises LogError naming the first line that the worker would not accept either.
    """
    return from_interactions(_decoded(path, limits or Limits()))


def from_interactions(interactions: Iterable[Interaction]) -> InteractionLog:
    """Build the columns; the sort by event time is stable, so log order holds inside equal times."""
    rows = sorted(interactions, key=lambda row: row.event_time_ms)
    users, user_ids = _indexed([row.user_id for row in rows])
    items, item_ids = _indexed([row.item_id for row in rows])
    kinds, kind_names = _indexed([row.kind for row in rows])
    return InteractionLog(
        users=users,
        items=items,
        kinds=kinds,
        values=np.array([row.value or 0.0 for row in rows], dtype=np.float32),
        value_given=np.array([row.value is not None for row in rows], dtype=np.bool_),
        event_times_ms=np.array([row.event_time_ms for row in rows], dtype=np.int64),
        event_ids=[row.event_id for row in rows],
        user_ids=user_ids,
        item_ids=item_ids,
        kind_names=kind_names,
    )


def split_by_time(log: InteractionLog, fraction: float = TRAINING_FRACTION) -> int:
    """Return m: the first m interactions are training, the rest is test."""
    return int(len(log) * fraction)


class _Keyed(msgspec.Struct):
    user_id: str


def _decoded(path: Path, limits: Limits) -> Iterator[Interaction]:
    user_id = msgspec.json.Decoder(_Keyed)
    rows = 0
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            line = raw.strip()
            if not line:
                continue
            rows += 1
            try:
                yield decode_interaction(user_id.decode(line).user_id.encode(), line, limits)
            except (DecodeError, msgspec.MsgspecError, UnicodeError) as error:
                raise LogError(f"{path}, line {number}: {error}; nothing was read, mend or delete that line") from error
    if rows == 0:
        raise LogError(f"{path}: no interactions in it; expected one JSON object a line")


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}; nothing was read, name a JSONL file of interactions") from error


def _indexed(names: list[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return each name's index, and the names in order of first appearance."""
    index: dict[str, int] = {}
    column = np.fromiter((index.setdefault(name, len(index)) for name in names), dtype=np.int64, count=len(names))
    return column, list(index)
