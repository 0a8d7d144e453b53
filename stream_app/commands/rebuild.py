"""`rerank rebuild` and `rerank reset-epoch`: Redis from the log, and a log that starts again."""

import asyncio
import logging
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from schemas.topics import topic_name
from stream_app.errors import SettingsError
from stream_app.settings import Settings, load_settings

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")]
_PLACE = re.compile(r"(\d+):(\d+)")


def rebuild(  # noqa: PLR0917 - each is an option of the command
    artefact: Annotated[
        Path | None, typer.Option(help="The model whose rows these shall be; without it RERANK_ARTEFACT.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Only this user's row.")] = None,
    until_offset: Annotated[
        list[str] | None,
        typer.Option(metavar="P:O", help="Stop at offset O of partition P, which is still included; repeatable."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Default: one a million records, at most one a core.")
    ] = None,
    max_users: Annotated[
        int, typer.Option(min=1, help="Rows in memory, of each process; the others wait in a temporary file.")
    ] = 200_000,
    accept_truncated: Annotated[
        bool, typer.Option(help="Rebuild from a log that has lost its start to retention.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Recreate the rows in Redis from `interactions`, byte for byte, whatever Redis holds; workers may run meanwhile.

    A stored row is overwritten unless it is ahead of the log that was read. Exit 1: run it again. For a model of
    another state space stop the workers before: nobody else may write until it has ended.
    """
    from stream_app.rebuild_run import RebuildRequest, run_rebuild  # noqa: PLC0415 - torch costs a second

    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # our errors say the same, with a remedy
    settings = load_settings()
    if artefact is not None:
        settings = settings.model_copy(update={"artefact": artefact})
    request = RebuildRequest(
        user_id=user,
        until_offsets=_until_offsets(until_offset or []),
        accept_truncated=accept_truncated,
        processes=processes,
        max_users=max_users,
    )
    started_s = time.monotonic()
    with _bar() as bar:
        log, rows = bar.add_task("offsets of the log", total=None), bar.add_task("rows", total=None)

        def show(done: Any) -> None:
            bar.update(log, completed=done.offsets_read, total=done.offsets_to_read)
            bar.update(rows, completed=done.judged, total=done.users)

        counts = run_rebuild(settings, request, show)
    _print(counts, time.monotonic() - started_s, json_output=json_output)


def _print(counts: Any, took_s: float, *, json_output: bool) -> None:
    rate = counts.records / took_s
    if json_output:
        found = {
            "records": counts.records,
            "interactions": counts.interactions,
            "dead_letters": counts.dead_letters,
            "users": counts.users,
            "rows": {"written": counts.written, "unchanged": counts.unchanged, "ahead": counts.ahead},
            "written_because": counts.verdicts,
            "seconds": round(took_s, 3),
            "interactions_per_second": round(rate, 1),
        }
        typer.echo(orjson.dumps(found).decode())
        return
    reasons = ", ".join(f"{count:,} {verdict}" for verdict, count in sorted(counts.verdicts.items()))
    typer.echo(
        f"{counts.interactions:,} interactions of {counts.users:,} users in {took_s:.1f} s ({rate:,.0f}/s)\n"
        f"rows: {counts.written:,} written{f' ({reasons})' if reasons else ''}, {counts.unchanged:,} unchanged, "
        f"{counts.ahead:,} ahead"
    )


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


def _until_offsets(places: list[str]) -> dict[int, int]:
    found = {}
    for place in places:
        match = _PLACE.fullmatch(place)
        if match is None:
            raise SettingsError(
                f"--until-offset {place!r}: not PARTITION:OFFSET; nothing was rebuilt; write for example 2:1041"
            )
        found[int(match[1])] = int(match[2])
    return found


def reset_epoch(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False, json_output: JsonOption = False
) -> None:
    """Say that `interactions` was deleted and created again: its offsets count from zero, rows stay.

    Raises the topic epoch and clears progress. Stop all workers before.
    """
    settings = load_settings()
    log = topic_name(settings.topic_prefix, "interactions")
    if not yes:
        typer.confirm(
            f"Interactions of {log} are applied again from the start of the log, on top of the rows that Redis holds. "
            "Are all workers stopped?",
            abort=True,
            err=True,
        )
    epoch = asyncio.run(_reset(settings, log))
    if json_output:
        typer.echo(orjson.dumps({"topic": log, "epoch": epoch}).decode())
    else:
        typer.echo(f"{log}: epoch {epoch}, nothing applied; start the workers")


async def _reset(settings: Settings, log: str) -> int:
    from stream_app.rebuild_run import store_without_rows  # noqa: PLC0415 - torch costs a second
    from stream_app.topic_admin import admin_client, partition_counts  # noqa: PLC0415
    from stream_app.topic_identity import topic_ids  # noqa: PLC0415

    async with admin_client(settings.kafka, settings.kafka.request_timeout_ms / 1000.0) as admin:
        partitions = (await partition_counts(admin)).get(log, 0)
        ids = await topic_ids(admin._client, [log])
    if not partitions:
        raise SettingsError(
            f"{log}: not on {settings.kafka.bootstrap_servers}; the epoch stays; `rerank topics create`, or correct "
            "RERANK_TOPIC_PREFIX"
        )
    async with store_without_rows(settings) as store:
        epoch = await store.reset_epoch(partitions)
        await store.set_log(ids.get(log, ""))
        return epoch
