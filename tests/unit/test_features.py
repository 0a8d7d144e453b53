"""Gather: lists and user rows as the arrays that a model scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.records import CandidateList
from stream_app.errors import ArtefactError
from stream_app.features import FeatureBatch, ItemArena, check_features, gather
from stream_app.state import Fence, UserRow, cold_row
from tests.builders import candidate_list

VECTORS = np.array([[9.0, 9.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=np.float32)  # (N + 1, V)
ARENA = ItemArena(["i-1", "i-2", "i-3"], VECTORS, ["unknown", "click"])
COLD = [9.0, 9.0]

item_ids = st.lists(st.sampled_from(["i-1", "i-2", "i-3", "i-odd"]), unique=True, max_size=4)


def gathered(
    requests: list[CandidateList],
    rows: list[UserRow] | None = None,
    *,
    history_size: int = 0,
    features: tuple[str, ...] = (),
) -> FeatureBatch:
    return gather(
        requests,
        rows or [cold_row(2)] * len(requests),
        arena=ARENA,
        history_size=history_size,
        feature_names=features,
    )


def row_of(vector: list[float], ring: bytes = b"") -> UserRow:
    return UserRow(1, 0, Fence(1, 0, 0), np.array(vector, dtype=np.float32).tobytes(), ring)


def test_lists_are_padded_to_the_longest_and_masked() -> None:
    batch = gathered([candidate_list(item_ids=["i-2"]), candidate_list(item_ids=["i-1", "i-3"])])
    assert batch.mask.tolist() == [[True, False], [True, True]]
    assert batch.items[0, 0].tolist() == [2.0, 0.0]
    assert batch.items[1].tolist() == [[1.0, 0.0], [3.0, 0.0]]


def test_an_unknown_item_gets_the_cold_start_vector_and_is_counted() -> None:
    batch = gathered([candidate_list(item_ids=["i-1", "odd"]), candidate_list(item_ids=["a", "b", "i-2"])])
    assert batch.items[0, 1].tolist() == COLD
    assert batch.cold_items.tolist() == [1, 2]


def test_padding_is_not_a_cold_item() -> None:
    batch = gathered([candidate_list(item_ids=[]), candidate_list(item_ids=["i-1", "i-2"])])
    assert batch.cold_items.tolist() == [0, 0]


def test_states_stand_in_the_order_of_the_lists() -> None:
    requests = [candidate_list(user_id="u-1"), candidate_list(user_id="u-2")]
    assert gathered(requests, [row_of([1.0, 2.0]), row_of([3.0, 4.0])]).states.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_history_is_padded_at_the_front_newest_last() -> None:
    rows = [row_of([0.0, 0.0], b"i-1\ni-2"), row_of([0.0, 0.0])]
    batch = gathered([candidate_list(), candidate_list()], rows, history_size=3)
    assert batch.history_mask.tolist() == [[False, True, True], [False, False, False]]
    assert batch.history[0, 1:].tolist() == [[1.0, 0.0], [2.0, 0.0]]


def test_history_keeps_the_newest_items() -> None:
    batch = gathered([candidate_list()], [row_of([0.0, 0.0], b"i-1\ni-2\ni-3")], history_size=2)
    assert batch.history[0].tolist() == [[2.0, 0.0], [3.0, 0.0]]


def test_a_model_without_history_gets_none() -> None:
    assert gathered([candidate_list()], [row_of([0.0, 0.0], b"i-1")]).history.shape == (1, 0, 2)


def test_features_stand_in_the_order_of_the_manifest() -> None:
    request = candidate_list(item_ids=["i-1", "i-2"], retrieval_scores=[0.5, 0.25])
    batch = gathered([request], features=("inverse_retrieval_position", "retrieval_score"))
    assert batch.features.tolist() == [[[1.0, 0.5], [0.5, 0.25]]]


def test_a_list_without_retrieval_scores_has_zeros() -> None:
    request = candidate_list(item_ids=["i-1", "i-2"], retrieval_scores=None)
    assert gathered([request], features=("retrieval_score",)).features.tolist() == [[[0.0], [0.0]]]


def test_a_retrieval_score_beyond_float32_stays_finite() -> None:
    request = candidate_list(item_ids=["i-1", "i-2"], retrieval_scores=[1e300, -1e300])
    assert np.isfinite(gathered([request], features=("retrieval_score",)).features).all()


@given(st.lists(item_ids, min_size=1, max_size=4))
def test_a_list_is_gathered_alike_alone_and_among_others(lists: list[list[str]]) -> None:
    requests = [candidate_list(item_ids=some) for some in lists]
    features = ("retrieval_score", "inverse_retrieval_position")
    together = gathered(requests, features=features)
    for b, request in enumerate(requests):
        alone, count = gathered([request], features=features), len(request.item_ids)
        assert np.array_equal(together.items[b, :count], alone.items[0])
        assert np.array_equal(together.features[b, :count], alone.features[0])
        assert together.mask[b].tolist() == [True] * count + [False] * (together.mask.shape[1] - count)
        assert not together.features[b, count:].any()
        assert together.cold_items[b] == alone.cold_items[0] == ("i-odd" in request.item_ids)


def test_an_unknown_user_has_neither_state_nor_history() -> None:
    batch = gathered([candidate_list(item_ids=["i-1"])], [row_of([1.0, 2.0], b"i-1")], history_size=1)
    unknown = batch.for_unknown_user()
    for emptied in (unknown.states, unknown.history, unknown.history_mask):
        assert not emptied.any()
    assert unknown.items is batch.items


@pytest.mark.parametrize("names", [["retrieval_score"], ["inverse_retrieval_position", "retrieval_score"], []])
def test_known_features_are_accepted(names: list[str]) -> None:
    check_features(names)


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(ArtefactError, match=r"manifest feature 'dwell_ms': not one of retrieval_score, "):
        check_features(["retrieval_score", "dwell_ms"])


@pytest.mark.parametrize("item_ids_of_arena", [["i-1", "i-2"], ["i-1", "i-1", "i-2"], ["i-1", "i-2", "i-3", "i-4"]])
def test_an_arena_whose_ids_do_not_fit_its_vectors_is_refused(item_ids_of_arena: list[str]) -> None:
    with pytest.raises(ArtefactError, match="export it again"):
        ItemArena(item_ids_of_arena, VECTORS, ["unknown"])


def test_what_the_model_does_not_know_is_row_and_kind_zero() -> None:
    assert (ARENA.item_row("i-2"), ARENA.item_row("odd")) == (2, 0)
    assert ARENA.item_rows(["odd", "i-3"]).tolist() == [0, 3]
    assert (ARENA.kind_index("click"), ARENA.kind_index("odd"), len(ARENA)) == (1, 0, 3)
