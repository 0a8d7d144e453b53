"""`rerank validate` without a broker, and the lines that `rerank tail` shows."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from schemas.codec import encode, encode_slate
from schemas.dead_letter import DeadLetter
from schemas.records import CandidateList, Interaction, Item
from stream_app.__main__ import app
from stream_app.commands.tail import line_of, printable
from stream_app.recorded_log import LogRecord
from tests.builders import candidate_list, interaction, item, slate

GOOD: Mapping[str, Interaction | CandidateList | Item] = {
    "interactions": interaction(),
    "candidates": candidate_list(),
    "items": item(),
}


def rerank(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def record(name: str, value: bytes | None, key: bytes = b"u-1") -> LogRecord:
    return LogRecord(name, 1, 7, 0, key, value, [])


@pytest.mark.parametrize("topic", GOOD)
def test_good_lines_of_every_input_pass(topic: str, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_bytes(encode(GOOD[topic]) + b"\r\n\n" + encode(GOOD[topic]))
    code, stdout, _ = rerank("validate", file, "--topic", topic, "--json")
    assert (code, json.loads(stdout)) == (0, {"lines": 2, "bad": []})


def test_every_bad_line_is_named_with_its_code() -> None:
    lines = b"\n".join([b"{", encode(interaction()), b'{"user_id":"u-1"}', b'{"user_id":5}', b"\xff"])
    code, stdout, _ = rerank("validate", "-", "--topic", "interactions", "--json", stdin=lines)
    bad = [(line["line"], line["code"]) for line in json.loads(stdout)["bad"]]
    assert (code, bad) == (2, [(1, "not_json"), (3, "missing_field"), (4, "wrong_type"), (5, "not_json")])


def test_check_sends_nothing() -> None:
    code, stdout, _ = rerank("produce", "-", "--topic", "interactions", "--check", stdin=encode(interaction()))
    assert (code, stdout) == (0, "1 lines, all good\n")


def test_a_topic_that_takes_no_input_is_refused() -> None:
    code, _, stderr = rerank("validate", "-", "--topic", "reranked", stdin=b"{}")
    assert code == 2
    assert "--topic 'reranked': not one of interactions, candidates, items" in stderr


def test_the_contract_is_exported_as_files(tmp_path: Path) -> None:
    code, stdout, _ = rerank("schema", "export", "--out", tmp_path / "wire")
    assert code == 0
    assert sorted(stdout.split()) == sorted(str(path) for path in (tmp_path / "wire").iterdir())
    assert (tmp_path / "wire" / "asyncapi.json").is_file()


def test_a_slate_is_one_line() -> None:
    assert line_of("reranked", record("reranked", encode_slate(slate(reasons=["cold_items"])))) == (
        "ranked (cold_items) request=r-1 user=u-1 items=2 [i-2 i-1] "
        "events=17 age_ms=12 total_ms=2.4 model=learned-ema:3"
    )


def test_a_dead_letter_is_one_line_with_its_code_and_its_first_bytes() -> None:
    letter = DeadLetter(
        topic="interactions",
        partition=2,
        offset=41,
        key=b"u-1",
        value=b"\xff{",
        headers=[],
        code="not_json",
        stage="DECODE",
        error_class="DecodeError",
        message="Interaction: malformed",
    )
    dead = LogRecord("interactions.dlq", 0, 0, 0, letter.key, letter.value, letter.record_headers())
    assert line_of("interactions.dlq", dead) == (
        "not_json             interactions/2/41 key=u-1 Interaction: malformed  value=\\xff{"
    )


def test_any_other_record_is_place_key_and_value() -> None:
    assert line_of("interactions", record("interactions", None)) == "interactions/1/7  u-1  null"


def test_bytes_that_are_no_slate_are_said_to_be_none() -> None:
    assert line_of("reranked", record("reranked", b"{")).startswith("reranked/1/7  no slate: Slate ")


def test_what_a_terminal_would_act_upon_is_escaped() -> None:
    odd: Interaction = interaction(item_id="\u202ei-1")
    line = printable(line_of("interactions", record("interactions", encode(odd), key=b"\x1b[2J")))
    assert "\\x1b[2J" in line
    assert "\\u202ei-1" in line
