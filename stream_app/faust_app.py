"""The Faust app of a worker: no web server, tables, data directory or leader, and a transport that loses nothing."""

import logging
from collections.abc import Callable, Mapping

import faust
from faust.types import TP
from mode.supervisors import CrashingSupervisor
from yarl import URL

from schemas.topics import topic_name
from stream_app.settings import Settings
from stream_app.transport import BatchTransport

# The transport bounds what is delivered, partition by partition; a full queue of Faust's would block all of them.
BUFFERED_BATCHES = 1_000_000


class RerankApp(faust.App):
    """A Faust app without web server, tables, data directory or leader: all it has is a consumer and two agents."""

    logger = logging.getLogger("faust.app")  # its services tell at INFO every step they take
    on_ready: Callable[[set[TP]], None]

    def _create_directories(self) -> None:
        """Create nothing: there are no tables."""

    def on_rebalance_end(self) -> None:
        """Tell the worker that partitions are assigned and records flow."""
        super().on_rebalance_end()
        self.on_ready(set(self.consumer.assignment()))


def faust_app(
    settings: Settings,
    on_start_offsets: Callable[[Mapping[TP, int]], None],
    on_gap: Callable[[TP, int, int], None],
) -> RerankApp:
    """Return the configured app; see docs/faults.md for why each setting is not Faust's default."""
    kafka = settings.kafka
    app = RerankApp(
        settings.group_id,
        broker=[URL(f"kafka://{server.strip()}") for server in kafka.bootstrap_servers.split(",")],
        broker_client_id="stream-rerank",
        broker_session_timeout=kafka.session_timeout_ms / 1000.0,
        broker_heartbeat_interval=kafka.heartbeat_interval_ms / 1000.0,
        broker_request_timeout=max(kafka.request_timeout_ms, kafka.session_timeout_ms + 1_000) / 1000.0,
        broker_commit_interval=kafka.commit_interval_ms / 1000.0,
        broker_max_poll_records=kafka.max_poll_records,
        consumer_max_fetch_size=4 * 1_048_576,
        consumer_auto_offset_reset="earliest",
        processing_guarantee="at_least_once",
        stream_buffer_maxsize=BUFFERED_BATCHES,
        stream_wait_empty=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        agent_supervisor=CrashingSupervisor,
        autodiscover=False,
    )
    app.transport = BatchTransport(
        app.conf.broker_consumer,
        app,
        fetch_max_wait_ms=kafka.fetch_max_wait_ms,
        max_batch_records=kafka.max_poll_records,
        on_start_offsets=on_start_offsets,
        on_gap=on_gap,
        durable_after_s={topic_name(settings.topic_prefix, "interactions"): settings.redis.durability_window_s()},
    )
    return app
