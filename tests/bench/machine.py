"""Where and with what a benchmark ran: saved beside its numbers."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from deploy.local import LocalStack

REPOSITORY = Path(__file__).resolve().parents[2]
_LIBRARIES = ("faust-streaming", "aiokafka", "redis", "torch", "numpy", "orjson", "msgspec")


def benchmark_stack(directory: Path) -> LocalStack:
    """Return a stack of our own: Apache Kafka from KAFKA_HOME or from ../shared/kafka, else the embedded broker."""
    given = os.environ.get("KAFKA_HOME")
    home = Path(given) if given else REPOSITORY.parent / "shared" / "kafka"
    if given or (home / "libs").is_dir():
        return LocalStack(directory, "apache", "local", kafka_home=home, kafka_heap_megabytes=1_024)
    return LocalStack(directory, "embedded", "local")


def describe(stack: LocalStack, seed: int) -> dict[str, object]:
    """Return machine, versions, broker, seed and commit."""
    return {
        "broker": {"apache": "Apache Kafka", "embedded": "embedded broker (Tansu)"}[stack.broker_kind],
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _LIBRARIES},
        "seed": seed,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def rerank_command(*arguments: str) -> list[str]:
    """Return the command line of a `rerank` process of this environment."""
    return [sys.executable, "-m", "stream_app", *arguments]
