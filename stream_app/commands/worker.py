"""`rerank worker`: one worker process."""

import asyncio
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import orjson
import structlog
import typer

from stream_app.settings import load_settings

if TYPE_CHECKING:
    from stream_app.app import Worker


REPEAT_AFTER_S = 10.0
MALLOC_PARAMETERS = {  # numbers of glibc's malloc.h
    "MALLOC_ARENA_MAX": (-8, 2),
    "MALLOC_MMAP_THRESHOLD_": (-3, 262_144),
    "MALLOC_TRIM_THRESHOLD_": (-1, 1_048_576),
}


def worker() -> None:
    """Serve until SIGTERM. Prints one JSON line when ready; JSON logs go to stderr."""
    signal.signal(signal.SIGTERM, _end_before_the_start)
    steady_heap()
    from stream_app.app import Worker  # noqa: PLC0415 - torch and faust cost a second that other commands need not pay

    settings = load_settings()
    log_to_stderr(settings.log_level)
    asyncio.run(_run_to_the_end(Worker(settings, announce=_print_line)))


def steady_heap() -> None:
    """Keep resident memory near what is in use; call before there are threads. `MALLOC_...` variables come first.

    glibc gives each thread a heap of its own, and what is freed in one is of no use to the others. A buffer from the
    broker is freed after small things were put behind it, and leaves a hole: the longer a worker ran, the more glibc
    would keep (tests/bench/bench_soak.py). So: few heaps, large buffers outside them, and what is free given back.
    """
    if not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    for variable, (parameter, value) in MALLOC_PARAMETERS.items():
        if variable not in os.environ:
            libc.mallopt(parameter, value)


def _end_before_the_start(*_: object) -> None:
    """End at once: nothing is in hand yet. The worker listens to signals itself as soon as it runs."""
    os._exit(0)


async def _run_to_the_end(worker: "Worker") -> None:
    """Run the worker and end the process from inside the loop.

    Tasks and threads of Faust and aiokafka can wait for minutes for a broker gone silent, and leaving the loop would
    wait for them; all that matters is settled by then.
    """
    code = await worker.run()
    sys.stdout.flush()
    logging.shutdown()
    os._exit(code)


def _print_line(line: Mapping[str, object]) -> None:
    typer.echo(orjson.dumps(line).decode())


def log_to_stderr(level: str) -> None:
    """Send every log record to stderr, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", key="time"),
        structlog.processors.format_exc_info,
    ]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    handler.addFilter(_Repeats())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Faust and aiokafka tell at INFO what they do once a second; their warnings are what an operator needs.
    for name in ("faust", "aiokafka", "mode"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))


class _Repeats(logging.Filter):
    """Let each kind of message of aiokafka through once in 10 s: of a broker away it tells 100 times a second."""

    def __init__(self) -> None:
        super().__init__("aiokafka")
        self._next_s: dict[tuple[str, object], float] = {}
        self._left_out: dict[tuple[str, object], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not super().filter(record):
            return True
        kind, now_s = (record.name, record.msg), time.monotonic()
        if now_s < self._next_s.get(kind, 0.0):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        self._next_s[kind] = now_s + REPEAT_AFTER_S
        if left_out := self._left_out.pop(kind, 0):
            record.msg = f"{record.msg} ({left_out} more like it since the last)"
        return True
