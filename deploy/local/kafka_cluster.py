"""Several Apache Kafka nodes on one machine."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.local.kafka import ApacheKafka, ClusterMember, new_cluster_id
from deploy.local.ports import free_ports
from deploy.local.server import PortTakenError

_START_ATTEMPTS = 3


class ApacheKafkaCluster:
    """Several Apache Kafka nodes on this machine, for tests of leader loss. Nodes are numbered from 1."""

    def __init__(
        self,
        directory: Path,
        home: Path | None = None,
        *,
        nodes: int = 3,
        settings: Mapping[str, str | int] | None = None,
        proxy_ports: Mapping[int, int] | None = None,
    ) -> None:
        """Keep the description; nothing runs yet. `proxy_ports`: by node, see ApacheKafka."""
        self._directory = directory
        self._home = home
        self._node_count = nodes
        self._settings = {**_cluster_settings(nodes), **(settings or {})}
        self._proxy_ports = dict(proxy_ports or {})
        self._nodes: dict[int, ApacheKafka] = {}

    @property
    def bootstrap_servers(self) -> str:
        """The addresses of all nodes."""
        return ",".join(node.address for node in self._nodes.values())

    def node(self, number: int) -> ApacheKafka:
        """Return node `number`, which can be paused, killed and asked for its pid."""
        return self._nodes[number]

    def kill(self, number: int) -> None:
        """SIGKILL one node."""
        self._nodes[number].kill()

    def start(self, number: int) -> None:
        """Start one node again, on its ports and with its data."""
        self._nodes[number].start()

    def stop(self) -> None:
        """Stop every node: all are told before any is waited for, or the last would wait for a quorum."""
        with ExitStack() as stack:
            for node in self._nodes.values():
                stack.callback(node.stop)
                if node.is_running:
                    node.child.popen.terminate()

    def __enter__(self) -> Self:
        """Start all nodes at once and wait until each knows all."""
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                self._start_all()
            except PortTakenError:
                self.stop()
                if attempt == _START_ATTEMPTS:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop all nodes, whatever happened."""
        self.stop()

    def _start_all(self) -> None:
        ports = free_ports(3 * self._node_count)
        voters = {number: ports[3 * number - 2] for number in range(1, self._node_count + 1)}
        cluster_id = new_cluster_id()
        for number, controller_port in voters.items():
            member = ClusterMember(node_id=number, cluster_id=cluster_id, voters=voters)
            node = ApacheKafka(
                self._directory,
                self._home,
                heap_megabytes=384,
                settings=self._settings,
                member=member,
                proxy_port=self._proxy_ports.get(number),
            )
            node.ports = [ports[3 * number - 3], controller_port, ports[3 * number - 1]]
            self._nodes[number] = node
        for node in self._nodes.values():
            node.launch()
        for node in self._nodes.values():
            node.wait_until_ready()


def _cluster_settings(nodes: int) -> dict[str, str | int]:
    in_sync = max(1, nodes - 1)
    return {
        "default.replication.factor": nodes,
        "min.insync.replicas": in_sync,
        "offsets.topic.replication.factor": nodes,
        "transaction.state.log.replication.factor": nodes,
        "transaction.state.log.min.isr": in_sync,
        "share.coordinator.state.topic.replication.factor": nodes,
        "share.coordinator.state.topic.min.isr": in_sync,
        # How long a killed leader is waited for; 9000 by default.
        "broker.session.timeout.ms": 3000,
        # At most half of it, or a broker on a busy machine loses its lease and is not ready again.
        "broker.heartbeat.interval.ms": 500,
    }
