"""Counters and timings of a worker, under the names of docs/operators.md. No user or item is ever a label."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

from models.manifest import Manifest

DURATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
AGE_BUCKETS_S = (0.1, 1.0, 10.0, 60.0, 600.0, 3_600.0, 86_400.0, 604_800.0)
RELOAD_OUTCOMES = ("ok", "rejected_hash", "rejected_space", "rejected_golden", "load_error")
SIZE_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


class Telemetry:
    """One registry a worker, so that tests and two workers in one process never share a counter."""

    def __init__(self) -> None:
        """Register every metric at zero."""
        self.registry = CollectorRegistry()
        self.events = Counter("rerank_events_total", "Interactions by outcome.", ["outcome"], registry=self.registry)
        self.requests = Counter(
            "rerank_requests_total",
            "Candidate lists by outcome.",
            ["outcome", "reason"],
            registry=self.registry,
        )
        self.dead_letters = Counter(
            "rerank_dlq_total", "Dead letters by topic and code.", ["topic", "code"], registry=self.registry
        )
        self.bad_rows = Counter(
            "rerank_bad_rows_total", "User rows that could not be read.", ["kind"], registry=self.registry
        )
        self.retries = Counter("rerank_retries_total", "Operations tried again.", ["stage"], registry=self.registry)
        self.rewinds = Counter(
            "rerank_rewinds_total", "Partitions read again because Redis lost them.", registry=self.registry
        )
        self.gap_records = Counter(
            "rerank_gap_records_total",
            "Records that retention took before they were read.",
            ["topic"],
            registry=self.registry,
        )
        self.rebalances = Counter("rerank_rebalances_total", "Assignments received.", registry=self.registry)
        self.partitions = Gauge("rerank_partitions_assigned", "Partitions this worker owns.", registry=self.registry)
        self.duration = Histogram(
            "rerank_request_duration_seconds",
            "Time of a candidate list, by stage.",
            ["stage"],
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.circuit_state = Gauge(
            "rerank_circuit_state", "0: asked, 1: probed, 2: not asked.", ["dependency"], registry=self.registry
        )
        self.circuit_openings = Counter(
            "rerank_circuit_openings_total",
            "Times a dependency ceased to be asked.",
            ["dependency"],
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "rerank_batch_size",
            "Records a micro-batch.",
            ["topic"],
            buckets=SIZE_BUCKETS,
            registry=self.registry,
        )

        self.freshness = Histogram(
            "rerank_freshness_seconds",
            "From the Kafka timestamp of a batch's first interaction to its state being saved.",
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.staleness = Histogram(
            "rerank_staleness_seconds",
            "Event time from the last interaction in a state to the list ranked by it.",
            buckets=AGE_BUCKETS_S,
            registry=self.registry,
        )
        self.candidates = Histogram(
            "rerank_candidates", "Items of a slate.", buckets=SIZE_BUCKETS, registry=self.registry
        )
        self.cold_users = Counter(
            "rerank_cold_users_total", "Lists of users nothing is known of.", registry=self.registry
        )
        self.cold_items = Counter(
            "rerank_cold_items_total", "Lists with items the model does not know.", registry=self.registry
        )
        self.nonfinite = Counter(
            "rerank_score_nonfinite_total", "Lists with a score that is not finite.", registry=self.registry
        )
        self.lag = Gauge(
            "rerank_consumer_lag_records", "Records not settled.", ["topic", "partition"], registry=self.registry
        )
        self.unsettled = Gauge(
            "rerank_unsettled_records",
            "Records delivered and not settled.",
            ["topic", "partition"],
            registry=self.registry,
        )
        self.undecided = Gauge(
            "rerank_undecided_records",
            "Records behind a transaction that is open.",
            ["topic", "partition"],
            registry=self.registry,
        )
        self.event_loop_lag = Histogram(
            "rerank_event_loop_lag_seconds",
            "How late the event loop is.",
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.event_loop_tasks = Gauge("rerank_event_loop_tasks", "asyncio tasks alive.", registry=self.registry)
        self.model_info = Gauge(
            "rerank_model_info",
            "The model in service.",
            ["name", "version", "sha256", "format", "dim"],
            registry=self.registry,
        )
        self.model_reloads = Counter(
            "rerank_model_reload_total",
            "Changed artefacts, by what became of them.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in RELOAD_OUTCOMES:
            self.model_reloads.labels(outcome)
        self.build_info = Gauge(
            "rerank_build_info", "This program.", ["version", "python", "torch"], registry=self.registry
        )

        self.build_info.labels(_version("stream-rerank"), platform.python_version(), _version("torch")).set(1)

    def show_model(self, manifest: Manifest) -> None:
        """Show which model is in service."""
        self.model_info.clear()
        sha256 = manifest.files.get("model.pt", "")
        self.model_info.labels(manifest.name, manifest.version, sha256, manifest.format, str(manifest.dims.S)).set(1)

    def describe_process(self) -> None:
        """Add what the operating system and Python know of this process: `process_*` and `python_gc_*`."""
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def totals(self) -> Mapping[str, float]:
        """Return every counter that is not zero, as `name{label,...}`: its value."""
        return {
            f"{sample.name}{{{','.join(sample.labels.values())}}}": sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.value
        }
