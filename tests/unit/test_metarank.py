"""Metarank's events become our records, field by field, or are refused as ours would be."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import DecodeError, ErrorCode
from schemas.limits import Limits
from schemas.metarank import from_metarank
from schemas.records import CandidateList, Interaction, Item

TIME_MS = 1_599_391_467_000
ITEM: dict[str, Any] = {
    "event": "item",
    "id": "81f46c34-a4bb-469c-8708-f8127cd67d27",
    "timestamp": "1599391467000",
    "item": "item1",
    "fields": [
        {"name": "title", "value": "your nice shirt"},
        {"name": "categories", "value": ["shirts", "summer"]},
        {"name": "color", "value": ["white", "black"]},
        {"name": "is_cute", "value": True},
        {"name": "price", "value": 10},
    ],
}
USER: dict[str, Any] = {
    "event": "user",
    "id": "e-2",
    "timestamp": "1599391467000",
    "user": "user1",
    "fields": [{"name": "age", "value": 33}],
}
RANKING: dict[str, Any] = {
    "event": "ranking",
    "id": "r-1",
    "timestamp": "1599391467000",
    "user": "user1",
    "session": "session1",
    "fields": [{"name": "query", "value": "cat"}],
    "items": [
        {"id": "item3", "fields": [{"name": "relevancy", "value": 2.0}], "label": 1},
        {"id": "item1", "relevancy": 1},
    ],
}
INTERACTION: dict[str, Any] = {
    "event": "interaction",
    "id": "e-3",
    "ranking": "r-1",
    "timestamp": "1599391467000",
    "user": "user1",
    "session": "session1",
    "type": "purchase",
    "item": "item1",
    "fields": [{"name": "count", "value": 1}, {"name": "value", "value": 9.5}],
}
EVENTS = {"item": ITEM, "ranking": RANKING, "interaction": INTERACTION, "user": USER}


def translate(event: dict[str, Any], /, **changes: Any) -> Interaction | CandidateList | Item | None:
    return from_metarank(json.dumps(event | changes).encode())


def code_of(value: bytes) -> ErrorCode:
    with pytest.raises(DecodeError) as caught:
        from_metarank(value)
    return caught.value.code


def without(event: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in names}


def test_an_item_event_is_an_item() -> None:
    assert translate(ITEM) == Item(
        item_id="item1",
        event_time_ms=TIME_MS,
        title="your nice shirt",
        categories=["shirts", "summer"],
        attributes={"color": ["white", "black"], "is_cute": True, "price": 10},
    )


def test_a_metadata_event_is_an_item_event() -> None:
    assert translate(ITEM, event="metadata") == translate(ITEM)


def test_an_item_event_without_fields_is_an_item_without_attributes() -> None:
    assert translate(without(ITEM, "fields")) == Item(item_id="item1", event_time_ms=TIME_MS)


def test_a_title_that_is_no_text_stays_an_attribute() -> None:
    fields = [{"name": "title", "value": 7}, {"name": "categories", "value": [1, 2]}]
    item = translate(ITEM, fields=fields)
    assert item == Item(item_id="item1", event_time_ms=TIME_MS, attributes={"title": 7, "categories": [1, 2]})


def test_an_interaction_event_is_an_interaction() -> None:
    assert translate(INTERACTION) == Interaction(
        event_id="e-3",
        user_id="user1",
        item_id="item1",
        kind="purchase",
        event_time_ms=TIME_MS,
        value=9.5,
        request_id="r-1",
        context={"count": 1, "session": "session1"},
    )


def test_an_interaction_without_a_ranking_names_no_request() -> None:
    record = translate(without(INTERACTION, "ranking", "fields", "session"))
    assert isinstance(record, Interaction)
    assert (record.request_id, record.context, record.value) == (None, None, None)


def test_a_value_that_is_no_number_stays_in_the_context() -> None:
    record = translate(INTERACTION, fields=[{"name": "value", "value": True}])
    assert isinstance(record, Interaction)
    assert (record.value, record.context) == (None, {"value": True, "session": "session1"})


def test_a_ranking_event_is_a_candidate_list() -> None:
    assert translate(RANKING) == CandidateList(
        request_id="r-1",
        user_id="user1",
        event_time_ms=TIME_MS,
        item_ids=["item3", "item1"],
        retrieval_scores=[2.0, 1.0],
        context={"query": "cat", "session": "session1"},
    )


def test_relevancies_count_only_when_every_item_has_one() -> None:
    record = translate(RANKING, items=[{"id": "item3", "relevancy": 2.0}, {"id": "item1"}])
    assert isinstance(record, CandidateList)
    assert record.retrieval_scores is None


def test_a_user_event_has_no_record() -> None:
    assert translate(USER) is None


@pytest.mark.parametrize("event", [RANKING, INTERACTION], ids=["ranking", "interaction"])
def test_the_session_stands_for_a_user_that_is_absent(event: dict[str, Any]) -> None:
    for anonymous in (without(event, "user"), event | {"user": None}):
        record = translate(anonymous)
        assert isinstance(record, Interaction | CandidateList)
        assert record.user_id == "session1"


@pytest.mark.parametrize("event", [RANKING, INTERACTION], ids=["ranking", "interaction"])
def test_an_event_of_nobody_is_refused(event: dict[str, Any]) -> None:
    assert code_of(json.dumps(without(event, "user", "session")).encode()) is ErrorCode.MISSING_FIELD


@pytest.mark.parametrize(
    "timestamp",
    [
        TIME_MS,
        1599391467000.0,
        "1599391467000",
        "2020-09-06T11:24:27Z",
        "2020-09-06T11:24:27.000999+00:00",
        "2020-09-06T14:24:27+03:00",
    ],
)
def test_a_timestamp_is_milliseconds_or_iso_8601_with_a_zone(timestamp: object) -> None:
    record = translate(ITEM, timestamp=timestamp)
    assert isinstance(record, Item)
    assert record.event_time_ms == TIME_MS


@pytest.mark.parametrize(
    "timestamp",
    ["", "yesterday", "2020-09-06T11:24:27", "1_599_391_467_000", " 1599391467000", "1599391467.5", 0.5, True, None],
)
def test_any_other_timestamp_is_refused(timestamp: object) -> None:
    assert code_of(json.dumps(ITEM | {"timestamp": timestamp}).encode()) is ErrorCode.WRONG_TYPE


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (b"", ErrorCode.NOT_JSON),
        (b"[" * 100_000, ErrorCode.TOO_DEEP),
        (b'{"event": "item"}', ErrorCode.MISSING_FIELD),
        (json.dumps(without(ITEM, "event")).encode(), ErrorCode.MISSING_FIELD),
        (json.dumps(ITEM | {"event": "purchase"}).encode(), ErrorCode.WRONG_TYPE),
        (json.dumps(ITEM | {"item": 1}).encode(), ErrorCode.WRONG_TYPE),
        (json.dumps(ITEM | {"item": ""}).encode(), ErrorCode.ID_LENGTH),
        (json.dumps(INTERACTION | {"type": "a\nb"}).encode(), ErrorCode.ID_CHARACTERS),
        (json.dumps(ITEM | {"timestamp": "9" * 19}).encode(), ErrorCode.NUMBER_RANGE),
        (json.dumps(ITEM | {"timestamp": 10**29}).encode(), ErrorCode.NUMBER_RANGE),
        (json.dumps(ITEM | {"fields": [{"name": "a", "value": 10**29}]}).encode(), ErrorCode.NUMBER_RANGE),
        (json.dumps(RANKING | {"items": [{"id": "a"}, {"id": "a"}]}).encode(), ErrorCode.DUPLICATE_ITEMS),
        (json.dumps(RANKING | {"items": [{"id": "a", "relevancy": 1e300}]}).encode(), ErrorCode.NUMBER_RANGE),
    ],
)
def test_a_bad_event_is_refused_with_the_code_of_our_own_records(value: bytes, code: ErrorCode) -> None:
    assert code_of(value) is code


def test_a_refusal_quotes_at_most_a_short_printable_piece() -> None:
    with pytest.raises(DecodeError) as caught:
        translate(ITEM, event="user\x00" * 1_000)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 250


def test_the_limits_of_the_worker_hold() -> None:
    with pytest.raises(DecodeError) as caught:
        from_metarank(json.dumps(RANKING).encode(), Limits(max_candidates=1))
    assert caught.value.code is ErrorCode.TOO_MANY_CANDIDATES


@given(data=st.data(), kind=st.sampled_from(sorted(EVENTS)))
def test_a_damaged_event_raises_nothing_but_a_decode_error(data: st.DataObject, kind: str) -> None:
    value = bytearray(json.dumps(EVENTS[kind]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(value)))
        value[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(DecodeError):
        from_metarank(bytes(value))


@given(st.text(max_size=30) | st.datetimes(timezones=st.timezones()).map(str) | st.floats() | st.integers())
def test_no_timestamp_raises_anything_but_a_decode_error(timestamp: object) -> None:
    with contextlib.suppress(DecodeError):
        translate(ITEM, timestamp=timestamp)
