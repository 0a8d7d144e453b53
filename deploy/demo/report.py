"""The result: one JSON object, its tables for people, and the files that let somebody check it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from deploy.demo.arms import ARMS
from deploy.demo.measure import TOLERANCE, Ledger, Quality, quantiles
from deploy.demo.prepare import Dataset
from deploy.demo.traffic import USERS_AT_ONCE, Counts, request_id
from models.metrics import METRICS

POLICIES = {
    "retrieval": "retrieval order (popularity, half-life 7 days)",
    "frozen": "user state frozen at the split",
    "live_strict": "live, events of one second hidden (strict)",
    "live": "live, every event",
    "offline_live": "the same without the stream (offline)",
}
_ARM_OF_POLICY = {"frozen": "frozen", "live": "live", "live_strict": "strict"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything that a run of the demo has found out."""

    dataset: Dataset
    seed: int
    ledger: Ledger
    counts: Counts
    streamed: Mapping[str, Quality]
    offline: Mapping[str, Quality]  # by arm
    versions: Mapping[str, str | None]
    topics: Mapping[str, str]
    model_version: str
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text, the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def as_json(measured: Measured) -> dict[str, Any]:
    """Return the content of demo.json: the keys that outsiders rely on first, what explains them after."""
    ledger, dataset = measured.ledger, measured.dataset
    policies = {**measured.streamed, "offline_live": measured.offline["live"]}
    metrics = {
        name: {policy: _number(policies[policy].metrics[name].value) for policy in _JSON_ORDER} for name in METRICS
    }
    return {
        **metrics,
        "lists": len(dataset.lists),
        "interactions": measured.counts.interactions,
        "lists_per_second": round(measured.counts.lists / measured.counts.replay_s, 1),
        "latency_ms": _rounded(quantiles(ledger.list_ms)),
        "click_to_slate_ms": _rounded(quantiles(ledger.click_ms)),
        "versions": dict(measured.versions),
        "seed": measured.seed,
        "data": dataset.name,
        "all_lists": dataset.all_lists,
        "users": len({one.user_index for one in dataset.lists}),
        "slates": ledger.slates,
        "outcomes": {arm: dict(ledger.outcomes[arm]) for arm in ARMS},
        "ranked_lists": {policy: policies[policy].lists for policy in _JSON_ORDER},
        "ndcg10_interval_95": {
            policy: [_number(policies[policy].metrics["ndcg10"].low), _number(policies[policy].metrics["ndcg10"].high)]
            for policy in _JSON_ORDER
        },
        "live_over_frozen": _number(_ratio(measured, "live")),
        "live_strict_over_frozen": _number(_ratio(measured, "live_strict")),
        "offline_difference": {arm: _number(difference) for arm, difference in differences(measured).items()},
        "model": {"name": "learned-ema", "version": measured.model_version},
        "topics": dict(measured.topics),
        "seconds": {name: round(seconds, 2) for name, seconds in measured.seconds.items()},
    }


_JSON_ORDER = ("retrieval", "frozen", "live", "live_strict", "offline_live")


def differences(measured: Measured) -> dict[str, float]:
    """Return, by arm, the largest difference of a metric between the stream and the offline evaluator."""
    found = {}
    for policy, arm in _ARM_OF_POLICY.items():
        streamed, offline = measured.streamed[policy].metrics, measured.offline[arm].metrics
        found[arm] = max(abs(streamed[name].value - offline[name].value) for name in METRICS)
    return found


def verdict(measured: Measured) -> str | None:
    """Return what is wrong with the run, None when all was ranked and the stream and the offline evaluator agree."""
    unranked = {arm: measured.ledger.outcomes[arm].total() - measured.ledger.outcomes[arm]["ranked"] for arm in ARMS}
    if any(unranked.values()):
        told = ", ".join(f"{count} of {arm}" for arm, count in unranked.items() if count)
        return (
            f"lists not ranked ({told}): Redis, the model or the time did not suffice; the numbers above are not "
            "to be trusted; run it on a quieter machine, or see the reasons in the slates"
        )
    apart = {arm: difference for arm, difference in differences(measured).items() if not difference <= TOLERANCE}
    if not apart:
        return None
    told = ", ".join(f"{arm} {difference:.2e}" for arm, difference in apart.items())
    return (
        f"the stream and the offline evaluator differ by more than {TOLERANCE:.0e} ({told}): interactions were lost, "
        "doubled or reordered, or another model served; the numbers above are not to be trusted"
    )


def title(measured: Measured) -> str:
    """Return what was measured, in one line."""
    dataset = measured.dataset
    return (
        f"{dataset.title}, seed {measured.seed}: {len(dataset.lists):,} of {dataset.all_lists:,} test lists, "
        f"{len({one.user_index for one in dataset.lists}):,} users; every number is read from slates on "
        f"{measured.topics['reranked']!r}"
    )


def quality_table(measured: Measured) -> Table:
    """Return the table of policies."""
    rows = []
    for policy, name in POLICIES.items():
        quality = measured.offline["live"] if policy == "offline_live" else measured.streamed[policy]
        ndcg = quality.metrics["ndcg10"]
        arm = _ARM_OF_POLICY.get(policy, "live")
        rows.append(
            [
                name,
                f"{ndcg.value:.4f}",
                f"[{ndcg.low:.3f}, {ndcg.high:.3f}]",
                f"{quality.metrics['hr10'].value:.4f}",
                f"{quality.metrics['mrr'].value:.4f}",
                f"{quality.lists:,}",
                f"{measured.ledger.outcomes[arm].total() - measured.ledger.outcomes[arm]['ranked']:,}",
            ]
        )
    return Table(head=["user state", "NDCG@10", "95 % interval", "HR@10", "MRR", "lists", "not ranked"], rows=rows)


def latency_table(measured: Measured) -> Table:
    """Return the table of latencies."""
    ledger = measured.ledger
    rows = []
    for name, values_ms in (
        ("candidate list produced -> slate read", ledger.list_ms),
        ("click produced -> first slate that reflects it read", ledger.click_ms),
    ):
        cells = ["-" if value is None else f"{value:.1f}" for value in quantiles(values_ms).values()]
        rows.append([name, *cells, f"{len(values_ms):,}"])
    return Table(head=["ms, live arm", "p50", "p90", "p99", "measured"], rows=rows)


def notes(measured: Measured) -> list[str]:
    """Return what the tables leave open."""
    largest = max(differences(measured).values())
    counts, versions = measured.counts, measured.versions
    return [
        f"live over frozen: {_ratio(measured, 'live'):.2f} times; strict over frozen: "
        f"{_ratio(measured, 'live_strict'):.2f} times",
        f"stream and offline evaluator differ by {largest:.1e} at most (live, strict, frozen; allowed {TOLERANCE:.0e})",
        f"{counts.lists / counts.replay_s:,.0f} lists/s with {USERS_AT_ONCE} users at once; {counts.lists:,} slates, "
        f"{counts.interactions:,} interactions",
        f"{versions['broker']} broker {versions['broker_version'] or ''}, Redis {versions['redis']}, "
        f"torch {versions['torch']}",
    ]


def plain(table: Table) -> str:
    """Return the table as aligned text."""
    lines = [table.head, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_lists(dataset: Dataset, path: Path) -> None:
    """Write the test lists, one a line, so that the metrics can be recomputed from the slates by somebody else."""
    with path.open("wb") as file:
        file.writelines(_list_lines(dataset))


def _list_lines(dataset: Dataset) -> Iterable[bytes]:
    log = dataset.log
    for index, one in enumerate(dataset.lists):
        line = {
            "request_ids": {arm: request_id(arm, index) for arm in ARMS},
            "user_id": log.user_ids[one.user_index],
            "event_id": log.event_ids[one.event_index],
            "event_time_ms": int(log.event_times_ms[one.event_index]),
            "wanted_item_id": log.item_ids[one.candidate_items[one.true_position]],
            "item_ids": [log.item_ids[item] for item in one.candidate_items],
        }
        yield orjson.dumps(line) + b"\n"


def _ratio(measured: Measured, policy: str) -> float:
    base = measured.streamed["frozen"].metrics["ndcg10"].value
    value = measured.streamed[policy].metrics["ndcg10"].value
    return value / base if base else math.nan


def _rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 3) for name, value in values.items()}


def _number(value: float) -> float | None:
    """Return the number, None where JSON has none for it."""
    return value if math.isfinite(value) else None
