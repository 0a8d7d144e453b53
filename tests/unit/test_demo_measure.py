"""From slates to numbers."""

import math

import numpy as np
import pytest

from deploy.demo.measure import Ledger, Place, offline_quality, place_of, quality_of, quantiles, streamed_quality
from tests.builders import slate

WANTED = ["i-1", "i-9"]
USERS = np.array([0, 1])


def test_the_place_of_an_item_is_read_off_the_slate_and_its_retrieval_positions() -> None:
    answer = slate(item_ids=["i-7", "i-1"], retrieval_positions=[4, 2])
    assert place_of(answer, "i-1") == Place(rank=1, retrieval_rank=2)


def test_an_item_that_a_slate_lacks_has_no_place() -> None:
    assert place_of(slate(), "i-99") is None


def test_ndcg_is_one_over_log2_of_the_place_counted_from_two() -> None:
    metrics = quality_of(np.array([0, 2, 10]), np.array([0, 1, 2]), seed=0).metrics
    assert metrics["ndcg10"].value == (1.0 + 0.5 + 0.0) / 3
    assert metrics["hr10"].value == 2 / 3
    assert metrics["mrr"].value == pytest.approx((1 + 1 / 3 + 1 / 11) / 3, abs=1e-15)


def test_retrieval_is_read_off_the_live_slates() -> None:
    ledger = Ledger(WANTED)
    ledger.add_slate("live", 0, slate(item_ids=["i-1", "i-2"], retrieval_positions=[1, 0]), 5.0)
    ledger.add_slate("frozen", 0, slate(item_ids=["i-2", "i-1"], retrieval_positions=[0, 1]), 5.0)
    quality = streamed_quality(ledger, USERS, seed=0)
    second = 1.0 / math.log2(3.0)
    assert {policy: (each.lists, each.metrics["ndcg10"].value) for policy, each in quality.items() if each.lists} == {
        "retrieval": (1, second),
        "live": (1, 1.0),
        "frozen": (1, second),
    }


def test_only_ranked_slates_count_for_quality_and_all_are_counted() -> None:
    ledger = Ledger(WANTED)
    ledger.add_slate("live", 0, slate(outcome="fallback", reasons=["stale"]), 5.0)
    ledger.add_slate("live", 1, slate(outcome="shed", item_ids=[]), 5.0)
    assert ledger.outcomes["live"] == {"fallback": 1, "shed": 1}
    assert streamed_quality(ledger, USERS, seed=0)["live"].lists == 0


def test_offline_rests_on_the_lists_that_the_stream_ranked() -> None:
    ledger = Ledger(WANTED)
    ledger.add_slate("live", 1, slate(item_ids=["i-9"], retrieval_positions=[0]), 5.0)
    quality = offline_quality({"live": np.array([7, 0])}, ledger, USERS, seed=0)["live"]
    assert (quality.lists, quality.metrics["ndcg10"].value) == (1, 1.0)


def test_latencies_are_those_of_the_live_arm() -> None:
    ledger = Ledger(WANTED)
    for arm, latency_ms in (("live", 5.0), ("strict", 50.0), ("frozen", 500.0)):
        ledger.add_slate(arm, 0, slate(), latency_ms)
    assert ledger.list_ms == [5.0]


def test_ndcg_so_far_is_the_mean_over_the_ranked_slates_read() -> None:
    ledger = Ledger(WANTED)
    ledger.add_slate("live", 0, slate(item_ids=["i-1"], retrieval_positions=[0]), 5.0)
    ledger.add_slate("live", 1, slate(item_ids=["i-8", "i-7", "i-9"], retrieval_positions=[0, 1, 2]), 5.0)
    assert ledger.ndcg10_so_far() == {"live": 0.75}


def test_quantiles_of_nothing_are_none() -> None:
    assert quantiles([]) == {"p50": None, "p90": None, "p99": None}


def test_quantiles_lie_between_the_measured_values() -> None:
    assert quantiles([float(value) for value in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
