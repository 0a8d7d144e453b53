"""Throughput: `rerank worker` against a plain Faust application, one process each, on the same preloaded topics.

Interleaved rounds, alternating order; a fresh group and fresh users each run. A rate is taken from outside: records
committed by the group (interactions), slates by their Kafka timestamps (lists of 100), start-up left out.

    python -m tests.bench.bench_throughput [--rounds 3] [--interactions N] [--lists N] [--out out/bench.json]
"""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from deploy.local import LocalStack
from stream_app.settings import KafkaSettings, RedisSettings, Settings
from stream_app.state import UserRow
from stream_app.topic_admin import create_topics
from tests.bench.contender import BenchError, Contender, forget_users, naive, ours, run
from tests.bench.machine import benchmark_stack, describe
from tests.bench.report import plot, print_throughput
from tests.bench.topics import PARTITIONS, OutputReader, fill, group_watcher
from tests.bench.workload import Workload, slate_order

INTERACTIONS_PREFIX = "only-interactions."
LISTS_PREFIX = "only-lists."
WARM_UP_S = 0.5
REQUIRED_RATIOS = {"interactions": 15.0, "lists": 5.0}
NO_DEADLINE_MS = 86_400_000  # the lists are older than any deadline by the time a contender reads them


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """Everything that both contenders share."""

    stack: LocalStack
    directory: Path
    workload: Workload
    rows: Mapping[str, UserRow]
    seconds: float
    totals: Mapping[str, int]

    @property
    def artefact(self) -> Path:
        """The artefact that both serve."""
        return self.directory / "artefact"

    def environment(self, prefix: str, group_id: str) -> dict[str, str]:
        """Return what a contender reads from its environment."""
        return {
            **self.stack.environment(),
            "RERANK_ARTEFACT": str(self.artefact),
            "RERANK_TOPIC_PREFIX": prefix,
            "RERANK_GROUP_ID": group_id,
            "RERANK_REDIS__KEY_PREFIX": RedisSettings().key_prefix,  # where the rows are that both find
            "NAIVE_DATA_DIRECTORY": str(self.directory / group_id),
        }


async def preload(stack: LocalStack, workload: Workload, interactions: int, lists: int) -> None:
    """Create both sets of topics and fill one input of each."""
    kafka = KafkaSettings(bootstrap_servers=stack.bootstrap_servers)
    for prefix in (INTERACTIONS_PREFIX, LISTS_PREFIX):
        await create_topics(Settings(kafka=kafka, topic_prefix=prefix), PARTITIONS)
    await fill(stack.bootstrap_servers, f"{INTERACTIONS_PREFIX}interactions", workload.interactions(interactions))
    requests = workload.lists(lists, deadline_ms=NO_DEADLINE_MS)
    await fill(stack.bootstrap_servers, f"{LISTS_PREFIX}candidates", requests)


async def time_interactions(arena: Arena, contender: Contender, run_number: int) -> dict[str, Any]:
    """Run one contender on the interactions alone."""
    forget_users(arena.stack.redis_url)
    group_id, topic = f"{contender.name}-interactions-{run_number}", f"{INTERACTIONS_PREFIX}interactions"
    total = arena.totals["interactions"]
    async with group_watcher(arena.stack.bootstrap_servers, group_id) as watcher:
        progress = await run(
            contender,
            environment=arena.environment(INTERACTIONS_PREFIX, group_id),
            log_path=arena.directory / f"{group_id}.log",
            watcher=watcher,
            topic=topic,
            total=total,
            seconds=arena.seconds,
        )
    return {
        "per_second": round(progress.rate(total), 1),
        "cpu_us": round(progress.cpu_us_per_record(total), 1),
        "commits": asdict(progress),
    }


async def time_lists(
    arena: Arena, contender: Contender, run_number: int, reader: OutputReader
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Run one contender on the lists alone; return its numbers and the order of items of every slate."""
    forget_users(arena.stack.redis_url)
    contender.store_rows(arena.stack.redis_url, arena.rows, arena.artefact)
    group_id = f"{contender.name}-lists-{run_number}"
    async with group_watcher(arena.stack.bootstrap_servers, group_id) as watcher:
        progress = await run(
            contender,
            environment=arena.environment(LISTS_PREFIX, group_id),
            log_path=arena.directory / f"{group_id}.log",
            watcher=watcher,
            topic=f"{LISTS_PREFIX}candidates",
            total=arena.totals["lists"],
            seconds=arena.seconds,
        )
    slates = await reader.read_new()
    orders = dict(slate_order(record.value) for record in slates)
    moments_ms = sorted(record.timestamp for record in slates)
    timed_ms = [moment for moment in moments_ms if moment >= moments_ms[0] + 1_000.0 * WARM_UP_S]
    if len(timed_ms) < 100 or timed_ms[-1] <= timed_ms[0]:
        raise BenchError(f"{contender.name}: {len(slates)} slates are too few to time; load more lists")
    return {
        "per_second": round(1_000.0 * (len(timed_ms) - 1) / (timed_ms[-1] - timed_ms[0]), 1),
        "cpu_us": round(progress.cpu_us_per_record(arena.totals["lists"]), 1),
        "slates": len(slates),
        "seconds": round((timed_ms[-1] - timed_ms[0]) / 1_000.0, 2),
    }, orders


def require_same_order(left: Mapping[str, list[str]], right: Mapping[str, list[str]]) -> int:
    """Return how many lists both have ranked, all alike.

    Raises:
        BenchError: two slates of one list differ: the contenders do not do the same job.
    """
    shared = left.keys() & right.keys()
    different = [request_id for request_id in shared if left[request_id] != right[request_id]]
    if different or not shared:
        raise BenchError(f"{len(different)} of {len(shared)} shared lists ranked differently: the comparison is void")
    return len(shared)


async def rounds(arena: Arena, count: int) -> tuple[dict[str, dict[str, list[dict[str, Any]]]], int]:
    """Run all rounds; return numbers by load and contender, and how many slates were compared."""
    reader = OutputReader(arena.stack.bootstrap_servers, f"{LISTS_PREFIX}reranked")
    numbers: dict[str, dict[str, list[dict[str, Any]]]] = {
        load: {"ours": [], "naive": []} for load in ("interactions", "lists")
    }
    compared = 0
    for number in range(count):
        contenders = [ours(), naive()] if number % 2 == 0 else [naive(), ours()]
        orders = []
        for contender in contenders:
            numbers["interactions"][contender.name].append(await time_interactions(arena, contender, number))
        for contender in contenders:
            timed, order = await time_lists(arena, contender, number, reader)
            numbers["lists"][contender.name].append(timed)
            orders.append(order)
        compared += require_same_order(*orders)
        shown = {
            load: {name: runs[-1]["per_second"] for name, runs in sides.items()} for load, sides in numbers.items()
        }
        print(f"round {number + 1}/{count}: {json.dumps(shown)}", file=sys.stderr)  # noqa: T201
    return numbers, compared


def summarise(numbers: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return medians and ratios of each load."""
    summary: dict[str, Any] = {}
    for load, sides in numbers.items():
        medians = {name: median(one["per_second"] for one in runs) for name, runs in sides.items()}
        cpu = {name: median(one["cpu_us"] for one in runs) for name, runs in sides.items()}
        summary[load] = {
            "per_second": medians,
            "ratio": round(medians["ours"] / medians["naive"], 1),
            "cpu_us": cpu,
            "cpu_ratio": round(cpu["naive"] / cpu["ours"], 1),
            "required_ratio": REQUIRED_RATIOS[load],
        }
    return summary


def main() -> int:
    """Run the benchmark; exit 1 when a required ratio is missed on Apache Kafka."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interactions", type=int, default=600_000)
    parser.add_argument("--lists", type=int, default=60_000)
    parser.add_argument("--seconds", type=float, default=12.0, help="longest measured time of one run")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # a new group has no coordinator for a moment
    workload = Workload(seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="rerank-bench-") as name, benchmark_stack(Path(name)) as stack:
        about = describe(stack, options.seed)
        print(f"{about['broker']}, {about['cpu']}, {about['cores']} cores; loading", file=sys.stderr)  # noqa: T201
        directory = Path(name)
        workload.write_artefact(directory / "artefact")
        asyncio.run(preload(stack, workload, options.interactions, options.lists))
        arena = Arena(
            stack=stack,
            directory=directory,
            workload=workload,
            rows=workload.user_rows(directory / "artefact"),
            seconds=options.seconds,
            totals={"interactions": options.interactions, "lists": options.lists},
        )
        numbers, compared = asyncio.run(rounds(arena, options.rounds))
    summary = summarise(numbers)
    result = {**about, "workload": asdict(workload), "summary": summary, "same_order_slates": compared, "runs": numbers}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print_throughput(result)
    plot(result, options.out.with_suffix(".png"))
    missed = [load for load, found in summary.items() if found["ratio"] < found["required_ratio"]]
    return 1 if missed and about["broker"] == "Apache Kafka" else 0


if __name__ == "__main__":
    sys.exit(main())
