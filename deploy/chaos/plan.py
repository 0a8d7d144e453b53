"""Which fault strikes what, and when: a pure function of the seed. Time is counted in steps of the load."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BrokerChoice = Literal["embedded", "apache", "cluster"]
Target = Literal["worker", "group", "redis", "redis link", "broker", "broker link", "load", "model"]

FIRST_STEP = 8  # a healthy start, so that there is something to lose
REST_STEPS = 6  # between two faults of one target
GAP_STEPS = (6, 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultKind:
    """A row of the fault table: how long it lasts, what it strikes, and with which brokers it makes sense."""

    name: str
    target: Target
    steps: tuple[int, int]
    brokers: tuple[BrokerChoice, ...] = ("embedded", "apache", "cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One fault at one step; `amount` (0 to 1) is how bad it is, where that can be chosen."""

    step: int
    steps: int
    kind: FaultKind
    index: int
    amount: float


def plan(kinds: Sequence[FaultKind], *, seed: int, steps: int, workers: int, brokers: int) -> list[Strike]:
    """Return the strikes of a run of `steps` steps.

    Kinds are dealt from a shuffled deck, so that every kind comes up before one comes up twice; several targets may
    be in trouble at once, one target never twice.
    """
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    counts = {"worker": workers, "broker": brokers, "broker link": brokers}
    deck: list[FaultKind] = []
    free_from: dict[tuple[str, int], int] = {}
    strikes: list[Strike] = []
    step = FIRST_STEP
    while step < steps:
        if not deck:
            deck = rng.sample(kinds, len(kinds))
        kind = deck.pop()
        index, lasts = rng.randrange(counts.get(kind.target, 1)), rng.randint(*kind.steps)
        amount = rng.random()
        # One broker of a cluster at a time: two of three down is no fault to be survived but an outage.
        place = (kind.target, index if kind.target == "worker" else 0)
        begins = max(step, free_from.get(place, 0))
        if begins + lasts > steps:
            step += GAP_STEPS[0]
            continue
        free_from[place] = begins + lasts + REST_STEPS
        strikes.append(Strike(step=begins, steps=lasts, kind=kind, index=index, amount=amount))
        step += rng.randint(*GAP_STEPS)
    return sorted(strikes, key=lambda strike: strike.step)
