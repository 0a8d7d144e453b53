"""What the local servers have in common: ports, start, readiness, stop.

A server is ready when it answers its own protocol *and* is ours: between choosing a port and binding it
somebody else may have taken it, and an open port alone would then be taken for a good start.
"""

import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from deploy.local.errors import LocalStackError
from deploy.local.ports import LOOPBACK, free_ports
from deploy.local.process import ChildProcess

_PORT_TAKEN = ("address already in use", "address in use", "addrinuse")
_PORT_ATTEMPTS = 4


class PortTakenError(LocalStackError):
    """Somebody took the port between choosing and binding it; other ports may work."""


class LocalServer(ABC):
    """One server on loopback. Its files lie in a new folder below `directory`, named after it.

    Caller: the thread that owns the stack. Affects: one child process.
    """

    name: ClassVar[str]
    port_count: ClassVar[int] = 1
    ready_timeout_s: ClassVar[float] = 60.0

    def __init__(self, directory: Path) -> None:
        """Create the folder; nothing runs yet."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=directory))
        self.ports: list[int] = []
        self._child: ChildProcess | None = None
        self._log_start_bytes = 0

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command line for `self.ports`; write the files it reads."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Return whether it answers its protocol and is ours; may raise OSError when it does not answer."""

    def choose_ports(self) -> list[int]:
        """Return `port_count` ports to try; asked again when one turns out to be taken."""
        return free_ports(self.port_count)

    @property
    def port(self) -> int:
        """The port that clients use."""
        return self.ports[0]

    @property
    def address(self) -> str:
        """The `host:port` that clients use."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def child(self) -> ChildProcess:
        """The child process.

        Raises:
            LocalStackError: the server was never started.
        """
        if self._child is None:
            raise LocalStackError(f"{self.name} was not started: it has no process; call start() first")
        return self._child

    @property
    def pid(self) -> int:
        """Process id of the latest start."""
        return self.child.pid

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._child is not None and self._child.is_running

    @property
    def log_path(self) -> Path:
        """Where its output goes."""
        return self.directory / f"{self.name}.log"

    def start(self) -> None:
        """Start it and wait until it is ready: on free ports the first time, on the same ports after that.

        Raises:
            LocalStackError: it ended or did not get ready; the message ends with its log.
        """
        if self.is_running:
            return
        if self.ports:
            self._start_on_ports()
            return
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self.ports = self.choose_ports()
            try:
                self._start_on_ports()
            except PortTakenError:
                if attempt == _PORT_ATTEMPTS:
                    raise
            else:
                return

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after a grace; a server that does not run is left alone."""
        if self._child is not None:
            self._child.stop()

    def kill(self) -> None:
        """SIGKILL, reaped before this returns."""
        self.child.kill()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self.child.pause()

    def resume(self) -> None:
        """SIGCONT."""
        self.child.resume()

    def __enter__(self) -> Self:
        """Start, and return the server."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, whatever happened."""
        self.stop()

    def launch(self) -> None:
        """Start the process without waiting for readiness (`wait_until_ready` does that)."""
        self._log_start_bytes = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._child = ChildProcess(self.command(), self.log_path)
        self._child.start()

    def wait_until_ready(self) -> None:
        """Wait for `is_ready`.

        Raises:
            PortTakenError: the process ended because a port was taken.
            LocalStackError: the process ended for another reason, or was not ready within `ready_timeout_s`.
        """
        give_up_s = time.monotonic() + self.ready_timeout_s
        while time.monotonic() < give_up_s:
            if not self.child.is_running:
                raise self._ended()
            try:
                if self.is_ready():
                    return
            except OSError:
                pass  # not listening yet, or listening and not answering yet
            time.sleep(0.05)
        raise LocalStackError(
            f"{self.name} on {self.address}: not ready after {self.ready_timeout_s:.0f} s, stopped; "
            f"read {self.log_path}, or point the RERANK_ settings at a server that runs\n"
            f"{self.child.log_tail()}"
        )

    def _start_on_ports(self) -> None:
        try:
            self.launch()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _ended(self) -> LocalStackError:
        with self.log_path.open("rb") as log:
            log.seek(self._log_start_bytes)
            output = log.read().decode(errors="replace").lower()
        if any(sign in output for sign in _PORT_TAKEN):
            return PortTakenError(
                f"{self.name} on ports {self.ports}: taken by another process, not started; free them or start again"
            )
        return LocalStackError(
            f"{self.name} on {self.address}: ended with exit code {self.child.popen.returncode}; "
            f"read {self.log_path}\n{self.child.log_tail()}"
        )
