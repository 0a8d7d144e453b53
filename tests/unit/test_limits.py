"""Each limit holds at its value and refuses one beyond it, before more work is spent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import DecodeError, ErrorCode, decode_candidate_list, decode_interaction, encode
from schemas.limits import DEFAULT_LIMITS, Limits
from tests.builders import candidate_list, interaction


def code_of_interaction(value: bytes, limits: Limits) -> ErrorCode | None:
    try:
        decode_interaction(b"u-1", value, limits)
    except DecodeError as error:
        return error.code
    return None


def code_of_list(item_ids: list[str], limits: Limits) -> ErrorCode | None:
    try:
        decode_candidate_list(b"u", encode(candidate_list(request_id="r", user_id="u", item_ids=item_ids)), limits)
    except DecodeError as error:
        return error.code
    return None


def test_the_limits_are_those_of_the_contract() -> None:
    limits = DEFAULT_LIMITS
    assert (limits.max_message_bytes, limits.max_candidates) == (1_048_576, 2_000)
    assert (limits.max_id_bytes, limits.max_nesting) == (256, 32)


def test_a_message_may_be_as_long_as_the_limit() -> None:
    value = encode(interaction())
    assert code_of_interaction(value, Limits(max_message_bytes=len(value))) is None
    assert code_of_interaction(value, Limits(max_message_bytes=len(value) - 1)) is ErrorCode.TOO_LARGE


def test_size_is_checked_before_nesting_and_nesting_before_json() -> None:
    deep = b'{"a":' * 100
    assert code_of_interaction(deep, Limits(max_message_bytes=len(deep) - 1)) is ErrorCode.TOO_LARGE
    assert code_of_interaction(deep, DEFAULT_LIMITS) is ErrorCode.TOO_DEEP
    assert code_of_interaction(deep, Limits(max_nesting=100)) is ErrorCode.NOT_JSON


def test_a_nesting_limit_beyond_the_parser_still_refuses() -> None:
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert code_of_interaction(deep, Limits(max_nesting=10**6)) is ErrorCode.TOO_DEEP


_STRINGS = st.text(st.sampled_from('[]{}"\\:,a'), max_size=12)
_TREES = st.recursive(
    _STRINGS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_STRINGS, inner, max_size=3)
)


def depth(tree: object) -> int:
    if not isinstance(tree, dict | list):
        return 0
    children = tree.values() if isinstance(tree, dict) else tree
    return 1 + max(map(depth, children), default=0)


@given(st.dictionaries(_STRINGS, _TREES, max_size=3))
def test_nesting_counts_the_brackets_outside_strings(context: dict[str, object]) -> None:
    value = encode(interaction(context=context))
    levels = 1 + depth(context)
    assert code_of_interaction(value, Limits(max_nesting=levels)) is None
    assert code_of_interaction(value, Limits(max_nesting=levels - 1)) is ErrorCode.TOO_DEEP


@given(st.integers(1, 12), st.lists(st.integers(1, 14), min_size=1, max_size=30))
def test_an_id_may_be_as_long_as_the_limit(limit: int, lengths: list[int]) -> None:
    item_ids = [chr(ord("a") + index) * length for index, length in enumerate(lengths)]
    expected = None if max(lengths) <= limit else ErrorCode.ID_LENGTH
    assert code_of_list(item_ids, Limits(max_id_bytes=limit)) is expected


def test_an_id_is_measured_in_bytes() -> None:
    assert code_of_list(["é" * 4], Limits(max_id_bytes=8)) is None
    assert code_of_list(["é" * 4], Limits(max_id_bytes=7)) is ErrorCode.ID_LENGTH


def test_a_list_may_be_as_long_as_the_limit() -> None:
    item_ids = ["a", "b", "c"]
    assert code_of_list(item_ids, Limits(max_candidates=3)) is None
    assert code_of_list(item_ids, Limits(max_candidates=2)) is ErrorCode.TOO_MANY_CANDIDATES


def test_a_context_deeper_than_it_can_be_written_again_is_refused() -> None:
    value = encode(interaction()).replace(b'"home"', b"[" * 300 + b"]" * 300)
    assert code_of_interaction(value, Limits(max_nesting=400)) is ErrorCode.TOO_DEEP
