"""Decoding: every bad record has its code, every odd one is served, and nothing but DecodeError leaves a decoder."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.codec import (
    DecodeError,
    ErrorCode,
    decode_candidate_list,
    decode_interaction,
    decode_item,
    decode_slate,
    decode_user_id,
    encode,
    encode_slate,
    peek_candidate_list,
    slate_digest_bytes,
)
from schemas.limits import DEFAULT_LIMITS, Limits
from schemas.records import After, CandidateList, Explanation, Interaction, Item, Slate, SlateTiming
from tests.bad_records import BadRecord, OddRecord, bad_records, good_value, odd_but_good_records
from tests.builders import candidate_list, interaction, item, slate

Decoder = Callable[[bytes | None, bytes | None, Limits], object]
DECODERS: dict[str, Decoder] = {"interactions": decode_interaction, "candidates": decode_candidate_list}
BAD_RECORDS = bad_records()
ODD_RECORDS = odd_but_good_records()


def decode(topic: str, key: bytes | None, value: bytes | None) -> object:
    """Decode as an agent does: a null value on interactions names a user to forget."""
    if topic == "interactions" and value is None:
        return decode_user_id(key, DEFAULT_LIMITS)
    return DECODERS[topic](key, value, DEFAULT_LIMITS)


def refusal_of(topic: str, key: bytes | None, value: bytes | None) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode(topic, key, value)
    return caught.value


@pytest.mark.parametrize("record", BAD_RECORDS, ids=lambda record: record.name)
def test_a_bad_record_is_refused_with_its_code_in_one_line(record: BadRecord) -> None:
    error = refusal_of(record.topic, record.key, record.value)
    assert error.code is record.code
    assert len(error.message) <= 300
    assert error.message.isprintable()
    assert "; record refused; " in error.message


@pytest.mark.parametrize("record", ODD_RECORDS, ids=lambda record: record.name)
def test_an_odd_record_is_served(record: OddRecord) -> None:
    assert decode(record.topic, record.key, record.value) is not None


_RECORDS: dict[type[msgspec.Struct], tuple[Decoder, bytes, bytes]] = {
    Interaction: (decode_interaction, b"u-1", good_value("interactions")),
    CandidateList: (decode_candidate_list, b"u-1", good_value("candidates")),
    Item: (decode_item, b"i-1", encode(item(item_id="i-1"))),
}


@pytest.mark.parametrize(
    ("record_type", "name"),
    [
        (record_type, field.name)
        for record_type in _RECORDS
        for field in msgspec.structs.fields(record_type)
        if not field.required
    ],
)
def test_null_in_any_optional_field_counts_as_absent(record_type: type[msgspec.Struct], name: str) -> None:
    decoder, key, value = _RECORDS[record_type]
    absent = {field: found for field, found in orjson.loads(value).items() if field != name}
    with_null, without = (orjson.dumps(fields) for fields in (absent | {name: None}, absent))
    assert decoder(key, with_null, DEFAULT_LIMITS) == decoder(key, without, DEFAULT_LIMITS)


def test_the_corpus_has_unique_names_and_every_code() -> None:
    names = [record.name for record in BAD_RECORDS] + [record.name for record in ODD_RECORDS]
    assert len(names) == len(set(names))
    assert {record.code for record in BAD_RECORDS} == set(ErrorCode)


@given(key=st.none() | st.binary(max_size=40), value=st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_a_decode_error(key: bytes | None, value: bytes) -> None:
    for decoder in (*DECODERS.values(), decode_item):
        with pytest.raises(DecodeError):
            decoder(key, value, DEFAULT_LIMITS)
    with pytest.raises(DecodeError):
        decode_slate(value)


@given(data=st.data(), topic=st.sampled_from(sorted(DECODERS)))
def test_a_damaged_record_raises_nothing_but_a_decode_error(data: st.DataObject, topic: str) -> None:
    value = bytearray(good_value(topic))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(value)))
        stop = data.draw(st.integers(start, min(len(value), start + 8)))
        value[start:stop] = data.draw(st.binary(max_size=4) | st.sampled_from(_FRAGMENTS))
    _decode_or_refuse(topic, bytes(value))


_FRAGMENTS = [b'"', b"\\", b"\\ud800", b"[" * 40, b'{"a":' * 2_000, b"1e999", b"9" * 5_000, b"NaN", b"\xff", b"\x00"]
_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50)
@given(data=st.data(), topic=st.sampled_from(sorted(DECODERS)))
def test_any_value_in_any_field_raises_nothing_but_a_decode_error(data: st.DataObject, topic: str) -> None:
    record_type = {"interactions": Interaction, "candidates": CandidateList}[topic]
    fields = st.dictionaries(st.sampled_from((*record_type.__struct_fields__, "colour")), _VALUES, max_size=3)
    _decode_or_refuse(topic, good_value(topic, **data.draw(fields)))


def _decode_or_refuse(topic: str, value: bytes) -> None:
    with contextlib.suppress(DecodeError):
        decode(topic, b"u-1", value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            good_value("interactions", event_time_ms="1700"),
            "Interaction event_time_ms='1700': Expected `int`, got `str`; record refused; "
            "send the type that the schema in schemas/wire names",
        ),
        (
            good_value("interactions", position=-1),
            "Interaction position=-1: Expected `int` >= 0; record refused; "
            "send a number within the range that the schema in schemas/wire names",
        ),
        (
            good_value("interactions", user_id="u-2"),
            "Interaction user_id='u-2' with key=b'u-1'; record refused; "
            "produce with the id of the record, as UTF-8 bytes, as its key",
        ),
        (
            good_value("interactions", item_id="i\n"),
            "Interaction item_id='i\\n': forbidden character; record refused; "
            "send ids in UTF-8 without control characters and line separators",
        ),
        (
            b"{}",
            "Interaction: Object missing required field `event_id`; record refused; "
            "send every field that the schema in schemas/wire requires",
        ),
    ],
)
def test_a_refusal_says_value_consequence_and_remedy(value: bytes, message: str) -> None:
    assert refusal_of("interactions", b"u-1", value).message == message


def test_a_refusal_names_the_candidate_at_fault() -> None:
    error = refusal_of("candidates", b"u-1", good_value("candidates", item_ids=["i-1", "i\t2"]))
    assert "item_ids[1]='i\\t2'" in error.message


def test_a_refusal_quotes_at_most_a_short_piece() -> None:
    error = refusal_of("interactions", b"u-1", good_value("interactions", event_time_ms="secret" * 1_000))
    assert len(error.message) < 250


def test_a_refusal_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(DecodeError(ErrorCode.NOT_JSON, "text")))  # noqa: S301  # our own bytes
    assert (error.code, error.message, str(error)) == (ErrorCode.NOT_JSON, "text", "text")


def test_the_last_of_two_equal_names_wins() -> None:
    value = good_value("interactions").replace(b'"kind"', b'"kind": "view", "kind"')
    assert decode_interaction(b"u-1", value, DEFAULT_LIMITS).kind == "click"


def test_null_for_an_optional_field_is_absent() -> None:
    absent = interaction(value=None, request_id=None, position=None, context=None)
    value = good_value("interactions", value=None, request_id=None, position=None, context=None)
    assert decode_interaction(b"u-1", value, DEFAULT_LIMITS) == absent


def test_the_user_to_forget_is_the_key() -> None:
    assert decode_user_id("ю-1".encode(), DEFAULT_LIMITS) == "ю-1"


def test_a_null_value_is_no_record() -> None:
    for decoder in (*DECODERS.values(), decode_item):
        with pytest.raises(DecodeError) as caught:
            decoder(b"u-1", None, DEFAULT_LIMITS)
        assert caught.value.code is ErrorCode.VALUE_MISSING


def test_an_item_is_keyed_by_its_id() -> None:
    assert decode_item(b"i-1", encode(item()), DEFAULT_LIMITS) == item()
    with pytest.raises(DecodeError) as caught:
        decode_item(b"i-2", encode(item()), DEFAULT_LIMITS)
    assert caught.value.code is ErrorCode.KEY_MISMATCH


def test_an_item_holds_no_integer_beyond_64_bits() -> None:
    value = encode(item()).replace(b"1994", b"9" * 30)
    with pytest.raises(DecodeError) as caught:
        decode_item(b"i-1", value, DEFAULT_LIMITS)
    assert caught.value.code is ErrorCode.NUMBER_RANGE


_CHARACTERS = st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"))
_IDS = st.text(_CHARACTERS, min_size=1, max_size=20)
_NUMBERS = st.floats(-(2.0**53), 2.0**53)
_TIMES = st.integers(-(2**53), 2**53)
_COUNTS = st.integers(0, 2**53)
_LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | _NUMBERS | st.text(max_size=9)
_CONTEXTS = st.dictionaries(
    _IDS, st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=5), max_size=3
)


@given(
    st.builds(
        Interaction,
        event_id=_IDS,
        user_id=_IDS,
        item_id=_IDS,
        kind=_IDS,
        event_time_ms=_TIMES,
        value=st.none() | _NUMBERS,
        request_id=st.none() | _IDS,
        position=st.none() | _COUNTS,
        context=st.none() | _CONTEXTS,
    )
)
def test_an_interaction_comes_back_as_it_went(record: Interaction) -> None:
    assert decode_interaction(record.user_id.encode(), encode(record), DEFAULT_LIMITS) == record


@settings(max_examples=50)
@given(data=st.data(), item_ids=st.lists(_IDS, unique=True, max_size=5))
def test_a_candidate_list_comes_back_as_it_went(data: st.DataObject, item_ids: list[str]) -> None:
    count = len(item_ids)
    record = data.draw(
        st.builds(
            CandidateList,
            request_id=_IDS,
            user_id=_IDS,
            event_time_ms=_TIMES,
            item_ids=st.just(item_ids),
            retrieval_scores=st.none() | st.lists(_NUMBERS, min_size=count, max_size=count),
            k=st.none() | st.integers(1, 2**53),
            deadline_ms=st.none() | _COUNTS,
            after=st.none() | st.builds(After, partition=st.integers(0, 2**31 - 1), offset=_COUNTS),
            explain=st.booleans(),
            context=st.none() | _CONTEXTS,
        )
    )
    assert decode_candidate_list(record.user_id.encode(), encode(record), DEFAULT_LIMITS) == record


@given(
    st.builds(
        Item,
        item_id=_IDS,
        event_time_ms=_TIMES,
        title=st.none() | _IDS,
        categories=st.none() | st.lists(_IDS),
        attributes=st.none() | _CONTEXTS,
        embedding=st.none() | st.lists(_NUMBERS),
    )
)
def test_an_item_comes_back_as_it_went(record: Item) -> None:
    assert decode_item(record.item_id.encode(), encode(record), DEFAULT_LIMITS) == record


def test_optional_fields_that_are_none_are_left_out() -> None:
    record = interaction(value=None, request_id=None, position=None, context=None)
    assert orjson.loads(encode(record)).keys() == {"event_id", "user_id", "item_id", "kind", "event_time_ms"}


def shed(**changes: Any) -> Slate:
    nothing: dict[str, Any] = {"item_ids": [], "scores": [], "retrieval_positions": [], "propensities": []}
    return slate(**({"outcome": "shed", "reasons": ["deadline"], "explanations": None} | nothing | changes))


def test_a_slate_comes_back_as_it_went() -> None:
    assert decode_slate(encode_slate(slate())) == slate()


def test_a_slate_without_explanations_does_not_mention_them() -> None:
    value = encode_slate(slate(explanations=None))
    assert b"explanations" not in value
    assert decode_slate(value) == slate(explanations=None)


def test_float32_arrays_encode_with_the_digits_of_float32() -> None:
    arrays = slate(scores=np.array([0.1, 0.25], dtype=np.float32), propensities=np.ones(2, dtype=np.float32))
    assert encode_slate(arrays) == encode_slate(slate(scores=[0.1, 0.25], propensities=[1.0, 1.0]))


def test_an_array_that_is_not_contiguous_encodes_its_values() -> None:
    strided = np.array([1.5, 9.0, 0.25, 9.0], dtype=np.float32)[::2]
    assert encode_slate(slate(scores=strided)) == encode_slate(slate())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["scores", "propensities"])
def test_a_slate_with_a_number_that_is_not_finite_is_not_encoded(field: str, bad: float) -> None:
    for numbers in ([0.5, bad], np.array([0.5, bad], dtype=np.float32)):
        with pytest.raises(ValueError, match=rf"Slate {field} holds {bad!r}: not encoded"):
            encode_slate(slate(**{field: numbers}))


def test_a_shed_slate_with_a_time_that_is_not_finite_is_not_encoded() -> None:
    timing_ms = SlateTiming(queue=float("nan"), state=0.0, score=0.0, total=0.0)
    with pytest.raises(ValueError, match="Slate timing_ms holds nan"):
        encode_slate(shed(timing_ms=timing_ms))


def test_a_shed_slate_is_written_like_any_other() -> None:
    as_ranked = msgspec.structs.replace(shed(), outcome="ranked")
    assert encode_slate(shed()) == encode_slate(as_ranked).replace(b"ranked", b"shed")


def test_an_explanation_with_a_number_that_is_not_finite_is_not_encoded() -> None:
    explanation = Explanation(item_id="i-1", score=1.0, cold_score=float("nan"), personal=0.0, moved=0)
    with pytest.raises(ValueError, match="Slate explanations holds nan"):
        encode_slate(slate(explanations=[explanation]))


def test_a_record_with_a_number_that_is_not_finite_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="Interaction context holds inf"):
        encode(interaction(context={"a": [float("inf")]}))


def test_the_word_null_in_an_id_is_no_reason_to_refuse() -> None:
    assert decode_slate(encode_slate(slate(request_id="null"))).request_id == "null"


def test_the_digest_bytes_leave_out_the_timing_and_nothing_else() -> None:
    slow = slate(timing_ms=SlateTiming(queue=99.0, state=99.0, score=99.0, total=300.0))
    assert slate_digest_bytes(encode_slate(slow)) == slate_digest_bytes(encode_slate(slate()))
    kept = orjson.loads(slate_digest_bytes(encode_slate(slate())))
    assert kept == {name: value for name, value in orjson.loads(encode_slate(slate())).items() if name != "timing_ms"}


def test_the_digest_bytes_of_float32_arrays_are_those_of_their_digits() -> None:
    arrays = slate(scores=np.array([0.1, 1 / 3], dtype=np.float32))
    again = decode_slate(encode_slate(arrays))
    assert slate_digest_bytes(encode_slate(again)) == slate_digest_bytes(encode_slate(arrays))


@pytest.mark.parametrize("changes", [{"outcome": "maybe"}, {"scores": [None]}, {"state": {}}])
def test_a_slate_of_the_wrong_shape_is_refused(changes: dict[str, Any]) -> None:
    value = msgspec.json.encode(msgspec.to_builtins(slate()) | changes)
    with pytest.raises(DecodeError):
        decode_slate(value)


def test_the_head_of_a_list_is_what_decoding_it_gives() -> None:
    request = candidate_list()
    head = peek_candidate_list(b"u-1", encode(request), DEFAULT_LIMITS)
    assert head is not None
    assert msgspec.to_builtins(head) == {name: getattr(request, name) for name in head.__struct_fields__}


@pytest.mark.parametrize(
    "record", [record for record in BAD_RECORDS if record.topic == "candidates"], ids=lambda record: record.name
)
def test_a_bad_list_with_a_sound_head_is_bad_beyond_it(record: BadRecord) -> None:
    head = peek_candidate_list(record.key, record.value, DEFAULT_LIMITS)
    assert head is None or head.user_id.encode() == record.key
    assert head is None or record.code not in (ErrorCode.KEY_MISMATCH, ErrorCode.TOO_LARGE)
