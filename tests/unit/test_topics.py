"""The topic table and the dead letter."""

from __future__ import annotations

import pytest

from schemas.dead_letter import DeadLetter
from schemas.limits import DEFAULT_LIMITS
from schemas.topics import CO_PARTITIONED, DEAD_LETTERS, TOPICS, dead_letter_name, topic_name
from stream_app.ports import OutputRecord


def dead_letter(**changes: object) -> DeadLetter:
    fields: dict[str, object] = {
        "topic": "interactions",
        "partition": 2,
        "offset": 1041,
        "key": b"u-1",
        "value": b"\xff",
        "headers": [],
        "code": "not_json",
        "stage": "decode",
        "error_class": "DecodeError",
        "message": "text",
    }
    return DeadLetter(**(fields | changes))  # type: ignore[arg-type]  # the fields above, changed


def test_the_topics_are_those_of_the_contract() -> None:
    assert [(spec.name, spec.key, spec.compacted) for spec in TOPICS] == [
        ("interactions", "user_id", False),
        ("candidates", "user_id", False),
        ("items", "item_id", True),
        ("reranked", "user_id", False),
    ]


def test_every_input_has_a_dead_letter_topic() -> None:
    assert [spec.name for spec in DEAD_LETTERS] == ["interactions.dlq", "candidates.dlq", "items.dlq"]


def test_a_prefix_stands_before_both_names() -> None:
    assert topic_name("shop.", "interactions") == "shop.interactions"
    assert dead_letter_name("shop.", "interactions") == "shop.interactions.dlq"


def test_a_name_outside_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"topic 'clicks': not in the topic table; use one of candidates, "):
        topic_name("", "clicks")
    with pytest.raises(ValueError, match=r"topic 'reranked\.dlq': not in the topic table"):
        dead_letter_name("", "reranked")


def test_the_log_of_record_is_kept_for_ever() -> None:
    assert TOPICS[0].kafka_config() == {
        "cleanup.policy": "delete",
        "retention.ms": "-1",
        "max.message.bytes": "2097152",
        "message.timestamp.type": "CreateTime",
    }


def test_the_broker_stamps_what_workers_write_and_nothing_else() -> None:
    stamped = {spec.name for spec in (*TOPICS, *DEAD_LETTERS) if spec.broker_time}
    assert stamped == {"reranked", "interactions.dlq", "candidates.dlq", "items.dlq"}
    assert {spec.kafka_config()["message.timestamp.type"] for spec in DEAD_LETTERS} == {"LogAppendTime"}


def test_the_co_partitioned_topics_share_their_key() -> None:
    assert {spec.key for spec in TOPICS if spec.name in CO_PARTITIONED} == {"user_id"}


def test_a_record_too_large_for_the_worker_fits_its_topic_and_its_dead_letter_fits_too() -> None:
    by_name = {spec.name: spec for spec in (*TOPICS, *DEAD_LETTERS)}
    for spec in TOPICS:
        if spec.dead_letter is not None:
            assert spec.max_message_bytes > DEFAULT_LIMITS.max_message_bytes
            assert by_name[spec.dead_letter].max_message_bytes > spec.max_message_bytes


def test_a_dead_letter_keeps_the_original_headers_first_and_untouched() -> None:
    original = [("b", b"\xff"), ("a", None), ("b", b"2")]
    assert dead_letter(headers=original).record_headers()[:3] == original


def test_a_second_dead_letter_adds_its_headers_behind_the_first() -> None:
    first = dead_letter(code="too_deep").record_headers()
    codes = [value for name, value in dead_letter(headers=first).record_headers() if name == "rerank.error.code"]
    assert codes == [b"too_deep", b"not_json"]


@pytest.mark.parametrize("limit_bytes", [65_536, 65_537, 100_000, 147_456, 1_048_576, 4_194_304])
@pytest.mark.parametrize("size_bytes", [10, 40_000, 65_536, 1_048_576, 4_194_304])
def test_whatever_its_record_holds_a_dead_letter_may_be_produced(size_bytes: int, limit_bytes: int) -> None:
    """The smallest limit is the least that RERANK_KAFKA__MAX_REQUEST_BYTES may be."""
    whole = dead_letter(
        topic="t" * 249,
        message="m" * 4_000,
        key=b"k" * size_bytes,
        value=b"v" * size_bytes,
        headers=[("h", b"x" * 100)] * (size_bytes // 100),
    )
    letter = whole.within(limit_bytes)
    record = OutputRecord("interactions.dlq", letter.key, letter.value, letter.record_headers())
    assert record.most_bytes() <= limit_bytes
    if 4 * size_bytes < limit_bytes:
        assert letter is whole


def test_headers_of_no_bytes_count_by_their_number() -> None:
    names = dict(dead_letter(headers=[("", None)] * 200_000).within(1_000_000).record_headers())
    assert b"headers 0 bytes" in (names["rerank.error.truncated"] or b"")


def test_a_message_that_utf_8_cannot_hold_is_escaped() -> None:
    headers = dict(dead_letter(message="id \ud800").record_headers())
    assert headers["__connect.errors.exception.message"] == b"id \\ud800"
