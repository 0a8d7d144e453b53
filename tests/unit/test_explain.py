"""Explain: what the user's own behaviour did to each item's score."""

import numpy as np

from schemas.codec import encode_slate
from schemas.records import CandidateList, Explanation
from stream_app.explain import explain
from stream_app.slate import LOWEST_SCORE, select
from stream_app.state import FloatArray
from tests.builders import candidate_list, slate

NAN, INFINITY = float("nan"), float("inf")


def explained(scores: list[float], cold_scores: list[float], request: CandidateList | None = None) -> list[Explanation]:
    array: FloatArray = np.array([scores], dtype=np.float32)  # (1, C)
    request = request or candidate_list(item_ids=[f"i-{c}" for c in range(len(scores))], k=None)
    (selection,) = select(array, np.ones_like(array, dtype=np.bool_), [request.k])
    return explain(request, selection, np.array(cold_scores, dtype=np.float32))


def test_explanations_stand_in_slate_order() -> None:
    assert explained([0.25, 0.75, 0.5], [0.5, 0.5, 0.5]) == [
        Explanation(item_id="i-1", score=0.75, cold_score=0.5, personal=0.25, moved=1),
        Explanation(item_id="i-2", score=0.5, cold_score=0.5, personal=0.0, moved=1),
        Explanation(item_id="i-0", score=0.25, cold_score=0.5, personal=-0.25, moved=-2),
    ]


def test_only_the_first_k_are_explained() -> None:
    request = candidate_list(item_ids=["i-0", "i-1", "i-2"], k=1)
    assert [one.item_id for one in explained([1.0, 3.0, 2.0], [0.0, 0.0, 0.0], request)] == ["i-1"]


def test_an_empty_list_has_no_explanations() -> None:
    assert explained([], []) == []


def test_scores_that_are_not_finite_are_explained_with_numbers_that_json_can_carry() -> None:
    explanations = explained([NAN, 1.0, INFINITY, 2.0], [NAN, INFINITY, 1.0, -INFINITY])
    assert [one.cold_score for one in explanations] == [LOWEST_SCORE, LOWEST_SCORE, LOWEST_SCORE, 1.0]
    encode_slate(slate(explanations=explanations))
