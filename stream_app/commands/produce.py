"""`rerank produce` and `rerank validate`: records from a file, one JSON object a line, onto a topic."""

import asyncio
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated

import msgspec
import orjson
import typer

from schemas.codec import DecodeError, decode_candidate_list, decode_interaction, decode_item
from schemas.limits import Limits
from schemas.topics import topic_name
from stream_app.commands.reading import existing_topics
from stream_app.errors import RerankError, SettingsError
from stream_app.ports import OutputRecord
from stream_app.publisher import KafkaPublisher
from stream_app.settings import Settings, load_settings

BATCH_RECORDS = 500
PACED_BATCHES_PER_S = 10.0
SHOWN_LINES = 20


class _Ids(msgspec.Struct):
    user_id: str | None = None
    item_id: str | None = None


_IDS = msgspec.json.Decoder(_Ids)

Decode = Callable[[bytes | None, bytes, Limits], object]

# The topics one may produce to: how a line is checked, and which of its ids is the key.
INPUTS: Mapping[str, tuple[Decode, str]] = {
    "interactions": (decode_interaction, "user_id"),
    "candidates": (decode_candidate_list, "user_id"),
    "items": (decode_item, "item_id"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodLine:
    """A line that the worker will take: key and value to produce."""

    line: int
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that the worker would refuse, and why."""

    line: int
    code: str
    message: str


FileArgument = Annotated[str, typer.Argument(help="One record a line; - reads standard input.")]
TopicOption = Annotated[str, typer.Option(help=f"One of {', '.join(INPUTS)}, without prefix.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of a sentence.")]


def validate(file: FileArgument, topic: TopicOption, json_output: JsonOption = False) -> None:
    """Check every line as the worker would; send nothing. Exit 2 if a line would be refused."""
    with _exit_on_errors("validate"), _open(file) as lines:
        checked = list(_check_all(lines, topic, load_settings().limits()))
    bad = [line for line in checked if isinstance(line, BadLine)]
    _report_bad(file, bad, silent=json_output)
    if json_output:
        typer.echo(orjson.dumps({"lines": len(checked), "bad": [asdict(line) for line in bad]}).decode())
    elif not bad:
        typer.echo(f"{len(checked)} lines, all good")
    if bad:
        raise typer.Exit(2)


def produce(
    file: FileArgument,
    topic: TopicOption,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Records a second; as fast as possible if not given.")] = (
        None
    ),
    check: Annotated[bool, typer.Option("--check", help="Only check the lines, send nothing.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Check the lines, then send them, keyed by user (items by item), each to the partition that Java would choose.

    A file with a bad line is not sent at all; standard input is sent up to the first bad line. Exit 2 for a bad line.
    """
    if check:
        validate(file, topic, json_output)
        return
    for name in ("aiokafka", "stream_app.publisher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # our errors say the same, with a remedy
    started_s = time.monotonic()
    with _exit_on_errors("produce"):
        settings = load_settings()
        if file != "-":
            with _open(file) as lines:
                bad = [line for line in _check_all(lines, topic, settings.limits()) if isinstance(line, BadLine)]
            if bad:
                _report_bad(file, bad, silent=False)
                typer.echo("nothing was sent", err=True)
                raise typer.Exit(2)
        with _open(file) as lines:
            sent, refused = asyncio.run(_send(lines, topic, settings, rate))
    _report_bad(file, refused, silent=False)
    if json_output:
        typer.echo(orjson.dumps({"sent": sent, "topic": topic_name(settings.topic_prefix, topic)}).decode())
    else:
        typer.echo(f"sent {sent} records to {settings.topic_prefix}{topic} in {time.monotonic() - started_s:.1f} s")
    if refused:
        raise typer.Exit(2)


def check_line(number: int, line: bytes, topic: str, limits: Limits) -> GoodLine | BadLine:
    """Return what the worker would say of a line on a topic of INPUTS."""
    decode, id_name = INPUTS[topic]
    try:
        key = getattr(_IDS.decode(line), id_name)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        key = None  # decode says what is wrong
    encoded = None if key is None else key.encode()
    try:
        decode(encoded, line, limits)
    except DecodeError as error:
        return BadLine(line=number, code=error.code, message=error.message)
    return GoodLine(line=number, key=encoded or b"", value=line)


def _check_all(lines: Iterable[bytes], topic: str, limits: Limits) -> Iterator[GoodLine | BadLine]:
    if topic not in INPUTS:
        raise SettingsError(f"--topic {topic!r}: not one of {', '.join(INPUTS)}; nothing was sent; correct it")
    for number, line in enumerate(lines, start=1):
        if not line.isspace():
            yield check_line(number, line.rstrip(b"\r\n"), topic, limits)


async def _send(
    lines: Iterable[bytes], topic: str, settings: Settings, rate: float | None
) -> tuple[int, list[BadLine]]:
    """Send in batches, each acknowledged before the next, up to the first bad line; return it, if there is one."""
    checked = _check_all(lines, topic, settings.limits())
    size = BATCH_RECORDS if rate is None else max(1, min(BATCH_RECORDS, round(rate / PACED_BATCHES_PER_S)))
    (full_name,) = await existing_topics(settings, [topic])
    publisher = KafkaPublisher(settings.kafka)
    await publisher.start()
    try:
        sent, started_s = 0, time.monotonic()
        while batch := list(itertools.islice(checked, size)):
            good = list(itertools.takewhile(lambda line: isinstance(line, GoodLine), batch))
            records = [OutputRecord(full_name, one.key, one.value, ()) for one in good if isinstance(one, GoodLine)]
            await (await publisher.send(records))
            sent += len(records)
            refused = batch[len(good) : len(good) + 1]
            if refused:
                return sent, [line for line in refused if isinstance(line, BadLine)]
            if rate is not None:
                await asyncio.sleep(max(0.0, started_s + sent / rate - time.monotonic()))
        return sent, []
    finally:
        await publisher.stop()


def _report_bad(file: str, bad: list[BadLine], *, silent: bool) -> None:
    if silent:
        return
    for line in bad[:SHOWN_LINES]:
        typer.echo(f"{file}:{line.line}: {line.code}: {line.message}", err=True)
    if len(bad) > SHOWN_LINES:
        typer.echo(f"{len(bad) - SHOWN_LINES} more bad lines", err=True)


@contextmanager
def _open(file: str) -> Iterator[IO[bytes]]:
    if file == "-":
        yield sys.stdin.buffer
        return
    try:
        opened = Path(file).open("rb")  # noqa: SIM115 - closed below; only opening is guarded
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}; nothing was sent; name a readable file") from error
    with opened:
        yield opened


@contextmanager
def _exit_on_errors(command: str) -> Iterator[None]:
    try:
        yield
    except SettingsError as error:
        typer.echo(f"rerank {command}: {error}", err=True)
        raise typer.Exit(2) from None
    except RerankError as error:
        typer.echo(f"rerank {command}: {error}", err=True)
        raise typer.Exit(1) from None
