"""One broker and one Redis for all integration tests; RERANK_TEST_BROKER=embedded|apache says which broker."""

import os
import shutil
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from deploy.local import LocalStack, LocalStackError
from deploy.local.programs import find_java, find_kafka_home
from deploy.local.stack import KafkaChoice
from tests.worker_kit import kill_all, last_words

_BESIDE_THE_REPOSITORY = Path(__file__).resolve().parents[3] / "shared" / "kafka"
_BROKERS: dict[str, KafkaChoice] = {"embedded": "embedded", "apache": "apache"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs Apache Kafka where there is none."""
    try:
        find_java()
        find_kafka_home(_kafka_home())
    except LocalStackError as error:
        for item in items:
            if item.get_closest_marker("kafka"):
                item.add_marker(pytest.mark.skip(reason=f"no Apache Kafka here: {error}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the workers of a failed test logged."""
    report = yield
    if report.when == "call" and report.failed and item.get_closest_marker("integration"):
        report.sections += last_words()
    return report


@pytest.fixture(scope="session")
def kafka_home() -> Path | None:
    """Return where Apache Kafka is; None where there is none, and then nothing that asks for it runs."""
    return _kafka_home()


@pytest.fixture(scope="session")
def test_broker() -> KafkaChoice:
    """Return which broker the tests share."""
    chosen = os.environ.get("RERANK_TEST_BROKER", "embedded")
    if chosen not in _BROKERS:
        pytest.fail(f"RERANK_TEST_BROKER={chosen!r}: not one of embedded, apache; no test ran; correct it")
    return _BROKERS[chosen]


@pytest.fixture(scope="session")
def local_stack(
    test_broker: KafkaChoice, kafka_home: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalStack]:
    """Start the shared broker and Redis. A test that stops, kills or pauses servers starts a stack of its own."""
    directory = tmp_path_factory.mktemp("stack")
    with LocalStack(directory, kafka=test_broker, redis="local", kafka_home=kafka_home) as stack:
        yield stack
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def topic_prefix() -> str:
    """Return a prefix that no other test has."""
    return f"t{uuid.uuid4().hex[:10]}-"


@pytest.fixture(autouse=True)
def no_worker_left_behind() -> Iterator[None]:
    """End the workers of a test that failed half-way."""
    yield
    kill_all()


def _kafka_home() -> Path | None:
    if os.environ.get("KAFKA_HOME"):
        return Path(os.environ["KAFKA_HOME"])
    return _BESIDE_THE_REPOSITORY if _BESIDE_THE_REPOSITORY.is_dir() else None
