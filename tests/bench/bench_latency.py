"""Open-loop latency: lists arrive by a seeded Poisson process, whatever the worker does meanwhile.

A latency runs from the moment a list was due to be sent, not from when it was, to the moment its slate was read:
a stalled worker or a stalled generator counts against the result, and nothing is left out.

    python -m tests.bench.bench_latency [--rates 20 200 500] [--seconds 10] [--out out/bench-latency.json]
"""

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from deploy.local import ChildProcess, LocalStack
from stream_app.settings import KafkaSettings, Settings
from stream_app.topic_admin import create_topics
from tests.bench.machine import REPOSITORY, benchmark_stack, describe, rerank_command
from tests.bench.topics import PARTITIONS
from tests.bench.workload import Workload

INTERACTIONS_BESIDE_PER_S = 1_000
WARM_UP_S = 2.0
SETTLE_S = 3.0
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Lists a second, and interactions a second beside them."""

    lists_per_s: int
    interactions_per_s: int


class Probe:
    """Sends on schedule and notes when each slate is read. Owner: one event loop."""

    def __init__(self, producer: AIOKafkaProducer, consumer: AIOKafkaConsumer) -> None:
        """Use connected clients."""
        self._producer = producer
        self._consumer = consumer
        self._due_s: dict[str, float] = {}
        self._all_answered = asyncio.Event()
        self.latency_ms: dict[str, float] = {}
        self.outcomes: Counter[str] = Counter()
        self.late_ms: list[float] = []

    async def read(self) -> None:
        """Note the arrival of slates, for ever."""
        async for record in self._consumer:
            read_s = time.monotonic()
            request_id = orjson.loads(record.value)["request_id"]
            if request_id in self._due_s:
                self.latency_ms[request_id] = 1_000.0 * (read_s - self._due_s.pop(request_id))
                self.outcomes[dict(record.headers)["rerank-outcome"].decode()] += 1
            if not self._due_s:
                self._all_answered.set()

    async def send(self, topic: str, records: Sequence[tuple[bytes, bytes]], due_s: Sequence[float]) -> None:
        """Send each record when it is due; one that is overdue at once."""
        for (key, value), moment_s in zip(records, due_s, strict=True):
            await asyncio.sleep(max(0.0, moment_s - time.monotonic()))
            self.late_ms.append(1_000.0 * (time.monotonic() - moment_s))
            if "candidates" in topic:
                self._due_s[orjson.loads(value)["request_id"]] = moment_s
                self._all_answered.clear()
            await self._producer.send(topic, value, key)

    async def settle(self) -> int:
        """Wait for the last slates, a little; return how many lists stay without one."""
        try:
            async with asyncio.timeout(SETTLE_S):
                await self._all_answered.wait()
        except TimeoutError:
            pass
        return len(self._due_s)


@asynccontextmanager
async def clients(stack: LocalStack, reranked: str) -> AsyncIterator[tuple[AIOKafkaProducer, AIOKafkaConsumer]]:
    """Connect a producer that never lingers and a consumer at the end of the output."""
    producer = AIOKafkaProducer(bootstrap_servers=stack.bootstrap_servers, acks=1)
    consumer = AIOKafkaConsumer(reranked, bootstrap_servers=stack.bootstrap_servers, fetch_max_wait_ms=5)
    await producer.start()
    await consumer.start()
    try:
        yield producer, consumer
    finally:
        await producer.stop()
        await consumer.stop()


async def measure(stack: LocalStack, prefix: str, workload: Workload, load: Load, seconds: float) -> dict[str, Any]:
    """Run one load; return percentiles over everything due after the warm-up."""
    rng = np.random.default_rng(workload.seed)
    total_s = WARM_UP_S + seconds
    lists = list(workload.lists(int(load.lists_per_s * total_s)))
    lists_due = np.cumsum(rng.exponential(1.0 / load.lists_per_s, len(lists)))
    beside = list(workload.interactions(int(load.interactions_per_s * total_s)))
    beside_due = np.arange(len(beside)) / max(1, load.interactions_per_s)
    async with clients(stack, f"{prefix}reranked") as (producer, consumer):
        probe = Probe(producer, consumer)
        reading = asyncio.create_task(probe.read())
        started_s = time.monotonic() + 0.5
        await asyncio.gather(
            probe.send(f"{prefix}candidates", lists, (started_s + lists_due).tolist()),
            probe.send(f"{prefix}interactions", beside, (started_s + beside_due).tolist()),
        )
        unanswered = await probe.settle()
        reading.cancel()
    timed = {f"r-{n}" for n, due_s in enumerate(lists_due.tolist()) if due_s >= WARM_UP_S}
    latencies = [latency for request_id, latency in probe.latency_ms.items() if request_id in timed]
    return {
        **asdict(load),
        **{f"p{p}_ms": round(float(np.percentile(latencies, p)), 2) for p in PERCENTILES},
        "timed": len(latencies),
        "unanswered": unanswered,
        "outcomes": dict(probe.outcomes),
        "generator_late_p99_ms": round(float(np.percentile(probe.late_ms, 99)), 2),
    }


async def measure_all(
    stack: LocalStack, directory: Path, workload: Workload, rates: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Start one worker and run every load through it."""
    prefix = "latency."
    settings = Settings(kafka=KafkaSettings(bootstrap_servers=stack.bootstrap_servers), topic_prefix=prefix)
    await create_topics(settings, PARTITIONS)
    environment = {
        **os.environ,
        **stack.environment(),
        "RERANK_ARTEFACT": str(directory / "artefact"),
        "RERANK_TOPIC_PREFIX": prefix,
        "PYTHONPATH": str(REPOSITORY),
    }
    child = ChildProcess(rerank_command("worker"), directory / "worker.log", environment, stdout=subprocess.PIPE)
    child.start()
    try:
        output = child.popen.stdout
        if output is None or b'"ready"' not in await asyncio.to_thread(output.readline):
            raise RuntimeError(f"the worker did not get ready; its log says:\n{child.log_tail()}")
        loads = [
            Load(lists_per_s=rate, interactions_per_s=beside)
            for beside in (0, INTERACTIONS_BESIDE_PER_S)
            for rate in rates
        ]
        found = []
        for load in loads:
            found.append(await measure(stack, prefix, workload, load, seconds))
            print(json.dumps(found[-1]), file=sys.stderr)  # noqa: T201
    finally:
        child.stop()
    return found


def main() -> None:
    """Print a line a load and save them all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", type=int, nargs="+", default=[20, 200, 500])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/bench-latency.json"))
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics are a moment without leaders
    workload = Workload(seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="rerank-bench-") as name, benchmark_stack(Path(name)) as stack:
        about = describe(stack, options.seed)
        workload.write_artefact(Path(name) / "artefact")
        runs = asyncio.run(measure_all(stack, Path(name), workload, options.rates, options.seconds))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, "workload": asdict(workload), "runs": runs}, indent=2) + "\n")
    lines = [
        f"{about['broker']}, {about['cpu']}, {about['cores']} cores (load {about['load_before']} before)",
        f"{'lists/s':>8}{'+ interactions/s':>18}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'timed':>8}{'unanswered':>12}",
    ]
    for run in runs:
        rates = f"{run['lists_per_s']:>8}{run['interactions_per_s']:>18}"
        lines.append(
            f"{rates}{run['p50_ms']:>9}{run['p90_ms']:>9}{run['p99_ms']:>9}{run['timed']:>8}{run['unanswered']:>12}"
        )
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
