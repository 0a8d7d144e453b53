"""A broker and a Redis on loopback, for a laptop and for tests."""

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from deploy.local.errors import LocalStackError
from deploy.local.kafka import ApacheKafka, EmbeddedKafka
from deploy.local.redis import RedisServer

KafkaChoice = Literal["auto", "apache", "embedded"]
RedisChoice = Literal["auto", "local"]
BrokerKind = Literal["given", "apache", "embedded"]

BOOTSTRAP_VARIABLE = "RERANK_KAFKA__BOOTSTRAP_SERVERS"
REDIS_VARIABLE = "RERANK_REDIS__URL"

# The embedded broker lets a group join take half the session timeout, so a short one keeps starts short.
_EMBEDDED_SETTINGS = {
    "RERANK_KAFKA__SESSION_TIMEOUT_MS": "3000",
    "RERANK_KAFKA__HEARTBEAT_INTERVAL_MS": "500",
}


class LocalStack:
    """Start what is missing, stop it again.

    Broker, `kafka="auto"`: what RERANK_KAFKA__BOOTSTRAP_SERVERS points at, else Apache Kafka if KAFKA_HOME
    is set, else the embedded broker; "apache" and "embedded" start that one whatever the environment says.
    Redis, `redis="auto"`: what RERANK_REDIS__URL points at, else one of our own; "local": one of our own.

    Raises (on entering):
        LocalStackError: a program is missing or did not get ready; nothing that was started is left running.
    """

    def __init__(
        self,
        directory: Path,
        kafka: KafkaChoice = "auto",
        redis: RedisChoice = "auto",
        *,
        kafka_home: Path | None = None,
        kafka_heap_megabytes: int = 512,
    ) -> None:
        """Choose the servers; nothing runs yet. Data and logs go below `directory`."""
        self._directory = directory
        self._kafka_home = kafka_home
        self._kafka_heap_megabytes = kafka_heap_megabytes
        self._given_bootstrap_servers = os.environ.get(BOOTSTRAP_VARIABLE) or None if kafka == "auto" else None
        self._given_redis_url = os.environ.get(REDIS_VARIABLE) or None if redis == "auto" else None
        self._broker_kind = self._choose_broker(kafka)
        self._kafka: ApacheKafka | EmbeddedKafka | None = None
        self._redis: RedisServer | None = None
        self._servers = ExitStack()

    @property
    def broker_kind(self) -> BrokerKind:
        """Which broker this is."""
        return self._broker_kind

    @property
    def bootstrap_servers(self) -> str:
        """The value of RERANK_KAFKA__BOOTSTRAP_SERVERS."""
        return self._given_bootstrap_servers or self.kafka.address

    @property
    def redis_url(self) -> str:
        """The value of RERANK_REDIS__URL; holds a password if the one that was given does."""
        return self._given_redis_url or self.redis.url

    @property
    def kafka(self) -> ApacheKafka | EmbeddedKafka:
        """The broker of ours, which can be stopped, killed, paused, restarted.

        Raises:
            LocalStackError: the broker was given from outside, or the stack does not run.
        """
        if self._kafka is None:
            raise LocalStackError(_not_ours(BOOTSTRAP_VARIABLE, self._given_bootstrap_servers is not None))
        return self._kafka

    @property
    def redis(self) -> RedisServer:
        """The Redis of ours, which can be stopped, killed, paused, restarted.

        Raises:
            LocalStackError: Redis was given from outside, or the stack does not run.
        """
        if self._redis is None:
            raise LocalStackError(_not_ours(REDIS_VARIABLE, self._given_redis_url is not None))
        return self._redis

    def environment(self) -> dict[str, str]:
        """Return the RERANK_ settings with which a child process finds this stack."""
        found = {BOOTSTRAP_VARIABLE: self.bootstrap_servers, REDIS_VARIABLE: self.redis_url}
        return found | _EMBEDDED_SETTINGS if self._broker_kind == "embedded" else found

    def __enter__(self) -> Self:
        """Start what is missing: the broker first, it takes longest to fail."""
        with ExitStack() as servers:
            if self._given_bootstrap_servers is None:
                self._kafka = self._new_kafka()
                servers.enter_context(self._kafka)
            if self._given_redis_url is None:
                self._redis = servers.enter_context(RedisServer(self._directory))
            self._servers = servers.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what was started, whatever happened."""
        self._servers.close()

    def _choose_broker(self, kafka: KafkaChoice) -> BrokerKind:
        if kafka != "auto":
            return kafka
        if self._given_bootstrap_servers:
            return "given"
        return "apache" if self._kafka_home or os.environ.get("KAFKA_HOME") else "embedded"

    def _new_kafka(self) -> ApacheKafka | EmbeddedKafka:
        if self._broker_kind == "apache":
            return ApacheKafka(self._directory, self._kafka_home, heap_megabytes=self._kafka_heap_megabytes)
        return EmbeddedKafka(self._directory)


def _not_ours(variable: str, given: bool) -> str:
    if given:
        return f"{variable} is set: that server is not ours, it is neither stopped nor paused; unset {variable}"
    return "the local stack does not run: it has no server; enter it first (with LocalStack(...) as stack)"
