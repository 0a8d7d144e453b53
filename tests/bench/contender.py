"""One process under measurement: started on a fresh group and fresh user states, watched from outside, stopped."""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import redis
from aiokafka import AIOKafkaConsumer

from deploy.local import ChildProcess
from stream_app.connection import connect
from stream_app.scorer import load_artefact
from stream_app.settings import RedisSettings
from stream_app.state import UserRow, pack_row
from stream_app.store import RedisStore, RowCodec
from stream_app.telemetry import Telemetry
from tests.bench.machine import REPOSITORY, rerank_command
from tests.bench.topics import committed_records

POLL_S = 0.05
START_TIMEOUT_S = 90.0


class BenchError(RuntimeError):
    """A contender did not do what is measured: its numbers would mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Who runs: its name, its command line, and how it keeps users in Redis."""

    name: str
    command: list[str]
    store_rows: Callable[[str, Mapping[str, UserRow], Path], None]


@dataclass(slots=True, kw_only=True)
class Progress:
    """What the group has committed: at each moment of a change, the records and the process's CPU seconds."""

    moments_s: list[float] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def note(self, records: int, process: psutil.Process) -> None:
        """Take note of a change; a count that stands still is none."""
        if records > (self.records[-1] if self.records else 0):
            times = process.cpu_times()
            self.moments_s.append(round(time.monotonic(), 3))
            self.records.append(records)
            self.cpu_s.append(round(times.user + times.system, 2))

    def rate(self, total: int) -> float:
        """Return records/s from the first commit to the last one that left work to do."""
        first, last = self._window(total)
        return (self.records[last] - self.records[first]) / (self.moments_s[last] - self.moments_s[first])

    def cpu_us_per_record(self, total: int) -> float:
        """Return microseconds of the process's CPU per record, in the window of `rate`."""
        first, last = self._window(total)
        return 1e6 * (self.cpu_s[last] - self.cpu_s[first]) / (self.records[last] - self.records[first])

    def _window(self, total: int) -> tuple[int, int]:
        busy = [index for index, records in enumerate(self.records) if records < total]
        if len(busy) < 2:
            raise BenchError(f"commits at {self.records} of {total} records: too few to time; load more records")
        return busy[0], busy[-1]


def ours() -> Contender:
    """Return `rerank worker`, one process."""
    return Contender(name="ours", command=rerank_command("worker"), store_rows=_store_our_rows)


def naive() -> Contender:
    """Return the plain Faust application, one process."""
    command = [sys.executable, "-m", "tests.bench.naive_faust", "worker", "--loglevel", "warn"]
    return Contender(name="naive", command=command, store_rows=_store_naive_rows)


def _store_our_rows(redis_url: str, rows: Mapping[str, UserRow], artefact: Path) -> None:
    space = load_artefact(artefact).space
    settings = RedisSettings()
    codec = RowCodec(state_size=len(next(iter(rows.values())).vector) // 4, space=space, telemetry=Telemetry())
    store = RedisStore(connect(settings), codec=codec, key_prefix=settings.key_prefix, log="interactions")
    _write_all(redis_url, {store.key(user_id): pack_row(row, space) for user_id, row in rows.items()})


def _store_naive_rows(redis_url: str, rows: Mapping[str, UserRow], artefact: Path) -> None:
    del artefact
    with redis.Redis.from_url(redis_url) as client:
        pipe = client.pipeline(transaction=False)
        for user_id, row in rows.items():
            fields: dict[str | bytes, bytes | float | int | str] = {
                "vector": row.vector,
                "events": row.events,
                "event_time_ms": row.last_event_time_ms,
            }
            pipe.hset(f"user:{user_id}", mapping=fields)
        pipe.execute()


def _write_all(redis_url: str, rows: Mapping[str, bytes]) -> None:
    with redis.Redis.from_url(redis_url) as client:
        pipe = client.pipeline(transaction=False)
        for key, data in rows.items():
            pipe.set(key, data)
        pipe.execute()


def forget_users(redis_url: str) -> None:
    """Empty the benchmark's own Redis."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()


async def run(
    contender: Contender,
    *,
    environment: Mapping[str, str],
    log_path: Path,
    watcher: AIOKafkaConsumer,
    topic: str,
    total: int,
    seconds: float,
) -> Progress:
    """Run the contender until it has done all `total` records or for `seconds` after its first commit.

    Raises:
        BenchError: it ended by itself, or did nothing in START_TIMEOUT_S.
    """
    child = ChildProcess(contender.command, log_path, {**os.environ, **environment, "PYTHONPATH": str(REPOSITORY)})
    child.start()
    progress = Progress()
    try:
        process = psutil.Process(child.pid)
        give_up_s, end_s = time.monotonic() + START_TIMEOUT_S, float("inf")
        while time.monotonic() < end_s and (not progress.records or progress.records[-1] < total):
            await asyncio.sleep(POLL_S)
            if not child.is_running or (not progress.records and time.monotonic() > give_up_s):
                raise BenchError(f"{contender.name} did no work; its log says:\n{child.log_tail()}")
            progress.note(await committed_records(watcher, topic), process)
            if progress.records and end_s == float("inf"):
                end_s = time.monotonic() + seconds
    finally:
        child.stop()
    return progress
