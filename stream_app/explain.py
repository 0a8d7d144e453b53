"""Explain: what the user's own behaviour did to each item's score. Pure: no I/O, no clock."""

import math

from schemas.records import CandidateList, Explanation
from stream_app.slate import LOWEST_SCORE, Selection
from stream_app.state import FloatArray


def explain(request: CandidateList, selection: Selection, cold_scores: FloatArray) -> list[Explanation]:
    """Return one explanation an item, in slate order.

    Args:
        cold_scores: (C,), the scores of the same list for an unknown user. They make `personal` exact for
            any model, without a word about its inside.
    """
    explanations = []
    for place, (position, score) in enumerate(
        zip(selection.positions.tolist(), selection.scores.tolist(), strict=True)
    ):
        cold_score = float(cold_scores[position])
        if not math.isfinite(cold_score):  # JSON cannot carry it
            cold_score = LOWEST_SCORE
        explanations.append(
            Explanation(
                item_id=request.item_ids[position],
                score=score,
                cold_score=cold_score,
                personal=score - cold_score,
                moved=position - place,
            )
        )
    return explanations
