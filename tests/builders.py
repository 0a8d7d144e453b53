"""Records with every field filled: a test names only the fields it is about."""

from __future__ import annotations

from typing import Any

from schemas.records import (
    After,
    CandidateList,
    Explanation,
    Interaction,
    Item,
    Slate,
    SlateModel,
    SlateState,
    SlateTiming,
)

EVENT_TIME_MS = 1_699_999_999_999


def interaction(**changes: Any) -> Interaction:
    """Build an interaction; keywords replace its fields."""
    fields: dict[str, Any] = {
        "event_id": "e-1",
        "user_id": "u-1",
        "item_id": "i-1",
        "kind": "click",
        "event_time_ms": EVENT_TIME_MS,
        "value": 4.0,
        "request_id": "r-0",
        "position": 3,
        "context": {"surface": "home"},
    }
    return Interaction(**(fields | changes))


def candidate_list(**changes: Any) -> CandidateList:
    """Build a candidate list of two items; keywords replace its fields.

    With `item_ids` alone, the retrieval scores follow: 1, 1/2, 1/3, ...
    """
    item_ids = changes.get("item_ids", ["i-1", "i-2"])
    fields: dict[str, Any] = {
        "request_id": "r-1",
        "user_id": "u-1",
        "event_time_ms": EVENT_TIME_MS,
        "item_ids": item_ids,
        "retrieval_scores": [1 / (position + 1) for position in range(len(item_ids))],
        "k": 10,
        "deadline_ms": 80,
        "after": After(partition=2, offset=1041),
        "explain": True,
        "context": {"surface": "home"},
    }
    return CandidateList(**(fields | changes))


def slate(**changes: Any) -> Slate:
    """Build the slate that turns the default candidate list round; keywords replace its fields."""
    fields: dict[str, Any] = {
        "request_id": "r-1",
        "user_id": "u-1",
        "event_time_ms": EVENT_TIME_MS,
        "outcome": "ranked",
        "reasons": [],
        "item_ids": ["i-2", "i-1"],
        "scores": [1.5, 0.25],
        "retrieval_positions": [1, 0],
        "propensities": [1.0, 1.0],
        "model": SlateModel(name="learned-ema", version="3", variant="control"),
        "state": SlateState(events=17, partition=2, offset=1041, age_ms=12),
        "explanations": [
            Explanation(item_id="i-2", score=1.5, cold_score=0.5, personal=1.0, moved=1),
            Explanation(item_id="i-1", score=0.25, cold_score=0.75, personal=-0.5, moved=-1),
        ],
        "timing_ms": SlateTiming(queue=1.2, state=0.4, score=0.3, total=2.4),
    }
    return Slate(**(fields | changes))


def item(**changes: Any) -> Item:
    """Build a catalogue item; keywords replace its fields."""
    fields: dict[str, Any] = {
        "item_id": "i-1",
        "event_time_ms": EVENT_TIME_MS,
        "title": "The Shawshank Redemption",
        "categories": ["drama"],
        "attributes": {"year": 1994},
        "embedding": [0.5, -0.25],
    }
    return Item(**(fields | changes))
