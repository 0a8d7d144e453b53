"""What outsiders read instead of our code: a JSON Schema per record, and one AsyncAPI document for all topics.

Everything is generated from the Structs and the topic table, committed in `schemas/wire`, and compared by a test.
A producer that validates its records against these schemas has none refused, but for what JSON Schema cannot say:
ids longer in bytes than in characters, arrays of different lengths, 1.0 for an integer, integers beyond 64 bits in
context, nesting, the size of the message, the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from schemas.dead_letter import DEAD_LETTER_HEADERS
from schemas.records import CandidateList, Interaction, Item, Slate
from schemas.topics import DEAD_LETTERS, TOPICS, TopicSpec

Document = dict[str, Any]

WIRE_VERSION = "1.0.0"
"""Version of the contract: minor for an added optional field; a field is never re-typed."""

RECORD_TYPES: Mapping[str, type[msgspec.Struct]] = MappingProxyType(
    {"interaction": Interaction, "candidate-list": CandidateList, "slate": Slate, "item": Item}
)
"""The records by the name of their files."""

_GOLDEN = Path(__file__).parent / "golden"
_NAMES = {record: name for name, record in RECORD_TYPES.items()}
_HEADERS = {
    "traceparent": "W3C trace context, copied from the request to its slate.",
    "correlation_id": "Copied from the request to its slate.",
    "rerank-outcome": "The outcome of the slate.",
    "rerank-model": "Name and version of the model that ranked it.",
}


def documents() -> dict[str, Document]:
    """Return every document by its file name."""
    schemas = {f"{name}.schema.json": json_schema(name) for name in RECORD_TYPES}
    return {**schemas, "asyncapi.json": asyncapi()}


def export(directory: Path) -> list[Path]:
    """Write every document into `directory`, which is made if need be; return the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, document in documents().items():
        path = directory / name
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def json_schema(name: str) -> Document:
    """Return the JSON Schema (2020-12) of the record `name`, a key of RECORD_TYPES."""
    record_type = RECORD_TYPES[name]
    _, components = msgspec.json.schema_components((record_type,), ref_template="#/$defs/{name}")
    root = components.pop(record_type.__name__)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:stream-rerank:{name}:{WIRE_VERSION}",
    }
    return {**head, **root, **({"$defs": components} if components else {})}


def asyncapi() -> Document:
    """Return the AsyncAPI 3.0 document: the topics, keys, headers and records of the re-ranker."""
    _, schemas = msgspec.json.schema_components(RECORD_TYPES.values(), ref_template="#/components/schemas/{name}")
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "stream-rerank", "version": WIRE_VERSION, "description": _SUMMARY},
        "defaultContentType": "application/json",
        "channels": {spec.name: _channel(spec) for spec in (*TOPICS, *DEAD_LETTERS)},
        "operations": _operations(),
        "components": {"messages": _messages(), "schemas": schemas},
    }


_SUMMARY = (
    "Interactions and candidate lists in, re-ranked slates out. JSON in UTF-8; unknown fields are ignored. "
    "Topics interactions and candidates have the same number of partitions and are keyed by the user id, with the "
    "murmur2 partitioner of Java's client (librdkafka: partitioner=murmur2_random). Topic names may carry a prefix."
)


def _channel(spec: TopicSpec) -> Document:
    return {
        "address": spec.name,
        "description": spec.summary,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _messages_of(spec)},
        "bindings": {
            "kafka": {
                "topicConfiguration": {
                    "cleanup.policy": ["compact" if spec.compacted else "delete"],
                    "retention.ms": spec.retention_ms,
                    "max.message.bytes": spec.max_message_bytes,
                },
                "bindingVersion": "0.5.0",
            }
        },
    }


def _operations() -> Document:
    """Say what the re-ranker does on each topic: it receives where it keeps dead letters, and sends elsewhere."""
    actions = {spec.name: "receive" if spec.dead_letter else "send" for spec in (*TOPICS, *DEAD_LETTERS)}
    return {
        f"{action}-{name}": {"action": action, "channel": {"$ref": f"#/channels/{name}"}}
        for name, action in actions.items()
    }


def _messages() -> Document:
    return {name: message for spec in (*TOPICS, *DEAD_LETTERS) for name, message in _messages_of(spec).items()}


def _messages_of(spec: TopicSpec) -> Document:
    """Return the messages of one topic by name: its record, and its null value where that means something."""
    if spec.record is None:
        payload: Document = {"description": "The original bytes, whatever they are."}
        return {spec.name: _message(spec, payload, DEAD_LETTER_HEADERS, contentType="application/octet-stream")}
    name = _NAMES[spec.record]
    headers = {header: _HEADERS[header] for header in spec.headers}
    reference = {"$ref": f"#/components/schemas/{spec.record.__name__}"}
    record = _message(spec, reference, headers, examples=_examples(name))
    if spec.null_value is None:
        return {name: record}
    null = _message(spec, {"type": "null", "description": spec.null_value}, headers)
    return {name: record, f"{name}-null": null}


def _examples(name: str) -> list[Document]:
    return [
        {"name": path.stem, "payload": json.loads(path.read_bytes())}
        for path in sorted(_GOLDEN.glob(f"v1-{name}-*.json"))
    ]


def _message(spec: TopicSpec, payload: Document, headers: Mapping[str, str], **more: Any) -> Document:
    key = f"{spec.key} of the record, in UTF-8." if spec.record else "Key of the original record."
    described = {name: {"type": "string", "description": meaning} for name, meaning in headers.items()}
    return {
        "summary": spec.summary,
        "payload": payload,
        **({"headers": {"type": "object", "properties": described}} if described else {}),
        **({"correlationId": {"location": "$message.header#/correlation_id"}} if "correlation_id" in headers else {}),
        "bindings": {"kafka": {"key": {"type": "string", "description": key}, "bindingVersion": "0.5.0"}},
        **more,
    }
