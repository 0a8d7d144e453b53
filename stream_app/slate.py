"""Select: from scores to the order of a slate. Pure: no I/O, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schemas.records import CandidateList, Explanation, Slate, SlateModel, SlateState, SlateTiming
from stream_app.features import BoolArray
from stream_app.state import FloatArray, IntArray, UserRow

# Written in place of a score that is not finite, so that JSON can carry it and it sorts last.
LOWEST_SCORE = float(np.finfo(np.float32).min)

COLD_USER = "cold_user"
COLD_ITEMS = "cold_items"
NONFINITE_SCORE = "nonfinite_score"
DEGRADED = "degraded"

NO_STATE = SlateState(events=0, partition=-1, offset=-1, age_ms=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The first k of one list: retrieval positions in slate order, and the scores that put them there."""

    positions: IntArray  # (K,)
    scores: FloatArray  # (K,)
    nonfinite: bool
    all_nonfinite: bool


def select(scores: FloatArray, mask: BoolArray, ks: Sequence[int | None]) -> list[Selection]:
    """Order each list by descending score; ties keep retrieval order, scores that are not finite go last.

    Args:
        scores: (B, C); `mask` (B, C) says which are candidates.
        ks: slate length of each list, None for all candidates.
    """
    finite = np.isfinite(scores)
    safe = np.where(finite, scores, np.float32(LOWEST_SCORE))  # (B, C)
    order = np.argsort(np.where(mask, -safe, np.inf), axis=1, kind="stable")  # (B, C)
    counts = mask.sum(axis=1)  # (B,)
    nonfinite: BoolArray = np.any(~finite & mask, axis=1)  # (B,)
    all_nonfinite: BoolArray = nonfinite & ~np.any(finite & mask, axis=1)  # (B,)
    selections = []
    for b, k in enumerate(ks):
        count = int(counts[b])
        positions = order[b, : count if k is None else min(k, count)]  # (K,)
        selections.append(
            Selection(
                positions=positions,
                scores=safe[b, positions],
                nonfinite=bool(nonfinite[b]),
                all_nonfinite=bool(all_nonfinite[b]),
            )
        )
    return selections


def state_of(request: CandidateList, row: UserRow) -> SlateState:
    """Return what the slate says of the user state it was made from; age is in event time."""
    return SlateState(
        events=row.events,
        partition=row.fence.partition,
        offset=row.fence.offset,
        age_ms=max(0, request.event_time_ms - row.last_event_time_ms) if row.events else 0,
    )


def ranked_slate(
    request: CandidateList,
    selection: Selection,
    *,
    row: UserRow,
    cold_items: int,
    degraded: bool,
    model: SlateModel,
    timing_ms: SlateTiming,
    explanations: list[Explanation] | None,
) -> Slate:
    """Return the slate of a scored list; `degraded`: the user's row is being rebuilt and may lack interactions."""
    positions = selection.positions.tolist()
    item_ids = request.item_ids
    reasons = [
        reason
        for reason, holds in (
            (COLD_USER, row.events == 0),
            (COLD_ITEMS, cold_items > 0),
            (NONFINITE_SCORE, selection.nonfinite),
            (DEGRADED, degraded),
        )
        if holds
    ]
    return Slate(
        request_id=request.request_id,
        user_id=request.user_id,
        event_time_ms=request.event_time_ms,
        outcome="ranked",
        reasons=reasons,
        item_ids=[item_ids[position] for position in positions],
        scores=selection.scores,  # type: ignore[arg-type]  # the codec writes float32 arrays as they are
        retrieval_positions=positions,
        propensities=[1.0] * len(positions),  # a deterministic policy
        model=model,
        state=state_of(request, row),
        explanations=explanations,
        timing_ms=timing_ms,
    )


def fallback_slate(
    request: CandidateList, reason: str, *, row: UserRow | None, model: SlateModel, timing_ms: SlateTiming
) -> Slate:
    """Return the list in retrieval order, saying why; `row` None: the state could not be read."""
    count = len(request.item_ids) if request.k is None else min(request.k, len(request.item_ids))
    scores = request.retrieval_scores
    return Slate(
        request_id=request.request_id,
        user_id=request.user_id,
        event_time_ms=request.event_time_ms,
        outcome="fallback",
        reasons=[reason],
        item_ids=request.item_ids[:count],
        scores=[0.0] * count if scores is None else scores[:count],
        retrieval_positions=list(range(count)),
        propensities=[1.0] * count,
        model=model,
        state=NO_STATE if row is None else state_of(request, row),
        timing_ms=timing_ms,
    )


def shed_slate(request: CandidateList, reason: str, *, model: SlateModel, timing_ms: SlateTiming) -> Slate:
    """Return the answer to a list past its deadline: no items, and nothing was spent on it."""
    return Slate(
        request_id=request.request_id,
        user_id=request.user_id,
        event_time_ms=request.event_time_ms,
        outcome="shed",
        reasons=[reason],
        item_ids=[],
        scores=[],
        retrieval_positions=[],
        propensities=[],
        model=model,
        state=NO_STATE,
        timing_ms=timing_ms,
    )
