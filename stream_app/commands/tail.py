"""`rerank tail`: watch a topic, a line a record."""

import asyncio
from typing import Annotated

import typer

from schemas.codec import DecodeError, decode_slate
from schemas.dead_letter import CONNECT_PREFIX, ERROR_CODE_HEADER
from schemas.records import Slate
from stream_app.commands.reading import TOPIC_NAMES, Start, reading, stop_on_signals
from stream_app.errors import RerankError, SettingsError
from stream_app.recorded_log import LogRecord, format_line
from stream_app.settings import Settings, load_settings

POLL_MS = 200
SHOWN_ITEMS = 5
SHOWN_BYTES = 120


def tail(
    topic: Annotated[str, typer.Option(help=f"One of {', '.join(TOPIC_NAMES)}, without prefix.")] = "reranked",
    user: Annotated[str | None, typer.Option(help="Only records with this key.")] = None,
    start: Annotated[Start, typer.Option("--from", help="Where to start.")] = Start.LATEST,
    json_output: Annotated[
        bool, typer.Option("--json", help="Whole records, in the format of a recorded log.")
    ] = False,
    number: Annotated[int | None, typer.Option("-n", min=1, help="End after so many records.")] = None,
    until_idle_s: Annotated[float | None, typer.Option(min=0.1, help="End when nothing came for so long.")] = None,
) -> None:
    """Show records as they come: slates, dead letters with their code, or any other topic of ours; Ctrl-C ends."""
    try:
        asyncio.run(_tail(load_settings(), topic, user, start, number, until_idle_s, json_output=json_output))
    except SettingsError as error:
        typer.echo(f"rerank tail: {error}", err=True)
        raise typer.Exit(2) from None
    except RerankError as error:
        typer.echo(f"rerank tail: {error}", err=True)
        raise typer.Exit(1) from None


async def _tail(
    settings: Settings,
    topic: str,
    user: str | None,
    start: Start,
    number: int | None,
    until_idle_s: float | None,
    *,
    json_output: bool,
) -> None:
    should_stop, shown, idle_s = stop_on_signals(), 0, 0.0
    key = None if user is None else user.encode()
    async with reading(settings, [topic], start) as consumer:
        typer.echo(f"tailing {settings.topic_prefix}{topic}; Ctrl-C ends", err=True)
        while not should_stop() and (until_idle_s is None or idle_s < until_idle_s):
            polled = await consumer.getmany(timeout_ms=POLL_MS)
            idle_s = 0.0 if polled else idle_s + POLL_MS / 1000.0
            for one in sorted((one for some in polled.values() for one in some), key=lambda one: int(one.timestamp)):
                if key is not None and one.key != key:
                    continue
                record = LogRecord(
                    one.topic, one.partition, one.offset, one.timestamp, one.key, one.value, list(one.headers)
                )
                typer.echo(format_line(record).decode().rstrip() if json_output else printable(line_of(topic, record)))
                shown += 1
                if shown == number:
                    return


def line_of(topic: str, record: LogRecord) -> str:
    """Return one line for people; `topic` is the plain name."""
    if topic == "reranked" and record.value is not None:
        try:
            return slate_line(decode_slate(record.value))
        except DecodeError as error:
            return f"{_place(record)}  no slate: {error.message}"
    headers = {name: (value or b"").decode(errors="replace") for name, value in record.headers}
    if ERROR_CODE_HEADER in headers:
        return dead_letter_line(record, headers)
    return f"{_place(record)}  {_text(record.key)}  {_text(record.value)}"


def slate_line(slate: Slate) -> str:
    """Return outcome, request, user, first items, state and time of a slate."""
    items = " ".join(slate.item_ids[:SHOWN_ITEMS]) + (" ..." if len(slate.item_ids) > SHOWN_ITEMS else "")
    outcome = slate.outcome + (f" ({', '.join(slate.reasons)})" if slate.reasons else "")
    return (
        f"{outcome:<9} request={slate.request_id} user={slate.user_id} items={len(slate.item_ids)} [{items}] "
        f"events={slate.state.events} age_ms={slate.state.age_ms} total_ms={slate.timing_ms.total:g} "
        f"model={slate.model.name}:{slate.model.version}"
    )


def dead_letter_line(record: LogRecord, headers: dict[str, str]) -> str:
    """Return code, original place, message and first bytes of a dead letter."""
    place = "/".join(headers.get(f"{CONNECT_PREFIX}{part}", "?") for part in ("topic", "partition", "offset"))
    message = headers.get(f"{CONNECT_PREFIX}exception.message", "")
    return f"{headers[ERROR_CODE_HEADER]:<20} {place} key={_text(record.key)} {message}  value={_text(record.value)}"


def printable(line: str) -> str:
    """Return the line with escapes in place of what a terminal would act upon."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)


def _place(record: LogRecord) -> str:
    return f"{record.topic}/{record.partition}/{record.offset}"


def _text(data: bytes | None) -> str:
    """Return the first bytes as text."""
    if data is None:
        return "null"
    return data[:SHOWN_BYTES].decode(errors="backslashreplace") + ("..." if len(data) > SHOWN_BYTES else "")
