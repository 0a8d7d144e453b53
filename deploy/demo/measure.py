"""From slates to numbers: where the wanted item stands, how long the answer took, and whether offline agrees."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploy.demo.arms import ARMS
from models.artefact import Model
from models.evaluation import stack
from models.log import InteractionLog
from models.metrics import METRICS, Estimate, UserBootstrap, ndcg_at_10, ranks_of
from models.protocol import TestList
from models.threads import one_thread
from models.waves import list_states
from schemas.records import Slate

QUANTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}
TOLERANCE = 1e-6

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """0-based places of the wanted item in a slate and in the retrieval order that the slate reports."""

    rank: int
    retrieval_rank: int


def place_of(slate: Slate, item_id: str) -> Place | None:
    """Return where an item stands in a slate, None when the slate does not hold it."""
    if item_id not in slate.item_ids:
        return None
    rank = slate.item_ids.index(item_id)
    return Place(rank=rank, retrieval_rank=slate.retrieval_positions[rank])


class Ledger:
    """What has been read from the slates so far.

    Owner: the traffic adds each slate once; the report reads it when the traffic is over.
    """

    def __init__(self, wanted_items: Sequence[str]) -> None:
        """Expect one slate an arm for each list; `wanted_items` are the item ids that should come first."""
        self._wanted_items = wanted_items
        self.ranks = {arm: np.full(len(wanted_items), -1, dtype=np.int64) for arm in ARMS}  # -1: no ranked slate
        self.retrieval_ranks: IntArray = np.full(len(wanted_items), -1, dtype=np.int64)
        self.outcomes: dict[str, Counter[str]] = {arm: Counter() for arm in ARMS}
        self.list_ms: list[float] = []
        self.click_ms: list[float] = []
        self._gains = dict.fromkeys(ARMS, 0.0)

    def add_slate(self, arm: str, list_index: int, slate: Slate, latency_ms: float) -> None:
        """Take the slate of one list; only `ranked` ones count for quality, only live ones for latency."""
        self.outcomes[arm][slate.outcome] += 1
        place = place_of(slate, self._wanted_items[list_index]) if slate.outcome == "ranked" else None
        if place is not None:
            self.ranks[arm][list_index] = place.rank
            self._gains[arm] += float(ndcg_at_10(np.array([place.rank]))[0])
        if arm == "live":
            self.list_ms.append(latency_ms)
            if place is not None:
                self.retrieval_ranks[list_index] = place.retrieval_rank

    def add_click(self, latency_ms: float) -> None:
        """Take the time from producing an interaction to reading the first slate that reflects it."""
        self.click_ms.append(latency_ms)

    @property
    def slates(self) -> int:
        """Slates read so far, of all arms."""
        return sum(counts.total() for counts in self.outcomes.values())

    def ndcg10_so_far(self) -> dict[str, float]:
        """Return NDCG@10 of each arm that has a ranked slate, over the slates read so far."""
        ranked = {arm: self.outcomes[arm]["ranked"] for arm in ARMS}
        return {arm: self._gains[arm] / ranked[arm] for arm in ARMS if ranked[arm]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One policy: its metrics by name (ndcg10, hr10, mrr), and the lists that they rest on."""

    lists: int
    metrics: Mapping[str, Estimate]


def streamed_quality(ledger: Ledger, users: IntArray, seed: int) -> dict[str, Quality]:
    """Return the policies as the slates tell them; `users` (L,) is the user of each list."""
    return {
        "retrieval": quality_of(ledger.retrieval_ranks, users, seed),
        "frozen": quality_of(ledger.ranks["frozen"], users, seed),
        "live": quality_of(ledger.ranks["live"], users, seed),
        "live_strict": quality_of(ledger.ranks["strict"], users, seed),
    }


def offline_quality(offline: Mapping[str, IntArray], ledger: Ledger, users: IntArray, seed: int) -> dict[str, Quality]:
    """Return what the evaluator says of each arm, on the lists whose slates were ranked."""
    return {arm: quality_of(np.where(ledger.ranks[arm] >= 0, ranks, -1), users, seed) for arm, ranks in offline.items()}


def quality_of(ranks: IntArray, users: IntArray, seed: int) -> Quality:
    """Return the metrics of ranks (L,) without those that are -1; NaN when none is left."""
    there = ranks >= 0
    if not there.any():
        nothing = Estimate(value=float("nan"), low=float("nan"), high=float("nan"))
        return Quality(lists=0, metrics=dict.fromkeys(METRICS, nothing))
    bootstrap = UserBootstrap(users[there], seed)
    metrics = {name: bootstrap.mean(metric(ranks[there])) for name, metric in METRICS.items()}
    return Quality(lists=int(there.sum()), metrics=metrics)


def offline_ranks(directory: Path, log: InteractionLog, m: int, lists: Sequence[TestList]) -> dict[str, IntArray]:
    """Return the ranks (L,) that the evaluator gives the wanted item in each arm, no stream involved."""
    model = Model(directory)
    true_positions = np.array([one.true_position for one in lists])
    with one_thread():
        states = list_states(model, log, m, lists)
        candidates = stack(lists, model.item_rows(log.item_ids))  # (L, C)
        return {
            arm: ranks_of(model.score(state, candidates), true_positions)
            for arm, state in (("live", states.live), ("strict", states.live_strict), ("frozen", states.frozen))
        }


def quantiles(values_ms: Sequence[float]) -> dict[str, float | None]:
    """Return p50, p90 and p99, None where nothing was measured."""
    if not values_ms:
        return dict.fromkeys(QUANTILES)
    return {name: float(np.percentile(values_ms, percent)) for name, percent in QUANTILES.items()}
