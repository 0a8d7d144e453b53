"""What the batched transport leans on in faust-streaming 0.15.3, and the defects it stands in for: no broker needed.

A newer Faust that changes one of these fails here first.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import faust
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.fetcher import Fetcher, OffsetResetStrategy
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from faust.exceptions import ConsumerNotStarted
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from stream_app import transport
from stream_app.faust_app import faust_app
from stream_app.settings import Settings
from stream_app.transport import BatchConsumer, FetchedBatch

LOG = TP("interactions", 0)


_consumers: list[Any] = []


@pytest.fixture(autouse=True)
def loops_of_consumer_threads_closed() -> Iterator[None]:
    yield
    for consumer in _consumers:
        consumer._thread.thread_loop.close()
    _consumers.clear()


async def callback(*_: object, **__: object) -> None:
    """Stand for Faust's own callbacks."""


def record(offset: int) -> ConsumerRecord:
    return ConsumerRecord(LOG.topic, LOG.partition, offset, 0, 0, b"k", b"v", None, 1, 1, ())


def batch(*offsets: int) -> FetchedBatch:
    return FetchedBatch([record(offset) for offset in offsets])


def message(consumer: Any, offset: int) -> ConsumerMessage:
    made = ConsumerMessage(LOG.topic, LOG.partition, offset, 0, 0, [], b"k", b"v", None, tp=LOG)
    made.generation_id = consumer.app.consumer_generation_id
    return made


def stock_consumer() -> Any:
    """Return Faust's own consumer, at committed offset 10."""
    app = faust.App("stock", broker="kafka://127.0.0.1:1", web_enabled=False)
    consumer = driver.Consumer(app.transport, callback, callback, callback)
    conductor: Any = app.topics
    conductor._acking_topics.add(LOG.topic)
    consumer._committed_offset[LOG] = 10
    app._consumer = consumer
    _consumers.append(consumer)
    return consumer


def our_consumer(on_start_offsets: Any = lambda offsets: None) -> Any:
    app = faust_app(Settings(), on_start_offsets, lambda *_: None)
    consumer = BatchConsumer(app.transport, callback, callback, callback)
    _consumers.append(consumer)
    return consumer


def test_the_version_is_the_pinned_one() -> None:
    assert version("faust-streaming") == "0.15.3"


async def test_faust_commits_past_one_unacked_record_and_we_do_not() -> None:
    stock = stock_consumer()
    stock.ack(message(stock, 11))
    assert stock._new_offset(LOG) == 12  # 10 was never acked
    ours = our_consumer()
    first, second = batch(10), batch(11)
    ours._delivered[LOG] += [first, second]
    second.settle()
    assert ours._new_offset(LOG) is None
    first.settle()
    assert ours._new_offset(LOG) == 12


async def ack_after(body: str) -> tuple[bool, Any]:
    """Feed Faust's own stream one record, raise in the middle, and return whether the record counts as acked."""
    stock = stock_consumer()
    app = stock.app
    app.flow_control.resume()
    channel = app.channel(value_type=bytes)
    stream = channel.stream()
    sent = message(stock, 10)
    sent.incref()
    event = faust.Event(app, b"k", b"v", None, sent)
    await channel.put(event)
    values: AsyncIterator[Any] = stream.__aiter__() if body == "plain" else stream.take(1, within=0.1)
    await anext(values)
    await values.aclose()  # type: ignore[attr-defined]  # what an exception in the agent's body does to it
    await stream.stop()
    return sent.acked, stock


@pytest.mark.parametrize("body", ["plain", "take"])
async def test_faust_acks_a_record_whose_agent_raised_and_our_commits_ignore_its_acks(body: str) -> None:
    acked, stock = await ack_after(body)
    assert acked
    assert stock._new_offset(LOG) == 11
    ours = our_consumer()
    waiting = batch(10)
    ours._delivered[LOG].append(waiting)
    carried = message(ours, 10)
    assert ours.ack(carried)
    assert ours._new_offset(LOG) is None


async def test_faust_acks_what_it_skips_during_a_rebalance() -> None:
    stock = stock_consumer()
    app = stock.app
    app.flow_control.resume()
    channel = app.channel(value_type=bytes)
    stream = channel.stream().noack()
    skipped, wanted = message(stock, 10), message(stock, 11)
    skipped.generation_id = app.consumer_generation_id - 1
    for one in (skipped, wanted):
        one.incref()
        await channel.put(faust.Event(app, b"k", b"v", None, one))
    values = stream._py_aiter()  # its Cython twin never acks what it skips: a gap that stays
    await anext(values)
    assert (skipped.acked, wanted.acked) == (True, False)
    await values.aclose()
    await stream.stop()


async def test_every_private_name_that_the_transport_uses_is_there() -> None:
    names = {
        driver.AIOKafkaConsumerThread: [
            "_create_worker_consumer", "_ensure_consumer", "call_thread", "seek", "seek_to_committed", "assignment",
        ],
        driver.Consumer: [
            "_new_consumer_thread", "_wait_next_records", "_to_message", "_filter_tps_with_pending_acks", "_new_offset",
            "_should_commit", "_commit", "_add_gap", "perform_seek", "on_partitions_revoked", "ack",
            "getmany", "commit",
        ],
        driver.Transport: ["Consumer"],
        AIOKafkaConsumer: ["seek", "seek_to_committed", "assignment", "highwater", "last_poll_timestamp"],
        Fetcher: ["request_offset_reset"],
        AIOKafkaClient: ["send", "get_random_node"],
    }  # fmt: skip
    missing = [(kind.__name__, name) for kind, of in names.items() for name in of if not hasattr(kind, name)]
    assert missing == []
    consumer = our_consumer()
    attributes = [
        "_read_offset",
        "_committed_offset",
        "_buffered_partitions",
        "_unacked_messages",
        "flow_active",
        "_thread",
    ]
    assert [name for name in attributes if not hasattr(consumer, name)] == []
    assert hasattr(driver, "ensure_aiokafka_TP")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("getmany", ["self", "timeout"]),
        ("perform_seek", ["self"]),
        ("on_partitions_revoked", ["self", "revoked"]),
        ("ack", ["self", "message"]),
        ("_wait_next_records", ["self", "timeout"]),
        ("_to_message", ["self", "tp", "record"]),
        ("_filter_tps_with_pending_acks", ["self", "topics"]),
        ("_new_offset", ["self", "tp"]),
        ("_should_commit", ["self", "tp", "offset"]),
        ("_commit", ["self", "offsets"]),
        ("_add_gap", ["self", "tp", "offset_from", "offset_to"]),
    ],
)
def test_what_the_transport_overrides_or_calls_has_the_signature_it_knows(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(driver.Consumer, name)).parameters) == parameters


async def test_the_worker_consumer_waits_as_told_and_keeps_partitions_together() -> None:
    consumer = our_consumer()
    made = consumer._thread._create_worker_consumer(consumer.transport)
    assert made._isolation_level == "read_committed"
    assert made._fetch_max_wait_ms == Settings().kafka.fetch_max_wait_ms
    assert made._partition_assignment_strategy == (RangePartitionAssignor,)
    await made.stop()
    stock = stock_consumer()
    theirs = stock._thread._create_worker_consumer(stock.transport)
    assert theirs._fetch_max_wait_ms == 1500
    assert RangePartitionAssignor not in theirs._partition_assignment_strategy
    await theirs.stop()


@pytest.mark.parametrize(
    ("position", "last_stable", "waiting", "undecided"),
    [
        (10, 40, 30, 0),
        (10, 25, 15, 15),
        (25, 25, 0, 15),
        (30, 25, 0, 10),
        (40, 40, 0, 0),
        (10, -1, 30, 0),
        (10, None, 30, 0),
    ],
)
async def test_what_lies_behind_an_open_transaction_does_not_wait_for_the_worker(
    position: int, last_stable: int | None, waiting: int, undecided: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer, subscription, tp = our_consumer(), SubscriptionState(), TopicPartition(*LOG)
    subscription.assign_from_user([tp])
    state = subscription.subscription.assignment.state_value(tp)
    state.seek(position)
    state.highwater, state.lso, state.timestamp = 40, last_stable, 7
    monkeypatch.setattr(consumer._thread, "_ensure_consumer", lambda: SimpleNamespace(_subscription=subscription))
    [standing] = consumer.standings().values()
    assert (standing.lag_records, standing.undecided_records, standing.fetched_ms) == (waiting, undecided, 7)


async def test_before_its_thread_has_a_consumer_nothing_is_known_and_nobody_who_asks_is_ended() -> None:
    consumer = our_consumer()
    with pytest.raises(ConsumerNotStarted):
        consumer._thread._ensure_consumer()
    assert (consumer.standings(), consumer.high_waters(LOG.topic)) == ({}, {})
    assert await consumer.log_end(*LOG) is None
    assert await consumer.topic_ids([LOG.topic]) == {}


async def test_committing_goes_through_faust_only_with_what_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    committed: list[Mapping[TP, int]] = []

    async def record_commit(_: object, offsets: Mapping[TP, int]) -> bool:
        committed.append(dict(offsets))
        return True

    consumer = our_consumer()
    monkeypatch.setattr(driver.Consumer, "_commit", record_commit)
    monkeypatch.setattr(consumer, "assignment", lambda: {LOG})
    done, waiting = batch(0, 1), batch(2, 3)
    consumer._delivered[LOG] += [done, waiting]
    done.settle(2)
    waiting.settle(1)
    await consumer.commit()
    await consumer.commit()
    assert committed == [{LOG: 2}]


async def test_commits_of_the_log_trail_by_the_durability_window_of_redis() -> None:
    consumer = our_consumer()
    consumer.transport.durable_after_s = {LOG.topic: 5.0}
    first, second = batch(10, 11), batch(12)
    consumer._delivered[LOG].extend([first, second])
    first.settle(2)
    second.settle()
    assert consumer._new_offset(LOG) is None
    first.settled_s -= 5.0
    assert consumer._new_offset(LOG) == 12
    second.settled_s -= 5.0
    assert consumer._new_offset(LOG) == 13


@pytest.mark.parametrize(
    ("environment", "window_s"),
    [
        ({}, 0.0),
        ({"RERANK_REDIS__URL": "redis+cluster://h:1"}, 5.0),
        ({"RERANK_REDIS__URL": "rediss+cluster://h:1", "RERANK_REDIS__DURABILITY_WINDOW_MS": "0"}, 0.0),
        ({"RERANK_REDIS__DURABILITY_WINDOW_MS": "2500"}, 2.5),
    ],
)
async def test_only_interactions_trail_and_by_default_only_in_a_cluster(
    environment: Mapping[str, str], window_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    app: Any = faust_app(Settings(), lambda _: None, lambda *_: None)
    assert app.transport.durable_after_s == {"interactions": window_s}


async def test_a_rewound_partition_forgets_what_was_delivered_of_it() -> None:
    consumer = our_consumer()
    old = batch(5)
    consumer._delivered[LOG].append(old)
    consumer.rewind(LOG.topic, LOG.partition, 3)
    old.settle()
    assert old.dropped
    assert list(consumer._filter_tps_with_pending_acks()) == []
    assert consumer._rewinds == {LOG: 3}


async def test_a_seek_to_the_committed_offsets_forgets_pending_batches_and_tells_where_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Mapping[TP, int]] = []
    consumer = our_consumer(told.append)

    async def committed() -> Mapping[TP, int]:
        return {LOG: 7}

    monkeypatch.setattr(consumer, "seek_to_committed", committed)
    old = batch(9)
    consumer._delivered[LOG].append(old)
    await asyncio.wait_for(consumer.perform_seek(), 5)
    assert old.dropped
    assert told == [{LOG: 7}]


async def test_aiokafka_seeks_nothing_that_was_never_committed_and_we_seek_it_to_the_start() -> None:
    never, once = TopicPartition("interactions", 0), TopicPartition("interactions", 1)
    subscription, sought = SubscriptionState(), list[Any]()
    subscription.assign_from_user([never, once])

    async def committed(tp: TopicPartition) -> int | None:
        return 5 if tp == once else None

    def reset(tps: list[TopicPartition], strategy: int) -> None:
        sought.extend((tp, strategy) for tp in tps)

    fetcher = SimpleNamespace(seek_to=lambda *to: sought.append(to), request_offset_reset=reset)
    stock: Any = SimpleNamespace(
        _subscription=subscription, _fetcher=fetcher, committed=committed, assignment=subscription.assigned_partitions
    )
    stock.seek_to_committed = lambda: AIOKafkaConsumer.seek_to_committed(stock)
    await stock.seek_to_committed()
    assert sought == [(once, 5)]
    thread = our_consumer()._thread
    thread._consumer = stock
    assert await thread._seek_to_committed() == {never: None, once: 5}
    assert sought[1:] == [(once, 5), (never, OffsetResetStrategy.EARLIEST)]


async def test_the_check_of_faust_that_raises_while_a_position_is_sought_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subscription, tp = SubscriptionState(), TopicPartition(*LOG)
    subscription.assign_from_user([tp])
    state = subscription.subscription.assignment.state_value(tp)
    state.highwater, state.timestamp = 40, 7
    state.await_reset(OffsetResetStrategy.EARLIEST)
    fetcher = SimpleNamespace(_subscriptions=subscription)
    made = SimpleNamespace(_fetcher=fetcher, assignment=subscription.assigned_partitions)
    for consumer in (stock_consumer(), our_consumer()):
        monkeypatch.setattr(consumer._thread, "_ensure_consumer", lambda: made)
        monkeypatch.setattr(consumer._thread, "_verify_aiokafka_event_path", lambda *_: False)
        monkeypatch.setattr(consumer._thread, "time_started", 0.0, raising=False)
    stock, ours = _consumers[-2:]
    with pytest.raises(AssertionError):
        stock.verify_event_path(0.0, LOG)
    ours.verify_event_path(0.0, LOG)


async def test_a_worker_without_partitions_has_nothing_to_seek() -> None:
    thread = our_consumer()._thread
    thread._consumer = SimpleNamespace(assignment=set)
    assert await thread._seek_to_committed() == {}


def suspend(consumer: Any) -> None:
    consumer.flow_active = False


def rebalance(consumer: Any) -> None:
    consumer.app.consumer_generation_id += 1


def seek(consumer: Any) -> None:
    consumer._seeks += 1


@pytest.mark.parametrize("overtake", [suspend, rebalance, seek])
@pytest.mark.parametrize("delivered_first", [0, 1])
async def test_what_is_fetched_while_a_seek_or_a_rebalance_runs_is_read_again_before_anything_else(
    overtake: Callable[[Any], None], delivered_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer, steps = our_consumer(), []
    other = TP(LOG.topic, 1)

    async def fetch(_: float) -> tuple[Mapping[TP, list[ConsumerRecord]], None]:
        steps.append("fetch")
        if not delivered_first and steps.count("fetch") == 1:
            overtake(consumer)
        return {LOG: [record(0)], other: [record(0)]}, None

    answers = iter([TimeoutError(), None])

    async def committed() -> Mapping[TP, int]:
        steps.append("seek")
        if (error := next(answers)) is not None:
            raise error
        return {}

    monkeypatch.setattr(consumer, "_wait_next_records", fetch)
    monkeypatch.setattr(consumer, "seek_to_committed", committed)
    monkeypatch.setattr(transport, "SEEK_AGAIN_S", 0.0)
    first = []
    async for tp, _ in consumer.getmany(1.0):
        first.append(tp)
        overtake(consumer)
    assert first == [LOG][:delivered_first]
    consumer.resume_flow()
    assert [tp async for tp, _ in consumer.getmany(1.0)] == []
    assert [tp async for tp, _ in consumer.getmany(1.0)] == [LOG, other]
    assert steps == ["fetch", "seek", "seek", "fetch"]


@pytest.mark.parametrize(
    ("log_start", "told"), [(15, [(LOG, 10, 5)]), (12, [(LOG, 10, 2)]), (3, [])], ids=["retention", "both", "a hole"]
)
async def test_a_jump_of_the_offsets_is_told_as_far_as_retention_made_it(
    log_start: int, told: list[tuple[TP, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer, gaps = our_consumer(), []

    async def earliest(*partitions: object) -> Mapping[object, int]:
        return dict.fromkeys(partitions, log_start)

    monkeypatch.setattr(consumer._thread, "earliest_offsets", earliest)
    monkeypatch.setattr(consumer.transport, "on_gap", lambda *gap: gaps.append(gap))
    consumer._next_offsets[LOG] = 8
    consumer._expect_next(LOG, [record(8), record(9)])
    consumer._expect_next(LOG, [record(15)])
    await asyncio.gather(*consumer._gaps)
    assert gaps == told
