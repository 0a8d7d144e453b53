"""`rerank record`: write a log of live topics that `rerank replay` reads."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Annotated, Any

import orjson
import typer
from aiokafka import AIOKafkaConsumer, TopicPartition

from schemas.topics import CO_PARTITIONED
from stream_app.commands.reading import Start, reading, stop_on_signals
from stream_app.errors import RerankError, SettingsError
from stream_app.log_merge import LogMerge, Place
from stream_app.recorded_log import LogRecord, format_line
from stream_app.settings import Settings, load_settings

POLL_MS = 200
QUIET_S = 1.0  # a partition that gives nothing for so long holds up the others no longer
WAITING_RECORDS = 2_000  # of one partition, while others are read; more are left on the broker


def record(
    out: Annotated[Path, typer.Option(help="Log to write; replaced if it exists.")],
    topics: Annotated[str, typer.Option(help="Topics, without prefix; earlier ones first in one millisecond.")] = (
        ",".join(CO_PARTITIONED)
    ),
    start: Annotated[Start, typer.Option("--from", help="Where to start.")] = Start.EARLIEST,
    until_idle_s: Annotated[float | None, typer.Option(min=0.1, help="End when nothing came for so long.")] = None,
    max_records: Annotated[int | None, typer.Option(min=1, help="End after so many records.")] = None,
) -> None:
    """Record topics in the order of their Kafka timestamps, until idle, enough, or Ctrl-C; commits nothing.

    Prints one JSON object: how many records of which topic, and how many came too late for their place.
    """
    try:
        names = [name.strip() for name in topics.split(",")]
        report = asyncio.run(_record(load_settings(), out, names, start, until_idle_s, max_records))
    except SettingsError as error:
        typer.echo(f"rerank record: {error}", err=True)
        raise typer.Exit(2) from None
    except RerankError as error:
        typer.echo(f"rerank record: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(orjson.dumps(report).decode())


async def _record(
    settings: Settings, out: Path, names: list[str], start: Start, until_idle_s: float | None, max_records: int | None
) -> dict[str, Any]:
    should_stop = stop_on_signals()
    written: Counter[str] = Counter()
    topics = [settings.topic_prefix + name for name in names]
    async with reading(settings, names, start) as consumer:
        reader = _Reader(consumer, topics)
        with _create(out) as file:
            typer.echo(f"recording {', '.join(topics)} to {out}; Ctrl-C ends", err=True)
            async for records in reader.batches(should_stop, until_idle_s):
                some = records if max_records is None else records[: max_records - written.total()]
                file.write(b"".join(map(format_line, some)))
                file.flush()
                written.update(one.topic for one in some)
                if written.total() == max_records:
                    break
    return {"records": written.total(), "topics": dict(written), "late": reader.late}


class _Reader:
    """Reads all partitions side by side, and merges them."""

    def __init__(self, consumer: AIOKafkaConsumer, topics: list[str]) -> None:
        """Read what is assigned to the consumer."""
        now_s = time.monotonic()
        self._consumer = consumer
        self._heard_s: dict[Place, float] = {(tp.topic, tp.partition): now_s for tp in consumer.assignment()}
        self._merge = LogMerge(topics, self._heard_s)
        self._last_s = now_s

    @property
    def late(self) -> int:
        """Return how many records came after one that they should have stood before."""
        return self._merge.late

    async def batches(
        self, should_stop: Callable[[], bool], until_idle_s: float | None
    ) -> AsyncIterator[list[LogRecord]]:
        """Yield merged records until asked to stop, or until nothing came for so long."""
        while not should_stop():
            now_s = await self._poll()
            yield list(self._merge.take(self._quiet(now_s)))
            self._hold_back(now_s)
            if until_idle_s is not None and now_s - self._last_s >= until_idle_s:
                break
        yield list(self._merge.take(self._heard_s))

    async def _poll(self) -> float:
        polled = await self._consumer.getmany(timeout_ms=POLL_MS)
        now_s = time.monotonic()
        for tp, records in polled.items():
            self._heard_s[tp.topic, tp.partition] = self._last_s = now_s
            for one in records:
                headers = list(one.headers)
                self._merge.add(
                    LogRecord(one.topic, one.partition, one.offset, one.timestamp, one.key, one.value, headers)
                )
        return now_s

    def _quiet(self, now_s: float) -> set[Place]:
        return {
            place
            for place, heard_s in self._heard_s.items()
            if now_s - heard_s >= QUIET_S and not self._merge.waiting(place)
        }

    def _hold_back(self, now_s: float) -> None:
        """Leave on the broker what would pile up here, and go on with what no longer does."""
        paused = self._consumer.paused()
        for place in self._heard_s:
            tp, full = TopicPartition(*place), self._merge.waiting(place) >= WAITING_RECORDS
            if full and tp not in paused:
                self._consumer.pause(tp)
            elif not full and tp in paused:
                self._consumer.resume(tp)
                self._heard_s[place] = now_s  # its silence was ours


def _create(path: Path) -> IO[bytes]:
    try:
        return path.open("wb")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; nothing was recorded; name a writable place") from error
