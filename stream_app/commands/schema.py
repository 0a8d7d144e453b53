"""`rerank schema export`: the contract as files."""

from pathlib import Path
from typing import Annotated

import typer

from schemas import wire

app = typer.Typer(no_args_is_help=True)


@app.callback()
def schema() -> None:
    """Publish what is on the topics."""


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Directory, made if need be; files of the same names are replaced.")],
) -> None:
    """Write a JSON Schema per record and one AsyncAPI document; print their paths."""
    try:
        paths = wire.export(out)
    except OSError as error:
        typer.echo(f"rerank schema export: {out}: {error.strerror}; name a writable directory", err=True)
        raise typer.Exit(2) from None
    for path in paths:
        typer.echo(str(path))
