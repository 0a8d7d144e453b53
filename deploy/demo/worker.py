"""The worker of the demo: a process of its own, as in production."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.demo.errors import DemoError
from deploy.local import ChildProcess

_READY_TIMEOUT_S = 90.0
_POLL_S = 0.05


class WorkerProcess:
    """`rerank worker`, started and ready inside the block, ended after it."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        """Describe the process; its logs go below `directory`, `environment` comes on top of ours."""
        self._announcements = directory / "worker.out"
        self._environment = {**os.environ, **environment}
        self._log_path = directory / "worker.log"
        self._child: ChildProcess | None = None

    def __enter__(self) -> Self:
        """Start, and wait until its partitions are assigned and its model is warm.

        Raises:
            DemoError: it ended, or was not ready in time; the message ends with its log.
        """
        with self._announcements.open("wb") as announcements:
            self._child = ChildProcess(
                [sys.executable, "-m", "stream_app", "worker"],
                self._log_path,
                self._environment,
                stdout=announcements,
            )
            try:
                self._child.start()
                self._wait_until_ready()
            except BaseException:
                self._child.stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """SIGTERM, and wait; whatever happened."""
        if self._child is not None:
            self._child.stop()

    def check(self) -> None:
        """Raise DemoError when the process has ended."""
        if self._child is not None and not self._child.is_running:
            raise DemoError(
                f"worker: ended with exit code {self._child.popen.returncode}, the lists it had are unanswered; "
                f"its last words:\n{self._child.log_tail()}"
            )

    def _wait_until_ready(self) -> None:
        give_up_s = time.monotonic() + _READY_TIMEOUT_S
        while b'"ready"' not in self._announcements.read_bytes():
            self.check()
            if time.monotonic() > give_up_s:
                tail = self._child.log_tail() if self._child else ""
                raise DemoError(f"worker: not ready after {_READY_TIMEOUT_S:.0f} s, stopped; its last words:\n{tail}")
            time.sleep(_POLL_S)
