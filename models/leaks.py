"""Leak checks: would the evaluation notice if the future, or the answer, reached the ranking?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from models.log import InteractionLog
from models.manifest import Manifest
from models.metrics import UserBootstrap, expected_auc, expected_ndcg_at_10, ndcg_at_10, ranks_of
from models.protocol import TestList, test_lists

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
MOST_LISTS = 0.95

ScoreLists = Callable[[InteractionLog, Sequence[TestList]], FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakCheck:
    """One check and what was found; `passed` false means that no number of the table can be trusted."""

    name: str
    passed: bool
    finding: str


def poisoned_future(score_lists: ScoreLists, log: InteractionLog, lists: Sequence[TestList], seed: int) -> LeakCheck:
    """Change every interaction from one of each user's lists on, the list's own included: no earlier score may move.

    The scores of later lists must move, or the poison had no teeth.
    """
    rng = np.random.default_rng(seed)
    cut_of = _cuts(lists, rng)
    cuts = np.array([cut_of.get(int(user), len(log)) for user in range(len(log.user_ids))])
    poisoned = poison(log, np.arange(len(log)) >= cuts[log.users], rng)
    clean, dirty = score_lists(log, lists), score_lists(poisoned, lists)
    same = (clean == dirty).all(axis=1)  # (L,)
    earlier = np.array([one.event_index <= cut_of[one.user_index] for one in lists])
    changed_early, changed_late = int((~same & earlier).sum()), int((~same & ~earlier).sum())
    return LeakCheck(
        name="poisoned_future",
        passed=changed_early == 0 and (changed_late > 0 or bool(earlier.all())),
        finding=f"of {int(earlier.sum())} lists up to the poison {changed_early} changed a score, "
        f"of {int((~earlier).sum())} after it {changed_late}",
    )


def poisoned_lists(log: InteractionLog, m: int, lists: Sequence[TestList], seed: int) -> LeakCheck:
    """Change every interaction of the second half of the test part: the lists before it must not change."""
    cut = lists[len(lists) // 2].event_index
    poisoned = poison(log, np.arange(len(log)) >= cut, np.random.default_rng(seed))
    rebuilt = [one for one in test_lists(poisoned, m, seed) if one.event_index < cut]
    before = [one for one in lists if one.event_index < cut]
    same = len(before) == len(rebuilt) and all(
        left.event_index == right.event_index
        and np.array_equal(left.candidate_items, right.candidate_items)
        and np.array_equal(left.retrieval_scores, right.retrieval_scores)
        for left, right in zip(before, rebuilt, strict=True)
    )
    finding = f"{len(before)} lists before the poison {'are unchanged' if same else 'changed'}"
    return LeakCheck(name="poisoned_lists", passed=same, finding=finding)


def poison(log: InteractionLog, where: npt.NDArray[np.bool_], rng: np.random.Generator) -> InteractionLog:
    """Return a log whose interactions have other items, kinds and values there; users and times stay."""
    count = int(where.sum())
    items, kinds, values = log.items.copy(), log.kinds.copy(), log.values.copy()
    if len(log.item_ids) > 1:
        items[where] = (items[where] + rng.integers(1, len(log.item_ids), count)) % len(log.item_ids)
    kinds[where] = rng.integers(0, len(log.kind_names), count)
    values[where] = rng.integers(0, 6, count)
    return replace(log, items=items, kinds=kinds, values=values)


def positive_control(live: FloatArray, leaked: FloatArray, true_positions: IntArray) -> LeakCheck:
    """Apply each list's own interaction before ranking it: such a leak must be seen, so the scores (L, C) must move.

    How far NDCG@10 rises depends on the model (one that never expects a repeat gains less, one that hardly uses the
    state nothing), so it is told and not judged.
    """
    moved = float((live != leaked).any(axis=1).mean())
    honest, cheating = (float(ndcg_at_10(ranks_of(scores, true_positions)).mean()) for scores in (live, leaked))
    return LeakCheck(
        name="positive_control",
        passed=moved >= MOST_LISTS,
        finding=f"updating before ranking moves the scores of {moved:.1%} of the lists, "
        f"and NDCG@10 from {honest:.4f} to {cheating:.4f}",
    )


def constant_scorer(candidates: IntArray, true_positions: IntArray, bootstrap: UserBootstrap, seed: int) -> LeakCheck:
    """Rank candidates (L, C), -1 for padding, by a constant and by chance: neither may know anything."""
    real = candidates >= 0
    constant = np.where(real, 0.0, -np.inf).astype(np.float32)
    drawn = np.random.default_rng(seed).random(candidates.shape).astype(np.float32)
    auc = float(expected_auc(constant, true_positions).mean())
    expected = float(expected_ndcg_at_10(constant, true_positions).mean())
    chance = bootstrap.mean(ndcg_at_10(ranks_of(np.where(real, drawn, -np.inf).astype(np.float32), true_positions)))
    # A 95 % interval misses one time in twenty; twice its width practically never does.
    slack = max(chance.high - chance.low, 1e-9)
    return LeakCheck(
        name="constant_scorer",
        passed=auc == 0.5 and abs(chance.value - expected) <= slack,
        finding=f"AUC {auc!r}, NDCG@10 {expected:.4f} with ties at random; a random scorer has {chance.value:.4f}",
    )


def training_range(manifest: Manifest, log: InteractionLog, m: int) -> LeakCheck:
    """The artefact must not have been trained on interactions later than the split of this log."""
    split_ms = int(log.event_times_ms[min(m, len(log) - 1)])
    return LeakCheck(
        name="training_range",
        passed=manifest.training.until_ms <= split_ms,
        finding=f"trained until {manifest.training.until_ms} ms, tested from {split_ms} ms",
    )


def _cuts(lists: Sequence[TestList], rng: np.random.Generator) -> dict[int, int]:
    """Return for each user the event index of one of his lists, drawn at random."""
    events: dict[int, list[int]] = {}
    for one in lists:
        events.setdefault(one.user_index, []).append(one.event_index)
    return {user: int(rng.choice(indices)) for user, indices in events.items()}
