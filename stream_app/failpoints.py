"""Fail-points: end, freeze or raise at a named place, to test what a fault there leaves behind. Never in production.

Off unless RERANK_FAILPOINT is set to `<name>[:<n>[:<action>]]`; then the n-th pass of that place acts, once.
"""

import os
import signal
from collections.abc import Iterator

POINTS = ("before_save", "after_save", "before_publish", "after_publish", "before_commit", "after_commit")
ACTIONS = ("kill", "raise", "stop")
PATTERN = rf"^(({'|'.join(POINTS)})(:[1-9][0-9]{{0,8}}(:({'|'.join(ACTIONS)}))?)?)?$"


class FailpointError(Exception):
    """What the action `raise` raises: no error of ours, as a bug would."""


_armed: dict[str, Iterator[str]] = {}  # name -> what each pass does; empty in production


def arm(failpoint: str) -> None:
    """Arm one fail-point, described as PATTERN says; "" disarms. Affects: every `reach` of this process."""
    _armed.clear()
    if failpoint:
        name, passes, action = (*failpoint.split(":"), "", "")[:3]
        _armed[name] = iter(["pass"] * (int(passes or 1) - 1) + [action or "kill"])


def reach(name: str) -> None:
    """Pass the place `name`; nothing happens unless it is armed."""
    if _armed and name in _armed:
        _act(name, next(_armed[name], "pass"))


def _act(name: str, action: str) -> None:
    if action == "raise":
        raise FailpointError(f"fail-point {name}")
    if action != "pass":
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
