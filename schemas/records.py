"""The records on the topics, as msgspec Structs that decode straight from JSON bytes.

Field order is the order on the wire. Unknown fields are ignored, a field is never re-typed, only optional
fields are added. An optional field that is null counts as absent. Number ranges stand in the types, so that
the decoder checks them and the published schemas state them. The rules for ids and counts stand here for the
schemas; `schemas.codec` checks them, against the limits of the worker.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from schemas.limits import DEFAULT_LIMITS, FORBIDDEN_IN_IDS, MAX_EXACT_INT

KINDS = (
    "impression",
    "view",
    "click",
    "like",
    "dislike",
    "skip",
    "rating",
    "add_to_cart",
    "purchase",
    "share",
    "complete",
)
"""Kinds of interaction known from the start. The set is open: others are kept and weighted by a default."""

_ID_SCHEMA: dict[str, Any] = {
    "minLength": 1,
    "maxLength": DEFAULT_LIMITS.max_id_bytes,
    "not": {"pattern": FORBIDDEN_IN_IDS},
}
_ID_RULE = f"1 to {DEFAULT_LIMITS.max_id_bytes} bytes of UTF-8 without control characters and line separators."

Id = Annotated[str, Meta(description=_ID_RULE, extra_json_schema=_ID_SCHEMA)]
Kind = Annotated[
    str,
    Meta(
        description=f"Open set; known: {', '.join(KINDS)}. {_ID_RULE}",
        extra_json_schema=_ID_SCHEMA,
        examples=list(KINDS),
    ),
]
EventTimeMs = Annotated[
    int,
    Meta(
        ge=-MAX_EXACT_INT,
        le=MAX_EXACT_INT,
        description="When it happened: milliseconds since 1970-01-01 UTC.",
    ),
]
Number = Annotated[float, Meta(ge=-float(MAX_EXACT_INT), le=float(MAX_EXACT_INT))]
Value = Annotated[Number, Meta(description="Strength of the act: stars, price, seconds.")]
ShownIn = Annotated[Id, Meta(description=f"The candidate list whose slate showed the item. {_ID_RULE}")]
Position = Annotated[
    int, Meta(ge=0, le=MAX_EXACT_INT, description="0-based place of the item in the slate that showed it.")
]
Partition = Annotated[int, Meta(ge=0, le=2**31 - 1, description="Partition of the topic interactions.")]
Offset = Annotated[int, Meta(ge=0, le=MAX_EXACT_INT, description="Offset in that partition.")]
ItemIds = Annotated[
    list[Id],
    Meta(
        description="In retrieval order, each item once.",
        extra_json_schema={"maxItems": DEFAULT_LIMITS.max_candidates, "uniqueItems": True},
    ),
]
RetrievalScores = Annotated[
    list[Number],
    Meta(
        description="Upstream's scores, one for each of item_ids.",
        extra_json_schema={"maxItems": DEFAULT_LIMITS.max_candidates},
    ),
]
SlateLength = Annotated[
    int, Meta(ge=1, le=MAX_EXACT_INT, description="Length of the slate; all candidates when absent.")
]
DeadlineMs = Annotated[
    int,
    Meta(
        ge=0,
        le=MAX_EXACT_INT,
        description="Milliseconds from the record's Kafka timestamp until the answer is useless.",
    ),
]
OpenFields = Annotated[
    dict[str, Any],
    Meta(
        description="Free facts. Integers fit 64 bits; nesting, counted from the whole record, is at most "
        f"{DEFAULT_LIMITS.max_nesting}."
    ),
]


class Interaction(Struct, frozen=True, kw_only=True):
    """One act of a user on an item. Topic `interactions`, key user_id; null value: forget this user."""

    event_id: Id
    user_id: Id
    item_id: Id
    kind: Kind
    event_time_ms: EventTimeMs
    value: Value | None = None
    request_id: ShownIn | None = None
    position: Position | None = None
    context: OpenFields | None = None


class After(Struct, frozen=True, kw_only=True):
    """Read-your-writes token: the position of an interaction that the slate must already reflect."""

    partition: Partition
    offset: Offset


class CandidateList(Struct, frozen=True, kw_only=True):
    """One request: items in retrieval order, to be ranked for a user. Topic `candidates`, key user_id."""

    request_id: Id
    user_id: Id
    event_time_ms: EventTimeMs
    item_ids: ItemIds
    retrieval_scores: RetrievalScores | None = None
    k: SlateLength | None = None
    deadline_ms: DeadlineMs | None = None
    after: After | None = None
    explain: Annotated[bool, Meta(description="Ask for explanations in the slate.")] | None = None
    context: OpenFields | None = None


class SlateModel(Struct, frozen=True, kw_only=True):
    """The artefact that ranked the slate, and the variant of the experiment it served."""

    name: str
    version: str
    variant: str


class SlateState(Struct, frozen=True, kw_only=True):
    """The user state behind the slate: interactions folded in, position of the last one, its age."""

    events: int
    partition: int
    offset: int
    age_ms: int


class SlateTiming(Struct, frozen=True, kw_only=True):
    """Milliseconds spent per stage; the only part of a slate that a replay does not reproduce."""

    queue: float
    state: float
    score: float
    total: float


class Explanation(Struct, frozen=True, kw_only=True):
    """Why an item stands where it stands."""

    item_id: str
    score: float
    cold_score: Annotated[float, Meta(description="Score of the same item for an unknown user.")]
    personal: Annotated[float, Meta(description="score minus cold_score.")]
    moved: Annotated[int, Meta(description="Retrieval position minus position in the slate; positive is up.")]


class Slate(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The ordered answer to a candidate list: a permutation or its first k. Topic `reranked`, key user_id."""

    request_id: str
    user_id: str
    event_time_ms: int
    outcome: Annotated[
        Literal["ranked", "fallback", "shed"],
        Meta(description="fallback: retrieval order, with a reason; shed: too late for its deadline, no items."),
    ]
    reasons: list[str]
    item_ids: list[str]
    scores: list[float]
    retrieval_positions: Annotated[list[int], Meta(description="0-based place of each item among the candidates.")]
    propensities: Annotated[
        list[float], Meta(description="Probability that this policy put the item at this position.")
    ]
    model: SlateModel
    state: SlateState
    explanations: list[Explanation] | None = None
    timing_ms: SlateTiming


class Item(Struct, frozen=True, kw_only=True):
    """One entry of the catalogue. Topic `items`, key item_id; a null value means: item withdrawn."""

    item_id: Id
    event_time_ms: EventTimeMs
    title: str | None = None
    categories: list[str] | None = None
    attributes: OpenFields | None = None
    embedding: list[Number] | None = None
