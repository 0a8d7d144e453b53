"""CPU microseconds a record in each stage of the path, in this process, without broker and Redis.

The collector is set as the worker sets it; `--collector default` shows what that is worth.

    python -m tests.bench.bench_stages [--collector default]
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from aiokafka import ConsumerRecord
from redis.asyncio import Connection

from schemas.limits import Limits
from stream_app.app import SystemClock, spare_the_collector
from stream_app.cache import CachedStore
from stream_app.features import gather
from stream_app.pipeline import Deadlines, Ranker, apply_interactions, decode_interactions, decode_lists
from stream_app.ports import AppliedOffsets, Serving
from stream_app.scorer import load_artefact
from stream_app.slate import select
from stream_app.state import Progress, RowUpdate, UserRow, advance, cold_row, fence_text, pack_row
from tests.bench.workload import Workload

INTERACTIONS, INTERACTIONS_AT_ONCE = 60_000, 1_000
LISTS, LISTS_AT_ONCE = 3_200, 32
LATE_LISTS, LATE_LISTS_AT_ONCE = 10_000, 500
STATE_SIZE = 65
SPACE = 1
FUTURE_MS = 10**12  # nothing is late
DEADLINES = Deadlines(default_ms=1_000.0, most_ms=FUTURE_MS * 2)


class InstantStore:
    """Knows nobody and writes at once."""

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Return cold rows."""
        return [cold_row(STATE_SIZE)] * len(user_ids)

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        """Say that everything is written."""
        del progress
        return [True] * len(updates)


class Waiting:
    """Whoever waits for the lists."""

    dropped = False

    def settle(self, count: int = 1) -> None:
        """Take note."""
        del count


class Stopwatch:
    """CPU time by stage."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.us: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def time(self, stage: str, records: int) -> Iterator[None]:
        """Add the CPU time of the block, divided by `records`."""
        started_s = time.process_time()
        yield
        self.us[stage].append(1e6 * (time.process_time() - started_s) / records)

    def medians(self) -> dict[str, float]:
        """Return the median of each stage."""
        return {stage: round(median(values), 2) for stage, values in self.us.items()}


def consumer_records(topic: str, records: Iterator[tuple[bytes, bytes]]) -> list[ConsumerRecord[bytes, bytes]]:
    """Return the records as a consumer gives them."""
    return [
        ConsumerRecord(topic, 0, offset, 0, 0, key, value, None, len(key), len(value), ())
        for offset, (key, value) in enumerate(records)
    ]


async def time_interactions(watch: Stopwatch, serving: Serving, workload: Workload) -> CachedStore:
    """Time the path of interactions; return the cache it filled."""
    store = CachedStore(InstantStore(), max_users=100_000)
    records = consumer_records("interactions", workload.interactions(INTERACTIONS))
    connection = Connection()
    for start in range(0, INTERACTIONS, INTERACTIONS_AT_ONCE):
        some, count = records[start : start + INTERACTIONS_AT_ONCE], INTERACTIONS_AT_ONCE
        with watch.time("decode", count):
            interactions, _ = decode_interactions(some, epoch=1, limits=Limits())
        user_ids = list({interaction.user_id: None for interaction in interactions})
        rows = dict(zip(user_ids, await store.load(user_ids), strict=True))
        with watch.time("advance", count):
            folded = advance(
                rows, interactions, model=serving.model, vocabulary=serving.arena, future_tolerance_ms=FUTURE_MS
            )
        with watch.time("pack rows", count):
            parts = [part for one in folded.updates for part in (fence_text(one.base), pack_row(one.row, SPACE))]
        with watch.time("pack command", count):
            connection.pack_command(*parts)
        with watch.time("whole path", count):
            await apply_interactions(
                some, serving=serving, store=store, epoch=1, limits=Limits(), future_tolerance_ms=FUTURE_MS
            )
    return store


async def time_lists(watch: Stopwatch, serving: Serving, workload: Workload, store: CachedStore) -> None:
    """Time the path of candidate lists."""
    ranker = Ranker(serving=serving, store=store, applied=AppliedOffsets(), clock=SystemClock())
    records = consumer_records("candidates", workload.lists(LISTS, deadline_ms=FUTURE_MS * 2))
    for start in range(0, LISTS, LISTS_AT_ONCE):
        some, count = records[start : start + LISTS_AT_ONCE], LISTS_AT_ONCE
        with watch.time("decode", count):
            requests, _ = decode_lists(some, Waiting(), limits=Limits(), deadlines=DEADLINES)
        lists = [request.request for request in requests]
        rows = await store.load([one.user_id for one in lists])
        with watch.time("gather", count):
            batch = gather(lists, rows, arena=serving.arena, history_size=0, feature_names=())
        with watch.time("score", count):
            scores = serving.model.score(batch)
        with watch.time("select", count):
            select(scores, batch.mask, [one.k for one in lists])
        requests, _ = decode_lists(some, Waiting(), limits=Limits(), deadlines=DEADLINES)
        with watch.time("whole path after decode", count):
            async for _ in ranker.rank(requests):
                pass
    late = consumer_records("candidates", workload.lists(LATE_LISTS, deadline_ms=0))
    for start in range(0, LATE_LISTS, LATE_LISTS_AT_ONCE):
        some, count = late[start : start + LATE_LISTS_AT_ONCE], LATE_LISTS_AT_ONCE
        with watch.time("look at a late one", count):
            requests, _ = decode_lists(some, Waiting(), limits=Limits(), deadlines=DEADLINES, backlog_at_ms=FUTURE_MS)
        with watch.time("shed a late one", count):
            async for _ in ranker.rank(requests):
                pass


def main() -> None:
    """Print the medians as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--collector", choices=("worker", "default"), default="worker")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    workload = Workload(seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="rerank-bench-") as name:
        workload.write_artefact(Path(name) / "artefact")
        serving = load_artefact(Path(name) / "artefact").serving()
    if options.collector == "worker":
        spare_the_collector()
    interactions, lists = Stopwatch(), Stopwatch()
    store = asyncio.run(time_interactions(interactions, serving, workload))
    asyncio.run(time_lists(lists, serving, workload, store))
    found = {"interactions": interactions.medians(), "lists": lists.medians(), "load": os.getloadavg()[0]}
    print(json.dumps({"cpu_us_per_record": found, "seed": options.seed}, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
