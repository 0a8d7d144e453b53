"""What the demo prints and saves."""

from pathlib import Path

import numpy as np

from deploy.demo.measure import Ledger, offline_quality, streamed_quality
from deploy.demo.prepare import Dataset
from deploy.demo.report import Measured, Table, as_json, plain, quality_table, verdict
from deploy.demo.traffic import Counts
from models.log import from_interactions
from models.protocol import TestList
from tests.builders import interaction, slate

CONTRACT_KEYS = [
    "ndcg10",
    "hr10",
    "mrr",
    "lists",
    "interactions",
    "lists_per_second",
    "latency_ms",
    "click_to_slate_ms",
    "versions",
    "seed",
]


def measured(offline_rank: int = 0, outcome: str = "ranked") -> Measured:
    """Build the result of one list whose live slate has the wanted item first."""
    log = from_interactions([interaction(item_id="i-1")])
    one = TestList(
        event_index=0,
        user_index=0,
        candidate_items=np.array([0]),
        true_position=0,
        retrieval_scores=np.array([1.0]),
    )
    ledger = Ledger(["i-1"])
    for arm in ("live", "strict", "frozen"):
        ledger.add_slate(arm, 0, slate(outcome=outcome, item_ids=["i-1", "i-2"], retrieval_positions=[1, 0]), 4.0)
    ledger.add_click(6.0)
    users = np.array([0])
    ranks = {"live": np.array([offline_rank]), "strict": np.array([0]), "frozen": np.array([0])}
    return Measured(
        dataset=Dataset(name="log.jsonl", path=Path("log.jsonl"), log=log, m=0, lists=[one], all_lists=9),
        seed=3,
        ledger=ledger,
        counts=Counts(interactions=5, lists=3, before_s=1.0, replay_s=2.0),
        streamed=streamed_quality(ledger, users, 3),
        offline=offline_quality(ranks, ledger, users, 3),
        versions={"python": "3.11.0", "broker": "embedded", "broker_version": None, "redis": "6.2.14", "torch": "2"},
        topics={"reranked": "reranked"},
        model_version="abc",
        seconds={"stream": 2.0},
    )


def test_the_json_begins_with_the_keys_that_outsiders_rely_on() -> None:
    assert list(as_json(measured()))[: len(CONTRACT_KEYS)] == CONTRACT_KEYS


def test_every_metric_has_the_five_policies() -> None:
    result = as_json(measured())
    assert [list(result[name]) for name in ("ndcg10", "hr10", "mrr")] == [
        ["retrieval", "frozen", "live", "live_strict", "offline_live"]
    ] * 3


def test_the_json_counts_and_times() -> None:
    result = as_json(measured())
    assert {name: result[name] for name in CONTRACT_KEYS[3:8]} == {
        "lists": 1,
        "interactions": 5,
        "lists_per_second": 1.5,
        "latency_ms": {"p50": 4.0, "p90": 4.0, "p99": 4.0},
        "click_to_slate_ms": {"p50": 6.0, "p90": 6.0, "p99": 6.0},
    }


def test_a_stream_that_agrees_with_the_evaluator_passes() -> None:
    assert verdict(measured()) is None


def test_a_stream_that_disagrees_with_the_evaluator_is_refused() -> None:
    complaint = verdict(measured(offline_rank=1))
    assert complaint is not None
    assert "live 5.00e-01" in complaint
    assert "lost, doubled or reordered" in complaint


def test_a_run_without_a_ranked_slate_is_refused() -> None:
    assert verdict(measured(outcome="fallback")) is not None


def test_the_table_says_how_many_lists_a_number_rests_on_and_how_many_were_not_ranked() -> None:
    rows = quality_table(measured(outcome="fallback")).rows
    assert [row[-2:] for row in rows] == [["0", "1"]] * 5


def test_a_plain_table_is_aligned_text() -> None:
    table = Table(head=["name", "value"], rows=[["a", "1.5"], ["longer", "22.25"]])
    assert plain(table) == "name    value\na         1.5\nlonger  22.25"


def test_a_list_that_was_not_ranked_is_a_complaint() -> None:
    complaint = verdict(measured(outcome="fallback"))
    assert complaint is not None
    assert complaint.startswith("lists not ranked (1 of live, 1 of strict, 1 of frozen): ")
