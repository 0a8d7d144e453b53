"""Metarank's public event JSON as our records, so that its users move by changing a topic.

    item, metadata  -> Item           title and categories are taken by name, other fields become attributes
    interaction     -> Interaction    type is the kind, ranking the request_id, a numeric field `value` the value
    ranking         -> CandidateList  relevancy, where every item has one, becomes retrieval_scores
    user            -> None           what is known of a user is learned from interactions; there is no such record

Other fields, and the session, go into the context. Without `user` the session stands for the user. Explicit labels
of a ranking are ignored. The key to produce with is the record's user_id, or item_id for an item.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from schemas.codec import check_candidate_list, check_interaction, check_item, parse
from schemas.limits import DEFAULT_LIMITS, Limits
from schemas.records import CandidateList, Interaction, Item
from schemas.refusals import DecodeError, ErrorCode, quote, refusal, refusal_of

_Scalar = bool | int | float | str
_RecordT = TypeVar("_RecordT", Interaction, CandidateList, Item)


class _Field(Struct, frozen=True):
    name: str
    value: _Scalar | list[_Scalar]


class _RankedItem(Struct, frozen=True):
    id: str
    relevancy: int | float | None = None
    fields: list[_Field] | None = None


class _Event(Struct, frozen=True, kw_only=True, tag_field="event"):
    id: str
    timestamp: int | float | str
    fields: list[_Field] | None = None


class _ItemEvent(_Event, frozen=True, kw_only=True, tag="item"):
    item: str


class _MetadataEvent(_ItemEvent, frozen=True, kw_only=True, tag="metadata"):
    """The older name of an item event."""


class _UserEvent(_Event, frozen=True, kw_only=True, tag="user"):
    user: str


class _InteractionEvent(_Event, frozen=True, kw_only=True, tag="interaction"):
    item: str
    type: str
    ranking: str | None = None
    user: str | None = None
    session: str | None = None


class _RankingEvent(_Event, frozen=True, kw_only=True, tag="ranking"):
    items: list[_RankedItem]
    user: str | None = None
    session: str | None = None


_AnyEvent = _ItemEvent | _MetadataEvent | _UserEvent | _InteractionEvent | _RankingEvent
_EVENT: msgspec.json.Decoder[_AnyEvent] = msgspec.json.Decoder(_AnyEvent)
_DIGITS = re.compile(r"-?[0-9]{1,19}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def from_metarank(value: bytes, limits: Limits = DEFAULT_LIMITS) -> Interaction | CandidateList | Item | None:
    """Translate one Metarank event; None for a `user` event. Raises DecodeError and nothing else."""
    event = parse("Metarank event", _EVENT, value, limits)
    if isinstance(event, _UserEvent):
        return None
    if isinstance(event, _ItemEvent):
        item = _convert(Item, value, _item_fields(event))
        check_item(item, limits)
        return item
    if isinstance(event, _InteractionEvent):
        interaction = _convert(Interaction, value, _interaction_fields(event))
        check_interaction(interaction, limits)
        return interaction
    candidates = _convert(CandidateList, value, _candidate_list_fields(event))
    check_candidate_list(candidates, limits)
    return candidates


def _convert(record_type: type[_RecordT], value: bytes, fields: Mapping[str, Any]) -> _RecordT:
    """Build the record as if its fields had been on the wire, with the ranges that its types state."""
    try:
        return msgspec.convert(fields, record_type)
    except msgspec.ValidationError as error:
        raise refusal_of(record_type.__name__, value, error) from None


def _item_fields(event: _ItemEvent) -> dict[str, Any]:
    attributes = _named(event.fields)
    fields: dict[str, Any] = {"item_id": event.item, "event_time_ms": _event_time_ms(event.timestamp)}
    if isinstance(attributes.get("title"), str):
        fields["title"] = attributes.pop("title")
    categories = attributes.get("categories")
    if isinstance(categories, list) and all(isinstance(category, str) for category in categories):
        fields["categories"] = attributes.pop("categories")
    return {**fields, "attributes": attributes or None}


def _interaction_fields(event: _InteractionEvent) -> dict[str, Any]:
    context = _named(event.fields)
    fields: dict[str, Any] = {
        "event_id": event.id,
        "user_id": _user_id(event),
        "item_id": event.item,
        "kind": event.type,
        "event_time_ms": _event_time_ms(event.timestamp),
        "request_id": event.ranking,
    }
    if _is_number(context.get("value")):
        fields["value"] = context.pop("value")
    return {**fields, "context": _with_session(context, event.session)}


def _candidate_list_fields(event: _RankingEvent) -> dict[str, Any]:
    relevancies = [_relevancy(item) for item in event.items]
    return {
        "request_id": event.id,
        "user_id": _user_id(event),
        "event_time_ms": _event_time_ms(event.timestamp),
        "item_ids": [item.id for item in event.items],
        "retrieval_scores": None if None in relevancies else relevancies,
        "context": _with_session(_named(event.fields), event.session),
    }


def _relevancy(item: _RankedItem) -> float | None:
    """Return the relevancy of a ranked item: the older attribute, or the field of that name."""
    if item.relevancy is not None:
        return item.relevancy
    found = _named(item.fields).get("relevancy")
    return found if _is_number(found) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(fields: Sequence[_Field] | None) -> dict[str, Any]:
    return {field.name: field.value for field in fields or ()}


def _with_session(context: dict[str, Any], session: str | None) -> dict[str, Any] | None:
    return (context if session is None else {**context, "session": session}) or None


def _user_id(event: _InteractionEvent | _RankingEvent) -> str:
    user_id = event.session if event.user is None else event.user
    if user_id is None:
        found = f"Metarank event id={quote(event.id)}: neither user nor session"
        raise refusal(ErrorCode.MISSING_FIELD, found)
    return user_id


def _event_time_ms(timestamp: float | str) -> int:
    """Read milliseconds, as a number or in digits, or an ISO-8601 time with its zone."""
    if isinstance(timestamp, int):
        return timestamp
    if isinstance(timestamp, float):
        if timestamp.is_integer():
            return int(timestamp)
    elif _DIGITS.fullmatch(timestamp):
        return int(timestamp)
    else:
        return _iso_time_ms(timestamp)
    raise _not_a_time(timestamp)


def _iso_time_ms(timestamp: str) -> int:
    try:
        when = datetime.fromisoformat(timestamp)
    except ValueError:
        raise _not_a_time(timestamp) from None
    if when.tzinfo is None:
        raise _not_a_time(timestamp)
    return (when - _EPOCH) // timedelta(milliseconds=1)


def _not_a_time(timestamp: float | str) -> DecodeError:
    found = f"Metarank event timestamp={quote(timestamp)}: neither milliseconds nor an ISO-8601 time with a zone"
    return refusal(ErrorCode.WRONG_TYPE, found)
