"""The plain Faust application that a newcomer writes from Faust's documentation: the other side of `make bench`.

It does the job of `rerank worker` on the same topics with the same artefact, one event at a time, and leaves out
the fence, deadlines, dead letters and explanations. Faust's own settings are its defaults, but for three that
favour it here: no web server (two contenders would fight for port 6066), one torch thread as ours (two cost it a
multiple beside a busy broker), and a short group session on the embedded broker (a join would take 30 s).

    python -m tests.bench.naive_faust worker --loglevel warn
"""

import os
import warnings
from pathlib import Path
from typing import Any

import faust
import numpy as np
import redis.asyncio as redis
import torch

from schemas.records import KINDS

prefix = os.environ.get("RERANK_TOPIC_PREFIX", "")
artefact = Path(os.environ["RERANK_ARTEFACT"])
embedded: dict[str, Any] = {
    name: float(os.environ[variable]) / 1000.0
    for name, variable in (
        ("broker_session_timeout", "RERANK_KAFKA__SESSION_TIMEOUT_MS"),
        ("broker_heartbeat_interval", "RERANK_KAFKA__HEARTBEAT_INTERVAL_MS"),
    )
    if variable in os.environ
}

app = faust.App(
    os.environ["RERANK_GROUP_ID"],
    broker=f"kafka://{os.environ['RERANK_KAFKA__BOOTSTRAP_SERVERS']}",
    web_enabled=False,
    datadir=os.environ["NAIVE_DATA_DIRECTORY"],
    topic_disable_leader=True,
    **embedded,
)


# "Models, Serialization, and Codecs" of Faust's user guide: records describe the topics, JSON is the default.
# Validation is off by default.
class Interaction(faust.Record):
    event_id: str
    user_id: str
    item_id: str
    kind: str
    event_time_ms: int
    value: float | None = None


class CandidateList(faust.Record):
    request_id: str
    user_id: str
    event_time_ms: int
    item_ids: list[str]
    k: int | None = None


class Slate(faust.Record):
    request_id: str
    user_id: str
    event_time_ms: int
    item_ids: list[str]
    scores: list[float]
    retrieval_positions: list[int]


interactions_topic = app.topic(f"{prefix}interactions", key_type=str, value_type=Interaction)
candidates_topic = app.topic(f"{prefix}candidates", key_type=str, value_type=CandidateList)
reranked_topic = app.topic(f"{prefix}reranked", key_type=str, value_type=Slate)

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
model: Any = torch.jit.load(str(artefact / "model.pt"))  # type: ignore[no-untyped-call]
item_ids = (artefact / "items.txt").read_text().split("\n")[:-1]
table = torch.from_numpy(np.load(artefact / "items.npy"))
cold_item = table[0]
items = {item_id: table[row] for row, item_id in enumerate(item_ids, start=1)}
kind_numbers = {kind: number for number, kind in enumerate(["unknown", *KINDS])}
state_size = table.shape[1] // 2 + 1

store = redis.from_url(os.environ["RERANK_REDIS__URL"])


def state_of(row: dict[Any, Any]) -> torch.Tensor:
    """Return the state in a hash, zeros for a new user."""
    if b"vector" not in row:
        return torch.zeros(state_size)
    return torch.frombuffer(bytearray(row[b"vector"]), dtype=torch.float32)


@app.agent(interactions_topic)
async def on_interaction(stream: faust.StreamT[Interaction]) -> None:
    """Move a user: one read, one forward, one write."""
    async for event in stream:
        row = await store.hgetall(f"user:{event.user_id}")
        gap_ms = event.event_time_ms - int(row.get(b"event_time_ms", event.event_time_ms))
        with torch.no_grad():
            state = model.advance(
                state_of(row).unsqueeze(0),
                items.get(event.item_id, cold_item).unsqueeze(0),
                torch.tensor([kind_numbers.get(event.kind, 0)]),
                torch.tensor([event.value or 0.0]),
                torch.tensor([max(0.0, gap_ms / 1000.0)]),
            )
        await store.hset(
            f"user:{event.user_id}",
            mapping={
                "vector": state[0].numpy().tobytes(),
                "events": int(row.get(b"events", 0)) + 1,
                "event_time_ms": event.event_time_ms,
            },
        )


@app.agent(candidates_topic)
async def on_candidates(stream: faust.StreamT[CandidateList]) -> None:
    """Rank a list: one read, one forward, one send."""
    async for request in stream:
        row = await store.hgetall(f"user:{request.user_id}")
        vectors = torch.stack([items.get(item_id, cold_item) for item_id in request.item_ids])
        count = len(request.item_ids)
        with torch.no_grad():
            scores = model.score(
                state_of(row).unsqueeze(0),
                torch.zeros(1, 0, vectors.shape[1]),
                torch.zeros(1, 0, dtype=torch.bool),
                vectors.unsqueeze(0),
                torch.zeros(1, count, 0),
                torch.ones(1, count, dtype=torch.bool),
            )[0].tolist()
        order = sorted(range(count), key=lambda position: -scores[position])[: request.k]
        await reranked_topic.send(
            key=request.user_id,
            value=Slate(
                request_id=request.request_id,
                user_id=request.user_id,
                event_time_ms=request.event_time_ms,
                item_ids=[request.item_ids[position] for position in order],
                scores=[scores[position] for position in order],
                retrieval_positions=order,
            ),
        )


if __name__ == "__main__":
    app.main()
