"""A soak: millions of interactions through one worker, with lists and rubbish between them; is anything growing?

Memory, descriptors and asyncio tasks of the worker are noted every second, and whenever it has done all it was sent and
rests. What is on its way moves memory by ten MB, more on a slower machine, so what stays is fitted: memory at rest
against the interactions applied. The first third is left out: a row grows until its ring of items is full (50
interactions of its user), and the cache until it is full of such rows.

    python -m tests.bench.bench_soak [--interactions 4000000] [--users 10000] [--cached-users 5000]
"""

import argparse
import asyncio
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.local import LocalStack
from stream_app.settings import KafkaSettings, Settings
from stream_app.topic_admin import create_topics
from tests.bench.machine import benchmark_stack, describe
from tests.bench.topics import PARTITIONS, fill
from tests.bench.worker import BenchWorker, bench_worker
from tests.bench.workload import Workload
from tests.worker_health import total

PREFIX = "soak."
CHUNK = 100_000  # interactions that are produced together
LISTS_A_CHUNK = 2_000
REST_S = 1.0
BAD_EVERY = 1_000
NO_DEADLINE_MS = 86_400_000
WARM_UP_SHARE = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the worker has done and what it holds."""

    at_s: float
    at_rest: bool
    applied: int
    dead_letters: int
    slates: int
    rss_mb: float
    descriptors: int
    tasks: int


async def look(worker: BenchWorker, *, at_rest: bool = False) -> Look:
    """Ask the worker and the operating system."""
    found, held = await worker.samples(), worker.footprint()
    return Look(
        at_s=round(time.monotonic(), 2),
        at_rest=at_rest,
        applied=int(total(found, "rerank_events_total", "applied")),
        dead_letters=int(total(found, "rerank_dlq_total")),
        slates=int(total(found, "rerank_requests_total")),
        rss_mb=round(held.rss_mb, 2),
        descriptors=held.descriptors,
        tasks=int(total(found, "rerank_event_loop_tasks")),
    )


def with_rubbish(records: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the records, every BAD_EVERY-th of them cut short."""
    for n, (key, value) in enumerate(records):
        yield key, value[:20] if n % BAD_EVERY == 0 else value


async def soak(
    stack: LocalStack, directory: Path, workload: Workload, options: argparse.Namespace
) -> tuple[list[Look], int]:
    """Send chunk after chunk, each when the one before is done; return what was noted, and how many lists were sent."""
    settings = Settings(kafka=KafkaSettings(bootstrap_servers=stack.bootstrap_servers), topic_prefix=PREFIX)
    await create_topics(settings, PARTITIONS)
    chunks = max(1, options.interactions // CHUNK)
    looks: list[Look] = []
    async with bench_worker(stack, directory, PREFIX, {"RERANK_CACHED_USERS": str(options.cached_users)}) as worker:
        for n in range(1, chunks + 1):
            some = replace(workload, seed=workload.seed + n)
            await fill(stack.bootstrap_servers, f"{PREFIX}interactions", with_rubbish(some.interactions(CHUNK)))
            lists = some.lists(LISTS_A_CHUNK, deadline_ms=NO_DEADLINE_MS)
            await fill(stack.bootstrap_servers, f"{PREFIX}candidates", lists)
            while not looks or not _has_done(looks[-1], n):
                await asyncio.sleep(1.0)
                looks.append(await look(worker))
            await asyncio.sleep(REST_S)
            looks.append(await look(worker, at_rest=True))
    return looks, chunks * LISTS_A_CHUNK


def _has_done(found: Look, chunks: int) -> bool:
    return found.applied + found.dead_letters >= chunks * CHUNK and found.slates >= chunks * LISTS_A_CHUNK


def summarise(looks: Sequence[Look], lists: int) -> dict[str, Any]:
    """Return the slope at rest, and ranges, after the first third of the interactions."""
    timed = [one for one in looks if one.applied >= WARM_UP_SHARE * looks[-1].applied]
    resting = [one for one in timed if one.at_rest]
    millions, rest_mb = np.array([one.applied for one in resting]) / 1e6, [one.rss_mb for one in resting]
    (slope, _), covariance = np.polyfit(millions, rest_mb, 1, cov=True)
    return {
        "applied": looks[-1].applied,
        "dead_letters": looks[-1].dead_letters,
        "slates": looks[-1].slates,
        "lists": lists,
        "seconds": round(looks[-1].at_s - looks[0].at_s, 1),
        "rss_slope_mb_per_million": round(float(slope), 2),
        "rss_slope_standard_error": round(float(np.sqrt(covariance[0, 0])), 2),
        "rss_at_rest_mb": {"from": rest_mb[0], "to": rest_mb[-1], "least": min(rest_mb), "most": max(rest_mb)},
        "rss_most_mb": max(one.rss_mb for one in timed),
        "descriptors": [min(one.descriptors for one in timed), max(one.descriptors for one in timed)],
        "tasks": [min(one.tasks for one in timed), max(one.tasks for one in timed)],
    }


def plot(looks: Sequence[Look], path: Path) -> None:
    """Draw memory over interactions; nothing where matplotlib is missing."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - the extra `train` brings it
    except ModuleNotFoundError:
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(8, 3.5))
    resting = [one for one in looks if one.at_rest]
    axis.plot(
        [one.applied / 1e6 for one in looks], [one.rss_mb for one in looks], color="#b0c4de", label="every second"
    )
    axis.plot([one.applied / 1e6 for one in resting], [one.rss_mb for one in resting], color="#3b6ea5", label="at rest")
    axis.legend(loc="lower right")
    axis.axvline(WARM_UP_SHARE * looks[-1].applied / 1e6, color="#b0b0b0", linestyle="--")
    axis.set(xlabel="interactions applied, millions", ylabel="resident memory, MB", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Print and save the numbers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--interactions", type=int, default=4_000_000)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--cached-users", type=int, default=5_000, help="fewer than there are: the cache is full")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/bench-soak.json"))
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics are a moment without leaders
    workload = Workload(seed=options.seed, users=options.users)
    with tempfile.TemporaryDirectory(prefix="rerank-bench-") as name, benchmark_stack(Path(name)) as stack:
        about = describe(stack, options.seed)
        workload.write_artefact(Path(name) / "artefact")
        looks, lists = asyncio.run(soak(stack, Path(name), workload, options))
    found = summarise(looks, lists)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    saved = {**about, "workload": asdict(workload), **found, "looks": [asdict(one) for one in looks]}
    options.out.write_text(json.dumps(saved, indent=2) + "\n")
    plot(looks, options.out.with_suffix(".png"))
    print(f"{about['broker']}, {about['cpu']}, {about['cores']} cores (load {about['load_before']} before)")  # noqa: T201
    print(json.dumps(found, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
