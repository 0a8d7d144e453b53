"""Where the workers of tests come from: one process imports what a worker imports, and forks them.

Most of what a worker costs before it is ready is the import of torch and faust, and the suite starts hundreds of
workers. Here each test process pays once. A forked worker runs the same module, with an
environment, a session and a log of its own, and dies with us, as with `ChildProcess`. What libraries read when they
are loaded (OMP_NUM_THREADS, the hash seed) is the nursery's; a test that needs it otherwise starts a process itself.

    python -m tests.nursery SOCKET

One connection is one process: arguments go in as a line of JSON, its pid comes back, and at its end the exit code.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from deploy.local.process import ChildProcess

START_TIMEOUT_S = 60.0
AGAIN_S = 0.02
_PR_SET_PDEATHSIG = 1


class ForkedProcess:
    """A process that the nursery forked, with those names of `subprocess.Popen` that a `ChildProcess` needs."""

    def __init__(self, connection: socket.socket, *arguments: object) -> None:
        """Have a module run; returns when the process is there."""
        self.returncode: int | None = None
        self._connection = connection
        self._lines = connection.makefile("rw")
        self._lines.write(json.dumps(arguments) + "\n")
        self._lines.flush()
        if not (pid := self._lines.readline()):
            raise AssertionError("the nursery ended; no process was started")
        self.pid = int(pid)
        self._reading = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; -N: it was ended by signal N.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0)
        with self._reading:
            if self.returncode is None:
                self.returncode = int(self._lines.readline() or -signal.SIGKILL)  # a nursery that died took it along
                self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ForkedChild(ChildProcess):
    """A child process that runs `python -m module arguments`, forked: on Linux, where that is safe."""

    def __init__(self, module: str, arguments: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> None:
        """Describe it."""
        super().__init__([sys.executable, "-m", module, *arguments], log_path, environment)
        self._request = (module, list(arguments), dict(environment), str(log_path))

    def start(self) -> None:
        """Start it, and the nursery before it, which is spawned by the same thread."""
        _the_nursery()
        super().start()

    def _spawn(self) -> Any:
        self.log_path.touch()
        return ForkedProcess(_connect(), *self._request)


class _Nursery:
    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="nursery-")  # goes with us
        self.address = str(Path(self._directory.name) / "socket")
        self.child = ChildProcess(
            [sys.executable, "-m", "tests.nursery", self.address], Path(self._directory.name) / "log"
        )
        self.child.start()


_the_nursery = cache(_Nursery)


def _connect() -> socket.socket:
    nursery = _the_nursery()
    connection, until_s = socket.socket(socket.AF_UNIX), time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            connection.connect(nursery.address)
        except OSError:
            if not nursery.child.is_running or time.monotonic() > until_s:
                raise AssertionError(f"no nursery:\n{nursery.child.log_tail()}") from None
            time.sleep(AGAIN_S)
        else:
            return connection


def _serve(address: str) -> NoReturn:
    """Fork a midwife for each connection, for ever: the parent of one process, which waits for its end."""
    importlib.import_module("stream_app.app")
    importlib.import_module("stream_app.__main__")
    del sys.modules["stream_app.__main__"]  # each process runs it anew
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # midwives are nobody's to wait for
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    nursery = os.getpid()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _die_with(nursery)
            _deliver(connection)
        connection.close()


def _deliver(connection: socket.socket) -> NoReturn:
    """Fork the process that is asked for, tell its pid, and its exit code when it has one."""
    lines = connection.makefile("rw")
    module, arguments, environment, log_path = json.loads(lines.readline())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    midwife = os.getpid()
    pid = os.fork()
    if pid == 0:
        _die_with(midwife)
        connection.close()
        lines.close()
        _run(module, arguments, environment, log_path)
    print(pid, file=lines, flush=True)
    end: Any = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its pid is nobody else's before its end is told
    print(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status, file=lines, flush=True)
    os.waitpid(pid, 0)
    os._exit(0)


def _run(module: str, arguments: list[str], environment: dict[str, str], log_path: str) -> NoReturn:
    os.setsid()
    for target, source in enumerate(
        [os.open(os.devnull, os.O_RDONLY), *[os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)] * 2]
    ):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - what an interpreter does with it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _die_with(parent: int) -> None:
    """Have the kernel end us when our parent ends; if it has ended already, nobody would."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    _serve(sys.argv[1])
