"""Rules of evaluation: waves equal a plain loop, and a planted leak is found."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from models.artefact import Model
from models.evaluation import EvaluationError, evaluate, live_scores
from models.export import Labels, write_artefact
from models.leaks import constant_scorer, poisoned_future, positive_control
from models.log import InteractionLog
from models.manifest import Training
from models.metrics import UserBootstrap
from models.protocol import TestList
from models.protocol import test_lists as make_lists
from models.training import Recipe, train
from models.waves import list_states
from tests.logs import rating_log, small_log

M = 1_997  # where the log of 2,497 interactions is split


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> InteractionLog:
    """Write one small log for the module; nothing mutates it."""
    return small_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory, log: InteractionLog) -> Path:
    """Train the default model a little."""
    trained = train(log, M, Recipe(dim=16, epochs=10))
    until_ms = int(log.event_times_ms[M - 1])
    labels = Labels(
        name="learned-ema",
        training=Training(from_ms=0, until_ms=until_ms, interactions=M, loss="softmax", seed=0),
        created_ms=0,
        metrics={},
    )
    directory = tmp_path_factory.mktemp("artefacts") / "learned-ema"
    write_artefact(trained.network, trained.item_ids, trained.item_vectors, labels, directory)
    return directory


def test_waves_keep_the_states_of_a_loop_over_interactions(log: InteractionLog, artefact: Path) -> None:
    model, lists = Model(artefact), make_lists(log, M, seed=0)
    states = list_states(model, log, M, lists)
    rows, kinds = model.item_rows(log.item_ids)[log.items], model.kind_indices(log.kind_names)[log.kinds]
    for index, one in enumerate(lists[::20]):
        mine = np.flatnonzero(log.users[: one.event_index] == one.user_index)
        same_second = log.event_times_ms[mine] // 1000 == log.event_times_ms[one.event_index] // 1000
        for kept, seen in (
            (states.live, mine),
            (states.live_strict, mine[~same_second]),
            (states.frozen, mine[mine < M]),
            (states.leaked, np.append(mine, one.event_index)),
        ):
            state = model.cold_states(1)
            for k in seen:
                state = model.advance(
                    state, rows[k : k + 1], kinds[k : k + 1], log.values[k : k + 1], np.zeros(1, dtype=np.float32)
                )
            assert np.array_equal(kept[20 * index], state[0])


def test_strict_hides_what_shares_the_lists_second(artefact: Path) -> None:
    warm = [("u", f"i{n}", 5.0, n) for n in range(8)] + [("v", f"i{n}", 5.0, n) for n in range(8, 14)]
    log = rating_log([*warm, ("v", "i2", 5.0, 90), ("v", "i3", 5.0, 90), ("v", "i4", 5.0, 91)])
    model = Model(artefact)
    lists = make_lists(log, 14, seed=0)
    states = list_states(model, log, 14, lists)
    assert [one.event_index for one in lists] == [14, 15, 16]
    assert np.array_equal(states.live_strict[0], states.live[0])
    assert np.array_equal(states.live_strict[1], states.live[0])
    assert np.array_equal(states.live_strict[2], states.live[2])
    assert not np.array_equal(states.live[1], states.live[0])


def test_live_beats_frozen_on_a_drifting_log_and_every_check_passes(log: InteractionLog, artefact: Path) -> None:
    evaluation = evaluate(artefact, log, seed=0)
    ndcg = evaluation.metrics["ndcg10"]
    assert ndcg["live"].value > 1.2 * ndcg["frozen"].value
    assert [check.name for check in evaluation.leak_checks if not check.passed] == []


def test_evaluation_again_gives_the_same_numbers(log: InteractionLog, artefact: Path) -> None:
    assert evaluate(artefact, log, seed=1) == evaluate(artefact, log, seed=1)


def test_a_planted_leak_is_found(log: InteractionLog, artefact: Path) -> None:
    model, lists = Model(artefact), make_lists(log, M, seed=0)

    def leaking(
        some_log: InteractionLog, some: Sequence[TestList]
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        scores = live_scores(model, some_log, M, some).copy()
        scores[:, 0] += some_log.items[[one.event_index for one in some]]
        return scores

    assert not poisoned_future(leaking, log, lists, seed=0).passed


def test_poison_that_changes_nothing_is_a_failed_check(log: InteractionLog) -> None:
    lists = make_lists(log, M, seed=0)
    blind = np.zeros((len(lists), 1), dtype=np.float32)
    assert not poisoned_future(lambda _log, _lists: blind, log, lists, seed=0).passed


def test_a_control_without_effect_is_a_failed_check() -> None:
    scores = np.array([[0.0, 1.0, 0.5]], dtype=np.float32)
    assert not positive_control(scores, scores, np.array([1])).passed


def test_updating_before_ranking_lifts_the_metric(log: InteractionLog, artefact: Path) -> None:
    check = next(one for one in evaluate(artefact, log, seed=0).leak_checks if one.name == "positive_control")
    honest, cheating = (float(word) for word in check.finding.split("NDCG@10 from ")[1].split(" to "))
    assert cheating > honest


def test_a_wanted_item_that_always_comes_first_is_no_leak_of_the_constant_scorer() -> None:
    candidates = np.tile(np.arange(10), (200, 1))
    check = constant_scorer(candidates, np.zeros(200, dtype=np.int64), UserBootstrap(np.arange(200), seed=0), seed=0)
    assert check.passed


def test_an_artefact_trained_on_the_test_part_is_found(log: InteractionLog, artefact: Path) -> None:
    early = evaluate(artefact, rating_log([(f"u{n}", f"i{n % 3}", 5.0, -1_000_000_000 + n) for n in range(40)]), seed=0)
    assert "training_range" not in [check.name for check in early.leak_checks if check.passed]


def test_a_log_without_lists_is_an_error(artefact: Path) -> None:
    with pytest.raises(EvaluationError, match="no list to rank"):
        evaluate(artefact, rating_log([("u", "i1", 1.0, n) for n in range(10)]), seed=0)
