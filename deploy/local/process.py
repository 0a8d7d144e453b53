"""One child process that cannot outlive us: started, paused, resumed, stopped by its pid.

On Linux a child dies with this process, however this process ends (`kill -9` included): a small program
asks the kernel for SIGKILL at its parent's death (prctl PR_SET_PDEATHSIG) and then becomes the server by
exec. That needs no `preexec_fn`, which may deadlock in a process with threads. The kernel means the parent
*thread*, so one thread that lives as long as the process spawns all children. Other systems have no such
request: there a killed parent leaves its servers behind.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from deploy.local.errors import LocalStackError

_SPAWNER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-stack-spawner")

# argv: parent pid, then the command. If the parent died before prctl, nobody would send the signal.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ChildProcess:
    """A child with its output in a file.

    `command[0]` is an absolute path. The child gets a session of its own: Ctrl-C in the terminal reaches us
    alone, and we stop it.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        stop_grace_s: float = 10.0,
        stdout: int | IO[bytes] | None = None,
    ) -> None:
        """Describe the child; `stdout=None` sends standard output to the log as well as standard error."""
        self.log_path = log_path
        self.stop_grace_s = stop_grace_s
        self._command = list(command)
        self._environment = dict(environment) if environment is not None else None
        self._stdout = stdout
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the child and return at once; a child that runs is left alone."""
        if not self.is_running:
            self._popen = _SPAWNER.submit(self._spawn).result()

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = self._command
        if sys.platform == "linux":
            parent = str(os.getpid())
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, parent, *command]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(  # noqa: S603  the command is ours, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=log if self._stdout is None else self._stdout,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the latest start.

        Raises:
            LocalStackError: it was never started.
        """
        return self._started().pid

    @property
    def popen(self) -> subprocess.Popen[bytes]:
        """The running child, for its pipes and its exit code."""
        return self._started()

    @property
    def is_running(self) -> bool:
        """Whether the child lives (a paused child does)."""
        return self._popen is not None and self._popen.poll() is None

    def stop(self) -> int | None:
        """End the child: SIGTERM, SIGKILL after the grace. Return its exit code, None if it never ran."""
        if self._popen is None:
            return None
        if self.is_running:
            self._send(signal.SIGTERM)
            self._send(signal.SIGCONT)  # a paused child would keep SIGTERM pending
            try:
                self._popen.wait(self.stop_grace_s)
            except subprocess.TimeoutExpired:
                self._send(signal.SIGKILL)
            except BaseException:
                self._send(signal.SIGKILL)  # a second Ctrl-C must not leave it behind
                raise
        return self._popen.wait()

    def kill(self) -> None:
        """End the child at once (SIGKILL) and reap it."""
        self._send(signal.SIGKILL)
        self._started().wait()

    def pause(self) -> None:
        """Freeze the child (SIGSTOP): its ports stay open, nothing is answered."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause` (SIGCONT)."""
        self._send(signal.SIGCONT)

    def log_tail(self, lines: int = 8) -> str:
        """Return the last lines of the log."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _send(self, number: signal.Signals) -> None:
        # Popen.send_signal polls first: a reaped pid that somebody else got is never signalled.
        self._started().send_signal(number)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._popen is None:
            raise LocalStackError(f"{self._command[0]!r} was not started: it has no pid; call start() first")
        return self._popen
