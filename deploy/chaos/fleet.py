"""The workers, and the process manager that starts again what ended by itself."""

import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import orjson

from deploy.chaos.skewed_worker import CLOCK_FILE, set_clock
from deploy.local.process import ChildProcess

READY_LINE = b'{"event":"ready"'
READY_TIMEOUT_S = 90.0
RESTART_AFTER_S = 0.5
LOOK_EVERY_S = 0.1
END_GRACE_S = 15.0  # of a worker's own 10 s, and the machine is busy


class Worker:
    """One `rerank worker` after the other under one number. Caller: one event loop."""

    def __init__(self, number: int, directory: Path, environment: Mapping[str, str]) -> None:
        """Describe it; nothing runs yet."""
        self.number = number
        self.starts = 0
        self.held = False  # True: a fault has it in hand, the fleet leaves it alone
        self.restart: asyncio.TimerHandle | None = None
        self._log_start_bytes = 0
        self._clock_path = directory / f"worker-{number}.clock"
        self._log_path = directory / f"worker-{number}.log"
        self._environment = {**environment, CLOCK_FILE: str(self._clock_path)}
        self.set_clock(ahead_s=0.0)
        self.child = self._new_child("")

    def _new_child(self, failpoint: str) -> ChildProcess:
        return ChildProcess(
            [sys.executable, "-m", "deploy.chaos.skewed_worker", "worker"],
            self._log_path,
            {**self._environment, "RERANK_FAILPOINT": failpoint},
            stop_grace_s=END_GRACE_S,
        )

    def start(self, failpoint: str = "") -> None:
        """Start it, unless it runs, with a fail-point where one is given; `is_ready` tells when it serves."""
        if self.child.is_running:
            return
        self._log_start_bytes = self._log_path.stat().st_size if self._log_path.exists() else 0
        self.starts += 1
        self.child = self._new_child(failpoint)
        self.child.start()

    def hold(self) -> None:
        """Take it in hand, also if it ended by itself and was to be started again."""
        self.held = True
        if self.restart is not None:
            self.restart.cancel()

    def release(self) -> None:
        """Start it and leave it to the fleet."""
        self.start()
        self.held = False

    def set_clock(self, *, ahead_s: float) -> None:
        """Set its wall clock, whether it runs or not; 0: to the true time."""
        set_clock(self._clock_path, ahead_s=ahead_s)

    @property
    def is_ready(self) -> bool:
        """Whether the process of the latest start has announced itself."""
        return self.child.is_running and READY_LINE in self._output()

    def last_words(self) -> str:
        """Return why the latest process says it failed, or how its log ends."""
        lines = self._output().decode(errors="replace").splitlines()
        failed = [line for line in lines if "event=failed" in line or line.startswith("rerank: ")]
        return _told((failed or lines or [""])[-1])

    def _output(self) -> bytes:
        if not self.child.log_path.exists():
            return b""
        with self.child.log_path.open("rb") as log:
            log.seek(self._log_start_bytes)
            return log.read()


def _told(line: str) -> str:
    """Return what a log line tells, without its frame and traceback."""
    try:
        told = orjson.loads(line)["event"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        told = line
    return str(told).removeprefix("event=failed ")[:200]


class Fleet:
    """All workers of a run. `say` hears of every end that nobody asked for."""

    def __init__(self, workers: list[Worker], say: Callable[[str], None]) -> None:
        """Own the workers."""
        self.workers = workers
        self.ended_by_themselves: list[str] = []
        self.slow_ends: list[str] = []
        self._say = say

    def start(self) -> None:
        """Start all."""
        for worker in self.workers:
            worker.start()

    async def ready(self, timeout_s: float = READY_TIMEOUT_S) -> bool:
        """Wait until every worker serves; return whether that came to pass in time."""
        until_s = time.monotonic() + timeout_s
        while not all(worker.is_ready for worker in self.workers):
            if time.monotonic() > until_s:
                return False
            await asyncio.sleep(LOOK_EVERY_S)
        return True

    async def supervise(self) -> None:
        """Start again what ended by itself, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for worker in self.workers:
                if not worker.held and not worker.child.is_running:
                    code = worker.child.popen.returncode
                    told = f"worker {worker.number} ended by itself, exit code {code}: {worker.last_words()}"
                    self.ended_by_themselves.append(told)
                    self._say(told)
                    worker.held = True
                    worker.restart = asyncio.get_running_loop().call_later(RESTART_AFTER_S, worker.release)

    async def terminate(self, worker: Worker) -> int | None:
        """SIGTERM, wait for the end, note an end that took longer than a worker may take; return the exit code."""
        announced = worker.is_ready
        started_s = time.monotonic()
        code = await asyncio.to_thread(worker.child.stop)
        took_s = time.monotonic() - started_s
        if announced and code is not None and code < 0:
            self.slow_ends.append(f"worker {worker.number}: SIGTERM, exit code {code} after {took_s:.1f} s")
        return code

    async def stop(self) -> None:
        """End all at once."""
        for worker in self.workers:
            worker.hold()
        await asyncio.gather(*(self.terminate(worker) for worker in self.workers))

    def leftovers(self) -> list[int]:
        """Return the process ids of workers that still run."""
        return [worker.child.pid for worker in self.workers if worker.starts and worker.child.is_running]
