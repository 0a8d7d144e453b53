"""How fast `rerank rebuild` folds a log into an empty Redis, by number of processes.

    python -m tests.bench.bench_rebuild [--interactions 500000] [--users 20000] [--kafka apache]

Wall-clock rates suffer from whatever else runs; the CPU time of one process says what one core can do.
"""

import asyncio
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import redis
import typer
from aiokafka import AIOKafkaProducer
from pydantic import SecretStr

from deploy.local import LocalStack
from schemas.codec import encode
from schemas.records import Interaction
from stream_app.rebuild_run import RebuildRequest, run_rebuild
from stream_app.settings import KafkaSettings, RedisSettings, Settings
from stream_app.topic_admin import create_topics
from tests.tiny_artefact import write_tiny_artefact

ITEMS, DIM, PARTITIONS, SEED = 1_000, 64, 4, 7


async def fill(settings: Settings, interactions: int, users: int) -> None:
    """Produce a seeded log in which few users are busy."""
    await create_topics(settings, PARTITIONS)
    rng = random.Random(SEED)  # noqa: S311 - a workload
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, linger_ms=5, max_batch_size=256 * 1024
    )
    await producer.start()
    try:
        for n in range(interactions):
            user_id = f"u-{int(rng.random() ** 2 * users)}"
            one = Interaction(
                event_id=f"e-{n}",
                user_id=user_id,
                item_id=f"i-{rng.randint(1, ITEMS)}",
                kind="click",
                event_time_ms=1_700_000_000_000 + n,
            )
            await producer.send("interactions", encode(one), user_id.encode())
    finally:
        await producer.stop()


def main(
    interactions: int = 500_000,
    users: int = 20_000,
    kafka: Annotated[str, typer.Option(help="embedded or apache")] = "embedded",
    rounds: int = 2,
) -> None:
    """Fill a log, rebuild it into an empty Redis, print rates."""
    broker: Literal["apache", "embedded"] = "apache" if kafka == "apache" else "embedded"
    with tempfile.TemporaryDirectory() as name, LocalStack(Path(name), kafka=broker, redis="local") as stack:
        settings = Settings(
            kafka=KafkaSettings(bootstrap_servers=stack.bootstrap_servers),
            redis=RedisSettings(url=SecretStr(stack.redis_url)),
            artefact=write_tiny_artefact(Path(name) / "artefact", items=ITEMS, dim=DIM),
        )
        asyncio.run(fill(settings, interactions, users))
        for _ in range(rounds):
            for processes in (1, 2):
                measure(settings, stack, processes)


def measure(settings: Settings, stack: LocalStack, processes: int) -> None:
    """Print one rebuild of an empty Redis."""
    with redis.Redis.from_url(stack.redis_url) as connection:
        connection.flushall()
    started_s, cpu_s = time.monotonic(), cpu_time_s()
    counts = run_rebuild(settings, RebuildRequest(processes=processes), lambda _: None)
    took_s, cpu_s = time.monotonic() - started_s, cpu_time_s() - cpu_s
    typer.echo(
        f"{stack.broker_kind}, {processes} process(es): {counts.interactions:,} interactions, {counts.users:,} users, "
        f"{counts.written:,} rows in {took_s:.1f} s = {counts.records / took_s:,.0f}/s; CPU {cpu_s:.1f} s = "
        f"{counts.records / cpu_s:,.0f} a CPU second"
    )


def cpu_time_s() -> float:
    """Return the CPU time of this process and of its ended children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    typer.run(main)
