"""`rerank topics create` and `rerank topics check`."""

import asyncio
import logging
from dataclasses import asdict
from typing import Annotated

import orjson
import typer

from stream_app.settings import load_settings
from stream_app.topic_admin import TopicProblem, check_topics, create_topics

app = typer.Typer(no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")]


@app.callback()
def quiet() -> None:
    """Create and check the topics of the re-ranker."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # our errors say the same, with a remedy


@app.command()
def create(
    partitions: Annotated[
        int, typer.Option(min=1, help="Partitions of every topic; more cannot be added without a rebuild.")
    ],
    replication_factor: Annotated[int, typer.Option(min=1, help="Copies of every record.")] = 1,
    json_output: JsonOption = False,
) -> None:
    """Create the topics that are missing; leave those that exist. Exit 1 if they do not fit together."""
    settings = load_settings()
    reports = asyncio.run(create_topics(settings, partitions, replication_factor))
    problems = asyncio.run(check_topics(settings))
    if json_output:
        _echo_json({"topics": [asdict(report) for report in reports]}, problems)
    else:
        for report in reports:
            state = "created" if report.created else "exists"
            typer.echo(f"{report.name:<32} {report.partitions:>4} partitions  {state}")
    _exit_on(problems, silent=json_output)


@app.command()
def check(json_output: JsonOption = False) -> None:
    """Check that every topic exists and that partition counts agree. Exit 1 if no worker would start."""
    problems = asyncio.run(check_topics(load_settings()))
    if json_output:
        _echo_json({}, problems)
    elif not problems:
        typer.echo("every topic exists, partition counts agree")
    _exit_on(problems, silent=json_output)


def _echo_json(fields: dict[str, object], problems: list[TopicProblem]) -> None:
    fields["problems"] = [asdict(problem) for problem in problems]
    typer.echo(orjson.dumps(fields))


def _exit_on(problems: list[TopicProblem], *, silent: bool) -> None:
    if not silent:
        for problem in problems:
            typer.echo(f"{problem.message}; {problem.remedy}", err=True)
    if any(problem.stops_workers for problem in problems):
        raise typer.Exit(1)
