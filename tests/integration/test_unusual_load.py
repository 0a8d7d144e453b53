"""Load that is not the usual one: more than can be served, one user who is half of it, the same request twice."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import NotLeaderForPartitionError
from aiokafka.protocol.produce import ProduceRequest

from deploy.local import LocalStack
from schemas.codec import encode
from schemas.limits import MAX_UNPACKED_BYTES
from schemas.records import After, CandidateList, Interaction, Slate, SlateTiming
from schemas.refusals import NotUnpacked
from stream_app.recorded_log import LogRecord, parse_line
from tests.builders import interaction
from tests.fault_kit import exit_code, healed, launched, redis_of, serving, stop_gracefully, stored_rows, under_load
from tests.odd_batches import SLOTS, OddBatch, odd_batches
from tests.raw_batches import CODECS, READ_NAME, batch, stamped
from tests.tiny_artefact import write_tiny_artefact
from tests.worker_health import samples, total, until_metrics
from tests.worker_kit import Site, client, site
from tests.worker_kit import ask as ask_in_time

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PARTITIONS = 4
SEED = 7
HOUR_MS = 3_600_000
NO_TIME = SlateTiming(queue=0.0, state=0.0, score=0.0, total=0.0)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artefact(tmp_path_factory.mktemp("artefact") / "tiny")


@pytest.fixture
def where(local_stack: LocalStack, artefact: Path, tmp_path: Path) -> Site:
    return site(local_stack, artefact, tmp_path, RERANK_HTTP__PORT="0")


ask = partial(ask_in_time, deadline_ms=HOUR_MS)


async def test_the_same_request_twice_gets_the_same_slate_twice(where: Site) -> None:
    await where.create_topics(PARTITIONS)
    worker = await serving(where)
    async with client(where) as outsider:
        at = await outsider.interact(interaction())
        request = ask(after=at)
        for _ in range(2):
            await outsider.send("candidates", b"u-1", encode(request))
        await outsider.until(lambda: len(outsider.slates) == 2)
        assert {slate.request_id for slate in outsider.slates} == {request.request_id}
        first, second = (without_timing(slate) for slate in outsider.slates)
        assert (first, first.outcome, first.state.events) == (second, "ranked", 1)
    await stop_gracefully(worker)


def without_timing(slate: Slate) -> Slate:
    return msgspec.structs.replace(slate, timing_ms=NO_TIME)


async def test_event_times_of_the_past_and_of_the_future_move_no_clock_and_are_counted(where: Site) -> None:
    await where.create_topics(PARTITIONS)
    worker = await serving(where)
    record_ms = int(time.time() * 1000)
    async with client(where) as outsider:
        for ahead_ms in (0, -30 * 24 * HOUR_MS, 365 * 24 * HOUR_MS):
            record = interaction(event_time_ms=record_ms + ahead_ms)
            await outsider.send("interactions", b"u-1", encode(record), timestamp_ms=record_ms)
        port = worker.ready()["http_port"]
        found = await until_metrics(port, lambda found: found.get(("rerank_events_total", ("applied",))) == 3)
    outcomes = {labels[0]: value for (name, labels), value in found.items() if name == "rerank_events_total" and value}
    assert outcomes == {"applied": 3, "late": 1, "future": 1}
    row = stored_rows(where)["u-1"]
    assert (row.events, row.last_event_time_ms) == (3, record_ms + where.settings().future_tolerance_ms)
    await stop_gracefully(worker)


async def test_a_backlog_is_shed_where_it_is_late_ranked_where_it_is_not_and_bounded_in_the_worker(where: Site) -> None:
    await where.create_topics(PARTITIONS)
    most = 100
    clicks = [interaction(event_id=f"e-{n}", user_id=f"u-{n % 40}", item_id=f"i-{n % 20 + 1}") for n in range(4_000)]
    late, in_time = [ask(f"u-{n % 40}", deadline_ms=1) for n in range(500)], [ask(f"u-{n % 40}") for n in range(500)]
    async with client(where) as outsider:
        await outsider.send_many([one for pair in zip(late, in_time, strict=True) for one in pair])
        await outsider.send_many(clicks)
        patient = {"RERANK_REDIS__BUDGET_MS": "10000", "RERANK_REDIS__TIMEOUT_MS": "10000"}
        worker = await serving(where, RERANK_KAFKA__MAX_POLL_RECORDS=str(most), RERANK_MICRO_BATCH_LISTS="4", **patient)
        port, unsettled = worker.ready()["http_port"], [0.0]
        until_s = time.monotonic() + 60.0
        while len(outsider.slates) < 1_000 or sum(row.events for row in stored_rows(where).values()) < len(clicks):
            unsettled.append(total(await samples(port), "rerank_unsettled_records"))
            assert time.monotonic() < until_s, (len(outsider.slates), unsettled[-1])
            await asyncio.sleep(0.05)
        outcome_of = {slate.request_id: slate.outcome for slate in outsider.slates}
        assert {outcome_of[request.request_id] for request in late} == {"shed"}
        assert {outcome_of[request.request_id] for request in in_time} == {"ranked"}
        assert len(outsider.slates) == 1_000
        # Four batches a partition of both inputs, and the poll that was under way when the fourth filled it.
        assert max(unsettled) <= 2 * PARTITIONS * 5 * most
    await stop_gracefully(worker)


async def test_a_user_who_is_half_of_the_load_costs_nobody_anything(where: Site) -> None:
    await where.create_topics(PARTITIONS)
    async with client(where) as outsider:
        worker = await serving(where)
        async with under_load(
            outsider, SEED, hot_share=0.5, interactions_per_tick=40, lists_per_tick=4, deadline_ms=HOUR_MS
        ) as load:
            await asyncio.sleep(3.0)
        ledger = await healed(where, load)
        assert (ledger.ranked, ledger.applied) == (ledger.requests, ledger.interactions)
        assert stored_rows(where)["u-hot"].events > 0.4 * ledger.interactions
        await stop_gracefully(worker)


async def test_users_whom_a_producer_sprays_over_partitions_end_no_worker_and_lose_no_interaction(where: Site) -> None:
    """Each of two workers moves the same rows on, under the other's hands."""
    await where.create_topics(2)
    events, users = 4_000, 4
    async with client(where) as outsider:
        workers = [
            await serving(where, RERANK_MICRO_BATCH_INTERACTIONS="1", RERANK_KAFKA__MAX_POLL_RECORDS="2")
            for _ in range(2)
        ]
        await asyncio.gather(
            *(
                outsider.send("interactions", f"u-{n % users}".encode(), encode(one), partition=n // users % 2)
                for n in range(events)
                for one in [interaction(event_id=f"e-{n}", user_id=f"u-{n % users}", event_time_ms=n)]
            )
        )
        until_s = time.monotonic() + 60.0
        while (found := {name: row.events for name, row in stored_rows(where).items()}) != {
            f"u-{n}": events // users for n in range(users)
        }:
            assert time.monotonic() < until_s, found
            assert all(worker.process.is_running for worker in workers), [w.log()[-2000:] for w in workers]
            await asyncio.sleep(0.1)
        for worker in workers:
            await stop_gracefully(worker)


async def rebuilt_and_recorded(where: Site) -> tuple[Path, list[LogRecord]]:
    """Check that a rebuild gives the rows that the worker wrote, record both inputs, and return file and records."""
    rows = stored_rows(where)
    with redis_of(where.redis_url) as redis:
        redis.delete(*redis.scan_iter(f"{where.prefix}*"))
    done = await asyncio.to_thread(where.command, "rebuild")
    assert done.returncode == 0, done.stderr
    assert stored_rows(where) == rows
    log = where.directory / "log.jsonl"
    done = await asyncio.to_thread(where.command, "record", "--out", str(log), "--until-idle-s", "2")
    assert done.returncode == 0, done.stderr
    return log, [parse_line(line) for line in log.read_bytes().splitlines()]


async def test_header_names_that_are_not_utf_8_cost_no_record(where: Site) -> None:
    await where.create_topics(PARTITIONS)
    codecs = ("", *CODECS)
    async with client(where) as outsider:
        partition = (await outsider.interact(interaction())).partition
        for number, codec in enumerate(codecs):
            odd, good = interaction(event_id=f"odd-{number}"), interaction(event_id=f"good-{number}")
            await outsider.send_odd("interactions", b"u-1", encode(odd), partition, compression=codec)
            await outsider.interact(good)
        last = await outsider.send_odd("interactions", b"u-1", b"{", partition)
        worker = await serving(where)
        requests = [ask(after=last) for _ in range(2 * len(codecs))]
        for codec, odd_list, good_list in zip(codecs, requests[::2], requests[1::2], strict=True):
            await outsider.send_odd("candidates", b"u-1", encode(odd_list), partition, compression=codec)
            await outsider.send("candidates", b"u-1", encode(good_list))
        await outsider.until(lambda: len(outsider.slates) == len(requests) and len(outsider.dead_letters) == 1)
        answers = [(slate.request_id, slate.outcome, slate.state.events) for slate in outsider.slates]
        expected = [(request.request_id, "ranked", 1 + 2 * len(codecs)) for request in requests]
        assert sorted(answers) == sorted(expected)
        [letter] = outsider.dead_letters
        assert (letter.value, letter.headers[READ_NAME]) == (b"{", None)
        await stop_gracefully(worker)
    _, recorded = await rebuilt_and_recorded(where)
    odd_ones = [one.headers for one in recorded if one.headers]
    assert odd_ones == [[(READ_NAME, b"\0\xff"), (READ_NAME, None)]] * (2 * len(codecs) + 1)


async def test_a_batch_that_unpacks_to_more_than_the_bound_is_refused_record_by_record_and_its_neighbours_are_served(
    where: Site,
) -> None:
    await where.create_topics(PARTITIONS)
    bomb = batch(0, [[("padding", bytes(MAX_UNPACKED_BYTES // 3))]] * 3, compression="zstd")
    async with client(where) as outsider:
        first = await outsider.interact(interaction(event_id="before"))
        requests, partition, refused = [ask(after=first), ask(after=first)], first.partition, []
        await outsider.send("candidates", b"u-1", encode(requests[0]))
        for topic in ("interactions", "candidates"):
            at = (await outsider.send_batch(topic, bomb, partition)).offset
            refused += [(f"{where.prefix}{topic}".encode(), str(offset).encode()) for offset in range(at, at + 3)]
        await outsider.interact(interaction(event_id="behind"))
        await outsider.send("candidates", b"u-1", encode(requests[1]))
        worker = await serving(where)
        await outsider.until(lambda: (len(outsider.slates), len(outsider.dead_letters)) == (2, len(refused)))
        answers = [(slate.request_id, slate.outcome) for slate in outsider.slates]
        assert answers == [(request.request_id, "ranked") for request in requests]
        assert {letter.code for letter in outsider.dead_letters} == {"too_large"}
        places = [
            (letter.headers["__connect.errors.topic"], letter.headers["__connect.errors.offset"])
            for letter in outsider.dead_letters
        ]
        assert sorted(places) == sorted(refused)
        await stop_gracefully(worker)
    assert stored_rows(where)["u-1"].events == 2
    log, recorded = await rebuilt_and_recorded(where)
    assert sum(isinstance(one.value, NotUnpacked) for one in recorded) == len(refused)
    done = await asyncio.to_thread(where.command, "replay", str(log))
    assert done.returncode == 0, done.stderr
    replayed = json.loads(done.stdout)
    assert (replayed["outcomes"], replayed["dead_letters"]) == ({"ranked": 2}, {"too_large": len(refused)})


Produce = Callable[[str, int, bytearray], Awaitable[int | None]]
"""Topic, partition and batch, to the offset of its first record; None where the broker refuses it."""


@asynccontextmanager
async def raw_producer(where: Site) -> AsyncIterator[Produce]:
    """Yield what produces a batch as it is."""
    kafka = AIOKafkaClient(bootstrap_servers=where.bootstrap_servers)

    async def produce(name: str, partition: int, built: bytearray) -> int | None:
        topic = f"{where.prefix}{name}"
        leader = kafka.cluster.leader_for_partition(TopicPartition(topic, partition))
        request = ProduceRequest(None, -1, 10_000, [(topic, [(partition, bytes(built))])])
        async with asyncio.timeout(30.0):
            while True:
                [(_, [(_, error, offset, *_)])] = (await kafka.send(leader, request)).topics
                if error != NotLeaderForPartitionError.errno:  # the topic is new
                    return None if error else offset
                await asyncio.sleep(0.05)

    try:
        await kafka.bootstrap()
        await kafka.set_topics([f"{where.prefix}{name}" for name in ("interactions", "candidates")])
        yield produce
    finally:
        await kafka.close()


def odd_batch(name: str, records: Sequence[Interaction | CandidateList]) -> OddBatch:
    return odd_batches([(record.user_id.encode(), encode(record)) for record in records])[name]


async def test_what_no_client_library_makes_is_read_or_refused_and_ends_no_worker(
    where: Site, test_broker: str
) -> None:
    await where.create_topics(PARTITIONS)
    names = list(odd_batches([(b"", b"")] * SLOTS))
    answered: list[str] = []
    refused: dict[tuple[bytes, bytes], bytes] = {}
    taken, applied = [], 0
    async with client(where) as outsider, raw_producer(where) as produce:
        partition = (await outsider.interact(interaction(event_id="before"))).partition
        for name in names:
            clicks = [interaction(event_id=f"{name} {number}") for number in range(SLOTS)]
            lists = [ask() for _ in range(SLOTS)]
            for topic, odd in (("interactions", odd_batch(name, clicks)), ("candidates", odd_batch(name, lists))):
                offset = await produce(topic, partition, stamped(odd.built, int(time.time() * 1_000)))
                if offset is None:
                    continue
                taken.append((name, topic))
                value = b"not unpacked: offsets %d to %d" % (offset, offset + SLOTS - 1)
                for at in range(offset + odd.read, offset + SLOTS):
                    refused[f"{where.prefix}{topic}".encode(), b"%d" % at] = value
                if topic == "interactions":
                    applied += odd.read
                else:
                    answered += [one.request_id for one in lists[: odd.read]]
        expected = [name for name in names if odd_batch(name, clicks).is_taken_by(test_broker)]
        assert taken == [(name, topic) for name in expected for topic in ("interactions", "candidates")]
        last = await outsider.interact(interaction(event_id="behind"))
        elsewhere = await outsider.interact(interaction(event_id="elsewhere", user_id="u-2"))
        assert elsewhere.partition != partition
        behind = [ask(after=last), ask("u-2", after=elsewhere)]
        for one in behind:
            await outsider.send("candidates", one.user_id.encode(), encode(one))
        answered += [one.request_id for one in behind]
        worker = await serving(where)
        await outsider.until(
            lambda: (len(outsider.slates), len(outsider.dead_letters)) == (len(answered), len(refused))
        )
        assert {slate.outcome for slate in outsider.slates} == {"ranked"}
        assert sorted(slate.request_id for slate in outsider.slates) == sorted(answered)
        assert {
            (one.headers["__connect.errors.topic"], one.headers["__connect.errors.offset"]): one.value
            for one in outsider.dead_letters
        } == refused
        assert {(one.code, one.key) for one in outsider.dead_letters} == {("not_json", None)}
        await stop_gracefully(worker)
    rows = stored_rows(where)
    assert (rows["u-1"].events, rows["u-2"].events) == (1 + applied + 1, 1)
    assert rows["u-1"].position == (partition, last.offset)
    log, recorded = await rebuilt_and_recorded(where)
    assert sum(isinstance(one.value, NotUnpacked) for one in recorded) == len(refused)
    done = await asyncio.to_thread(where.command, "replay", str(log))
    assert done.returncode == 0, done.stderr
    replayed = json.loads(done.stdout)
    assert replayed["outcomes"] == {"ranked": len(answered)}
    assert replayed["dead_letters"] == {"not_json": len(refused)}


async def test_a_wrong_checksum_is_refused_by_the_broker_or_ends_the_worker_with_the_offset(
    where: Site, test_broker: str
) -> None:
    await where.create_topics(PARTITIONS)
    async with client(where) as outsider, raw_producer(where) as produce:
        first = await outsider.interact(interaction())
        damaged = batch(0, [[]])
        damaged[-1] ^= 1
        offset = await produce("interactions", first.partition, damaged)
        assert offset == (None if test_broker == "apache" else first.offset + 1)
        if offset is not None:
            worker = launched(where)
            assert await exit_code(worker) == 1
            assert f"interactions, partition {first.partition}, offset {offset}: " in worker.log()
            done = await asyncio.to_thread(where.command, "rebuild")
            assert (done.returncode, f"offset {offset}: " in done.stderr) == (1, True)


async def test_batches_of_every_codec_are_applied(where: Site) -> None:
    await where.create_topics(PARTITIONS)
    worker = await serving(where)
    async with client(where) as outsider:
        for codec in CODECS:
            some = [interaction(event_id=f"{codec}-{n}", context={"padding": "x" * 1_000}) for n in range(20)]
            topic = f"{where.prefix}interactions"
            async with AIOKafkaProducer(
                bootstrap_servers=where.bootstrap_servers, acks="all", compression_type=codec, linger_ms=20
            ) as producer:
                sent = await asyncio.gather(
                    *[await producer.send(topic, encode(one), one.user_id.encode()) for one in some]
                )
            after = After(partition=sent[-1].partition, offset=sent[-1].offset)
            slate = await outsider.ask(ask(after=after))
            assert slate.outcome == "ranked"
        assert slate.state.events == 20 * len(CODECS)
    await stop_gracefully(worker)
