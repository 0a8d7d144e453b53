"""`rerank demo`: the whole system on real data, and what it is worth."""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table as RichTable

from stream_app.errors import RerankError

if TYPE_CHECKING:
    from deploy.demo.report import Table
    from deploy.demo.run import Result

DEFAULT_LISTS = 3_000
_NOTHING_LEFT = "stopped; nothing that the demo started is left running"


class _Signals:
    """Makes SIGTERM end the demo as Ctrl-C does, and remembers which of the two it was."""

    def __init__(self) -> None:
        """Listen to both, also where a shell has told a background process to ignore Ctrl-C."""
        self.received = signal.SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.SIGTERM
        signal.raise_signal(signal.SIGINT)  # asyncio knows how to end cleanly on this one


def demo(
    data: Annotated[
        str, typer.Option(help="movielens, synthetic, or a JSONL file of interactions in the wire format.")
    ] = "movielens",
    seed: Annotated[int, typer.Option(min=0, help="Of the training, of the test lists and of the intervals.")] = 0,
    all_lists: Annotated[bool, typer.Option("--all", help="Replay the whole test part.")] = False,
    lists: Annotated[int, typer.Option(min=1, help="Replay the first so many test lists.")] = DEFAULT_LISTS,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    out: Annotated[Path, typer.Option(help="Where demo.json, demo.png and their evidence go.")] = Path("out"),
) -> None:
    """Start broker and Redis, train, serve, replay real interactions through Kafka, and show what live state is worth.

    Exit 1: something failed, or the stream and the offline evaluator disagree. Exit 2: there is no data.
    """
    signals = _Signals()
    try:
        result = _run(data, seed, None if all_lists else lists, out)
        _show(result, json_output=json_output)
    except KeyboardInterrupt:
        typer.echo(_NOTHING_LEFT, err=True)
        raise typer.Exit(128 + signals.received) from None
    except RerankError as error:
        typer.echo(f"rerank demo: {error}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 1)) from None
    if result.complaint:
        typer.echo(f"rerank demo: {result.complaint}", err=True)
        raise typer.Exit(1)


def _run(data: str, seed: int, most_lists: int | None, out: Path) -> "Result":
    from deploy.demo.progress import display  # noqa: PLC0415 - torch costs a second that other commands need not pay
    from deploy.demo.run import Options, run  # noqa: PLC0415

    for name in ("aiokafka", "asyncio"):  # our errors say the same, with a remedy
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return run(Options(data=data, seed=seed, most_lists=most_lists, out=out), display())


def _show(result: "Result", *, json_output: bool) -> None:
    from deploy.demo import report  # noqa: PLC0415

    measured = result.measured
    if json_output:
        typer.echo(orjson.dumps(report.as_json(measured), option=orjson.OPT_INDENT_2))
        return
    console = Console(highlight=False)
    tables = (report.quality_table(measured), report.latency_table(measured))
    typer.echo("\n" + report.title(measured) + "\n")
    for table in tables:
        if console.is_terminal:
            console.print(_rich(table))
        else:
            typer.echo(report.plain(table) + "\n")
    for line in report.notes(measured):
        typer.echo(line)
    typer.echo("written: " + ", ".join(str(path) for path in result.files))


def _rich(table: "Table") -> RichTable:
    shown = RichTable(header_style="bold")
    for number, name in enumerate(table.head):
        shown.add_column(name, justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*row, style="bold" if row[0].startswith("live") else None)
    return shown
