"""Settings: one frozen object, read once from `RERANK_...` variables (docs/operators.md lists them)."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.limits import Limits
from stream_app import failpoints
from stream_app.errors import SettingsError

ENV_PREFIX = "RERANK_"
CLUSTER_DURABILITY_WINDOW_MS = 5_000
_BROKER = re.compile(r" *(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})? *")


def _brokers(servers: str) -> str:
    """Refuse what aiokafka would fail to read with a traceback."""
    if not all(_BROKER.fullmatch(server) for server in servers.split(",")):
        raise PydanticCustomError("brokers", "not a list of HOST:PORT with commas between")
    return servers


class KafkaSettings(BaseModel):
    """How the worker speaks to the broker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bootstrap_servers: Annotated[str, AfterValidator(_brokers)] = "127.0.0.1:9092"
    session_timeout_ms: int = Field(default=10_000, ge=1_000)
    heartbeat_interval_ms: int = Field(default=2_000, ge=100)
    fetch_max_wait_ms: int = Field(default=20, ge=1, le=5_000)
    request_timeout_ms: int = Field(default=30_000, ge=1_000)
    commit_interval_ms: int = Field(default=1_000, ge=50)
    max_poll_records: int = Field(default=1_000, ge=1)
    max_request_bytes: int = Field(default=4 * 1_048_576, ge=65_536)
    idempotence: Literal["auto", "on", "off"] = "auto"

    @model_validator(mode="after")
    def _heartbeats_keep_the_session(self) -> Self:
        if 2 * self.heartbeat_interval_ms > self.session_timeout_ms:
            raise ValueError(
                f"RERANK_KAFKA__HEARTBEAT_INTERVAL_MS={self.heartbeat_interval_ms} is more than half of "
                f"RERANK_KAFKA__SESSION_TIMEOUT_MS={self.session_timeout_ms}: one lost beat would cost all partitions"
            )
        return self

    @model_validator(mode="after")
    def _fetches_are_answered_in_time(self) -> Self:
        if self.fetch_max_wait_ms >= self.request_timeout_ms:
            raise ValueError(
                f"RERANK_KAFKA__FETCH_MAX_WAIT_MS={self.fetch_max_wait_ms} is not less than "
                f"RERANK_KAFKA__REQUEST_TIMEOUT_MS={self.request_timeout_ms}: every fetch that waits would fail"
            )
        return self


class RedisSettings(BaseModel):
    """How the worker speaks to Redis."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    scripts: Literal["lua", "watch"] = "lua"
    foreign_rows: Literal["refuse", "cold"] = "refuse"
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    durability_window_ms: int | None = Field(default=None, ge=0)
    key_prefix: str = Field(default="rerank", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    timeout_ms: int = Field(default=500, ge=1)
    connect_timeout_ms: int = Field(default=500, ge=1)
    budget_ms: int = Field(default=50, ge=1)
    breaker_failures: int = Field(default=3, ge=1)
    breaker_probe_ms: int = Field(default=500, ge=1)

    @model_validator(mode="after")
    def _clusters_have_scripts(self) -> Self:
        if self.scripts == "watch" and self._in_cluster():  # without them a cluster would need a transaction a bucket
            raise ValueError("RERANK_REDIS__SCRIPTS=watch with a cluster in RERANK_REDIS__URL: a cluster needs scripts")
        return self

    @model_validator(mode="after")
    def _keys_have_certificates(self) -> Self:
        if self.key_file is not None and self.certificate_file is None:
            raise ValueError(
                f"RERANK_REDIS__KEY_FILE={self.key_file} without RERANK_REDIS__CERTIFICATE_FILE: Redis could not be "
                "shown whose key it is"
            )
        return self

    def _in_cluster(self) -> bool:
        return self.url.get_secret_value().partition("://")[0].endswith("+cluster")

    def durability_window_s(self) -> float:
        """Return how long a commit waits for a write to become durable: in a cluster by default, else not at all."""
        default_ms = CLUSTER_DURABILITY_WINDOW_MS if self._in_cluster() else 0
        return (default_ms if self.durability_window_ms is None else self.durability_window_ms) / 1000.0


class HttpSettings(BaseModel):
    """Where health and telemetry are served; nowhere without a port."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int | None = Field(default=None, ge=0, le=65_535)


class Settings(BaseSettings):
    """Everything a worker is told from outside.

    Raises SettingsError (through `load_settings`) naming the variable, its value and what is expected.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid")

    kafka: KafkaSettings = KafkaSettings()
    redis: RedisSettings = RedisSettings()
    http: HttpSettings = HttpSettings()
    artefact: Path | None = None
    artefact_check_s: float = Field(default=2.0, ge=0.0)
    group_id: str = Field(default="rerank", min_length=1, max_length=200)
    topic_prefix: str = Field(default="", max_length=100, pattern=r"^[A-Za-z0-9._-]*$")
    deadline_ms: int = Field(default=1_000, ge=1)
    max_deadline_ms: int = Field(default=600_000, ge=1)
    max_message_bytes: int = Field(default=Limits().max_message_bytes, ge=1_024)
    max_candidates: int = Field(default=Limits().max_candidates, ge=1)
    micro_batch_interactions: int = Field(default=1_000, ge=1)
    micro_batch_lists: int = Field(default=32, ge=1)
    cached_users: int = Field(default=100_000, ge=0)
    future_tolerance_ms: int = Field(default=300_000, ge=0)
    join_timeout_s: float = Field(default=120.0, gt=0)
    stall_after_s: float = Field(default=60.0, gt=0)
    grace_s: float = Field(default=10.0, gt=0)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    failpoint: str = Field(default="", pattern=failpoints.PATTERN)

    @model_validator(mode="after")
    def _deadlines_agree(self) -> Self:
        if self.deadline_ms > self.max_deadline_ms:
            raise ValueError(
                f"RERANK_DEADLINE_MS={self.deadline_ms} is more than RERANK_MAX_DEADLINE_MS={self.max_deadline_ms}"
            )
        return self

    @model_validator(mode="after")
    def _what_is_taken_may_be_produced(self) -> Self:
        if self.max_message_bytes > self.kafka.max_request_bytes:
            raise ValueError(
                f"RERANK_MAX_MESSAGE_BYTES={self.max_message_bytes} is more than "
                f"RERANK_KAFKA__MAX_REQUEST_BYTES={self.kafka.max_request_bytes}: an input that is taken might be too "
                "large to be answered, or to be kept as a dead letter"
            )
        return self

    def row_prefix(self) -> str:
        """Return the first part of every Redis key; unless it is set, topics of another prefix get another one.

        Fences count offsets of one log: two logs that share rows would take each other's interactions for duplicates.
        """
        if "key_prefix" in self.redis.model_fields_set or not self.topic_prefix:
            return self.redis.key_prefix
        return f"{self.redis.key_prefix}-{self.topic_prefix}"

    def limits(self) -> Limits:
        """Return the limits that decoding enforces."""
        return Limits(max_message_bytes=self.max_message_bytes, max_candidates=self.max_candidates)


def load_settings() -> Settings:
    """Read the environment once.

    Raises:
        SettingsError: one line a wrong variable: its name, its value (secrets masked), what is expected.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError("\n".join(_sentence(item) for item in error.errors())) from None


def _sentence(item: ErrorDetails) -> str:
    if item["type"] == "value_error":  # two settings that cannot both hold name themselves
        return f"{item['ctx']['error']}; the process does not start; correct one of them"
    name = ENV_PREFIX + "__".join(str(part).upper() for part in item["loc"])
    if item["type"] == "extra_forbidden":  # a misspelt name may hold a password
        return f"{name}: no such setting; the process does not start; correct the name or unset it"
    value = "(secret)" if name.endswith("URL") else repr(item["input"])
    return f"{name}={value}: {item['msg']}; the process does not start; correct or unset {name}"
