"""The doctor's look at the environment."""

import pytest

from stream_app.commands.doctor_settings import examine_settings, unknown_variables
from stream_app.commands.findings import Finding, as_json, as_text, fail, healthy, ok, warn


def test_variables_of_settings_are_known_in_any_case() -> None:
    environment = {"RERANK_KAFKA__BOOTSTRAP_SERVERS": "", "rerank_redis__url": "", "RERANK_ARTEFACT": "", "PATH": ""}
    assert unknown_variables(environment) == []


def test_a_misspelt_variable_is_a_warning_that_names_the_right_one() -> None:
    _, findings = examine_settings({"RERANK_ARTEFCT": "x"})
    assert findings == [
        Finding(
            check="settings",
            verdict="warn",
            message="RERANK_ARTEFCT: no setting has this name, it is ignored",
            remedy="did you mean RERANK_ARTEFACT? else unset it",
        )
    ]


def test_a_misspelt_part_of_a_group_fails_and_its_value_is_not_shown() -> None:
    settings, findings = examine_settings({"RERANK_REDIS__PASSWROD": "geheim"})
    assert settings is None
    assert [finding.verdict for finding in findings] == ["fail"]
    assert "geheim" not in as_text(findings)


def test_a_wrong_value_fails_with_the_name_of_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_KAFKA__SESSION_TIMEOUT_MS", "soon")
    settings, findings = examine_settings({"RERANK_KAFKA__SESSION_TIMEOUT_MS": "soon"})
    assert settings is None
    assert findings[0].message.startswith("RERANK_KAFKA__SESSION_TIMEOUT_MS='soon'")


def test_settings_that_contradict_each_other_fail_with_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_KAFKA__MAX_REQUEST_BYTES", "65536")
    settings, findings = examine_settings({"RERANK_KAFKA__MAX_REQUEST_BYTES": "65536"})
    assert settings is None
    assert [finding.verdict for finding in findings] == ["fail"]
    assert "RERANK_MAX_MESSAGE_BYTES=1048576 is more than RERANK_KAFKA__MAX_REQUEST_BYTES=65536" in findings[0].message


def test_a_warning_is_healthy_and_a_failure_is_not() -> None:
    assert healthy([ok("a", "fine"), warn("b", "slow", "hurry")])
    assert not healthy([ok("a", "fine"), fail("b", "gone", "look")])


def test_text_puts_the_remedy_under_its_finding() -> None:
    assert as_text([ok("redis", "answers"), fail("broker", "gone", "start it")]) == (
        "ok    redis   answers\nfail  broker  gone\n              -> start it"
    )


def test_json_says_healthy_and_lists_the_findings() -> None:
    assert as_json([fail("broker", "gone", "start it")]) == (
        '{"healthy":false,"findings":[{"check":"broker","verdict":"fail","message":"gone","remedy":"start it"}]}'
    )
