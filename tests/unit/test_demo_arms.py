"""The arms of the demo: what each user has seen when a list is ranked."""

import numpy as np

from deploy.demo.arms import Step, frozen_steps, live_steps, scripts_of, strict_steps
from models.log import InteractionLog, from_interactions
from models.protocol import TestList
from tests.builders import interaction

# Log indices 10, 20, ... of one user; lists 0, 1, 2 are asked for ahead of interactions 20, 30 and 50.
EVENTS = [10, 20, 30, 40, 50, 60]
LIST_OF = {20: 0, 30: 1, 50: 2}


def step(lists: tuple[int, ...], interactions: tuple[int, ...]) -> Step:
    return Step(lists=lists, interactions=interactions)


def log_of(*rows: tuple[str, int]) -> InteractionLog:
    """Build a log of (user, second) rows."""
    return from_interactions(
        interaction(event_id=f"e-{number}", user_id=user, item_id=f"i-{number}", event_time_ms=second * 1_000)
        for number, (user, second) in enumerate(rows)
    )


def list_at(log: InteractionLog, index: int) -> TestList:
    return TestList(
        event_index=index,
        user_index=int(log.users[index]),
        candidate_items=np.array([0, 1]),
        true_position=0,
        retrieval_scores=np.array([2.0, 1.0]),
    )


def test_a_live_list_comes_after_every_earlier_interaction_and_before_its_own() -> None:
    assert live_steps(EVENTS, LIST_OF) == [
        step((), (10,)),
        step((0,), (20,)),
        step((1,), (30, 40)),
        step((2,), (50, 60)),
    ]


def test_interactions_of_one_second_are_hidden_from_the_lists_of_that_second() -> None:
    seconds = {10: 1, 20: 1, 30: 2, 40: 3, 50: 3, 60: 3}
    assert strict_steps(EVENTS, seconds, LIST_OF) == [
        step((), ()),
        step((0,), (10, 20)),
        step((1,), (30,)),
        step((2,), (40, 50, 60)),
    ]


def test_lists_of_one_second_share_a_step() -> None:
    seconds = dict.fromkeys(EVENTS, 7)
    assert strict_steps(EVENTS, seconds, LIST_OF) == [step((), ()), step((0, 1, 2), (10, 20, 30, 40, 50, 60))]


def test_nothing_follows_the_second_of_the_last_strict_list() -> None:
    seconds = {10: 1, 20: 2, 30: 3, 40: 4, 50: 5, 60: 6}
    assert strict_steps(EVENTS, seconds, LIST_OF)[-1] == step((2,), (50,))


def test_frozen_lists_see_the_training_part_alone() -> None:
    assert frozen_steps(EVENTS, 20, LIST_OF) == [step((), (10,)), step((0, 1, 2), ())]


def test_the_arms_are_namespaces_of_user_ids() -> None:
    log = log_of(("u-1", 1), ("u-2", 2), ("u-1", 3))
    scripts = scripts_of(log, 2, [list_at(log, 2)])
    assert {arm: [script.user_id for script in each] for arm, each in scripts.items()} == {
        "live": ["live/u-1"],
        "strict": ["strict/u-1"],
        "frozen": ["frozen/u-1"],
    }


def test_what_precedes_the_first_list_is_told_apart() -> None:
    log = log_of(("u-1", 1), ("u-2", 2), ("u-1", 3), ("u-1", 4))
    (live,) = scripts_of(log, 2, [list_at(log, 3)])["live"]
    assert (live.before, live.steps) == ((0, 2), (step((0,), (3,)),))


def test_a_second_that_straddles_the_split_is_hidden_whole() -> None:
    log = log_of(("u-1", 1), ("u-1", 2), ("u-1", 2))
    (strict,) = scripts_of(log, 2, [list_at(log, 2)])["strict"]
    assert (strict.before, strict.steps) == ((0,), (step((0,), (1, 2)),))


def test_users_with_most_lists_come_first() -> None:
    log = log_of(("u-1", 1), ("u-2", 2), ("u-2", 3))
    scripts = scripts_of(log, 0, [list_at(log, index) for index in range(3)])
    assert [script.user_id for script in scripts["live"]] == ["live/u-2", "live/u-1"]


def test_a_user_without_a_list_sends_nothing() -> None:
    log = log_of(("u-1", 1), ("u-2", 2))
    assert [script.user_id for script in scripts_of(log, 1, [list_at(log, 1)])["frozen"]] == ["frozen/u-2"]
