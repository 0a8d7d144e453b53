"""`rerank train` and `rerank evaluate`, called as a user calls them."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from models import synthetic
from schemas.codec import encode
from stream_app.commands.model import evaluate, train
from tests.builders import interaction

app = typer.Typer()
app.command()(train)
app.command()(evaluate)


def rerank(*words: str | Path) -> Result:
    """Run a command with these words."""
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one small log for the module; nothing mutates it."""
    return synthetic.write(tmp_path_factory.mktemp("log") / "log.jsonl", 0, users=40, items=120, interactions=1_000)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory, log: Path) -> Path:
    """Train the dot product once for the module."""
    directory = tmp_path_factory.mktemp("artefacts") / "dot"
    assert rerank("train", "--model", "dot", "--data", log, "--out", directory).exit_code == 0
    return directory


def test_train_writes_the_artefact_into_the_named_directory(artefact: Path) -> None:
    assert (artefact / "manifest.json").is_file()


def test_train_tells_as_json_what_it_wrote(tmp_path: Path, log: Path) -> None:
    result = rerank(
        "train", "--model", "cosine", "--loss", "mse", "--seed", "3", "--data", log, "--out", tmp_path / "a", "--json"
    )
    told = json.loads(result.stdout)
    assert (told["name"], told["loss"], told["seed"], told["artefact"]) == ("cosine", "mse", 3, str(tmp_path / "a"))


def test_evaluate_prints_every_policy_and_every_check(artefact: Path, log: Path) -> None:
    lines = rerank("evaluate", "--artefact", artefact, "--data", log).stdout.splitlines()
    starts = [line.replace(":", "\t").split("\t")[0] for line in lines]
    assert {"policy", "retrieval", "frozen", "live", "live_strict"} <= set(starts)
    assert {"training_range", "poisoned_lists", "poisoned_future", "positive_control", "constant_scorer"} <= set(starts)


def test_evaluate_as_json_gives_each_metric_by_policy(artefact: Path, log: Path) -> None:
    told = json.loads(rerank("evaluate", "--artefact", artefact, "--data", log, "--json").stdout)
    for metric in ("ndcg10", "hr10", "mrr"):
        assert set(told[metric]) == {"retrieval", "frozen", "live", "live_strict"}
        for policy, (low, high) in told["intervals"][metric].items():
            assert low <= told[metric][policy] <= high


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_bad_line_is_named_and_ends_with_exit_code_2(tmp_path: Path, artefact: Path, command: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(encode(interaction()) + b"\n{\n")
    option, target = ("--out", tmp_path / "a") if command == "train" else ("--artefact", artefact)
    result = rerank(command, "--data", path, option, target)
    assert result.exit_code == 2
    assert "bad.jsonl, line 2: " in result.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("words", [("--model", "svd"), ("--loss", "hinge")])
def test_an_unknown_model_or_loss_ends_with_exit_code_2(tmp_path: Path, log: Path, words: tuple[str, str]) -> None:
    result = rerank("train", *words, "--data", log, "--out", tmp_path / "a")
    assert result.exit_code == 2
    assert "not one of" in result.stderr


def test_evaluating_a_directory_without_artefact_ends_with_exit_code_2(tmp_path: Path, log: Path) -> None:
    result = rerank("evaluate", "--artefact", tmp_path, "--data", log)
    assert result.exit_code == 2
    assert "rerank train" in result.stderr


@pytest.mark.parametrize("kind", ["skip", "impression"])
def test_a_log_that_teaches_nothing_is_told_in_one_sentence(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "log.jsonl"
    lines = [
        encode(interaction(event_id=f"e-{n}", user_id=f"u-{n % 5}", item_id=f"i-{n % 7}", kind=kind, event_time_ms=n))
        for n in range(200)
    ]
    data.write_bytes(b"\n".join(lines) + b"\n")
    result = rerank("train", "--data", data, "--out", tmp_path / "a")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("out", [".", "taken", "file", "file/below"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").touch()
    (tmp_path / "file").touch()
    result = rerank("train", "--data", "no-such-log.jsonl", "--out", out)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{out}: ")
    assert result.stderr.count("\n") == 1
