"""The golden bytes decode to the records that were meant, and those encode to the same bytes again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

import schemas
from schemas.codec import (
    decode_candidate_list,
    decode_interaction,
    decode_item,
    decode_slate,
    encode,
    encode_slate,
)
from schemas.dead_letter import DEAD_LETTER_HEADERS, DeadLetter
from schemas.limits import DEFAULT_LIMITS
from schemas.records import CandidateList, Interaction, Item, Slate
from tests.builders import candidate_list, interaction, item, slate

GOLDEN = Path(schemas.__file__).parent / "golden"


def absent(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


_NOTHING_RANKED: dict[str, Any] = {
    "item_ids": [],
    "scores": [],
    "retrieval_positions": [],
    "propensities": [],
    "explanations": None,
}
RECORDS: dict[str, Interaction | CandidateList | Item | Slate] = {
    "v1-interaction-full": interaction(),
    "v1-interaction-minimal": interaction(**absent("value", "request_id", "position", "context")),
    "v1-candidate-list-full": candidate_list(retrieval_scores=[0.9, 0.7]),
    "v1-candidate-list-minimal": candidate_list(
        explain=False, **absent("retrieval_scores", "k", "deadline_ms", "after", "context")
    ),
    "v1-slate-full": slate(),
    "v1-slate-fallback": slate(
        outcome="fallback",
        reasons=["store_unavailable"],
        item_ids=["i-1", "i-2"],
        scores=[0.0, 0.0],
        retrieval_positions=[0, 1],
        explanations=None,
    ),
    "v1-slate-shed": slate(outcome="shed", reasons=["deadline"], **_NOTHING_RANKED),
    "v1-item-full": item(),
    "v1-item-minimal": item(**absent("title", "categories", "attributes", "embedding")),
}
DECODERS: dict[type, Callable[[bytes], object]] = {
    Interaction: lambda value: decode_interaction(b"u-1", value, DEFAULT_LIMITS),
    CandidateList: lambda value: decode_candidate_list(b"u-1", value, DEFAULT_LIMITS),
    Item: lambda value: decode_item(b"i-1", value, DEFAULT_LIMITS),
    Slate: decode_slate,
}


@pytest.mark.parametrize("name", RECORDS)
def test_golden_bytes_decode_to_their_record(name: str) -> None:
    value = (GOLDEN / f"{name}.json").read_bytes()
    assert DECODERS[type(RECORDS[name])](value) == RECORDS[name]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_encodes_to_its_golden_bytes(name: str) -> None:
    record = RECORDS[name]
    value = encode_slate(record) if isinstance(record, Slate) else encode(record)
    assert value == (GOLDEN / f"{name}.json").read_bytes()


def test_every_golden_file_is_tested() -> None:
    files = {path.name for path in GOLDEN.iterdir()}
    assert files == {f"{name}.json" for name in RECORDS} | {"v1-dead-letter-headers.json"}


def test_a_dead_letter_carries_its_golden_headers() -> None:
    letter = DeadLetter(
        topic="interactions",
        partition=2,
        offset=1041,
        key=b"u-1",
        value=b'{"event_id": ',
        headers=[("traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")],
        code="not_json",
        stage="DECODE",
        error_class="DecodeError",
        message="Interaction b'{\"event_id\": ': Input data was truncated; record refused; send one JSON object",
    )
    golden = orjson.loads((GOLDEN / "v1-dead-letter-headers.json").read_bytes())
    assert letter.record_headers() == [(name, value.encode()) for name, value in golden]


def test_the_documented_headers_of_a_dead_letter_are_those_it_carries() -> None:
    golden = orjson.loads((GOLDEN / "v1-dead-letter-headers.json").read_bytes())
    assert [name for name, _ in golden] == ["traceparent", *DEAD_LETTER_HEADERS]
