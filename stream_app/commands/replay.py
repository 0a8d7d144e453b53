"""`rerank replay`: the worker's path over a recorded log, without broker and Redis."""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import msgspec
import orjson
import typer

from stream_app.errors import RerankError, SettingsError
from stream_app.recorded_log import read_log
from stream_app.settings import Settings, load_settings

if TYPE_CHECKING:
    from stream_app.scorer import Artefact


def replay(
    log: Annotated[Path, typer.Argument(help="A recorded log (`rerank record` writes one).")],
    artefact: Annotated[Path | None, typer.Option(help="Artefact directory; RERANK_ARTEFACT if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the slates here, one JSON object a line.")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Records at once; the slates do not depend on it.")] = 1_000,
    json_output: Annotated[bool, typer.Option("--json", help="Only the JSON object, no sentence on stderr.")] = False,
) -> None:
    """Replay a log and print one JSON object: the number of slates, the SHA-256 of them without timing_ms, counts.

    Exit 2: a line of the log is bad, or a setting is; the message names it. Exit 1: the artefact does not serve.
    """
    started_s = time.monotonic()
    try:
        report = _replay(log, artefact, out, micro_batch)
    except SettingsError as error:
        typer.echo(f"rerank replay: {error}", err=True)
        raise typer.Exit(2) from None
    except RerankError as error:
        typer.echo(f"rerank replay: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(orjson.dumps(report).decode())
    if not json_output:
        spent_s = time.monotonic() - started_s
        typer.echo(f"{report['records']} records in {spent_s:.1f} s, {report['slates']} slates", err=True)
    if report["records"] == report["other_topics"] > 0:
        typer.echo("no line of the log is of interactions or candidates: check RERANK_TOPIC_PREFIX", err=True)


def _replay(log: Path, directory: Path | None, out: Path | None, micro_batch_records: int) -> dict[str, Any]:
    from stream_app.scorer import load_artefact  # noqa: PLC0415 - torch costs a second that other commands need not pay

    settings = load_settings()
    directory = directory or settings.artefact
    if directory is None:
        raise SettingsError("no artefact: nothing was replayed; give --artefact DIR, or set RERANK_ARTEFACT")
    if out is not None and out.exists() and log.exists() and out.samefile(log):
        raise SettingsError(f"--out {out}: is the log itself; nothing was replayed; name another file")
    artefact = load_artefact(directory)
    with _whole_file(out) as file:
        return asyncio.run(_report(log, artefact, file, settings, micro_batch_records))


async def _report(
    log: Path, artefact: "Artefact", out: IO[bytes] | None, settings: Settings, micro_batch_records: int
) -> dict[str, Any]:
    from stream_app.replay import replay_of  # noqa: PLC0415 - as above
    from stream_app.slate_digest import SlateDigest  # noqa: PLC0415 - as above

    with contextlib.closing(SlateDigest(out)) as digest:
        path = replay_of(
            artefact,
            digest.put,
            prefix=settings.topic_prefix,
            limits=settings.limits(),
            future_tolerance_ms=settings.future_tolerance_ms,
            micro_batch_records=micro_batch_records,
        )
        await path.feed(read_log(log))
        await path.finish()
        manifest = artefact.manifest
        return {
            "slates": digest.slates,
            "sha256": digest.hexdigest(),
            **msgspec.to_builtins(path.counts),
            "model": {"name": manifest.name, "version": manifest.version},
        }


@contextlib.contextmanager
def _whole_file(path: Path | None) -> Iterator[IO[bytes] | None]:
    """Open a file that appears under its name only when the block ends well."""
    if path is None:
        yield None
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; no slates were written; name a writable place") from error
    finally:
        partial.unlink(missing_ok=True)
