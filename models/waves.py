"""The user's state at each test list, by walking the log in waves.

Wave j holds the j-th interaction of every user, so a log costs as many calls of `advance` as its busiest user has
interactions, and not one for each interaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.artefact import Model
from models.log import InteractionLog
from models.protocol import TestList

MAX_GAP_S = 10 * 365 * 86_400.0  # what the worker clamps to

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListStates:
    """The user's state for each of L lists, (L, S), under each rule of when an interaction is seen."""

    frozen: FloatArray  # after the training part
    live: FloatArray  # after every interaction before the list's
    live_strict: FloatArray  # the same, without those of the same second
    leaked: FloatArray  # with the list's own interaction already applied: the positive control


def list_states(model: Model, log: InteractionLog, m: int, lists: Sequence[TestList]) -> ListStates:
    """Walk the log in waves and keep the states that the lists are ranked with."""
    waves = _waves(log, {one.user_index for one in lists})
    list_of = np.full(len(log), -1, dtype=np.int64)
    list_of[[one.event_index for one in lists]] = np.arange(len(lists))
    kept = {rule: model.cold_states(len(lists)) for rule in ("frozen", "live", "live_strict", "leaked")}
    states = model.cold_states(len(log.user_ids))  # (U, S)
    before_second, at_split = states.copy(), states.copy()
    seconds = log.event_times_ms // 1000
    last_second = np.full(len(log.user_ids), np.iinfo(np.int64).min)
    inputs = _Inputs(model, log)
    for wave in waves:
        users, mine = log.users[wave], list_of[wave]
        fresh = users[seconds[wave] != last_second[users]]
        before_second[fresh] = states[fresh]
        last_second[users] = seconds[wave]
        ranked = mine >= 0
        kept["live"][mine[ranked]] = states[users[ranked]]
        kept["live_strict"][mine[ranked]] = before_second[users[ranked]]
        states[users] = inputs.advance(states[users], wave)
        kept["leaked"][mine[ranked]] = states[users[ranked]]
        trained = users[wave < m]
        at_split[trained] = states[trained]
    kept["frozen"] = at_split[[one.user_index for one in lists]]
    return ListStates(**kept)


class _Inputs:
    """The log as inputs of `advance`."""

    def __init__(self, model: Model, log: InteractionLog) -> None:
        self._model = model
        self._rows = model.item_rows(log.item_ids)[log.items]
        self._kinds = model.kind_indices(log.kind_names)[log.kinds]
        self._values = log.values
        self._dt_s = _gaps_s(log)

    def advance(self, states: FloatArray, wave: IntArray) -> FloatArray:
        """Return the states after the interactions with these log indices, one for each state."""
        return self._model.advance(states, self._rows[wave], self._kinds[wave], self._values[wave], self._dt_s[wave])


def _gaps_s(log: InteractionLog) -> FloatArray:
    """Return the seconds since the same user's previous interaction, 0 for his first: (N,)."""
    order = np.argsort(log.users, kind="stable")
    gaps_ms = np.diff(log.event_times_ms[order], prepend=0)
    gaps_ms[np.flatnonzero(np.diff(log.users[order], prepend=-1))] = 0
    gaps_s = np.empty(len(log), dtype=np.float32)
    gaps_s[order] = np.minimum(gaps_ms / 1000.0, MAX_GAP_S)
    return gaps_s


def _waves(log: InteractionLog, users: set[int]) -> list[IntArray]:
    """Return log indices by their turn: wave j has the j-th interaction of each of the users that has one."""
    used = np.flatnonzero(np.isin(log.users, np.fromiter(users, dtype=np.int64, count=len(users))))
    order = used[np.argsort(log.users[used], kind="stable")]
    starts = np.flatnonzero(np.diff(log.users[order], prepend=-1))
    turns = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    by_turn = order[np.argsort(turns, kind="stable")]
    return np.split(by_turn, np.cumsum(np.bincount(turns))[:-1])
