"""Select: from scores to the order of a slate."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import decode_slate, encode_slate
from schemas.records import CandidateList, Slate, SlateModel, SlateState, SlateTiming
from stream_app.slate import LOWEST_SCORE, Selection, fallback_slate, ranked_slate, select, shed_slate
from stream_app.state import Fence, FloatArray, UserRow, cold_row
from tests.builders import EVENT_TIME_MS, candidate_list

NAN, INFINITY = float("nan"), float("inf")
MODEL = SlateModel(name="m", version="1", variant="control")
TIMING_MS = SlateTiming(queue=1.0, state=2.0, score=3.0, total=6.0)
ROW = UserRow(17, EVENT_TIME_MS - 12, Fence(1, 2, 1041), bytes(8), b"i-1")

lists = st.lists(st.lists(st.floats(width=32), max_size=8), min_size=1, max_size=4)
ks = st.none() | st.integers(1, 10)


def padded(scores: list[list[float]], padding: float = NAN) -> tuple[FloatArray, Any]:
    """Return scores (B, C) and mask (B, C) of lists of several lengths."""
    longest = max(map(len, scores))
    array: FloatArray = np.full((len(scores), longest), padding, dtype=np.float32)  # (B, C)
    mask = np.zeros((len(scores), longest), dtype=np.bool_)  # (B, C)
    for b, some in enumerate(scores):
        array[b, : len(some)], mask[b, : len(some)] = some, True
    return array, mask


def selected(scores: list[float], k: int | None = None) -> Selection:
    (selection,) = select(*padded([scores]), [k])
    return selection


def positions(scores: list[float], k: int | None = None) -> list[int]:
    found: list[int] = selected(scores, k).positions.tolist()
    return found


def test_higher_scores_come_first() -> None:
    assert positions([0.25, 0.75, 0.5]) == [1, 2, 0]


def test_ties_keep_retrieval_order() -> None:
    assert positions([0.5, 1.0, 0.5, 1.0, 0.5]) == [1, 3, 0, 2, 4]


def test_minus_zero_and_zero_are_a_tie() -> None:
    assert positions([-0.0, 0.0, -0.0]) == [0, 1, 2]


def test_scores_that_are_not_finite_go_last_in_retrieval_order() -> None:
    assert positions([NAN, -1.0, INFINITY, 2.0, -INFINITY]) == [3, 1, 0, 2, 4]


def test_scores_that_are_not_finite_are_written_as_the_lowest() -> None:
    selection = selected([NAN, 1.0, INFINITY])
    assert selection.scores.tolist() == [1.0, LOWEST_SCORE, LOWEST_SCORE]


@pytest.mark.parametrize(
    ("scores", "nonfinite", "all_nonfinite"),
    [([1.0, 2.0], False, False), ([1.0, NAN], True, False), ([NAN, INFINITY], True, True), ([], False, False)],
)
def test_a_selection_says_whether_scores_were_not_finite(
    scores: list[float], nonfinite: bool, all_nonfinite: bool
) -> None:
    selection = selected(scores)
    assert (selection.nonfinite, selection.all_nonfinite) == (nonfinite, all_nonfinite)


@pytest.mark.parametrize(("k", "expected"), [(1, [2]), (2, [2, 1]), (3, [2, 1, 0]), (9, [2, 1, 0]), (None, [2, 1, 0])])
def test_a_slate_is_the_first_k(k: int | None, expected: list[int]) -> None:
    assert positions([1.0, 2.0, 3.0], k) == expected


@given(lists, st.floats(width=32), ks)
def test_padding_never_leaks_between_lists(scores: list[list[float]], padding: float, k: int | None) -> None:
    together = select(*padded(scores, padding), [k] * len(scores))
    for alone, selection in zip(scores, together, strict=True):
        expected = selected(alone, k)
        assert selection.positions.tolist() == expected.positions.tolist()
        assert selection.scores.tolist() == expected.scores.tolist()
        assert (selection.nonfinite, selection.all_nonfinite) == (expected.nonfinite, expected.all_nonfinite)


@given(st.lists(st.floats(width=32), max_size=20), ks)
def test_a_slate_never_loses_or_doubles_a_candidate(scores: list[float], k: int | None) -> None:
    request = candidate_list(item_ids=[f"i-{c}" for c in range(len(scores))], k=k)
    slate = ranked(request, scores)
    length = len(scores) if k is None else min(k, len(scores))
    assert len(slate.item_ids) == len(set(slate.item_ids)) == length
    assert [request.item_ids[position] for position in slate.retrieval_positions] == slate.item_ids
    assert len(slate.scores) == len(slate.propensities) == length
    finite = [score for score in slate.scores if score != LOWEST_SCORE]
    assert finite == sorted(finite, reverse=True)


def ranked(
    request: CandidateList, scores: list[float], *, row: UserRow = ROW, cold_items: int = 0, degraded: bool = False
) -> Slate:
    """Return the slate after a round trip through its bytes, as a reader sees it."""
    slate = ranked_slate(
        request,
        selected(scores, request.k),
        row=row,
        cold_items=cold_items,
        degraded=degraded,
        model=MODEL,
        timing_ms=TIMING_MS,
        explanations=None,
    )
    return decode_slate(encode_slate(slate))


def test_a_ranked_slate_answers_its_list() -> None:
    request = candidate_list(item_ids=["i-1", "i-2"], request_id="r-9", user_id="u-9", k=None)
    assert ranked(request, [0.25, 1.5]) == Slate(
        request_id="r-9",
        user_id="u-9",
        event_time_ms=EVENT_TIME_MS,
        outcome="ranked",
        reasons=[],
        item_ids=["i-2", "i-1"],
        scores=[1.5, 0.25],
        retrieval_positions=[1, 0],
        propensities=[1.0, 1.0],
        model=MODEL,
        state=SlateState(events=17, partition=2, offset=1041, age_ms=12),
        timing_ms=TIMING_MS,
    )


def test_reasons_name_all_that_makes_a_slate_less_than_it_could_be() -> None:
    request = candidate_list(item_ids=["i-1", "i-2"])
    assert ranked(request, [1.0, NAN], row=cold_row(2), cold_items=1, degraded=True).reasons == [
        "cold_user",
        "cold_items",
        "nonfinite_score",
        "degraded",
    ]


def test_the_age_of_a_state_from_the_future_is_zero() -> None:
    request = candidate_list(event_time_ms=EVENT_TIME_MS - 1_000)
    assert ranked(request, [1.0, 2.0]).state.age_ms == 0


def test_a_fallback_is_the_first_k_in_retrieval_order() -> None:
    request = candidate_list(item_ids=["i-1", "i-2", "i-3"], retrieval_scores=[0.5, 0.75, 0.25], k=2)
    slate = fallback_slate(request, "stale", row=None, model=MODEL, timing_ms=TIMING_MS)
    assert (slate.outcome, slate.reasons) == ("fallback", ["stale"])
    assert (slate.item_ids, slate.scores, slate.retrieval_positions) == (["i-1", "i-2"], [0.5, 0.75], [0, 1])
    assert slate.state == SlateState(events=0, partition=-1, offset=-1, age_ms=0)


def test_a_fallback_without_retrieval_scores_scores_zero() -> None:
    request = candidate_list(item_ids=["i-1", "i-2"], retrieval_scores=None, k=None)
    slate = fallback_slate(request, "model_error", row=ROW, model=MODEL, timing_ms=TIMING_MS)
    assert (slate.scores, slate.state.events) == ([0.0, 0.0], 17)


def test_a_shed_list_has_no_items() -> None:
    slate = shed_slate(candidate_list(), "deadline", model=MODEL, timing_ms=TIMING_MS)
    assert (slate.outcome, slate.reasons, slate.item_ids, slate.scores) == ("shed", ["deadline"], [], [])
