"""A worker process and a client, for tests on a real broker: what an outsider would drive and read."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from pydantic import SecretStr

from deploy.local import LocalStack
from deploy.local.process import ChildProcess
from schemas.codec import decode_slate, encode
from schemas.records import After, CandidateList, Interaction, Slate
from stream_app.settings import KafkaSettings, RedisSettings, Settings
from stream_app.topic_admin import create_topics
from tests.builders import candidate_list
from tests.nursery import ForkedChild
from tests.raw_batches import NAME, StandIn, odd
from tests.tiny_artefact import item_ids

READY_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 30.0
LAST_WORDS = 6_000
_numbers = itertools.count()


def ask(user_id: str = "u-1", **changes: object) -> CandidateList:
    """Return a list of ten items of a tiny artefact, with a request id of its own and time enough."""
    fields: dict[str, object] = {
        "request_id": f"r-{next(_numbers)}",
        "user_id": user_id,
        "item_ids": item_ids()[:10],
        "after": None,
        "deadline_ms": 20_000,
        "k": None,
    }
    return candidate_list(**(fields | changes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where one test runs: a broker, a Redis, topics of its own, a group of its own."""

    bootstrap_servers: str
    redis_url: str
    prefix: str
    artefact: Path
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> Settings:
        """Return the settings of a command on this site."""
        return Settings(
            kafka=KafkaSettings(bootstrap_servers=self.bootstrap_servers),
            redis=RedisSettings(url=SecretStr(self.redis_url), key_prefix=f"{self.prefix}rerank"),
            topic_prefix=self.prefix,
            artefact=self.artefact,
        )

    def worker_environment(self) -> dict[str, str]:
        """Return the environment of a worker on this site."""
        return {
            **os.environ,
            **self.environment,
            "RERANK_KAFKA__BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "RERANK_REDIS__URL": self.redis_url,
            "RERANK_REDIS__KEY_PREFIX": f"{self.prefix}rerank",
            "RERANK_GROUP_ID": f"{self.prefix}group",
            "RERANK_TOPIC_PREFIX": self.prefix,
            "RERANK_ARTEFACT": str(self.artefact),
        }

    def command(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a `rerank` command on this site to its end."""
        return subprocess.run(
            [sys.executable, "-m", "stream_app", *arguments],
            env={**self.worker_environment(), **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    async def create_topics(self, partitions: int = 4) -> None:
        """Create the topics of this test."""
        await create_topics(self.settings(), partitions)


def site(stack: LocalStack, artefact: Path, directory: Path, **environment: str) -> Site:
    """Return a site of its own on a stack."""
    return Site(
        bootstrap_servers=stack.bootstrap_servers,
        redis_url=stack.redis_url,
        prefix=f"t{uuid.uuid4().hex[:10]}-",
        artefact=artefact,
        directory=directory,
        environment={**stack.environment(), **environment},
    )


class WorkerProcess:
    """`rerank worker`: started and ready on entering, gone on leaving, by pid."""

    def __init__(self, where: Site, module: str = "stream_app", **environment: str) -> None:
        """Describe the worker; extra environment names are full names."""
        mark = uuid.uuid4().hex[:6]
        self.log_path = where.directory / f"worker-{mark}.log"
        whole_environment = {**where.worker_environment(), **environment}
        if module == "stream_app" and sys.platform == "linux":
            self.process: ChildProcess = ForkedChild(module, ["worker"], self.log_path, whole_environment)
        else:  # another module changes what is imported after it
            self.process = ChildProcess([sys.executable, "-m", module, "worker"], self.log_path, whole_environment)

    def start(self) -> None:
        """Start without waiting; `kill_all` ends what a test leaves behind."""
        self.process.start()
        _started.append(self)

    def ready(self) -> dict[str, Any]:
        """Wait for the ready line and return it."""
        until_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < until_s:
            for line in self.log().splitlines():
                if line.startswith('{"event":"ready"') and line.endswith("}"):
                    announced: dict[str, Any] = json.loads(line)
                    return announced
            if not self.process.is_running:
                raise AssertionError(f"worker ended before it was ready:\n{self.log()[-3000:]}")
            time.sleep(0.02)
        raise AssertionError(f"worker not ready in {READY_TIMEOUT_S} s:\n{self.log()[-3000:]}")

    def log(self) -> str:
        """Return what it logged so far."""
        return self.log_path.read_text(errors="replace")

    def __enter__(self) -> "WorkerProcess":
        try:
            self.start()
            self.ready()
        except BaseException:
            self.process.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()


_started: list[WorkerProcess] = []


def last_words() -> Iterator[tuple[str, str]]:
    """Yield a title and the end of the log of every worker that a test started."""
    for worker in _started:
        state = "runs" if worker.process.is_running else "ended"
        yield f"log of worker {worker.process.pid}, which {state}", worker.log()[-LAST_WORDS:]


def kill_all() -> None:
    """Kill every worker that a test started and that still runs, and forget them all."""
    while _started:
        _started.pop().process.kill()


@dataclass(frozen=True, slots=True)
class DeadLetterRecord:
    """A record read from a dead-letter topic."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes | None]

    @property
    def code(self) -> str:
        return (self.headers["rerank.error.code"] or b"").decode()


class Client:
    """Produces as an outsider would, and collects everything that comes out."""

    def __init__(self, where: Site) -> None:
        self.slates: list[Slate] = []
        self.slate_bytes: list[bytes] = []
        self.dead_letters: list[DeadLetterRecord] = []
        self._prefix = where.prefix
        self._producer = AIOKafkaProducer(
            bootstrap_servers=where.bootstrap_servers, acks="all", max_request_size=8 * 1_048_576
        )
        self._consumer = AIOKafkaConsumer(
            *(where.prefix + name for name in ("reranked", "interactions.dlq", "candidates.dlq")),
            bootstrap_servers=where.bootstrap_servers,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=20,
        )
        self._reading: asyncio.Task[None] | None = None
        self._came = asyncio.Event()

    async def start(self) -> None:
        await self._producer.start()
        await self._consumer.start()
        self._reading = asyncio.create_task(self._read())

    async def stop(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        await self._consumer.stop()
        await self._producer.stop()

    async def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        *,
        headers: Sequence[tuple[str, bytes]] = (),
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> After:
        """Produce raw bytes and return where they went."""
        if key is None and value is None:
            return await self._send_nothing(self._prefix + topic, headers)
        where = await self._producer.send_and_wait(
            self._prefix + topic,
            value,
            key,
            headers=list(headers),
            partition=partition,
            timestamp_ms=timestamp_ms,
        )
        return After(partition=where.partition, offset=where.offset)

    async def _send_nothing(self, topic: str, headers: Sequence[tuple[str, bytes]]) -> After:
        """Produce a record without key and value, which aiokafka's `send` refuses and Kafka does not."""
        batch = self._producer.create_batch()
        batch.append(key=None, value=None, timestamp=None, headers=list(headers))
        where = await (await self._producer.send_batch(batch, topic, partition=0))
        return After(partition=where.partition, offset=where.offset)

    async def send_odd(
        self, topic: str, key: bytes, value: bytes | None, partition: int, *, compression: str = ""
    ) -> After:
        """Produce a record with two headers whose name is not UTF-8; no producer library would."""
        headers = [(NAME, b"\0\xff"), (NAME, None)]
        return await self._send_changed(topic, key, value, headers, partition, partial(odd, compression=compression))

    async def send_batch(self, topic: str, built: bytearray, partition: int) -> After:
        """Produce a batch as it is, and return where its first record went."""
        return await self._send_changed(topic, b"", b"", [], partition, lambda _: built)

    async def _send_changed(
        self,
        topic: str,
        key: bytes,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes | None]],
        partition: int,
        change: Callable[[bytearray], bytearray],
    ) -> After:
        batch = self._producer.create_batch()
        batch.append(key=key, value=value, timestamp=None, headers=headers)
        batch._builder = StandIn(batch._builder, change)
        where = await (await self._producer.send_batch(batch, self._prefix + topic, partition=partition))
        return After(partition=where.partition, offset=where.offset)

    async def send_many(self, records: Sequence[Interaction | CandidateList]) -> None:
        """Produce records in order and wait for all of them."""
        futures = [
            await self._producer.send(
                self._prefix + ("interactions" if isinstance(record, Interaction) else "candidates"),
                encode(record),
                record.user_id.encode(),
            )
            for record in records
        ]
        await asyncio.gather(*futures)

    async def interact(self, record: Interaction) -> After:
        """Produce one interaction."""
        return await self.send("interactions", record.user_id.encode(), encode(record))

    async def ask(self, record: CandidateList) -> Slate:
        """Produce one candidate list and wait for its slate."""
        await self.send("candidates", record.user_id.encode(), encode(record))
        await self.until(lambda: any(slate.request_id == record.request_id for slate in self.slates))
        return next(slate for slate in self.slates if slate.request_id == record.request_id)

    async def until(self, holds: Callable[[], bool], timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Read until something holds of what was collected."""
        try:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise AssertionError(
                f"after {timeout_s} s: {len(self.slates)} slates, {len(self.dead_letters)} dead letters"
            ) from None

    async def _read(self) -> None:
        async for record in self._consumer:
            if record.topic.endswith(".dlq"):
                topic = record.topic.removeprefix(self._prefix)
                self.dead_letters.append(DeadLetterRecord(topic, record.key, record.value, dict(record.headers)))
            else:
                self.slates.append(decode_slate(record.value))
                self.slate_bytes.append(record.value)
            self._came.set()


@asynccontextmanager
async def client(where: Site) -> AsyncIterator[Client]:
    """Connect a client for the length of a block."""
    connected = Client(where)
    try:
        await connected.start()
        yield connected
    finally:
        await connected.stop()
