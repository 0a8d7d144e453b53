"""Rules of the test lists."""

import numpy as np
import pytest

from models.leaks import poison
from models.log import InteractionLog
from models.popularity import HALF_LIFE_MS, DecayedPopularity
from models.protocol import test_lists as make_lists
from tests.logs import rating_log, small_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> InteractionLog:
    """Write one small log for the module; nothing mutates it."""
    return small_log(tmp_path_factory.mktemp("log"))


def test_every_candidate_is_known_by_then_and_untouched_by_the_user(log: InteractionLog) -> None:
    for one in make_lists(log, 2000, seed=0):
        past = slice(0, one.event_index)
        touched = set(log.items[past][log.users[past] == one.user_index].tolist())
        others = set(one.candidate_items.tolist()) - {int(log.items[one.event_index])}
        assert len(others) == len(one.candidate_items) - 1
        assert others <= set(log.items[past].tolist())
        assert not others & touched


def test_the_wanted_item_stands_where_the_list_says(log: InteractionLog) -> None:
    for one in make_lists(log, 2000, seed=0):
        assert one.candidate_items[one.true_position] == log.items[one.event_index]


def test_lists_come_in_falling_popularity_of_seven_days(log: InteractionLog) -> None:
    one = make_lists(log, 2000, seed=0)[-1]
    ages_ms = log.event_times_ms[one.event_index] - log.event_times_ms[: one.event_index]
    weights = np.bincount(log.items[: one.event_index], 0.5 ** (ages_ms / HALF_LIFE_MS), minlength=len(log.item_ids))
    assert one.retrieval_scores == pytest.approx(weights[one.candidate_items])
    assert (np.diff(one.retrieval_scores) <= 0).all()


def test_there_is_a_list_for_every_wanted_interaction_with_a_known_item(log: InteractionLog) -> None:
    wanted = np.flatnonzero(log.positive())
    known = [int(k) for k in wanted[wanted >= 2000] if log.items[k] in log.items[:k]]
    assert [one.event_index for one in make_lists(log, 2000, seed=0)] == known


def test_same_seed_same_lists_and_another_seed_others(log: InteractionLog) -> None:
    first, again, other = (make_lists(log, 2300, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a.candidate_items, b.candidate_items) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a.candidate_items, b.candidate_items) for a, b in zip(first, other, strict=True))


def test_the_future_has_no_say_in_a_list(log: InteractionLog) -> None:
    cut = 2200
    poisoned = poison(log, np.arange(len(log)) >= cut, np.random.default_rng(0))
    for a, b in zip(make_lists(log, 2000, seed=0), make_lists(poisoned, 2000, seed=0), strict=False):
        if a.event_index >= cut:
            break
        assert np.array_equal(a.candidate_items, b.candidate_items)


def test_ties_in_popularity_favour_no_position() -> None:
    rows = [("u0", f"i{n}", 5.0, 0) for n in range(10)] + [(f"v{n}", f"i{n % 10}", 5.0, 0) for n in range(400)]
    log = rating_log(rows)
    first_time = [one for one in make_lists(log, 10, seed=0) if len(set(one.retrieval_scores.tolist())) == 1]
    places = {one.true_position for one in first_time} if first_time else {0}
    assert len(first_time) > 5
    assert len(places) > 3


def test_popularity_halves_in_seven_days() -> None:
    popularity = DecayedPopularity(2)
    popularity.add(1, 0)
    assert popularity.scores(np.array([0, 1]), HALF_LIFE_MS).tolist() == [0.0, 0.5]


def test_popularity_survives_centuries() -> None:
    popularity = DecayedPopularity(2)
    for event_time_ms in (0, 10**13, 0):
        popularity.add(0, event_time_ms)
    popularity.add(1, 10**13)
    assert popularity.scores(np.array([0, 1]), 10**13).tolist() == [1.0, 1.0]
