"""Counters and timings of a worker, under the names of docs/operators.md. No user or item is ever a label."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

DURATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SIZE_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000)


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

    def serve(self, port: int) -> None:
        """Serve the metrics on 127.0.0.1 from a thread of their own."""
        start_http_server(port, addr="127.0.0.1", registry=self.registry)

    def totals(self) -> Mapping[str, float]:
        """Return every counter that is not zero, as `name{label,...}`: its value."""
        return {
            f"{sample.name}{{{','.join(sample.labels.values())}}}": sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.value
        }
