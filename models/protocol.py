"""The test lists: which candidates are ranked against each wanted interaction, and in what retrieval order.

For every positive interaction of the test part: its item, 50 items drawn by popularity so far and 49 drawn uniformly,
all known by then and untouched by the user, in the order of popularity with a half-life of seven days. Nothing that
happens at or after the interaction has a say, its own item excepted.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.log import InteractionLog
from models.popularity import DecayedPopularity

BY_POPULARITY = 50
BY_CHANCE = 49
UNPOPULAR_KINDS = frozenset({"impression", "skip", "dislike"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TestList:
    """One list to rank: C item indices in retrieval order (100 unless fewer are known), and the wanted one's place."""

    __test__ = False  # the name is the protocol's; pytest must not collect it

    event_index: int
    user_index: int
    candidate_items: npt.NDArray[np.int64]
    true_position: int
    retrieval_scores: npt.NDArray[np.float64]


def test_lists(log: InteractionLog, m: int, seed: int) -> list[TestList]:
    """Return the lists of all positive interactions from index m on, in log order. Same log, m and seed: same lists.

    An interaction is left out when nobody had touched its item ("never seen" would give the answer away) or when no
    other candidate exists.
    """
    return list(_lists(log, m, seed))


test_lists.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions by this prefix


class _Past:
    """What the interactions so far say: who touched what, and how popular it is."""

    def __init__(self, items: int) -> None:
        self.counts = np.zeros(items)
        self.known = np.zeros(items, dtype=bool)
        self.touched: dict[int, list[int]] = defaultdict(list)
        self.recent = DecayedPopularity(items)

    def add(self, user: int, item: int, event_time_ms: int, *, popular: bool) -> None:
        self.known[item] = True
        self.touched[user].append(item)
        if popular:
            self.counts[item] += 1.0
            self.recent.add(item, event_time_ms)

    def negatives(self, user: int, item: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return items known by now and untouched by the user: by popularity first, then uniformly, none twice."""
        allowed = self.known.copy()
        allowed[self.touched[user]] = False
        allowed[item] = False
        pool = np.flatnonzero(allowed)
        with np.errstate(divide="ignore"):
            # Gumbel top-k: a draw without replacement with probability proportional to the count.
            keys = np.log(self.counts[pool]) + rng.gumbel(size=len(pool))
        split = min(BY_POPULARITY, len(pool))
        order = np.argsort(-keys, kind="stable")
        rest = pool[np.sort(order[split:])]
        by_chance = rng.choice(rest, size=min(BY_CHANCE, len(rest)), replace=False)
        return np.concatenate((pool[order[:split]], by_chance))


def _lists(log: InteractionLog, m: int, seed: int) -> Iterator[TestList]:
    past = _Past(len(log.item_ids))
    popular = np.array([name not in UNPOPULAR_KINDS for name in log.kind_names])[log.kinds]
    positive = log.positive()
    for k in range(len(log)):
        user, item, now_ms = int(log.users[k]), int(log.items[k]), int(log.event_times_ms[k])
        if k >= m and positive[k] and past.known[item]:
            # One generator a list: what is drawn for one list never shifts the draws of another.
            rng = np.random.default_rng((seed, k))
            negatives = past.negatives(user, item, rng)
            if len(negatives):
                yield _in_retrieval_order(k, user, item, negatives, past.recent, now_ms, rng)
        past.add(user, item, now_ms, popular=bool(popular[k]))


def _in_retrieval_order(  # noqa: PLR0917 - one list is all of these
    k: int,
    user: int,
    item: int,
    negatives: npt.NDArray[np.int64],
    recent: DecayedPopularity,
    now_ms: int,
    rng: np.random.Generator,
) -> TestList:
    """Return the list by falling popularity; the shuffle before the stable sort settles ties without favour."""
    candidates = rng.permutation(np.append(negatives, item))
    scores = recent.scores(candidates, now_ms)
    order = np.argsort(-scores, kind="stable")
    candidates = candidates[order]
    return TestList(
        event_index=k,
        user_index=user,
        candidate_items=candidates,
        true_position=int(np.flatnonzero(candidates == item)[0]),
        retrieval_scores=scores[order],
    )
