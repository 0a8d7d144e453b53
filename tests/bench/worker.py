"""One worker process for a benchmark that watches it from outside: its memory, descriptors and /metrics."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from deploy.local import ChildProcess, LocalStack
from tests.bench.machine import REPOSITORY, rerank_command
from tests.worker_health import Samples, samples

MEGABYTE = 1_048_576


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a process holds."""

    rss_mb: float
    descriptors: int
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchWorker:
    """A worker that is ready."""

    child: ChildProcess
    port: int

    async def samples(self) -> Samples:
        """Return its telemetry."""
        return await samples(self.port)

    def footprint(self) -> Footprint:
        """Return its memory, descriptors and CPU seconds."""
        process = psutil.Process(self.child.pid)
        times = process.cpu_times()
        return Footprint(
            rss_mb=process.memory_info().rss / MEGABYTE,
            descriptors=process.num_fds(),
            cpu_s=times.user + times.system,
        )


@asynccontextmanager
async def bench_worker(
    stack: LocalStack, directory: Path, prefix: str, settings: Mapping[str, str]
) -> AsyncIterator[BenchWorker]:
    """Run one worker with the artefact in `directory`, its topics under `prefix`, for the length of a block.

    Raises:
        RuntimeError: it did not get ready.
    """
    environment = {
        **os.environ,
        **stack.environment(),
        "RERANK_ARTEFACT": str(directory / "artefact"),
        "RERANK_TOPIC_PREFIX": prefix,
        "RERANK_HTTP__PORT": "0",
        "PYTHONPATH": str(REPOSITORY),
        **settings,
    }
    child = ChildProcess(rerank_command("worker"), directory / "worker.log", environment, stdout=subprocess.PIPE)
    child.start()
    try:
        output = child.popen.stdout
        line = b"" if output is None else await asyncio.to_thread(output.readline)
        if b'"ready"' not in line:
            raise RuntimeError(f"the worker did not get ready; its log says:\n{child.log_tail()}")
        ready: dict[str, Any] = orjson.loads(line)
        yield BenchWorker(child=child, port=ready["http_port"])
    finally:
        child.stop()
