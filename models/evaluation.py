"""Evaluate an artefact on a log: the same lists in retrieval order, with the user frozen at the split, and live."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models import leaks
from models.artefact import Model
from models.leaks import LeakCheck
from models.log import InteractionLog, split_by_time
from models.manifest import Manifest
from models.metrics import METRICS, Estimate, UserBootstrap, ndcg_at_10, ranks_of
from models.protocol import TestList, test_lists
from models.threads import one_thread
from models.waves import list_states

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class EvaluationError(Exception):
    """There is nothing to evaluate; the message says what the log lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One artefact on one log. `metrics` is by metric (ndcg10, hr10, mrr), then by policy.

    Policies: `retrieval` (popularity of seven days), `frozen` (user state at the split), `live` (every interaction
    before the list's), `live_strict` (the same, but those of the list's own second are not yet visible).
    """

    manifest: Manifest
    lists: int
    users: int
    interactions: int
    seed: int
    metrics: Mapping[str, Mapping[str, Estimate]]
    live_over_frozen: Estimate
    live_strict_over_frozen: Estimate
    leak_checks: Sequence[LeakCheck]


def evaluate(directory: Path, log: InteractionLog, seed: int) -> Evaluation:
    """Evaluate the artefact on the last 20 % of a log. Same artefact, log and seed: same numbers.

    Raises EvaluationError when the test part has no list, ManifestError when the artefact is not what it promises.
    """
    with one_thread():
        return _evaluate(Model(directory), log, seed)


def _evaluate(model: Model, log: InteractionLog, seed: int) -> Evaluation:
    m = split_by_time(log)
    lists = test_lists(log, m, seed)
    if not lists:
        raise EvaluationError(
            f"{len(log)} interactions and no list to rank: the last 20 % hold no wanted interaction (a rating of 4 "
            "or more, a click, like, purchase, ...) with an item seen before; name a longer log"
        )
    candidates = stack(lists, model.item_rows(log.item_ids))
    true_positions = np.array([one.true_position for one in lists])
    states = list_states(model, log, m, lists)
    scores = {
        "retrieval": _retrieval_scores(candidates),
        "frozen": model.score(states.frozen, candidates),
        "live": model.score(states.live, candidates),
        "live_strict": model.score(states.live_strict, candidates),
    }
    ranks = {policy: ranks_of(each, true_positions) for policy, each in scores.items()}
    bootstrap = UserBootstrap(np.array([one.user_index for one in lists]), seed)
    gains = {policy: ndcg_at_10(each) for policy, each in ranks.items()}
    return Evaluation(
        manifest=model.manifest,
        lists=len(lists),
        users=len({one.user_index for one in lists}),
        interactions=len(log),
        seed=seed,
        metrics={
            name: {policy: bootstrap.mean(metric(each)) for policy, each in ranks.items()}
            for name, metric in METRICS.items()
        },
        live_over_frozen=bootstrap.ratio(gains["live"], gains["frozen"]),
        live_strict_over_frozen=bootstrap.ratio(gains["live_strict"], gains["frozen"]),
        leak_checks=[
            leaks.training_range(model.manifest, log, m),
            leaks.poisoned_lists(log, m, lists, seed),
            leaks.poisoned_future(lambda one, some: live_scores(model, one, m, some), log, lists, seed),
            leaks.positive_control(scores["live"], model.score(states.leaked, candidates), true_positions),
            leaks.constant_scorer(candidates, true_positions, bootstrap, seed),
        ],
    )


def live_scores(model: Model, log: InteractionLog, m: int, lists: Sequence[TestList]) -> FloatArray:
    """Return the scores (L, C) of the lists with live states, -inf for padding."""
    return model.score(list_states(model, log, m, lists).live, stack(lists, model.item_rows(log.item_ids)))


def stack(lists: Sequence[TestList], rows: IntArray) -> IntArray:
    """Return the candidates of all lists as table rows (L, C), padded with -1; `rows` maps log items to table rows."""
    width = max(len(one.candidate_items) for one in lists)
    stacked = np.full((len(lists), width), -1, dtype=np.int64)
    for index, one in enumerate(lists):
        stacked[index, : len(one.candidate_items)] = rows[one.candidate_items]
    return stacked


def _retrieval_scores(candidates: IntArray) -> FloatArray:
    """Return scores that fall along each list, so that they keep its order."""
    positions = -np.arange(candidates.shape[1], dtype=np.float32)
    return np.where(candidates >= 0, positions, -np.inf).astype(np.float32)
