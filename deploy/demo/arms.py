"""The three arms: who asks for which lists in which state. Pure: indices in, scripts out.

The arms are namespaces of user ids, so that one worker serves all of them at once and every number comes from slates:
`live/u1` gets each list after every earlier interaction of u1; `strict/u1` gets all lists of a second before any
interaction of that second; `frozen/u1` gets all lists with the state at the split.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from models.log import InteractionLog
from models.protocol import TestList

ARMS = ("live", "strict", "frozen")
LONGEST_PREFIX_BYTES = max(len(f"{arm}/") for arm in ARMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Lists that are ranked in the state so far, then interactions that change it.

    `lists` are indices into the test lists, `interactions` indices into the log.
    """

    lists: tuple[int, ...]
    interactions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What one user of one arm does, in order. `before` happens ahead of the first list."""

    arm: str
    user_id: str
    before: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def list_count(self) -> int:
        """How many lists the user asks for."""
        return sum(len(step.lists) for step in self.steps)


def scripts_of(log: InteractionLog, m: int, lists: Sequence[TestList]) -> dict[str, list[Script]]:
    """Return the scripts of each arm, those with most lists first: a user's lists come one after the other, so the
    longest script bounds the time of all."""
    list_of = {one.event_index: index for index, one in enumerate(lists)}
    scripts: dict[str, list[Script]] = {arm: [] for arm in ARMS}
    for user, events in _events_of_users(log, lists).items():
        last_list = max(index for index in events if index in list_of)
        for arm, steps in {
            "live": live_steps([index for index in events if index <= last_list], list_of),
            "strict": strict_steps(events, log.event_times_ms // 1000, list_of),
            "frozen": frozen_steps(events, m, list_of),
        }.items():
            scripts[arm].append(_script(arm, log.user_ids[user], steps))
    return {arm: sorted(each, key=lambda script: -script.list_count) for arm, each in scripts.items()}


def live_steps(events: Iterable[int], list_of: Mapping[int, int]) -> list[Step]:
    """Return the steps of one user whose every interaction is seen by his next list; `list_of`: log index to list."""
    return _merged(((index,), (list_of[index],) if index in list_of else ()) for index in events)


def strict_steps(
    events: Iterable[int], seconds: Mapping[int, int] | np.ndarray, list_of: Mapping[int, int]
) -> list[Step]:
    """Return the steps of one user whose interactions of one second are hidden from the lists of that second.

    `seconds` gives the second of each log index. Nothing follows the second of the last list.
    """
    groups = [tuple(group) for _, group in groupby(events, key=lambda index: int(seconds[index]))]
    asked = [tuple(list_of[index] for index in group if index in list_of) for group in groups]
    until = max((number for number, lists in enumerate(asked) if lists), default=-1) + 1
    return _merged(zip(groups[:until], asked[:until], strict=True))


def frozen_steps(events: Iterable[int], m: int, list_of: Mapping[int, int]) -> list[Step]:
    """Return the steps of one user who is known up to log index m and never seen again."""
    events = list(events)
    trained = tuple(index for index in events if index < m)
    lists = tuple(list_of[index] for index in events if index in list_of)
    return [Step(lists=(), interactions=trained), Step(lists=lists, interactions=())]


def _merged(groups: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Step]:
    """Join groups (interactions, lists) without a list to the one before: nobody looks in between."""
    steps = [Step(lists=(), interactions=())]
    for interactions, lists in groups:
        if lists:
            steps.append(Step(lists=lists, interactions=interactions))
        else:
            steps[-1] = Step(lists=steps[-1].lists, interactions=steps[-1].interactions + interactions)
    return steps


def _script(arm: str, user_id: str, steps: Sequence[Step]) -> Script:
    return Script(arm=arm, user_id=f"{arm}/{user_id}", before=steps[0].interactions, steps=tuple(steps[1:]))


def _events_of_users(log: InteractionLog, lists: Sequence[TestList]) -> dict[int, list[int]]:
    """Return the log indices of each user who has a list, in log order."""
    events: dict[int, list[int]] = {one.user_index: [] for one in lists}
    for index, user in _numbered(log):
        if user in events:
            events[user].append(index)
    return events


def _numbered(log: InteractionLog) -> Iterator[tuple[int, int]]:
    return enumerate(log.users.tolist())
