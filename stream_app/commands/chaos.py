"""`rerank chaos`: faults at random against a whole system, and the proof that nothing was lost or doubled."""

import asyncio
import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import orjson
import typer
from rich.console import Console
from rich.table import Table

from stream_app.errors import RerankError

if TYPE_CHECKING:
    from deploy.chaos.ledger import Ledger

Broker = Literal["embedded", "apache", "cluster"]


def chaos(  # noqa: PLR0917 - each is an option of the command
    seed: Annotated[
        int, typer.Option(min=0, help="Decides every fault, its step and its target; 0: by the clock.")
    ] = 0,
    minutes: Annotated[float, typer.Option(min=0.2, help="How long the load lasts.")] = 5.0,
    broker: Annotated[
        Broker, typer.Option(help="The embedded broker, one Apache Kafka, or three (KAFKA_HOME).")
    ] = "embedded",
    only: Annotated[
        list[str] | None, typer.Option(help="Faults with this in their name, and no others; may be given again.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=16, help="How many workers share the load.")] = 3,
    artefact: Annotated[
        Path | None, typer.Option(help="A learned-ema artefact; without it a tiny one of random items.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    out: Annotated[Path | None, typer.Option(help="Keep logs here, and the ledger as chaos.json and chaos.md.")] = None,
) -> None:
    """Start broker, Redis and workers, break them at random under load, heal them, and compare with the oracle.

    Faults are told on stderr as they strike. Exit 1: something was lost, doubled or left undone; it says what.
    """
    from deploy.chaos.run import Options, run  # noqa: PLC0415 - torch costs a second that other commands need not pay

    for name in ("aiokafka", "asyncio"):  # brokers die here on purpose
        logging.getLogger(name).setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    options = Options(
        seed=seed or int(time.time()),
        minutes=minutes,
        broker=broker,
        workers=workers,
        artefact=artefact,
        out=out,
        only=only or (),
    )
    try:
        ledger = asyncio.run(run(options, lambda line: typer.echo(line, err=True)))
    except KeyboardInterrupt:
        typer.echo("stopped; nothing that the run started is left running", err=True)
        raise typer.Exit(130) from None
    except RerankError as error:
        typer.echo(f"rerank chaos: {error}", err=True)
        raise typer.Exit(1) from None
    if out is not None:
        (out / "chaos.json").write_bytes(orjson.dumps(ledger.as_json(), option=orjson.OPT_INDENT_2))
        (out / "chaos.md").write_text(ledger.markdown())
    _show(ledger, json_output=json_output)
    if not ledger.holds:
        raise typer.Exit(1)


def _show(ledger: "Ledger", *, json_output: bool) -> None:
    if json_output:
        typer.echo(orjson.dumps(ledger.as_json(), option=orjson.OPT_INDENT_2))
        return
    console = Console(highlight=False)
    for title, rows in ledger.sections():
        if console.is_terminal:
            table = Table(title=title, title_justify="left", show_header=False)
            table.add_column()
            table.add_column(justify="right")
            for name, value in rows:
                table.add_row(name, value, style="bold red" if value.startswith("FAILS") else None)
            console.print(table)
            continue
        typer.echo(f"\n{title}")
        for name, value in rows:
            typer.echo(f"  {name:<58} {value}")
    typer.echo("\nnot tried: " + "; ".join(ledger.left_out))
    for line in ledger.differences():
        typer.echo(f"DIFFERS  {line}")
    typer.echo("everything holds" if ledger.holds else "something does not hold")
