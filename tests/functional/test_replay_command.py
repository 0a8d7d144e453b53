"""`rerank replay`: what it prints, writes and exits with."""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from schemas.codec import slate_digest_bytes
from stream_app.__main__ import app
from tests.log_writing import LogWriter, seeded_log, write_log
from tests.tiny_artefact import item_ids, write_tiny_artefact


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of a tiny artefact."""
    return str(write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny"))


def rerank(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_count_and_the_digest_come_first_and_are_of_the_written_slates(tmp_path: Path, artefact: str) -> None:
    log = write_log(tmp_path / "log.jsonl", seeded_log(3, records=60, item_ids=item_ids(8)))
    code, stdout, stderr = rerank("replay", log, "--artefact", artefact, "--out", tmp_path / "slates.jsonl", "--json")
    slates = (tmp_path / "slates.jsonl").read_bytes().splitlines()
    digest = hashlib.sha256(b"".join(slate_digest_bytes(slate) + b"\n" for slate in slates)).hexdigest()
    assert (code, stderr) == (0, "")
    assert list(json.loads(stdout).items())[:2] == [("slates", len(slates)), ("sha256", digest)]


def test_slates_stand_in_the_order_of_their_candidate_records(tmp_path: Path, artefact: str) -> None:
    writer = LogWriter()
    writer.candidates("u-1", ["i-1"], request_id="waits", after=writer.next_position("u-1"))
    writer.candidates("u-2", ["i-1"], request_id="does not wait")
    writer.interaction("u-1", "i-1")
    log = write_log(tmp_path / "log.jsonl", writer.records)
    rerank("replay", log, "--artefact", artefact, "--out", tmp_path / "slates.jsonl")
    lines = (tmp_path / "slates.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == ["waits", "does not wait"]


def test_a_bad_line_ends_with_2_and_leaves_no_slates(tmp_path: Path, artefact: str) -> None:
    writer = LogWriter()
    writer.candidates("u-1", ["i-1"])
    log = write_log(tmp_path / "log.jsonl", writer.records)
    log.write_bytes(log.read_bytes() + b"{\n")
    code, stdout, stderr = rerank("replay", log, "--artefact", artefact, "--out", tmp_path / "slates.jsonl")
    assert (code, stdout) == (2, "")
    assert f"{log}:2: " in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]


def test_the_log_itself_is_never_overwritten(tmp_path: Path, artefact: str) -> None:
    log = write_log(tmp_path / "log.jsonl", [])
    assert rerank("replay", log, "--artefact", artefact, "--out", log)[0] == 2


def test_an_artefact_that_does_not_load_ends_with_1(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", [])
    assert rerank("replay", log, "--artefact", tmp_path)[0] == 1


def test_a_log_without_our_topics_says_so(tmp_path: Path, artefact: str) -> None:
    writer = LogWriter()
    writer.raw("orders", b"u-1", b"{}")
    log = write_log(tmp_path / "log.jsonl", writer.records)
    code, stdout, stderr = rerank("replay", log, "--artefact", artefact)
    assert (code, json.loads(stdout)["other_topics"]) == (0, 1)
    assert "check RERANK_TOPIC_PREFIX" in stderr
