"""Start-up with 100,000 items: process start to `ready` (group joined, model warm) to first slate, CPU and memory.

python -m tests.bench.bench_startup [--rounds 3] [--items 100000] [--out out/bench-startup.json]
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
from dataclasses import asdict
from pathlib import Path
from statistics import median

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from deploy.local import ChildProcess, LocalStack
from stream_app.settings import KafkaSettings, Settings
from stream_app.topic_admin import create_topics
from tests.bench.machine import REPOSITORY, benchmark_stack, describe, rerank_command
from tests.bench.topics import PARTITIONS
from tests.bench.workload import Workload

FIRST_SLATE_LIMIT_S = 3.0  # after the group has joined
RESIDENT_LIMIT_MB = 500
DEADLINE_MS = 60_000


async def start_once(stack: LocalStack, directory: Path, workload: Workload, number: int) -> dict[str, float]:
    """Start a worker with one list waiting for it; return seconds and megabytes."""
    settings = Settings(kafka=KafkaSettings(bootstrap_servers=stack.bootstrap_servers), topic_prefix=f"start-{number}.")
    await create_topics(settings, PARTITIONS)
    producer = AIOKafkaProducer(bootstrap_servers=stack.bootstrap_servers)
    consumer = AIOKafkaConsumer(
        f"{settings.topic_prefix}reranked",
        bootstrap_servers=stack.bootstrap_servers,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=5,
    )
    await producer.start()
    await consumer.start()
    environment = {
        **os.environ,
        **stack.environment(),
        "RERANK_ARTEFACT": str(directory / "artefact"),
        "RERANK_TOPIC_PREFIX": settings.topic_prefix,
        "RERANK_GROUP_ID": f"start-{number}",
        "PYTHONPATH": str(REPOSITORY),
    }
    child = ChildProcess(
        rerank_command("worker"), directory / f"worker-{number}.log", environment, stdout=subprocess.PIPE
    )
    try:
        [(key, value)] = workload.lists(1, deadline_ms=DEADLINE_MS)
        await producer.send_and_wait(f"{settings.topic_prefix}candidates", value, key)
        started_s = time.monotonic()
        child.start()
        output = child.popen.stdout
        ready = await asyncio.to_thread(output.readline) if output else b""
        ready_s = time.monotonic()
        if b'"ready"' not in ready:
            raise RuntimeError(f"the worker did not get ready; its log says:\n{child.log_tail()}")
        async with asyncio.timeout(30.0):
            await consumer.getone()
        slate_s = time.monotonic()
        process = psutil.Process(child.pid)
        memory, times = process.memory_info(), process.cpu_times()
    finally:
        child.stop()
        await producer.stop()
        await consumer.stop()
    return {
        "ready_s": round(ready_s - started_s, 3),
        "first_slate_after_ready_s": round(slate_s - ready_s, 3),
        "first_slate_s": round(slate_s - started_s, 3),
        "cpu_s": round(times.user + times.system, 2),
        "resident_mb": round(memory.rss / 1e6, 1),
    }


async def measure(stack: LocalStack, directory: Path, workload: Workload, rounds: int) -> list[dict[str, float]]:
    """Start the worker `rounds` times, each on topics and a group of its own."""
    return [await start_once(stack, directory, workload, number) for number in range(rounds)]


def main() -> int:
    """Print the medians; exit 1 when start-up or memory is over its limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/bench-startup.json"))
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics are a moment without leaders
    workload = Workload(seed=options.seed, items=options.items)
    with tempfile.TemporaryDirectory(prefix="rerank-bench-") as name, benchmark_stack(Path(name)) as stack:
        about = describe(stack, options.seed)
        workload.write_artefact(Path(name) / "artefact")
        runs = asyncio.run(measure(stack, Path(name), workload, options.rounds))
    medians = {field: median(one[field] for one in runs) for field in runs[0]}
    result = {**about, "workload": asdict(workload), "median": medians, "runs": runs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{about['broker']}, {options.items:,} items, load {about['load_before']}: {json.dumps(medians)}")  # noqa: T201
    within = medians["first_slate_after_ready_s"] < FIRST_SLATE_LIMIT_S and medians["resident_mb"] < RESIDENT_LIMIT_MB
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
