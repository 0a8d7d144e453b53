"""`rerank doctor`: what is wrong with my broker, Redis, topics, artefact, each with its remedy."""

import asyncio
import logging
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import Annotated

import typer

from stream_app.commands.doctor_artefact import examine_artefact
from stream_app.commands.doctor_broker import examine_broker
from stream_app.commands.doctor_redis import examine_redis
from stream_app.commands.doctor_rows import examine_rows
from stream_app.commands.doctor_settings import examine_settings
from stream_app.commands.findings import Finding, as_json, as_text, fail, healthy
from stream_app.settings import Settings

_LONGEST_S = 10.0


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Say what is wrong with broker, Redis, topics and artefact, and the remedy; exit 1 if anything fails."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what it logs is in the findings
    settings, findings = examine_settings(os.environ)
    if settings is not None:
        findings += asyncio.run(_examine(settings))
    typer.echo(as_json(findings) if json_output else as_text(findings))
    if not healthy(findings):
        raise typer.Exit(1)


async def _examine(settings: Settings) -> list[Finding]:
    """Ask the servers, then look at the artefact, then at the rows; none of the three takes longer than `_LONGEST_S`.

    Importing torch holds the interpreter for seconds: beside it a server that answers at once would seem to be away.
    """
    servers = await asyncio.gather(
        _in_time("broker", examine_broker(settings)),
        _in_time("redis", examine_redis(settings.redis, prefix=settings.row_prefix())),
    )
    artefact = await _in_time("artefact", _artefact(settings.artefact))
    return [*servers[0], *servers[1], *artefact, *await _in_time("rows", examine_rows(settings))]


async def _artefact(directory: Path | None) -> list[Finding]:
    return await asyncio.to_thread(examine_artefact, directory)


async def _in_time(check: str, findings: Awaitable[list[Finding]]) -> list[Finding]:
    try:
        return await asyncio.wait_for(findings, _LONGEST_S)
    except TimeoutError:
        return [
            fail(
                check,
                f"no answer within {_LONGEST_S:.0f} s: it hangs",
                "look at its log, restart it, ask again",
            )
        ]
