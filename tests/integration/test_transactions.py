"""Producers with transactions: the committed counts, the aborted never was, the open one holds up what is behind."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from deploy.chaos.oracle import Record
from deploy.local import LocalStack
from deploy.local.stack import KafkaChoice
from schemas.codec import encode
from schemas.records import After, CandidateList, Interaction
from tests.builders import interaction
from tests.fault_kit import Load, healed_log, redis_of, serving, stop_gracefully, stored_rows
from tests.tiny_artefact import ITEMS, write_tiny_artefact
from tests.worker_health import ask, total, until_metrics
from tests.worker_kit import Client, Site, client, site
from tests.worker_kit import ask as ask_for

pytestmark = [pytest.mark.integration, pytest.mark.kafka, pytest.mark.timeout(300)]

PARTITIONS = 2
STALL_AFTER_S = 2.0
UNDECIDED = "rerank_undecided_records"
LAG = "rerank_consumer_lag_records"

Sent = Interaction | CandidateList


@pytest.fixture(scope="module")
def apache(
    test_broker: KafkaChoice,
    kafka_home: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalStack]:
    if test_broker == "apache":
        yield request.getfixturevalue("local_stack")
        return
    with LocalStack(tmp_path_factory.mktemp("stack"), kafka="apache", redis="local", kafka_home=kafka_home) as stack:
        yield stack


@pytest.fixture
async def where(apache: LocalStack, tmp_path: Path) -> Site:
    made = site(apache, write_tiny_artefact(tmp_path / "artefact"), tmp_path, RERANK_HTTP__PORT="0")
    await made.create_topics(PARTITIONS)
    return made


def topic_of(record: Sent) -> str:
    return "interactions" if isinstance(record, Interaction) else "candidates"


@dataclass(slots=True)
class Transactions:
    """A producer that sends in transactions, and the interactions of which it was told that they count."""

    producer: AIOKafkaProducer
    prefix: str
    load: Load
    committed: list[Record] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    def acts(self, user_id: str, count: int) -> list[Interaction]:
        """Return interactions that nobody has sent yet."""
        numbers = [next(self._numbers) for _ in range(count)]
        return [
            interaction(event_id=f"e-{n}", user_id=user_id, item_id=f"i-{1 + n % ITEMS}", kind="click", event_time_ms=n)
            for n in numbers
        ]

    async def send(self, records: Sequence[Sent]) -> tuple[Sequence[Sent], list[After]]:
        """Send into the open transaction; return the records, and where they went."""
        sent = []
        for one in records:
            at = await self.producer.send_and_wait(self.prefix + topic_of(one), encode(one), one.user_id.encode())
            sent.append(After(partition=at.partition, offset=at.offset))
        return records, sent

    async def send_plainly(self, outsider: Client, records: Sequence[Sent]) -> tuple[Sequence[Sent], list[After]]:
        """Send beside every transaction."""
        return records, [await outsider.send(topic_of(one), one.user_id.encode(), encode(one)) for one in records]

    def count(self, records: Sequence[Sent], places: Sequence[After]) -> None:
        """Take note that these are committed."""
        for one, at in zip(records, places, strict=True):
            if isinstance(one, Interaction):
                self.committed.append((at.partition, at.offset, one.user_id.encode(), encode(one)))
            else:
                self.load.request_ids.add(one.request_id)

    def log(self) -> list[Record]:
        """Return what one pass over the log must apply."""
        return sorted(self.committed, key=lambda record: record[:2])


@asynccontextmanager
async def transactions(where: Site, outsider: Client) -> AsyncIterator[Transactions]:
    producer = AIOKafkaProducer(
        bootstrap_servers=where.bootstrap_servers, transactional_id=f"{where.prefix}producer", linger_ms=0
    )
    await producer.start()
    try:
        yield Transactions(producer, where.prefix, Load(outsider, seed=0))
    finally:
        await producer.stop()


async def without_lag(port: int, undecided: Callable[[float], bool]) -> None:
    await until_metrics(port, lambda found: total(found, LAG) == 0 and undecided(total(found, UNDECIDED)), 20.0)


def none(count: float) -> bool:
    return count == 0


def some(count: float) -> bool:
    return count > 0


async def rebuild(where: Site) -> dict[str, int]:
    """Rebuild and return what became of the rows."""
    done = await asyncio.to_thread(where.command, "rebuild", "--json")
    assert done.returncode == 0, done.stderr
    rows: dict[str, int] = json.loads(done.stdout)["rows"]
    return rows


def flush(where: Site) -> None:
    with redis_of(where.redis_url) as connection:
        for key in connection.scan_iter(f"{where.prefix}rerank:*:u:*"):
            connection.delete(key)


async def test_what_was_aborted_is_never_applied_nor_answered(where: Site) -> None:
    async with client(where) as outsider, transactions(where, outsider) as sending:
        worker = await serving(where)
        port = worker.ready()["http_port"]
        async with sending.producer.transaction():
            sending.count(*await sending.send([*sending.acts("u-1", 20), *sending.acts("u-2", 20), ask_for("u-1")]))

        await sending.producer.begin_transaction()
        aborted, places = await sending.send([*sending.acts("u-1", 30), *sending.acts("u-3", 30), ask_for("u-3")])
        await sending.producer.abort_transaction()
        await without_lag(port, none)  # though the log ends with what nobody applies
        await healed_log(where, sending.load, sending.log())
        assert sorted(stored_rows(where)) == ["u-1", "u-2"]

        stale = await outsider.ask(ask_for("u-1", after=places[29], deadline_ms=500))
        assert (stale.outcome, stale.reasons) == ("fallback", ["stale"])
        async with sending.producer.transaction():
            sending.count(*await sending.send(sending.acts("u-1", 5)))
        ranked = await outsider.ask(ask_for("u-1", after=places[29]))
        assert (ranked.outcome, ranked.state.events) == ("ranked", 25)

        await healed_log(where, sending.load, sending.log())
        live = stored_rows(where)
        flush(where)
        assert await rebuild(where) == {"written": 2, "unchanged": 0, "ahead": 0}
        assert stored_rows(where) == live
        await stop_gracefully(worker)
    assert aborted[-1].request_id not in {slate.request_id for slate in outsider.slates}
    assert not outsider.dead_letters
    assert not any(event in worker.log() for event in ("event=gap", "event=store_behind"))


async def test_an_open_transaction_holds_up_what_lies_behind_it_and_ends_no_worker(where: Site) -> None:
    async with client(where) as outsider, transactions(where, outsider) as sending:
        worker = await serving(where, RERANK_STALL_AFTER_S=f"{STALL_AFTER_S:g}")
        port = worker.ready()["http_port"]
        sending.count(*await sending.send_plainly(outsider, sending.acts("u-1", 10)))
        await healed_log(where, sending.load, sending.log())
        await sending.producer.begin_transaction()
        opened = await sending.send([*sending.acts("u-1", 10), ask_for("u-1")])
        behind = await sending.send_plainly(outsider, [*sending.acts("u-1", 10), ask_for("u-1")])
        await without_lag(port, some)
        rows, _ = await asyncio.gather(
            rebuild(where),
            asyncio.sleep(3.0 * STALL_AFTER_S),  # a worker that took this for a stall would have ended
        )
        assert rows == {"written": 0, "unchanged": 1, "ahead": 0}
        assert await ask(port, "/livez") == (200, {"status": "ok", "checks": {}})
        await without_lag(port, some)
        await healed_log(where, sending.load, sending.log())
        assert not outsider.slates

        await sending.producer.commit_transaction()
        sending.count(*opened)
        sending.count(*behind)
        await healed_log(where, sending.load, sending.log())
        await without_lag(port, none)
        await stop_gracefully(worker)
    assert not any(event in worker.log() for event in ("event=gap", "event=store_behind"))
