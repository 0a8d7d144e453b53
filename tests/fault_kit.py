"""What fault tests share: a steady load, the log read back, every row read from Redis by its documented bytes, and
the comparison of both with the oracle. Nothing here is the worker's own code but what produces records.
"""

import asyncio
import struct
import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import redis
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from redis.cluster import ClusterNode, RedisCluster
from redis.sentinel import Sentinel

from deploy.chaos.artefact import formula_of
from deploy.chaos.oracle import Expected, Record, fold, read
from schemas.codec import encode
from schemas.records import KINDS, After, CandidateList, Interaction
from tests.tiny_artefact import item_ids
from tests.worker_kit import Client, Site, WorkerProcess

HEAL_TIMEOUT_S = 90.0
TICK_S = 0.025
_HEAD = struct.Struct("<BBHIQQq")  # version, flags, S, crc32, space, interactions, latest event time: docs in DESIGN.md


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A row as it lies in Redis."""

    position: tuple[int, int]
    events: int
    last_event_time_ms: int
    vector: bytes
    items: list[str]


def parse_row(data: bytes) -> StoredRow:
    """Return the row of these bytes; raise AssertionError when its checksum does not hold."""
    _, flags, size, checksum, _, events, last_event_time_ms = _HEAD.unpack_from(data, 32)
    assert zlib.crc32(data[:36] + bytes(4) + data[40:]) == checksum, f"checksum of {data!r}"
    vector, ring = data[64 : 64 + 4 * size], data[64 + 4 * size :]
    if flags:  # where a user who moved was before: a count of 16 bits, 12 bytes each
        ring = ring[2 + 12 * int.from_bytes(ring[:2], "little") :]
    position = (int(data[6:12]), int(data[12:32]) - 1)
    return StoredRow(position, events, last_event_time_ms, vector, ring.decode().split("\n") if ring else [])


def stored_rows(where: Site) -> dict[str, StoredRow]:
    """Return the row of every user of a site."""
    with redis_of(where.redis_url) as client:
        keys = list(client.scan_iter(f"{where.prefix}rerank:*:u:*", count=1_000))
        values = [client.get(key) for key in keys]
    found = zip(keys, values, strict=True)
    return {key.decode().split(":u:", 1)[1]: parse_row(value) for key, value in found if value is not None}


def redis_of(url: str) -> Any:
    """Return a client for one server, for the primary that sentinels name, or for a cluster."""
    scheme, _, rest = url.partition("://")
    if scheme == "redis":
        return redis.Redis.from_url(url, socket_timeout=5)
    places, _, service = rest.partition("/")
    hosts = [(host, int(port)) for host, _, port in (place.partition(":") for place in places.split(","))]
    if scheme == "redis+cluster":
        nodes = [ClusterNode(*host) for host in hosts]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=nodes, socket_timeout=5)
    return Sentinel(hosts, socket_timeout=5).master_for(service, socket_timeout=5)  # type: ignore[no-untyped-call]


def expected_row(user: Expected) -> StoredRow:
    """Return what must lie in Redis for a user of the oracle."""
    return StoredRow(user.position, user.events, user.last_event_time_ms, user.vector.tobytes(), user.items)


@dataclass(slots=True)
class Load:
    """Seeded traffic, counted. `interactions` and `lists` count what the broker acknowledged."""

    outsider: Client
    seed: int
    users: int = 30
    hot_share: float = 0.0  # of all records, those of one more user
    bad_share: float = 0.0
    deadline_ms: int = 5_000
    interactions_per_tick: int = 6
    lists_per_tick: int = 2
    request_ids: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    ends: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        """Send no more."""
        self._ended.set()

    async def run(self) -> None:
        """Send until the end, in order, waiting for the broker once a tick."""
        rng = np.random.default_rng(self.seed)
        while not self._ended.is_set():
            interactions = [self._interaction(rng) for _ in range(self.interactions_per_tick)]
            lists = [self._list(rng) for _ in range(self.lists_per_tick)]
            await asyncio.gather(
                *(self._send("interactions", *record) for record in interactions),
                *(self._send("candidates", *record) for record in lists),
            )
            await asyncio.sleep(TICK_S)

    async def _send(self, topic: str, key: bytes, value: bytes | None) -> None:
        at = await self._sent(topic, key, value)
        self.counts[topic] += 1
        self.ends[topic][at.partition] = max(at.offset, self.ends[topic].get(at.partition, -1))

    def _user(self, rng: np.random.Generator) -> str:
        if self.hot_share and rng.random() < self.hot_share:
            return "u-hot"
        return f"u-{rng.integers(self.users)}"

    async def _sent(self, topic: str, key: bytes, value: bytes | None) -> After:
        """Send until the broker has it: a record that lies in the log twice is folded twice, by the oracle as well."""
        while True:
            try:
                return await self.outsider.send(topic, key, value)
            except KafkaError as error:
                if not error.retriable:
                    raise
            await asyncio.sleep(TICK_S)

    def _interaction(self, rng: np.random.Generator) -> tuple[bytes, bytes | None]:
        number, user_id = self.counts["made"], self._user(rng)
        self.counts["made"] += 1
        record = Interaction(
            event_id=f"e-{self.seed}-{number}",
            user_id=user_id,
            item_id=str(rng.choice([*item_ids(), "i-never-seen"])),
            kind=str(rng.choice(KINDS)),
            event_time_ms=int(time.time() * 1000) - int(rng.integers(10_000)),
            value=[None, 1.0, 3.0, 5.0][rng.integers(4)],
        )
        if rng.random() < self.bad_share:
            return user_id.encode(), [b"{", b"", b"[]", b'{"user_id": "u-1"}', b"\xff" * 9][rng.integers(5)]
        return user_id.encode(), encode(record)

    def _list(self, rng: np.random.Generator) -> tuple[bytes, bytes | None]:
        request_id, user_id = f"r-{self.seed}-{len(self.request_ids)}", self._user(rng)
        if rng.random() < self.bad_share:
            self.counts["bad_lists"] += 1
            return user_id.encode(), [b"{", None, b"[]"][rng.integers(3)]
        self.request_ids.add(request_id)
        request = CandidateList(
            request_id=request_id,
            user_id=user_id,
            event_time_ms=int(time.time() * 1000),
            item_ids=[str(one) for one in rng.permutation(item_ids())[:10]],
            deadline_ms=self.deadline_ms,
        )
        return user_id.encode(), encode(request)


@asynccontextmanager
async def under_load(outsider: Client, seed: int, **changes: float) -> AsyncIterator[Load]:
    """Run a load for the length of a block; every record is acknowledged when it is left."""
    load = Load(outsider, seed, **changes)  # type: ignore[arg-type]  # numbers, by field name
    sending = asyncio.create_task(load.run())
    try:
        yield load
    finally:
        load.end()
        await sending


def is_interaction(key: bytes | None, value: bytes | None) -> bool:
    """Tell whether a record of the log is an interaction, by the oracle's own reading."""
    try:
        read(key, value)
    except (ValueError, KeyError, TypeError):
        return value is None  # forgets the user
    return True


async def read_log(where: Site, ends: Mapping[int, int], topic: str = "interactions") -> list[Record]:
    """Return the records of a topic up to the offset `ends` of each partition, in offset order inside a partition.

    A plain consumer without a group reads them; ends are what a producer was told, for the embedded broker's are wrong.
    """
    name = where.prefix + topic
    consumer = AIOKafkaConsumer(
        bootstrap_servers=where.bootstrap_servers, auto_offset_reset="earliest", fetch_max_wait_ms=20
    )
    await consumer.start()
    records: list[Record] = []
    try:
        partitions = [TopicPartition(name, partition) for partition in ends]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        missing = {partition for partition, end in ends.items() if end >= 0}
        async with asyncio.timeout(HEAL_TIMEOUT_S):
            while missing:
                for tp, batch in (await consumer.getmany(timeout_ms=500)).items():
                    records += [(tp.partition, one.offset, one.key, one.value) for one in batch]
                    if batch[-1].offset >= ends[tp.partition]:
                        missing.discard(tp.partition)
    finally:
        await consumer.stop()
    return records


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where everything went. Requests by distinct request id, interactions by position."""

    requests: int
    ranked: int
    fallback: int
    shed: int
    dead_lists: int
    interactions: int
    applied: int
    dead_interactions: int

    def balances(self) -> bool:
        """Tell whether everything that came in came out, once."""
        lists_out = self.ranked + self.fallback + self.shed + self.dead_lists
        return self.requests == lists_out and self.interactions == self.applied + self.dead_interactions


async def healed(where: Site, load: Load) -> Ledger:
    """Wait until every row is what the oracle says and every request has an outcome; return the ledger.

    Raises:
        AssertionError: it did not come to that in HEAL_TIMEOUT_S; the message names what differs.
    """
    return await healed_log(where, load, await read_log(where, load.ends["interactions"]))


async def healed_log(where: Site, load: Load, log: Sequence[Record]) -> Ledger:
    """Do what `healed` does for a log already read, in the order in which it must be folded."""
    formula = formula_of(where.artefact)
    users = fold(log, formula.moves, formula.rows, formula.kinds)
    expected = {name: expected_row(user) for name, user in users.items()}
    refused = {(partition, offset) for partition, offset, key, value in log if not is_interaction(key, value)}
    await _until_equal(where, expected)
    outsider = load.outsider
    wanted = load.request_ids

    def answered() -> bool:
        dead = len(dead_positions(outsider, "interactions")), len(dead_positions(outsider, "candidates"))
        return dead >= (len(refused), load.counts["bad_lists"]) and wanted <= {
            one.request_id for one in outsider.slates
        }

    try:
        await outsider.until(answered, HEAL_TIMEOUT_S)
    except AssertionError as error:
        unanswered = sorted(wanted - {one.request_id for one in outsider.slates})
        raise AssertionError(f"{error}; of {len(wanted)} requests {len(unanswered)} unanswered: {unanswered}") from None
    ledger = ledger_of(where, load, len(log))
    assert dead_positions(outsider, "interactions") == refused
    assert ledger.balances(), ledger
    return ledger


def ledger_of(where: Site, load: Load, interactions: int) -> Ledger:
    """Count outcomes: of several slates of one request, the first is the answer."""
    first: dict[str, str] = {}
    for slate in load.outsider.slates:
        first.setdefault(slate.request_id, slate.outcome)
    outcomes = [outcome for request_id, outcome in first.items() if request_id in load.request_ids]
    return Ledger(
        requests=len(load.request_ids) + load.counts["bad_lists"],
        ranked=outcomes.count("ranked"),
        fallback=outcomes.count("fallback"),
        shed=outcomes.count("shed"),
        dead_lists=len(dead_positions(load.outsider, "candidates")),
        interactions=interactions,
        applied=sum(row.events for row in stored_rows(where).values()),
        dead_interactions=len(dead_positions(load.outsider, "interactions")),
    )


def dead_positions(outsider: Client, topic: str) -> set[tuple[int, int]]:
    """Return the (partition, offset) of every dead letter of a topic."""
    return {
        (int(letter.headers["__connect.errors.partition"] or -1), int(letter.headers["__connect.errors.offset"] or -1))
        for letter in outsider.dead_letters
        if letter.topic == f"{topic}.dlq"
    }


async def _until_equal(where: Site, expected: Mapping[str, StoredRow]) -> None:
    until_s = time.monotonic() + HEAL_TIMEOUT_S
    while True:
        try:
            stored = await asyncio.to_thread(stored_rows, where)
        except (redis.RedisError, redis.exceptions.RedisClusterException) as error:
            stored, problem = {}, repr(error)
        else:
            if stored == expected:
                return
            wrong = [name for name in {*stored, *expected} if stored.get(name) != expected.get(name)]
            name = min(wrong)
            problem = (
                f"{len(wrong)} of {len(expected)} users differ; {name}: {stored.get(name)}, not {expected.get(name)}"
            )
        assert time.monotonic() < until_s, f"after {HEAL_TIMEOUT_S} s: {problem}"
        await asyncio.sleep(0.1)


async def exit_code(worker: WorkerProcess, timeout_s: float = 60.0) -> int:
    """Wait for a worker to end by itself and return its exit code; -9: it was killed."""
    return await asyncio.to_thread(worker.process.popen.wait, timeout_s)


async def until_log_says(worker: WorkerProcess, text: str, timeout_s: float = 60.0, *, times: int = 1) -> None:
    """Wait until a worker has logged `text`, so many times."""
    until_s = time.monotonic() + timeout_s
    while worker.log().count(text) < times:
        assert time.monotonic() < until_s, f"no {text!r} ({times}) in {timeout_s} s:\n{worker.log()[-3000:]}"
        assert worker.process.is_running, f"ended:\n{worker.log()[-3000:]}"
        await asyncio.sleep(0.05)


def launched(where: Site, module: str = "stream_app", **environment: str) -> WorkerProcess:
    """Start a worker without waiting for it."""
    worker = WorkerProcess(where, module, **environment)
    worker.start()
    return worker


async def serving(where: Site, module: str = "stream_app", **environment: str) -> WorkerProcess:
    """Start a worker beside the running load, and return it ready."""
    worker = launched(where, module, **environment)
    await asyncio.to_thread(worker.ready)
    return worker


async def stop_gracefully(worker: WorkerProcess) -> None:
    """End a worker with SIGTERM and check that it says it went well."""
    code = await asyncio.to_thread(worker.process.stop)
    assert code == 0, f"exit code {code}:\n{worker.log()[-3000:]}"
