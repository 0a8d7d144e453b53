"""Settings come from the environment, once; a wrong one is refused with its name, value and expectation."""

import os

import pytest

from schemas.limits import Limits
from stream_app.errors import SettingsError
from stream_app.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def no_settings_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RERANK_")]:
        monkeypatch.delenv(name)


def test_without_an_environment_the_defaults_hold() -> None:
    settings = load_settings()
    assert settings.kafka.bootstrap_servers == "127.0.0.1:9092"
    assert settings.topic_prefix == ""
    assert settings.limits() == Limits()


def test_nested_names_use_two_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_KAFKA__BOOTSTRAP_SERVERS", "k:1")
    monkeypatch.setenv("RERANK_GROUP_ID", "g")
    monkeypatch.setenv("RERANK_MAX_CANDIDATES", "7")
    settings = load_settings()
    assert (settings.kafka.bootstrap_servers, settings.group_id) == ("k:1", "g")
    assert settings.limits().max_candidates == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RERANK_KAFKA__FETCH_MAX_WAIT_MS", "soon"),
        ("RERANK_MICRO_BATCH_LISTS", "0"),
        ("RERANK_TOPIC_PREFIX", "a b"),
        ("RERANK_KAFKA__IDEMPOTENCE", "maybe"),
        ("RERANK_KAFKA__BOOTSTRAP_SERVERS", ""),
        ("RERANK_KAFKA__BOOTSTRAP_SERVERS", ":"),
        ("RERANK_KAFKA__BOOTSTRAP_SERVERS", "a:9092,b:x"),
        ("RERANK_FAILPOINT", "before_lunch"),
        ("RERANK_FAILPOINT", "before_save:0"),
        ("RERANK_FAILPOINT", "before_save:1:shout"),
    ],
)
def test_a_wrong_value_is_refused_with_its_variable_and_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{name}={value!r}: ")
    assert str(caught.value).endswith(f"; the process does not start; correct or unset {name}")


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("RERANK_DEADLINE_MS", "RERANK_MAX_DEADLINE_MS"), ("601", "600")),
        (("RERANK_KAFKA__HEARTBEAT_INTERVAL_MS", "RERANK_KAFKA__SESSION_TIMEOUT_MS"), ("3001", "6000")),
        (("RERANK_KAFKA__FETCH_MAX_WAIT_MS", "RERANK_KAFKA__REQUEST_TIMEOUT_MS"), ("1000", "1000")),
        (("RERANK_MAX_MESSAGE_BYTES", "RERANK_KAFKA__MAX_REQUEST_BYTES"), ("4194305", "4194304")),
    ],
)
def test_two_settings_that_cannot_both_hold_are_refused_together(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, str], values: tuple[str, str]
) -> None:
    for name, value in zip(names, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    for name, value in zip(names, values, strict=True):
        assert f"{name}={value}" in str(caught.value)
    assert str(caught.value).endswith("; the process does not start; correct one of them")


def test_a_cluster_without_scripts_is_refused_without_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_REDIS__SCRIPTS", "watch")
    monkeypatch.setenv("RERANK_REDIS__URL", "redis+sentinel://:canary@h:1/rows")
    load_settings()
    monkeypatch.setenv("RERANK_REDIS__URL", "rediss+cluster://:canary@h:1")
    with pytest.raises(SettingsError, match=r"^RERANK_REDIS__SCRIPTS=watch .* a cluster needs scripts; ") as caught:
        load_settings()
    assert "canary" not in str(caught.value)


def test_a_key_without_its_certificate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_REDIS__KEY_FILE", "k.pem")
    with pytest.raises(SettingsError, match=r"^RERANK_REDIS__KEY_FILE=k.pem without RERANK_REDIS__CERTIFICATE_FILE"):
        load_settings()
    monkeypatch.setenv("RERANK_REDIS__CERTIFICATE_FILE", "c.pem")
    load_settings()


def test_values_at_the_edge_of_a_contradiction_hold_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_MAX_MESSAGE_BYTES", "65536")
    monkeypatch.setenv("RERANK_KAFKA__MAX_REQUEST_BYTES", "65536")
    monkeypatch.setenv("RERANK_KAFKA__FETCH_MAX_WAIT_MS", "999")
    monkeypatch.setenv("RERANK_KAFKA__REQUEST_TIMEOUT_MS", "1000")
    settings = load_settings()
    assert settings.max_message_bytes == settings.kafka.max_request_bytes


def test_a_misspelt_nested_name_is_refused_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_REDIS__PASSWROD", "canary")
    with pytest.raises(SettingsError, match="RERANK_REDIS__PASSWROD: no such setting") as caught:
        load_settings()
    assert "canary" not in str(caught.value)


def test_the_redis_url_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_REDIS__URL", "redis://:canary@h:1/0")
    settings = load_settings()
    assert "canary" not in repr(settings)
    assert "canary" not in settings.model_dump_json()
    assert settings.redis.url.get_secret_value() == "redis://:canary@h:1/0"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().group_id = "other"


def test_two_topic_prefixes_on_one_redis_never_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().row_prefix() == "rerank"
    monkeypatch.setenv("RERANK_TOPIC_PREFIX", "a-")
    assert load_settings().row_prefix() == "rerank-a-"
    monkeypatch.setenv("RERANK_REDIS__KEY_PREFIX", "mine")
    assert load_settings().row_prefix() == "mine"
