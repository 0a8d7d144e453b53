"""What `rerank topics check` calls a problem."""

from stream_app.topic_admin import TopicProblem, topic_problems, topic_specs


def equal_counts(partitions: int, prefix: str = "") -> dict[str, int]:
    return dict.fromkeys(topic_specs(prefix), partitions)


def test_every_topic_with_equal_counts_is_no_problem() -> None:
    assert topic_problems(equal_counts(4, "shop-"), "shop-") == []


def test_topics_of_others_are_not_ours() -> None:
    assert topic_problems(equal_counts(4) | {"orders": 9}, "") == []


def test_missing_topics_are_named_with_their_prefix() -> None:
    counts = equal_counts(4, "shop-")
    del counts["shop-items"], counts["shop-interactions.dlq"]
    assert topic_problems(counts, "shop-") == [
        TopicProblem(
            message="topics shop-items, shop-interactions.dlq: not there, no worker starts",
            remedy="rerank topics create --partitions N",
        )
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
