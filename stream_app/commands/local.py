"""`rerank up`: a broker and a Redis on this machine until Ctrl-C."""

import asyncio
import os
import shlex
import signal
import tempfile
from pathlib import Path
from types import FrameType
from typing import Annotated

import orjson
import typer

from deploy.local import LocalStack
from stream_app.settings import load_settings
from stream_app.topic_admin import create_topics


def up(
    partitions: Annotated[int, typer.Option(min=1, help="Partitions of every topic.")] = 4,
    directory: Annotated[
        Path | None,
        typer.Option(help="Where data and logs go; a temporary folder that is removed if not given."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object instead of export lines.")] = False,
) -> None:
    """Start what is missing of broker and Redis, create the topics, print the settings; Ctrl-C stops all."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="rerank-") as temporary:
        try:
            _serve(directory or Path(temporary), partitions, json_output=json_output)
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)


def _serve(directory: Path, partitions: int, *, json_output: bool) -> None:
    with LocalStack(directory) as stack:
        settings = load_settings()
        kafka = settings.kafka.model_copy(update={"bootstrap_servers": stack.bootstrap_servers})
        asyncio.run(create_topics(settings.model_copy(update={"kafka": kafka}), partitions))
        # What the caller has set already, perhaps with a password, is not repeated.
        environment = {k: v for k, v in stack.environment().items() if os.environ.get(k) != v}
        if json_output:
            ready = {"event": "ready", "broker_kind": stack.broker_kind, "environment": environment}
            typer.echo(orjson.dumps(ready))
        else:
            for name, value in environment.items():
                typer.echo(f"export {name}={shlex.quote(value)}")
        typer.echo(f"{stack.broker_kind} broker and Redis are up, Ctrl-C stops them", err=True)
        while True:
            signal.pause()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
