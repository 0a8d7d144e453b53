"""Ranking metrics of lists with one wanted item each, and how sure they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CUTOFF = 10
BOOTSTRAPS = 500

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def ndcg_at_10(ranks: IntArray) -> FloatArray:
    """Return NDCG@10 of each list from the 0-based rank of its one wanted item: 1 / log2(rank + 2), 0 from rank 10."""
    return np.where(ranks < CUTOFF, 1.0 / np.log2(ranks + 2.0), 0.0)


def hit_at_10(ranks: IntArray) -> FloatArray:
    """Return 1.0 for each list whose wanted item stands in the first ten places."""
    return (ranks < CUTOFF).astype(np.float64)


def reciprocal_rank(ranks: IntArray) -> FloatArray:
    """Return 1 / (rank + 1) of each list, without a cutoff."""
    return np.asarray(1.0 / (ranks + 1.0))


METRICS: Mapping[str, Callable[[IntArray], FloatArray]] = {
    "ndcg10": ndcg_at_10,
    "hr10": hit_at_10,
    "mrr": reciprocal_rank,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with the ends of its 95 % interval, users resampled."""

    value: float
    low: float
    high: float


class UserBootstrap:
    """Resample users, not lists: lists of one user rise and fall together. The draws are made once, so two
    estimates over the same lists are paired."""

    def __init__(self, users: IntArray, seed: int, draws: int = BOOTSTRAPS) -> None:
        """Draw for lists of these users (L,)."""
        self._users, self._list_user = np.unique(users, return_inverse=True)
        count = len(self._users)
        rng = np.random.default_rng(seed)
        picked = rng.integers(0, max(count, 1), size=(draws, count))
        self._times = np.stack([np.bincount(row, minlength=count) for row in picked]).astype(np.float64)

    def mean(self, values: FloatArray) -> Estimate:
        """Estimate the mean of one value a list (L,)."""
        return _estimate(float(values.mean()), self._totals(values) / self._totals(np.ones_like(values)))

    def ratio(self, values: FloatArray, base: FloatArray) -> Estimate:
        """Estimate mean(values) / mean(base), paired; infinite where the base is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return _estimate(float(np.divide(values.mean(), base.mean())), self._totals(values) / self._totals(base))

    def _totals(self, values: FloatArray) -> FloatArray:
        """Return the sum of the values in each draw: (draws,)."""
        return np.asarray(self._times @ np.bincount(self._list_user, weights=values, minlength=len(self._users)))


def _estimate(value: float, draws: FloatArray) -> Estimate:
    low, high = np.percentile(draws, (2.5, 97.5))
    return Estimate(value=value, low=float(low), high=float(high))


def ranks_of(scores: npt.NDArray[np.float32], true_positions: IntArray) -> IntArray:
    """Return the 0-based rank of the wanted item in each row of scores (L, C); ties keep retrieval order, as slates do.

    A score that is not finite ranks below every finite one; padding is -inf and ties with it go by position too.
    """
    clean = np.where(np.isfinite(scores), scores, -np.inf)
    truth = np.take_along_axis(clean, true_positions[:, None], axis=1)  # (L, 1)
    before = np.arange(clean.shape[1])[None, :] < true_positions[:, None]  # (L, C)
    return np.asarray(((clean > truth) | ((clean == truth) & before)).sum(axis=1))


def expected_auc(scores: npt.NDArray[np.float32], true_positions: IntArray) -> FloatArray:
    """Return the share of other candidates below the wanted one, ties counting one half; -inf is padding: (L,)."""
    truth = np.take_along_axis(scores, true_positions[:, None], axis=1)  # (L, 1)
    real = np.isfinite(scores)  # (L, C)
    below = ((scores < truth) & real).sum(axis=1)
    ties = ((scores == truth) & real).sum(axis=1) - 1
    return np.asarray((below + 0.5 * ties) / (real.sum(axis=1) - 1))


def expected_ndcg_at_10(scores: npt.NDArray[np.float32], true_positions: IntArray) -> FloatArray:
    """Return NDCG@10 of each list with ties in random order, in expectation: the mean over the places of the tie."""
    truth = np.take_along_axis(scores, true_positions[:, None], axis=1)  # (L, 1)
    first = (scores > truth).sum(axis=1)
    last = first + (scores == truth).sum(axis=1)
    gains = np.concatenate(([0.0], np.cumsum(ndcg_at_10(np.arange(scores.shape[1])))))
    return np.asarray((gains[last] - gains[first]) / (last - first))
