"""`rerank train` and `rerank evaluate`: make an artefact from a log, and say what it is worth."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and only these two commands of `rerank` need training code

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from models.evaluation import Evaluation
    from models.log import InteractionLog
    from models.metrics import Estimate

MOVIELENS = "movielens"
SYNTHETIC = "synthetic"
DATA_HELP = "FILE.jsonl with one interaction in the wire format a line, or `movielens`, or `synthetic`."
BAD_INPUT = 2

DataOption = Annotated[str, typer.Option("--data", help=DATA_HELP)]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same bytes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")]


def train(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Directory of the artefact; an older artefact is replaced.")],
    model: Annotated[str, typer.Option("--model", help="cosine, dot, mlp or learned-ema.")] = "learned-ema",
    loss: Annotated[str, typer.Option("--loss", help="softmax or mse.")] = "softmax",
    seed: SeedOption = 0,
    json_output: JsonOption = False,
) -> None:
    """Train a model on the first 80 % of a log and write it as an artefact."""
    from models.export import ExportError, Labels, check_replaceable, write_artefact
    from models.log import split_by_time
    from models.manifest import Training
    from models.training import Recipe, TrainingError
    from models.training import train as fit

    try:
        check_replaceable(out)
    except ExportError as error:
        _refuse(str(error))
    log = _read(data, seed)
    m = split_by_time(log)
    started_s = time.monotonic()
    try:
        recipe = Recipe(model=model, loss=loss, seed=seed)
        with _progress(f"training {model}") as on_step:
            trained = fit(log, m, recipe, on_step)
        labels = Labels(
            name=model,
            training=Training(
                from_ms=int(log.event_times_ms[0]),
                until_ms=int(log.event_times_ms[m - 1]),
                interactions=m,
                loss=loss,
                seed=seed,
            ),
            created_ms=time.time_ns() // 1_000_000,
            metrics={"final_loss": trained.final_loss},
        )
        manifest = write_artefact(trained.network, trained.item_ids, trained.item_vectors, labels, out)
    except (TrainingError, ExportError) as error:
        _refuse(str(error))
    written = {
        "artefact": str(out),
        "name": manifest.name,
        "version": manifest.version,
        "loss": loss,
        "seed": seed,
        "interactions": m,
        "items": len(trained.item_ids),
        "final_loss": trained.final_loss,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    typer.echo(json.dumps(written) if json_output else _written(written))


def evaluate(
    artefact: Annotated[Path, typer.Option("--artefact", help="Directory of the artefact.")],
    data: DataOption,
    seed: SeedOption = 0,
    json_output: JsonOption = False,
) -> None:
    """Rank the last 20 % of a log with an artefact: retrieval order, user frozen at the split, live; leak checks.

    Exits with 1 when a leak check fails: no number of the table can be trusted then.
    """
    from models.artefact import UnsupportedModelError
    from models.evaluation import EvaluationError
    from models.evaluation import evaluate as rank
    from models.manifest import ManifestError

    log = _read(data, seed)
    try:
        evaluation = rank(artefact, log, seed)
    except (EvaluationError, ManifestError, UnsupportedModelError) as error:
        _refuse(str(error))
    if json_output:
        typer.echo(json.dumps(_as_json(evaluation)))
    else:
        _print(evaluation)
    if not all(check.passed for check in evaluation.leak_checks):
        raise typer.Exit(1)


def _read(data: str, seed: int) -> "InteractionLog":
    """Return the log that `--data` names; a bad file ends the command with exit code 2."""
    from models import movielens, synthetic
    from models.log import LogError, read_log

    try:
        if data == MOVIELENS:
            return read_log(movielens.fetch(announce=lambda terms: typer.echo(terms, err=True)))
        if data == SYNTHETIC:
            with tempfile.TemporaryDirectory() as folder:
                return read_log(synthetic.write(Path(folder) / "synthetic.jsonl", seed))
        return read_log(Path(data))
    except (LogError, movielens.MovieLensUnavailableError) as error:
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(BAD_INPUT)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """Show a progress bar on stderr if that is a terminal; yield what training tells its steps to."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, loss: bar.update(
            task, completed=done, total=total, description=f"{title}, loss {loss:.3f}"
        )


def _written(written: dict[str, Any]) -> str:
    return (
        f"{written['artefact']}: {written['name']} version {written['version']}, {written['items']} items, "
        f"{written['interactions']} interactions, loss {written['final_loss']:.4f}, {written['seconds']} s"
    )


def _as_json(evaluation: "Evaluation") -> dict[str, Any]:
    """Return the table: {metric: {policy: value}}, and under `intervals` the same with [low, high]."""
    metrics = evaluation.metrics
    over_frozen = {"live": evaluation.live_over_frozen, "live_strict": evaluation.live_strict_over_frozen}
    return {
        **{name: {policy: each.value for policy, each in row.items()} for name, row in metrics.items()},
        "intervals": {
            name: {policy: [each.low, each.high] for policy, each in row.items()} for name, row in metrics.items()
        },
        "over_frozen": {
            policy: {"ratio": each.value, "interval": [each.low, each.high]} for policy, each in over_frozen.items()
        },
        "leak_checks": {
            check.name: {"passed": check.passed, "finding": check.finding} for check in evaluation.leak_checks
        },
        "lists": evaluation.lists,
        "users": evaluation.users,
        "interactions": evaluation.interactions,
        "model": {"name": evaluation.manifest.name, "version": evaluation.manifest.version},
        "seed": evaluation.seed,
    }


def _print(evaluation: "Evaluation") -> None:
    """Print the table, with `rich` on a terminal and tab-separated when piped."""
    rows = [
        [policy, *(_cell(evaluation.metrics[name][policy]) for name in ("ndcg10", "hr10", "mrr"))]
        for policy in evaluation.metrics["ndcg10"]
    ]
    model = evaluation.manifest
    typer.echo(
        f"{model.name} version {model.version}: {evaluation.lists} lists of {evaluation.users} users, "
        "95 % intervals from resampled users"
    )
    headings = ("policy", "NDCG@10", "HR@10", "MRR")
    if sys.stdout.isatty():
        table = Table(*headings)
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        Console().print(table)
    else:
        typer.echo("\n".join("\t".join(row) for row in (headings, *rows)))
    typer.echo(f"live over frozen {_cell(evaluation.live_over_frozen)}")
    typer.echo(f"live_strict over frozen {_cell(evaluation.live_strict_over_frozen)}")
    for check in evaluation.leak_checks:
        typer.echo(f"{check.name}: {'passed' if check.passed else 'FAILED'} ({check.finding})")


def _cell(estimate: "Estimate") -> str:
    return f"{estimate.value:.4f} [{estimate.low:.3f}, {estimate.high:.3f}]"
