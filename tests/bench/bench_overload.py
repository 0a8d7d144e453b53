"""Three times the capacity, open loop: lists keep coming at a fixed rate, whatever the worker does.

First the capacity: a backlog without deadlines. Then, for a while, three times as many lists a second, each with a
deadline. Then the capacity again, because machines change their pace: shares are of the mean of both. What should be
seen: nearly as many lists ranked as at capacity, what is late shed before any work, the p99 of what is answered under
its deadline, memory flat.

    python -m tests.bench.bench_overload [--seconds 120] [--times 3] [--deadline-ms 500] [--out out/bench-overload.json]
"""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from deploy.local import LocalStack
from stream_app.settings import KafkaSettings, Settings
from stream_app.topic_admin import create_topics
from tests.bench.machine import benchmark_stack, describe
from tests.bench.topics import PARTITIONS, fill, partition_of
from tests.bench.worker import BenchWorker, bench_worker
from tests.bench.workload import Workload
from tests.worker_health import total, until_metrics

PREFIX = "overload."
TICK_S = 0.02
POOL = 20_000
NO_DEADLINE_MS = 86_400_000
WARM_UP_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Lists that one worker ranks; the second number holds on a machine that others use too."""

    per_s: float
    per_cpu_s: float


async def look(worker: BenchWorker) -> dict[str, float]:
    """Return what the worker has done so far and what it holds."""
    found = await worker.samples()
    outcomes = {name: total(found, "rerank_requests_total", name) for name in ("ranked", "fallback", "shed")}
    return {"at_s": time.monotonic(), **asdict(worker.footprint()), **outcomes}


async def capacity(stack: LocalStack, worker: BenchWorker, workload: Workload, lists: int) -> Capacity:
    """Return lists ranked out of a backlog without deadlines, a second and a CPU second; the first fifth left out."""
    requests = workload.lists(lists, deadline_ms=NO_DEADLINE_MS)
    looks = [await look(worker)]
    before = looks[0]["ranked"]
    await fill(stack.bootstrap_servers, f"{PREFIX}candidates", requests)
    while looks[-1]["ranked"] < before + lists:
        looks.append(await look(worker))
        await asyncio.sleep(0.1)
    timed = [one for one in looks if WARM_UP_SHARE * lists <= one["ranked"] - before < lists]
    if len(timed) < 2:
        raise RuntimeError(f"{lists} lists were ranked before anybody looked; give more with --lists")
    ranked, seconds, cpu_s = (timed[-1][name] - timed[0][name] for name in ("ranked", "at_s", "cpu_s"))
    return Capacity(per_s=ranked / seconds, per_cpu_s=ranked / cpu_s)


class Flood:
    """Sends lists at a fixed rate, in batches of TICK_S, encoded before."""

    def __init__(self, producer: AIOKafkaProducer, workload: Workload, deadline_ms: int) -> None:
        """Encode a pool of lists that is sent round and round."""
        self._producer = producer
        self._pools: dict[int, list[tuple[bytes, bytes]]] = defaultdict(list)
        for key, value in workload.lists(POOL, deadline_ms=deadline_ms):
            self._pools[partition_of(key)].append((key, value))
        self.sent = 0
        self.late_ms: list[float] = []

    async def run(self, per_s: float, seconds: float) -> None:
        """Send for so long; a late tick sends at once what it owes."""
        started_s, tick = time.monotonic(), 0
        while (due_s := started_s + tick * TICK_S) < started_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            self.late_ms.append(1_000.0 * (time.monotonic() - due_s))
            owed = int(per_s * TICK_S * (tick + 1)) - self.sent
            for partition in range(PARTITIONS):
                await self._send(partition, (owed + partition) // PARTITIONS)
            tick += 1

    async def _send(self, partition: int, count: int) -> None:
        pool, builder = self._pools[partition], self._producer.create_batch()
        now_ms = int(time.time() * 1_000)
        for n in range(count):
            key, value = pool[(self.sent + n) % len(pool)]
            if builder.append(key=key, value=value, timestamp=now_ms) is None:
                break
            self.sent += 1
        await self._producer.send_batch(builder, f"{PREFIX}candidates", partition=partition)


async def watch(worker: BenchWorker, looks: list[dict[str, float]]) -> None:
    """Note every second what the worker has done and what it holds."""
    while True:
        looks.append(await look(worker))
        await asyncio.sleep(1.0)


async def slates_since(stack: LocalStack, offsets: Mapping[int, int]) -> dict[str, list[float]]:
    """Return the `timing_ms.total` of every slate from these offsets on, by outcome."""
    consumer = AIOKafkaConsumer(bootstrap_servers=stack.bootstrap_servers, enable_auto_commit=False)
    await consumer.start()
    totals_ms: dict[str, list[float]] = defaultdict(list)
    try:
        consumer.assign([TopicPartition(f"{PREFIX}reranked", partition) for partition in range(PARTITIONS)])
        for partition, offset in offsets.items():
            consumer.seek(TopicPartition(f"{PREFIX}reranked", partition), offset)
        while batch := await consumer.getmany(timeout_ms=1_500):
            for record in (record for records in batch.values() for record in records):
                slate = orjson.loads(record.value)
                totals_ms[slate["outcome"]].append(slate["timing_ms"]["total"])
    finally:
        await consumer.stop()
    return totals_ms


async def end_offsets(stack: LocalStack) -> dict[int, int]:
    """Return where each partition of the output ends, by reading them: the embedded broker's end offsets are wrong."""
    consumer = AIOKafkaConsumer(bootstrap_servers=stack.bootstrap_servers, enable_auto_commit=False)
    await consumer.start()
    ends = dict.fromkeys(range(PARTITIONS), 0)
    try:
        partitions = [TopicPartition(f"{PREFIX}reranked", partition) for partition in range(PARTITIONS)]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        while batch := await consumer.getmany(timeout_ms=1_500):
            for where, records in batch.items():
                ends[where.partition] = records[-1].offset + 1
    finally:
        await consumer.stop()
    return ends


def summarise(
    looks: Sequence[dict[str, float]],
    totals_ms: dict[str, list[float]],
    capacities: Sequence[Capacity],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the numbers of the overloaded time, its first fifth left out of rates and memory."""
    timed = looks[int(WARM_UP_SHARE * len(looks)) :]
    seconds = timed[-1]["at_s"] - timed[0]["at_s"]
    cpu_s = timed[-1]["cpu_s"] - timed[0]["cpu_s"]
    rates = {name: (timed[-1][name] - timed[0][name]) / seconds for name in ("ranked", "fallback", "shed")}
    answered = totals_ms["ranked"] + totals_ms["fallback"]
    at_most = Capacity(per_s=mean(one.per_s for one in capacities), per_cpu_s=mean(one.per_cpu_s for one in capacities))
    ranked_cpu_share = rates["ranked"] / at_most.per_cpu_s
    others = rates["fallback"] + rates["shed"]
    other_cpu_us = 1e6 * (cpu_s / seconds - ranked_cpu_share) / max(1.0, others)
    slope = np.polyfit([look["at_s"] for look in timed], [look["rss_mb"] for look in timed], 1)[0]
    return {
        "capacity_per_s": [round(one.per_s, 1) for one in capacities],
        "capacity_per_cpu_s": [round(one.per_cpu_s, 1) for one in capacities],
        "offered_per_s": round(options.times * capacities[0].per_s, 1),
        **{f"{name}_per_s": round(rate, 1) for name, rate in rates.items()},
        "cpu_share": round(cpu_s / seconds, 3),
        "ranked_cpu_us": round(1e6 / at_most.per_cpu_s, 1),
        "shed_or_fallback_cpu_us": round(other_cpu_us, 1),
        "ranked_share_of_capacity": round(rates["ranked"] / at_most.per_s, 3),
        "answered_share_of_capacity": round((rates["ranked"] + rates["fallback"]) / at_most.per_s, 3),
        "deadline_ms": options.deadline_ms,
        "answered_p50_ms": round(float(np.percentile(answered, 50)), 1),
        "answered_p99_ms": round(float(np.percentile(answered, 99)), 1),
        "answered_max_ms": round(max(answered), 1),
        "answered_late": {
            name: round(float(np.mean(np.array(totals_ms[name]) > options.deadline_ms)), 4)
            for name in ("ranked", "fallback")
            if totals_ms[name]
        },
        "rss_mb": [round(timed[0]["rss_mb"], 1), round(timed[-1]["rss_mb"], 1)],
        "rss_slope_mb_per_minute": round(60.0 * float(slope), 2),
        "seconds": round(seconds, 1),
        "slates": {name: len(values) for name, values in totals_ms.items()},
    }


async def measure(
    stack: LocalStack, directory: Path, workload: Workload, options: argparse.Namespace
) -> dict[str, Any]:
    """Find the capacity, then flood."""
    settings = Settings(kafka=KafkaSettings(bootstrap_servers=stack.bootstrap_servers), topic_prefix=PREFIX)
    await create_topics(settings, PARTITIONS)
    producer = AIOKafkaProducer(bootstrap_servers=stack.bootstrap_servers, max_batch_size=4 * 1_048_576, acks=1)
    await producer.start()
    try:
        async with bench_worker(stack, directory, PREFIX, {}) as worker:
            first = await capacity(stack, worker, workload, options.lists)
            print(first, file=sys.stderr)  # noqa: T201
            before, looks = await end_offsets(stack), list[dict[str, float]]()
            flood = Flood(producer, workload, options.deadline_ms)
            watching = asyncio.create_task(watch(worker, looks))
            await flood.run(options.times * first.per_s, options.seconds)
            watching.cancel()
            await until_metrics(
                worker.port,
                lambda found: total(found, "rerank_requests_total") >= flood.sent + options.lists,
                timeout_s=300.0,
            )
            totals_ms = await slates_since(stack, before)
            second = await capacity(stack, worker, workload, options.lists)
        summary = summarise(looks, totals_ms, (first, second), options)
        return {
            **summary,
            "sent": flood.sent,
            "generator_late_p99_ms": round(float(np.percentile(flood.late_ms, 99)), 1),
        }
    finally:
        await producer.stop()


def main() -> None:
    """Print and save the numbers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--deadline-ms", type=int, default=500)
    parser.add_argument("--lists", type=int, default=40_000, help="the backlog that shows the capacity")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/bench-overload.json"))
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics are a moment without leaders
    workload = Workload(seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="rerank-bench-") as name, benchmark_stack(Path(name)) as stack:
        about = describe(stack, options.seed)
        workload.write_artefact(Path(name) / "artefact")
        found = asyncio.run(measure(stack, Path(name), workload, options))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, "workload": asdict(workload), **found}, indent=2) + "\n")
    print(f"{about['broker']}, {about['cpu']}, {about['cores']} cores (load {about['load_before']} before)")  # noqa: T201
    print(json.dumps(found, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
