"""The topic table: what is on which topic, under which key, and how Kafka keeps it.

`rerank topics create` makes what stands here; the AsyncAPI document says it to outsiders.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from schemas.records import CandidateList, Interaction, Item, Slate

_DAY_MS = 86_400_000
_MIB = 1_048_576
FOREVER_MS = -1

TRACE_HEADERS = ("traceparent", "correlation_id")
"""Headers that are copied from a request to its answer."""

SLATE_HEADERS = ("rerank-outcome", "rerank-model")
"""Headers that a slate adds, so that a reader can route without parsing it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """One topic, its name without prefix.

    `key` is the record's field whose UTF-8 bytes are the record key. `null_value` says what a null value means,
    None where it means nothing and is refused. `dead_letter` names the topic of its refused records, None where
    we do not read the topic. `max_message_bytes` is Kafka's `max.message.bytes`: with key, headers and framing.
    `headers` are those we read or write. `broker_time`: the broker stamps the records, whatever the clock of a worker
    says; it would refuse those of a clock that runs an hour ahead, and retention would take those of one far behind.
    """

    name: str
    key: str
    record: type[msgspec.Struct] | None
    summary: str
    retention_ms: int
    compacted: bool = False
    null_value: str | None = None
    dead_letter: str | None = None
    max_message_bytes: int = _MIB
    headers: tuple[str, ...] = ()
    broker_time: bool = False

    def kafka_config(self) -> dict[str, str]:
        """Return the topic's settings under Kafka's names."""
        return {
            "cleanup.policy": "compact" if self.compacted else "delete",
            "retention.ms": str(self.retention_ms),
            "max.message.bytes": str(self.max_message_bytes),
            "message.timestamp.type": "LogAppendTime" if self.broker_time else "CreateTime",
        }


TOPICS = (
    TopicSpec(
        name="interactions",
        key="user_id",
        record=Interaction,
        summary="What users did. The log of record: every user state can be rebuilt from it.",
        retention_ms=FOREVER_MS,
        null_value="Forget this user.",
        dead_letter="interactions.dlq",
        max_message_bytes=2 * _MIB,
        headers=TRACE_HEADERS,
    ),
    TopicSpec(
        name="candidates",
        key="user_id",
        record=CandidateList,
        summary="Lists of items, in retrieval order, to be ranked for a user.",
        retention_ms=_DAY_MS,
        dead_letter="candidates.dlq",
        max_message_bytes=2 * _MIB,
        headers=TRACE_HEADERS,
    ),
    TopicSpec(
        name="items",
        key="item_id",
        record=Item,
        summary="The catalogue: the last record of each item.",
        retention_ms=FOREVER_MS,
        compacted=True,
        null_value="Item withdrawn.",
        dead_letter="items.dlq",
        max_message_bytes=2 * _MIB,
    ),
    TopicSpec(
        name="reranked",
        key="user_id",
        record=Slate,
        summary="The answers, one for each candidate list; also the rows to train on.",
        retention_ms=30 * _DAY_MS,
        max_message_bytes=4 * _MIB,
        headers=(*TRACE_HEADERS, *SLATE_HEADERS),
        broker_time=True,
    ),
)
"""The topics, names without prefix. An input takes more bytes than a worker accepts, so that it can be told so."""

DEAD_LETTERS = tuple(
    TopicSpec(
        name=spec.dead_letter,
        key=spec.key,
        record=None,
        summary=f"Records of {spec.name} that were refused: original key, bytes and headers, and why.",
        retention_ms=14 * _DAY_MS,
        max_message_bytes=spec.max_message_bytes + _MIB,  # the original is kept whole, headers come on top
        broker_time=True,
    )
    for spec in TOPICS
    if spec.dead_letter is not None
)
"""The topics of refused records, in the order of TOPICS."""

CO_PARTITIONED = ("interactions", "candidates")
"""Topics with equal partition counts and one partitioner (murmur2): partition p of one belongs to p of the other."""

_NAMES = frozenset(spec.name for spec in (*TOPICS, *DEAD_LETTERS))


def topic_name(prefix: str, name: str) -> str:
    """Return the full name of a topic of this table; raise ValueError for a name that is not in it."""
    if name not in _NAMES:
        raise ValueError(f"topic {name!r}: not in the topic table; use one of {', '.join(sorted(_NAMES))}")
    return prefix + name


def dead_letter_name(prefix: str, name: str) -> str:
    """Return the full name of the topic for the refused records of `name`; raise ValueError where none is kept."""
    return topic_name(prefix, f"{name}.dlq")
