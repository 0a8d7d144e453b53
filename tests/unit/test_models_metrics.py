"""Metrics against hand-computed values and against an independent implementation."""

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, Qrel, ScoredDoc, Success, nDCG

from models.metrics import (
    UserBootstrap,
    expected_auc,
    expected_ndcg_at_10,
    hit_at_10,
    ndcg_at_10,
    ranks_of,
    reciprocal_rank,
)


def test_ties_keep_retrieval_order() -> None:
    scores = np.array([[1.0, 2.0, 1.0, 1.0]], dtype=np.float32)
    assert [int(ranks_of(scores, np.array([position]))[0]) for position in range(4)] == [1, 0, 2, 3]


def test_a_score_that_is_not_finite_ranks_last() -> None:
    scores = np.array([[np.nan, -5.0, np.inf]], dtype=np.float32)
    assert [int(ranks_of(scores, np.array([position]))[0]) for position in range(3)] == [1, 0, 2]


def test_metrics_of_the_first_tenth_and_eleventh_place() -> None:
    ranks = np.array([0, 9, 10])
    assert ndcg_at_10(ranks).tolist() == [1.0, 1.0 / np.log2(11.0), 0.0]
    assert hit_at_10(ranks).tolist() == [1.0, 1.0, 0.0]
    assert reciprocal_rank(ranks).tolist() == [1.0, 0.1, 1.0 / 11.0]


def test_metrics_agree_with_ir_measures() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 30)).astype(np.float32)
    truth = rng.integers(0, 30, 50)
    ranks = ranks_of(scores, truth)
    relevant = [Qrel(str(index), str(item), 1) for index, item in enumerate(truth)]
    run = [
        ScoredDoc(str(index), str(item), float(score))
        for index, row in enumerate(scores)
        for item, score in enumerate(row)
    ]
    theirs = ir_measures.calc_aggregate([nDCG @ 10, Success @ 10, RR], relevant, run)
    assert ndcg_at_10(ranks).mean() == pytest.approx(theirs[nDCG @ 10], abs=1e-12)
    assert hit_at_10(ranks).mean() == pytest.approx(theirs[Success @ 10], abs=1e-12)
    assert reciprocal_rank(ranks).mean() == pytest.approx(theirs[RR], abs=1e-12)


def test_a_constant_scorer_has_auc_one_half_exactly() -> None:
    constant = np.zeros((3, 7), dtype=np.float32)
    assert expected_auc(constant, np.array([0, 3, 6])).tolist() == [0.5, 0.5, 0.5]


def test_a_tie_is_worth_the_mean_of_its_places() -> None:
    scores = np.array([[2.0, 1.0, 1.0, 0.0]], dtype=np.float32)
    mean = (1.0 / np.log2(3.0) + 1.0 / np.log2(4.0)) / 2.0
    assert expected_ndcg_at_10(scores, np.array([2])).tolist() == pytest.approx([mean])


def test_the_interval_comes_from_users_not_from_lists() -> None:
    values = np.repeat([0.0, 1.0], 500)
    two_users = UserBootstrap(np.repeat([7, 9], 500), seed=0).mean(values)
    assert (two_users.value, two_users.low, two_users.high) == (0.5, 0.0, 1.0)


def test_a_ratio_is_paired() -> None:
    base = np.random.default_rng(0).random(100)
    ratio = UserBootstrap(np.arange(100) % 10, seed=0).ratio(2.0 * base, base)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_same_seed_same_interval() -> None:
    values, users = np.random.default_rng(0).random(100), np.arange(100) % 10
    assert UserBootstrap(users, seed=3).mean(values) == UserBootstrap(users, seed=3).mean(values)
