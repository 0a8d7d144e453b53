"""What `rerank topics check` calls a problem."""

import pytest
from typer.testing import CliRunner

from stream_app.commands import topics
from stream_app.settings import Settings
from stream_app.topic_admin import TopicProblem, topic_problems, topic_specs


def equal_counts(partitions: int, prefix: str = "") -> dict[str, int]:
    return dict.fromkeys(topic_specs(prefix), partitions)


def test_every_topic_with_equal_counts_is_no_problem() -> None:
    assert topic_problems(equal_counts(4, "shop-"), "shop-") == []


def test_topics_of_others_are_not_ours() -> None:
    assert topic_problems(equal_counts(4) | {"orders": 9}, "") == []


@pytest.mark.parametrize("name", ["interactions", "candidates", "reranked", "interactions.dlq", "candidates.dlq"])
def test_a_topic_that_a_worker_reads_or_writes_stops_it(name: str) -> None:
    counts = equal_counts(4, "shop-")
    del counts[f"shop-{name}"]
    assert topic_problems(counts, "shop-") == [
        TopicProblem(
            message=f"topics shop-{name}: not there, no worker starts",
            remedy="rerank topics create --partitions N",
            stops_workers=True,
        )
    ]


def test_other_topics_that_are_missing_stop_no_worker() -> None:
    counts = equal_counts(4, "shop-")
    del counts["shop-items"], counts["shop-items.dlq"]
    assert topic_problems(counts, "shop-") == [
        TopicProblem(
            message="topics shop-items, shop-items.dlq: not there, no worker needs them",
            remedy="rerank topics create --partitions N",
            stops_workers=False,
        )
    ]


def test_missing_topics_are_told_apart_by_what_they_stop() -> None:
    needed = "interactions, candidates, reranked, interactions.dlq, candidates.dlq"
    assert [(one.message, one.stops_workers) for one in topic_problems({}, "")] == [
        (f"topics {needed}: not there, no worker starts", True),
        ("topics items, items.dlq: not there, no worker needs them", False),
    ]


def test_interactions_and_candidates_of_unequal_counts_are_a_problem() -> None:
    (problem,) = topic_problems(equal_counts(4) | {"candidates": 6}, "")
    assert problem.message == (
        "partitions: 'interactions' has 4, 'candidates' has 6; a click and the next list would part, no worker starts"
    )


def test_other_topics_may_have_other_counts() -> None:
    assert topic_problems(equal_counts(4) | {"items": 1, "reranked": 8, "candidates.dlq": 1}, "") == []


def test_the_topics_are_the_table_and_its_dead_letters() -> None:
    assert list(topic_specs("a.")) == [
        "a.interactions",
        "a.candidates",
        "a.items",
        "a.reranked",
        "a.interactions.dlq",
        "a.candidates.dlq",
        "a.items.dlq",
    ]


@pytest.mark.parametrize(("stops_workers", "exit_code"), [(True, 1), (False, 0)])
def test_the_check_fails_only_for_what_stops_a_worker(
    monkeypatch: pytest.MonkeyPatch, stops_workers: bool, exit_code: int
) -> None:
    problem = TopicProblem(message="topics x: not there", remedy="make x", stops_workers=stops_workers)

    async def found(_: Settings) -> list[TopicProblem]:
        return [problem]

    monkeypatch.setattr(topics, "check_topics", found)
    result = CliRunner().invoke(topics.app, ["check"])
    assert (result.exit_code, result.stderr) == (exit_code, "topics x: not there; make x\n")
