"""The command line: `rerank`, or `python -m stream_app`."""

import typer

from stream_app.commands import schema, topics
from stream_app.commands.chaos import chaos
from stream_app.commands.demo import demo
from stream_app.commands.doctor import doctor
from stream_app.commands.local import up
from stream_app.commands.model import evaluate, train
from stream_app.commands.produce import produce, validate
from stream_app.commands.rebuild import rebuild, reset_epoch
from stream_app.commands.record import record
from stream_app.commands.replay import replay
from stream_app.commands.tail import tail
from stream_app.commands.worker import worker
from stream_app.errors import RerankError

app = typer.Typer(
    name="rerank",
    help="Event-driven streaming re-ranker: a click is in the user's next list.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(worker)
app.command()(doctor)
app.command()(up)
app.command()(demo)
app.command()(chaos)
app.command()(train)
app.command()(evaluate)
app.command()(replay)
app.command()(rebuild)
app.command(name="reset-epoch")(reset_epoch)
app.command()(record)
app.command()(produce)
app.command()(validate)
app.command()(tail)
app.add_typer(topics.app, name="topics", help="Create the topics, or check them.")
app.add_typer(schema.app, name="schema", help="Publish the contract.")


def main() -> None:
    """Run the command line; what is wrong outside is one sentence and exit code 1."""
    try:
        app()
    except RerankError as error:
        typer.echo(f"rerank: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
