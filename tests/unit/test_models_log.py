"""Rules of interaction logs and of the split."""

from pathlib import Path

import pytest

from models.log import LogError, from_interactions, read_log, split_by_time
from schemas.codec import encode
from tests.builders import interaction
from tests.logs import rating_log


def test_interactions_are_ordered_by_event_time_and_log_order_inside() -> None:
    log = from_interactions(
        interaction(event_id=event_id, event_time_ms=time_ms)
        for event_id, time_ms in (("late", 9), ("first", 5), ("second", 5), ("early", 1))
    )
    assert log.event_ids == ["early", "first", "second", "late"]


def test_a_row_comes_back_as_the_record_it_was(tmp_path: Path) -> None:
    record = interaction(request_id=None, position=None, context=None)
    (tmp_path / "log.jsonl").write_bytes(encode(record) + b"\n\n")
    assert read_log(tmp_path / "log.jsonl").interaction(0) == record


def test_no_value_is_zero_for_the_model_and_none_on_the_wire() -> None:
    log = from_interactions([interaction(value=None)])
    assert (log.values.tolist(), log.interaction(0).value) == ([0.0], None)


def test_the_first_80_percent_are_training() -> None:
    assert split_by_time(rating_log([("u", f"i{n}", 5.0, n) for n in range(11)])) == 8


def test_wanted_are_ratings_from_4_and_positive_kinds() -> None:
    rows = [("rating", 3.0), ("rating", 4.0), ("click", 0.0), ("view", 5.0), ("skip", 5.0), ("complete", 0.0)]
    log = from_interactions(
        interaction(kind=kind, value=value, event_time_ms=number) for number, (kind, value) in enumerate(rows)
    )
    assert log.positive().tolist() == [False, True, True, False, False, True]


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"user_id": 1}', b'{"user_id": "u"}', b"\xff\xfe", b'{"user_id": "\\ud800"}']
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(encode(interaction()) + b"\n" + line + b"\n")
    with pytest.raises(LogError, match=r"log\.jsonl, line 2: "):
        read_log(path)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(LogError, match="no interactions"):
        read_log(tmp_path / "log.jsonl")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="No such file"):
        read_log(tmp_path / "log.jsonl")
