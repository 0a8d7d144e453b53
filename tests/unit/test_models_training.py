"""Rules of training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.leaks import poison
from models.log import InteractionLog, from_interactions
from models.networks import DEFAULT_STRENGTHS, NETWORKS, VALUE_BUCKETS
from models.sequences import CONTEXT, TARGETS, TrainingRows
from models.training import Recipe, Trained, Trainee, TrainingError, kind_names, train
from tests.builders import EVENT_TIME_MS, interaction
from tests.logs import rating_log, small_log

TINY = Recipe(dim=8, epochs=2)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> InteractionLog:
    """Write one small log for the module; nothing mutates it."""
    return small_log(tmp_path_factory.mktemp("log"), interactions=1_000)


def same_bits(left: Trained, right: Trained) -> bool:
    """Say whether two trainings came to the same model."""
    return (
        left.item_ids == right.item_ids
        and left.item_vectors.tobytes() == right.item_vectors.tobytes()
        and torch.equal(left.network.moves, right.network.moves)
        and all(torch.equal(a, b) for a, b in zip(left.network.parameters(), right.network.parameters(), strict=True))
    )


@pytest.mark.parametrize("loss", ["softmax", "mse"])
@pytest.mark.parametrize("model", NETWORKS)
def test_training_again_gives_the_same_bits(log: InteractionLog, model: str, loss: str) -> None:
    recipe = replace(TINY, model=model, loss=loss)
    assert same_bits(train(log, 800, recipe), train(log, 800, recipe))


def test_another_seed_gives_another_model(log: InteractionLog) -> None:
    assert not same_bits(train(log, 800, TINY), train(log, 800, replace(TINY, seed=1)))


def test_training_leaves_the_global_generator_and_threads_alone(log: InteractionLog) -> None:
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    train(log, 800, TINY)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_nothing_after_the_split_is_read(log: InteractionLog) -> None:
    poisoned = poison(log, np.arange(len(log)) >= 800, np.random.default_rng(0))
    assert same_bits(train(log, 800, TINY), train(poisoned, 800, TINY))


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("count", [TARGETS - 1, TARGETS + 3])
def test_training_sees_the_states_that_serving_computes(model: str, count: int) -> None:
    # Not longer than context and targets: what lies before is cut off in training, and weighs next to nothing.
    assert count <= CONTEXT + TARGETS
    kinds = ["rating", "click", "skip", "like"]
    log = from_interactions(
        interaction(item_id=f"i{n % 7}", kind=kinds[n % 4], value=float(n % 6), event_time_ms=n, event_id=f"e{n}")
        for n in range(count)
    )
    rows = TrainingRows.of(log, count, kind_names(log))
    torch.manual_seed(0)
    trainee = Trainee(NETWORKS[model](4, kind_names(log)), rows, replace(TINY, dim=4))
    trainee.settle(rows)
    vectors = torch.from_numpy(trainee.item_vectors(rows))
    state = torch.zeros(1, trainee.network.state_size)
    served = []
    for n in range(count):
        served.append(state)
        row = int(np.flatnonzero(rows.catalogue == log.items[n])[0]) + 1
        kind = torch.tensor([trainee.network.kinds.index(log.kind_names[log.kinds[n]])])
        state = trainee.network.advance(
            state, vectors[row : row + 1], kind, torch.from_numpy(log.values[n : n + 1]), torch.zeros(1)
        )
    with torch.no_grad():
        chunks = rows.chunks(torch.arange(rows.chunk_count))
        trained = trainee.states(chunks)[chunks.labelled]
    assert torch.allclose(trained, torch.cat(served), atol=1e-5)


def test_impressions_are_neither_learned_from_nor_learned() -> None:
    rows = [("click", "i1"), ("impression", "i2"), ("click", "i3"), ("click", "i1")]
    log = from_interactions(
        interaction(kind=kind, item_id=item_id, event_time_ms=n) for n, (kind, item_id) in enumerate(rows)
    )
    trained = train(log, len(log), replace(TINY, epochs=1))
    still = trained.network.kinds.index("impression") * VALUE_BUCKETS
    assert trained.item_ids == ["i1", "i3"]
    assert trained.network.moves[still].tolist() == [1.0, 0.0, 0.0]


def test_unseen_kinds_keep_their_proportions_on_the_scale_of_the_learned_ones(log: InteractionLog) -> None:
    network = train(log, 800, TINY).network
    gain = {kind: float(network.moves[index * VALUE_BUCKETS, 1]) for index, kind in enumerate(network.kinds)}
    ratings = network.moves[network.kinds.index("rating") * VALUE_BUCKETS :][1:VALUE_BUCKETS, 1]
    assert gain["impression"] == 0.0
    assert gain["dislike"] < gain["skip"] < 0.0 < gain["view"] < gain["click"] < gain["purchase"]
    assert gain["purchase"] == pytest.approx(2.0 * gain["click"])
    assert float(ratings.min()) <= gain["click"] <= float(ratings.max())


def test_kinds_of_the_log_follow_the_known_ones() -> None:
    log = from_interactions([interaction(kind="zap"), interaction(kind="unknown"), interaction(kind="hug")])
    assert kind_names(log) == [*DEFAULT_STRENGTHS, "hug", "zap"]


def test_an_item_met_once_has_the_cold_start_embedding() -> None:
    log = rating_log([("u", "a", 5.0, 0), ("u", "b", 5.0, 1), ("v", "a", 5.0, 2), ("v", "c", 5.0, 3)])
    trained = train(log, len(log), TINY)
    assert trained.item_ids == ["a", "b", "c"]
    cold = trained.item_vectors[0, :-1]
    assert [bool((row[:-1] == cold).all()) for row in trained.item_vectors[1:]] == [False, True, True]


def test_an_unknown_item_has_the_median_bias(log: InteractionLog) -> None:
    biases = train(log, 800, TINY).item_vectors[:, -1]
    assert biases[0] == np.median(biases[1:])


def test_popular_items_come_first_for_an_unknown_user(log: InteractionLog) -> None:
    trained = train(log, 800, replace(TINY, epochs=8))
    counts = np.bincount(log.items[:800], minlength=len(log.item_ids))
    top = np.argsort(-trained.item_vectors[1:, -1])[:10]
    ids = {item_id: index for index, item_id in enumerate(log.item_ids)}
    assert counts[[ids[trained.item_ids[row]] for row in top]].mean() > 2.0 * counts[counts > 0].mean()


@pytest.mark.parametrize("changes", [{"model": "svd"}, {"loss": "hinge"}])
def test_an_unknown_name_is_refused_with_the_known_ones(changes: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match="not one of"):
        Recipe(**changes)  # type: ignore[arg-type]  # only names


def test_a_log_without_a_moving_interaction_is_refused() -> None:
    log = from_interactions([interaction(kind="impression")])
    with pytest.raises(TrainingError, match="nothing to train on"):
        train(log, 1, TINY)


def test_progress_counts_every_step_once(log: InteractionLog) -> None:
    told: list[tuple[int, int]] = []
    train(log, 800, TINY, lambda done, total, _loss: told.append((done, total)))
    assert told == [(number, len(told)) for number in range(1, len(told) + 1)]


def test_one_user_with_a_lasting_event_time_trains() -> None:
    log = from_interactions(
        interaction(item_id=f"i{n}", event_time_ms=EVENT_TIME_MS, event_id=f"e{n}") for n in range(3)
    )
    assert np.isfinite(train(log, 3, TINY).item_vectors).all()


def test_synthetic_logs_are_written_alike(tmp_path: Path) -> None:
    first, again = small_log(tmp_path, interactions=200), small_log(tmp_path, interactions=200)
    assert first.event_ids == again.event_ids
    assert first.items.tolist() == again.items.tolist()


def test_what_a_user_has_met_is_spared_but_for_the_target() -> None:
    log = rating_log([("u", item_id, 5.0, n) for n, item_id in enumerate("abcab")])
    rows = TrainingRows.of(log, len(log), kind_names(log))
    chunks = rows.chunks(torch.tensor([0]))
    seen = [sorted(set(row.tolist()) - {0}) for row in chunks.seen(chunks.wanted)]
    assert seen == [[], [1], [1, 2], [1, 2], [1, 2]]


def test_sparing_is_for_logs_without_repeats() -> None:
    once = rating_log([("u", f"i{n}", 5.0, n) for n in range(5)])
    twice = rating_log([("u", f"i{n % 2}", 5.0, n) for n in range(5)])
    shares = [TrainingRows.of(log, 5, kind_names(log)).repeat_share for log in (once, twice)]
    assert shares == pytest.approx([0.0, 0.6])
