"""The published documents are generated, current, and accept and refuse what the decoder does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import schemas
from schemas.codec import ErrorCode
from schemas.topics import DEAD_LETTERS, TOPICS
from schemas.wire import RECORD_TYPES, asyncapi, documents, export, json_schema
from tests.bad_records import bad_records, odd_but_good_records

WIRE = Path(schemas.__file__).parent / "wire"
GOLDEN = Path(schemas.__file__).parent / "golden"
RECORD_ON = {"interactions": "interaction", "candidates": "candidate-list"}
VALIDATORS = {name: Draft202012Validator(json_schema(name)) for name in RECORD_TYPES}


def test_the_committed_documents_are_those_that_the_code_generates(tmp_path: Path) -> None:
    generated = {path.name: path.read_bytes() for path in export(tmp_path / "wire")}
    assert generated == {path.name: path.read_bytes() for path in WIRE.iterdir()}
    assert generated.keys() == documents().keys()


@pytest.mark.parametrize("name", RECORD_TYPES)
def test_a_schema_is_valid_json_schema(name: str) -> None:
    Draft202012Validator.check_schema(json_schema(name))


@pytest.mark.parametrize("name", RECORD_TYPES)
def test_golden_records_satisfy_their_schema(name: str) -> None:
    files = sorted(GOLDEN.glob(f"v1-{name}-*.json"))
    assert len(files) >= 2
    for path in files:
        VALIDATORS[name].validate(json.loads(path.read_bytes()))


def test_odd_but_good_records_satisfy_their_schema() -> None:
    for record in odd_but_good_records():
        if record.value is not None:
            VALIDATORS[RECORD_ON[record.topic]].validate(json.loads(record.value))


BEYOND_JSON_SCHEMA = {
    *(
        f"{topic}: {name}"
        for topic in RECORD_ON
        for name in (
            "id too long in bytes alone",
            "30 digits in context",
            "30 digits deep in context",
            "1e999 in context",
            "event_time_ms is 1000000000000.0",
        )
    ),
    "candidates: fewer scores than items",
    "candidates: more scores than items",
    "candidates: scores without items",
    "candidates: no scores for items",
}


def test_bad_records_fail_their_schema_but_for_what_it_cannot_say() -> None:
    about_bytes = {
        ErrorCode.NOT_JSON,
        ErrorCode.TOO_LARGE,
        ErrorCode.TOO_DEEP,
        ErrorCode.KEY_MISSING,
        ErrorCode.KEY_MISMATCH,
    }
    passing = set()
    for record in bad_records():
        if record.value is None or record.code in about_bytes:
            continue
        with contextlib.suppress(ValueError):  # 5,000 digits: more than Python's own parser takes
            if VALIDATORS[RECORD_ON[record.topic]].is_valid(json.loads(record.value)):
                passing.add(record.name)
    assert passing == BEYOND_JSON_SCHEMA


def test_the_asyncapi_document_has_a_channel_for_every_topic() -> None:
    assert list(asyncapi()["channels"]) == [spec.name for spec in (*TOPICS, *DEAD_LETTERS)]


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    document = asyncapi()
    references = set(_references(document))
    assert "#/components/schemas/CandidateList" in references
    for reference in references:
        target = document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


def _references(node: Any) -> Iterator[str]:
    for name, child in node.items() if isinstance(node, dict) else enumerate(node):
        if name == "$ref":
            yield child
        elif isinstance(child, dict | list):
            yield from _references(child)
