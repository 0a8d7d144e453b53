"""The recorded log: what a line means, and what is said of a bad one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.refusals import ErrorCode, NotUnpacked
from stream_app.recorded_log import MAX_LINE_BYTES, LogRecord, RecordedLogError, format_line, parse_line, read_log

_START = b'{"topic":"interactions","partition":1,"offset":7,"timestamp_ms":5'
_BYTES = st.none() | st.binary(max_size=20)
_TEXT = st.text(st.characters(codec="utf-8"), max_size=10)

records = st.builds(
    LogRecord,
    topic=st.text(st.characters(codec="utf-8"), min_size=1, max_size=10),
    partition=st.integers(0, 999_999),
    offset=st.integers(0, 2**63 - 1),
    timestamp=st.integers(-(2**63), 2**63 - 1),
    key=_BYTES,
    value=_BYTES,
    headers=st.lists(st.tuples(_TEXT, _BYTES), max_size=3),
)


@given(records)
def test_a_record_survives_the_log(record: LogRecord) -> None:
    line = format_line(record)
    assert parse_line(line) == record
    assert line.count(b"\n") == 1


def test_bytes_that_are_utf8_are_written_as_text() -> None:
    record = LogRecord("interactions", 1, 7, 5, b"u-1", "é".encode(), [])
    assert format_line(record) == _START + ',"key":"u-1","value":"é"}\n'.encode()


def test_bytes_that_are_not_utf8_are_written_as_base64() -> None:
    record = LogRecord("interactions", 1, 7, 5, b"\xff", b"\xfe", [])
    assert format_line(record) == _START + b',"key_base64":"/w==","value_base64":"/g=="}\n'


def test_what_was_not_unpacked_is_so_in_the_log_too_and_what_only_says_so_is_not() -> None:
    value = NotUnpacked.at(3, 7, ErrorCode.TOO_LARGE)
    line = format_line(LogRecord("interactions", 1, 7, 5, None, value, []))
    assert line == _START + b',"key":null,"value":"not unpacked: offsets 3 to 7","not_unpacked":"too_large"}\n'
    read = parse_line(line).value
    assert (type(read), read) == (NotUnpacked, value)
    assert isinstance(read, NotUnpacked)
    assert read.code is ErrorCode.TOO_LARGE
    assert type(parse_line(format_line(LogRecord("interactions", 1, 7, 5, None, bytes(value), []))).value) is bytes


def test_a_code_that_says_nothing_of_a_batch_is_none_of_a_record_that_was_not_unpacked() -> None:
    with pytest.raises(ValueError, match="not_unpacked='too_deep'"):
        parse_line(_START + b',"value":"x","not_unpacked":"too_deep"}')


def test_a_null_value_is_a_tombstone() -> None:
    assert parse_line(_START + b',"key":"u-1","value":null}').value is None


def test_a_key_may_be_missing() -> None:
    assert parse_line(_START + b',"value":"{}"}').key is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "truncated"),
        (b"[]", "Expected `object`, got `array`"),
        (_START + b"}", "neither `value` nor `value_base64`"),
        (_START + b',"value":"a","value_base64":"YQ=="}', "both a value and its base64"),
        (_START + b',"value_base64":"?"}', "value is not base64"),
        (_START + b',"value":1}', r"\$.value"),
        (b'{"topic":"t","partition":-1,"offset":0,"timestamp_ms":0,"value":null}', r"\$.partition"),
        (b'{"topic":"t","partition":0,"offset":0,"value":null}', "timestamp_ms"),
        (b"\xff", "malformed"),
        (b'"' + b"a" * MAX_LINE_BYTES + b'"', "longer than"),
    ],
    ids=lambda one: repr(one)[:40],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(_START + b',"value":null}\n\n' + line + b"\n")
    with pytest.raises(RecordedLogError, match=rf"log\.jsonl:3: .*{message}"):
        list(read_log(path))


def test_a_log_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordedLogError, match="No such file"):
        list(read_log(tmp_path / "none.jsonl"))
