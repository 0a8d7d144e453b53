"""The agents in this process, with fakes for broker, store and model."""

import asyncio
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from schemas.records import After
from stream_app.agents import ATTEMPTS, InteractionsAgent, ListsAgent
from stream_app.cache import CachedStore
from stream_app.errors import ModelError, OtherLogError, PublishError, StoreUnavailableError
from stream_app.pipeline import REFOLDS, ListRequest
from stream_app.ports import UserStore
from stream_app.state import Fence, FloatArray, Progress, RowUpdate, UserRow
from stream_app.transport import FetchedBatch
from tests.agent_bench import MAX_DEADLINE_MS, Bench
from tests.bad_records import bad_records
from tests.builders import candidate_list, interaction
from tests.fakes import (
    RECORD_TIME_MS,
    FailingStore,
    FakeClock,
    FakeRecord,
    FakeStream,
    HalvingModel,
    RecordingPublisher,
    memory_store,
    record_of,
    serving,
)


def click(offset: int, item_id: str = "i-1", user_id: str = "u-1") -> FakeRecord:
    return record_of(interaction(user_id=user_id, item_id=item_id, kind="click", event_time_ms=offset), offset=offset)


def request(offset: int = 0, *, headers: tuple[tuple[str, bytes], ...] = (), **changes: object) -> FakeRecord:
    fields: dict[str, object] = {"after": None, "explain": False, "k": None, "item_ids": ["i-1", "i-2", "i-3"]}
    return record_of(candidate_list(**(fields | changes)), offset=offset, headers=headers)


class BuggyModel(HalvingModel):
    """Hits a bug whenever item i-2 is among its input."""

    def advance(self, states, items, kinds, values, dt_s):  # type: ignore[no-untyped-def]
        if (items == [0.0, 1.0]).all(axis=1).any():
            raise ZeroDivisionError("a bug")
        return super().advance(states, items, kinds, values, dt_s)

    def score(self, batch):  # type: ignore[no-untyped-def]
        if batch.items.shape[1] == 1:
            raise ZeroDivisionError("a bug")
        return super().score(batch)


class PassingBug(HalvingModel):
    """Hits a bug in its first call, and never again."""

    def _call(self) -> None:
        super()._call()
        if self.calls == 1:
            raise ZeroDivisionError("a bug")


class ContestedStore:
    """Refuses what is folded: somebody else was faster, so many times."""

    def __init__(self, store: UserStore, refusals: int) -> None:
        self.saves = 0
        self._store, self._refusals = store, refusals

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        return await self._store.load(user_ids)

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        self.saves += 1
        return await self._store.save(updates, progress) if self.saves > self._refusals else [False for _ in updates]


async def test_interactions_are_saved_before_their_batch_is_settled() -> None:
    bench = Bench()
    batch = bench.stream.put(click(0), click(1, "i-2"))
    await bench.interactions()
    [row] = await bench.store.load(["u-1"])
    assert (row.events, row.fence) == (2, Fence(1, 0, 1))
    assert batch.done
    assert bench.applied.offsets == {0: 1}


async def test_interactions_of_another_log_end_the_worker_before_one_is_applied_or_refused() -> None:
    async def is_log_ours(doubtful: bool) -> bool:
        raise OtherLogError("interactions", "1a", "2b")

    bench = Bench(is_log_ours=is_log_ours)
    batch = bench.stream.put(click(0), FakeRecord(topic="interactions", offset=1, value=b"{"))
    await bench.interactions()
    assert [type(failure) for failure in bench.failures] == [OtherLogError]
    assert (bench.publisher.sent, bench.applied.offsets, batch.done) == ([], {}, False)
    [row] = await bench.store.load(["u-1"])
    assert row.events == 0


async def test_interactions_wait_until_the_log_is_known_to_be_ours() -> None:
    answers, asked = [False, False, True], list[bool]()

    async def is_log_ours(doubtful: bool) -> bool:
        asked.append(doubtful)
        return answers.pop(0)

    bench = Bench(is_log_ours=is_log_ours)
    batch = bench.stream.put(click(0))
    await bench.interactions()
    assert (answers, asked, batch.done, bench.applied.offsets) == ([], [False] * 3, True, {0: 0})


@pytest.mark.parametrize(("offset", "doubtful"), [(4, True), (7, True), (8, False), (9, False)])
async def test_offsets_that_begin_again_below_what_is_applied_make_the_log_doubtful(
    offset: int, doubtful: bool
) -> None:
    asked = list[bool]()

    async def is_log_ours(doubtful: bool) -> bool:
        asked.append(doubtful)
        return True

    bench = Bench(is_log_ours=is_log_ours)
    bench.applied.advance(0, 7)
    await bench.store.save([], [Progress(0, -1, 7)])
    bench.stream.put(click(offset))
    await bench.interactions()
    assert asked == [doubtful]


async def test_a_bad_interaction_is_a_dead_letter_and_its_neighbours_are_applied() -> None:
    bench = Bench()
    batch = bench.stream.put(click(0), FakeRecord(topic="interactions", offset=1, value=b"{"), click(2))
    await bench.interactions()
    [row] = await bench.store.load(["u-1"])
    assert row.events == 2
    assert bench.codes() == ["not_json"]
    assert bench.publisher.sent[0].value == b"{"
    assert batch.done


@pytest.mark.parametrize("topic", ["interactions", "candidates"])
async def test_every_bad_record_is_a_dead_letter_and_every_good_one_is_served(topic: str) -> None:
    bench = Bench()
    bad = [case for case in bad_records() if case.topic == topic]
    for offset, case in enumerate(bad):
        good = click(2 * offset) if topic == "interactions" else request(2 * offset, request_id=f"r-{offset}")
        bench.stream.put(good, FakeRecord(topic=topic, offset=2 * offset + 1, key=case.key, value=case.value))
    await (bench.interactions() if topic == "interactions" else bench.lists())
    assert bench.failures == []
    assert bench.codes() == [case.code for case in bad]
    assert [sent.value for sent in bench.publisher.sent if sent.topic != "reranked"] == [case.value for case in bad]
    if topic == "interactions":
        [row] = await bench.store.load(["u-1"])
        assert row.events == len(bad)
    else:
        assert sorted(slate.request_id for slate in bench.slates()) == sorted(f"r-{n}" for n in range(len(bad)))


async def test_a_dead_letter_too_large_to_be_produced_is_cut_and_says_so() -> None:
    bench = Bench(max_output_bytes=200_000)
    batch = bench.stream.put(FakeRecord(topic="interactions", value=b"x" * 2_000_000, headers=(("h", b"1"),)))
    await bench.interactions()
    [sent] = bench.publisher.sent
    assert sent.value == b"x" * 65_536
    assert (dict(sent.headers)["rerank.error.truncated"] or b"").startswith(b"key 3, value 2000000, headers 2 bytes; ")
    assert bench.codes() == ["too_large"]
    assert batch.done


async def test_an_interaction_that_hits_a_bug_is_isolated() -> None:
    bench = Bench(serving=serving(BuggyModel()))
    batch = bench.stream.put(click(0, user_id="a"), click(1, "i-2", user_id="b"), click(2, user_id="c"))
    await bench.interactions()
    assert [row.events for row in await bench.store.load(["a", "b", "c"])] == [1, 0, 1]
    assert bench.codes() == ["internal_error"]
    assert batch.done


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_a_bug_that_passes_costs_no_record_and_leaves_its_traceback(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    applying, ranking = Bench(serving=serving(PassingBug())), Bench(serving=serving(PassingBug()))
    applying.stream.put(*(click(n) for n in range(count)))
    ranking.stream.put(*(request(n, request_id=f"r-{n}") for n in range(count)))
    await applying.interactions()
    await ranking.lists()
    assert [row.events for row in await applying.store.load(["u-1"])] == [count]
    assert [slate.outcome for slate in ranking.slates()] == ["ranked"] * count
    assert (applying.codes(), ranking.codes()) == ([], [])
    told = [record for record in caplog.records if record.getMessage().startswith(f"event=bug records={count} ")]
    assert [record.exc_info and record.exc_info[0] for record in told] == [ZeroDivisionError] * 2


async def test_going_on_past_a_bug_waits_for_redis_too() -> None:
    bench = Bench(store=FailingStore(memory_store(), failing_saves=2), serving=serving(BuggyModel()))
    batch = bench.stream.put(click(0, "i-2"))
    await bench.interactions()
    assert (bench.codes(), bench.failures, batch.done) == (["internal_error"], [], True)


async def test_interactions_wait_for_redis_and_none_is_lost() -> None:
    store = FailingStore(memory_store(), failing_loads=2, failing_saves=1)
    bench = Bench(store=store)
    batch = bench.stream.put(click(0), click(1))
    await bench.interactions()
    [row] = await store.load(["u-1"])
    assert row.events == 2
    assert batch.done
    assert bench.failures == []


async def test_a_save_whose_reply_was_lost_is_not_applied_twice() -> None:
    store = FailingStore(memory_store(), lost_replies=1)
    bench = Bench(store=store)
    bench.stream.put(click(0, "i-1"), click(1, "i-2"))
    await bench.interactions()
    [row] = await store.load(["u-1"])
    assert row.events == 2


async def test_a_store_that_lost_interactions_has_them_read_again_before_anything_is_written() -> None:
    store = memory_store()
    bench = Bench(store=store)
    bench.stream.put(click(0), click(1))
    await bench.interactions()
    store.lose_everything()
    bench.stream = FakeStream()
    batch = bench.stream.put(click(2))
    await bench.interactions()
    assert bench.rewinds == [(0, -1)]
    assert not batch.done
    assert store.dump() == {}


async def test_reading_lost_interactions_again_makes_no_dead_letter_twice() -> None:
    store = memory_store()
    bench = Bench(store=store)
    records = click(0), FakeRecord(topic="interactions", offset=1, value=b"{"), click(2)
    bench.stream.put(*records)
    await bench.interactions()
    store.lose_everything()
    bench.applied.rewind(0, -1)
    bench.stream = FakeStream()
    again = bench.stream.put(*records, FakeRecord(topic="interactions", offset=3, value=b"}"))
    await bench.interactions()
    assert [letter.value for letter in bench.publisher.sent] == [b"{", b"}"]
    assert again.done


async def test_a_hole_in_one_partition_costs_the_others_of_its_micro_batch_nothing() -> None:
    bench = Bench()
    bench.applied.advance(0, 9)
    behind = bench.stream.put(click(10))
    other = record_of(interaction(user_id="u-2", event_time_ms=0), partition=1)
    sound = bench.stream.put(other)
    await bench.interactions()
    assert bench.rewinds == [(0, -1)]
    assert (behind.done, sound.done) == (False, True)
    assert [row.events for row in await bench.store.load(["u-1", "u-2"])] == [0, 1]


async def test_after_a_failure_nothing_more_is_applied_before_what_failed() -> None:
    bench = Bench(serving=serving(HalvingModel(failures=ATTEMPTS)))
    failed, next_one = bench.stream.put(click(0)), bench.stream.put(click(1))
    await bench.run(InteractionsAgent(bench.context(), max_records=1))
    assert len(bench.failures) == 1
    assert (failed.done, next_one.done) == (False, False)
    assert [row.events for row in await bench.store.load(["u-1"])] == [0]


async def test_while_lost_interactions_are_read_again_slates_are_degraded() -> None:
    bench = Bench()
    bench.applied.advance(0, 1)
    bench.applied.rewind(0, -1)
    bench.stream.put(request(request_id="before"))
    await bench.lists()
    bench.stream = FakeStream()
    bench.stream.put(click(0), click(1))
    await bench.interactions()
    bench.stream = FakeStream()
    bench.stream.put(request(request_id="after"))
    await bench.lists()
    assert [slate.reasons for slate in bench.slates()] == [["cold_user", "degraded"], []]


async def test_a_dropped_batch_is_left_alone() -> None:
    bench = Bench()
    batch = bench.stream.put(click(0))
    batch.dropped = True
    await bench.interactions()
    assert not batch.done
    assert [row.events for row in await bench.store.load(["u-1"])] == [0]


async def test_a_dropped_batch_of_lists_is_answered_elsewhere() -> None:
    bench = Bench()
    batch = bench.stream.put(request(), FakeRecord(topic="candidates", offset=1, value=b"{"))
    batch.dropped = True
    await bench.lists()
    assert (bench.publisher.sent, batch.done) == ([], False)


async def test_an_agent_whose_partition_is_read_again_waits_for_nothing_any_more() -> None:
    bench = Bench(store=FailingStore(memory_store(), failing_saves=1))
    bench.applied.advance(0, 9)
    bench.stream.put(click(10))
    agent = InteractionsAgent(bench.context(), max_records=1_000)
    await bench.run(agent)
    assert (bench.rewinds, agent.retrying) == ([(0, -1)], False)


async def test_asked_to_stop_while_redis_is_away_nothing_is_settled() -> None:
    bench = Bench(store=FailingStore(memory_store(), failing_loads=10**6))
    agent = InteractionsAgent(bench.context(), max_records=1_000)
    batch = bench.stream.put(click(0))
    running = asyncio.create_task(agent.run(bench.stream))  # type: ignore[arg-type]
    await asyncio.sleep(0.1)
    agent.stop()
    async with asyncio.timeout(5):
        await agent.drained()
    assert not batch.done
    running.cancel()


async def test_a_model_that_cannot_advance_stops_the_worker_with_nothing_settled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stream_app.agents.RETRY_FIRST_S", 0.0)
    bench = Bench(serving=serving(HalvingModel(failures=10**6)))
    batch = bench.stream.put(click(0))
    await bench.interactions()
    assert [type(failure) for failure in bench.failures] == [ModelError]
    assert not batch.done


async def test_rows_that_others_move_on_are_folded_again_until_they_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stream_app.agents.RETRY_FIRST_S", 0.0)
    store = ContestedStore(memory_store(), refusals=2 * REFOLDS * ATTEMPTS)
    bench = Bench(store=store)
    batch = bench.stream.put(click(0), click(1, user_id="u-2"))
    await bench.interactions()
    assert (bench.failures, store.saves, batch.done) == ([], 2 * REFOLDS * ATTEMPTS + 1, True)
    assert [row.events for row in await bench.store.load(["u-1", "u-2"])] == [1, 1]


async def test_a_partition_whose_rows_others_never_leave_alone_has_no_excuse_and_settles_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So whoever watches that partitions move ends the worker, which has said why."""
    monkeypatch.setattr("stream_app.agents.RETRY_FIRST_S", 0.0)
    store = ContestedStore(memory_store(), refusals=10**9)
    bench = Bench(store=store)
    batch = bench.stream.put(click(0), click(1, user_id="u-2"))
    agent = InteractionsAgent(bench.context(), max_records=100)
    running = asyncio.create_task(agent.run(bench.stream))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        while store.saves <= 2 * REFOLDS * ATTEMPTS:  # noqa: ASYNC110 - the store tells nobody
            await asyncio.sleep(0)
        assert (agent.retrying, bench.failures, batch.done) == (False, [], False)
        agent.stop()
        await agent.drained()
    running.cancel()
    assert (bench.failures, batch.done) == ([], False)
    assert (
        "2 interactions refused 5 times: others write the same users; nothing was acked, they are tried again; check "
        "that no two groups share a Redis key prefix, and that producers put a user into one partition"
    ) in caplog.text


class YieldingStore:
    """Lets others go first, by seed, before each of its answers."""

    def __init__(self, store: UserStore, rng: random.Random) -> None:
        self._store, self._rng = store, rng

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        await self._yield()
        rows = await self._store.load(user_ids)
        await self._yield()
        return rows

    async def save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress] = ()) -> list[bool]:
        await self._yield()
        return await self._store.save(updates, progress)

    async def _yield(self) -> None:
        for _ in range(self._rng.randrange(4)):
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(5))
async def test_users_sprayed_over_partitions_have_each_interaction_once_whoever_is_faster(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("stream_app.agents.RETRY_FIRST_S", 0.0)
    rng, shared, users, events = random.Random(seed), memory_store(), 3, 300  # noqa: S311 - a workload
    workers = [Bench(store=CachedStore(YieldingStore(shared, rng), max_users=100)) for _ in range(3)]
    batches = [
        worker.stream.put(
            record_of(interaction(user_id=f"u-{n % users}", event_time_ms=n), offset=n, partition=partition)
        )
        for n in range(events)
        for partition, worker in enumerate(workers)
    ]
    await asyncio.gather(*(worker.run(InteractionsAgent(worker.context(), max_records=1)) for worker in workers))
    assert [worker.failures for worker in workers] == [[], [], []]
    assert all(batch.done for batch in batches)
    rows = await shared.load([f"u-{n}" for n in range(users)])
    assert [row.events for row in rows] == [len(workers) * events // users] * users


async def test_an_outage_of_redis_is_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_app.agents.RETRY_FIRST_S", 0.0)
    store = FailingStore(memory_store(), failing_loads=2 * ATTEMPTS)
    bench = Bench(store=store, serving=serving(HalvingModel(failures=ATTEMPTS - 1)))
    batch = bench.stream.put(click(0))
    await bench.interactions()
    assert bench.failures == []
    assert batch.done


async def test_a_list_is_ranked_by_the_state_of_its_user() -> None:
    bench = Bench()
    bench.stream.put(click(0, "i-2"))
    await bench.interactions()
    bench.stream = FakeStream()
    batch = bench.stream.put(request())
    await bench.lists()
    [slate] = bench.slates()
    assert (slate.outcome, slate.reasons) == ("ranked", [])
    assert slate.item_ids == ["i-2", "i-3", "i-1"]
    assert slate.scores == [1.0, 1.0, 0.0]
    assert slate.retrieval_positions == [1, 2, 0]
    assert batch.done


async def test_a_slate_carries_the_headers_of_its_list_and_says_outcome_and_model() -> None:
    bench = Bench()
    bench.stream.put(request(headers=(("traceparent", b"00-1"), ("correlation_id", b"c"), ("other", b"x"))))
    await bench.lists()
    [sent] = bench.publisher.sent
    assert list(sent.headers) == [
        ("traceparent", b"00-1"),
        ("correlation_id", b"c"),
        ("rerank-outcome", b"ranked"),
        ("rerank-model", b"halving:1"),
    ]
    assert sent.key == b"u-1"


async def test_a_slate_too_large_loses_its_explanations_or_is_a_dead_letter_and_its_neighbours_are_answered() -> None:
    bench = Bench(max_output_bytes=2_000)
    many = [f"i-{number:04}" for number in range(200)]
    batch = bench.stream.put(
        request(0, request_id="small", explain=True),
        request(1, request_id="explained", explain=True, item_ids=many[:20]),
        request(2, request_id="large", item_ids=many),
        request(3, request_id="after"),
    )
    await bench.lists()
    assert [(slate.request_id, slate.explanations is None) for slate in bench.slates()] == [
        ("small", False),
        ("explained", True),
        ("after", True),
    ]
    [letter] = [sent for sent in bench.publisher.sent if sent.topic == "candidates.dlq"]
    assert bench.codes() == ["output_too_large"]
    assert dict(letter.headers)["__connect.errors.offset"] == b"2"
    assert not bench.failures
    assert batch.done


async def test_a_list_past_its_deadline_is_shed_before_any_work() -> None:
    model = HalvingModel()
    bench = Bench(serving=serving(model), clock=FakeClock(RECORD_TIME_MS + 81))
    batch = bench.stream.put(request(deadline_ms=80))
    await bench.lists()
    [slate] = bench.slates()
    assert (slate.outcome, slate.reasons, slate.item_ids) == ("shed", ["deadline"], [])
    assert model.calls == 0
    assert batch.done


async def test_a_list_waits_for_its_after_no_longer_than_the_worker_allows() -> None:
    bench = Bench(clock=FakeClock(RECORD_TIME_MS + MAX_DEADLINE_MS))
    batch = bench.stream.put(
        request(after=After(partition=0, offset=9), deadline_ms=2**53 - 1), request(1, deadline_ms=MAX_DEADLINE_MS + 1)
    )
    await bench.lists()
    assert [slate.outcome for slate in bench.slates()] == ["shed", "shed"]
    assert batch.done


async def test_in_a_backlog_a_late_list_is_shed_by_its_head_and_one_without_a_sound_head_is_a_dead_letter() -> None:
    bench = Bench(clock=FakeClock(RECORD_TIME_MS + 100))
    late = [request(n, request_id=f"r-{n}", deadline_ms=80) for n in range(40)]
    twice = request(40, request_id="twice", item_ids=["i-1", "i-1"], deadline_ms=80)
    in_time = request(41, request_id="in time", item_ids=["i-1", "i-1"], deadline_ms=1_000)
    no_head = FakeRecord(topic="candidates", offset=42, value=b'{"request_id": 7}')
    batch = bench.stream.put(*late, twice, in_time, no_head)
    await bench.lists()
    assert {slate.request_id for slate in bench.slates()} == {*(f"r-{n}" for n in range(40)), "twice"}
    assert {(slate.outcome, slate.event_time_ms) for slate in bench.slates()} == {("shed", 1_699_999_999_999)}
    assert bench.codes() == ["duplicate_items", "wrong_type"]
    assert batch.done


async def test_late_lists_do_not_thin_out_a_forward_pass() -> None:
    model = HalvingModel()
    bench = Bench(serving=serving(model), clock=FakeClock(RECORD_TIME_MS + 100))
    lists = [request(n, request_id=f"r-{n}", deadline_ms=80 if n % 10 else 1_000) for n in range(320)]
    bench.stream.put(*lists)
    await bench.lists()
    assert [slate.outcome for slate in bench.slates()].count("ranked") == 32
    assert model.calls == 1


async def test_without_a_deadline_of_its_own_the_default_holds() -> None:
    bench = Bench(clock=FakeClock(RECORD_TIME_MS + 999))
    bench.stream.put(request(deadline_ms=None))
    await bench.lists()
    assert [slate.outcome for slate in bench.slates()] == ["ranked"]


@pytest.mark.parametrize(
    ("bench", "reason"),
    [
        (lambda: Bench(store=FailingStore(memory_store(), failing_loads=1)), "store_unavailable"),
        (lambda: Bench(serving=serving(HalvingModel(failures=1))), "model_error"),
        (lambda: Bench(serving=serving(HalvingModel(scores=nan_scores()))), "model_nonfinite"),
    ],
)
async def test_what_is_down_gives_retrieval_order_with_a_reason(bench: Callable[[], Bench], reason: str) -> None:
    fakes = bench()
    batch = fakes.stream.put(request(retrieval_scores=[3.0, 2.0, 1.0], k=2))
    await fakes.lists()
    [slate] = fakes.slates()
    assert (slate.outcome, slate.reasons) == ("fallback", [reason])
    assert (slate.item_ids, slate.scores) == (["i-1", "i-2"], [3.0, 2.0])
    assert batch.done


def nan_scores() -> FloatArray:
    return np.full((1, 3), np.nan, dtype=np.float32)


async def test_a_list_that_hits_a_bug_is_isolated() -> None:
    bench = Bench(serving=serving(BuggyModel()))
    batch = bench.stream.put(request(0, request_id="good"))
    bad = bench.stream.put(request(1, request_id="bad", item_ids=["i-1"], retrieval_scores=None, user_id="u-2"))
    await ListsAgentOfOne(bench)
    assert [slate.request_id for slate in bench.slates()] == ["good"]
    assert bench.codes() == ["internal_error"]
    assert batch.done
    assert bad.done


async def ListsAgentOfOne(bench: Bench) -> None:  # noqa: N802
    """Rank one list a forward pass."""
    await bench.run(ListsAgent(bench.context(), max_records=1))


async def test_unacknowledged_answers_stop_the_worker_with_nothing_settled() -> None:
    bench = Bench(publisher=RecordingPublisher(failures=1))
    batch = bench.stream.put(request())
    await bench.lists()
    assert [type(failure) for failure in bench.failures] == [PublishError]
    assert not batch.done


async def test_unacknowledged_dead_letters_stop_the_worker_with_nothing_settled() -> None:
    bench = Bench(publisher=RecordingPublisher(failures=1))
    batch = bench.stream.put(FakeRecord(topic="interactions", value=b"{"))
    await bench.interactions()
    assert [type(failure) for failure in bench.failures] == [PublishError]
    assert not batch.done


async def parked(bench: Bench, *, after: After) -> tuple[ListsAgent, asyncio.Task[None], asyncio.Task[None]]:
    """Start a lists agent and feed it one list that waits for `after` beside one that does not."""
    agent = ListsAgent(bench.context(), max_records=32)
    bench.stream.put(request(0, after=after, request_id="waits"), request(1, request_id="free", user_id="u-2"))
    running = asyncio.create_task(agent.run(bench.stream))  # type: ignore[arg-type]
    watching = asyncio.create_task(agent.watch_parked())
    await asyncio.sleep(0.05)
    return agent, running, watching


async def end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_list_waits_for_its_after_and_its_neighbour_does_not() -> None:
    bench = Bench()
    _, *tasks = await parked(bench, after=After(partition=0, offset=0))
    assert [slate.request_id for slate in bench.slates()] == ["free"]
    interactions = FakeStream()
    interactions.put(click(0, "i-2"))
    interactions.end()
    await InteractionsAgent(bench.context(), max_records=10).run(interactions)  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    assert [slate.request_id for slate in bench.slates()] == ["free", "waits"]
    assert bench.slates()[1].state.offset == 0
    assert bench.slates()[1].item_ids[0] == "i-2"
    await end(*tasks)


async def test_an_after_that_was_a_dead_letter_is_reached_all_the_same() -> None:
    bench = Bench()
    _, *tasks = await parked(bench, after=After(partition=0, offset=0))
    interactions = FakeStream()
    interactions.put(FakeRecord(topic="interactions", value=b"{"))
    interactions.end()
    await InteractionsAgent(bench.context(), max_records=10).run(interactions)  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    assert [slate.request_id for slate in bench.slates()] == ["free", "waits"]
    await end(*tasks)


async def test_an_after_in_the_stored_row_is_reached_at_once() -> None:
    bench = Bench()
    bench.stream.put(click(3))
    await bench.interactions()
    bench.applied.drop()  # as after a restart: nothing was delivered yet
    bench.stream = FakeStream()
    bench.stream.put(request(after=After(partition=0, offset=3)))
    await bench.lists()
    assert [slate.outcome for slate in bench.slates()] == ["ranked"]


async def test_an_after_not_reached_by_the_deadline_is_a_stale_fallback() -> None:
    bench = Bench()
    agent = ListsAgent(bench.context(), max_records=32)
    batch = bench.stream.put(request(after=After(partition=0, offset=9), deadline_ms=80))
    tasks = [asyncio.create_task(agent.run(bench.stream)), asyncio.create_task(agent.watch_parked())]  # type: ignore[arg-type]
    await asyncio.sleep(0.03)
    assert bench.slates() == []
    bench.clock.time_ms += 80
    await asyncio.sleep(0.15)
    [slate] = bench.slates()
    assert (slate.outcome, slate.reasons) == ("fallback", ["stale"])
    assert batch.done
    await end(*tasks)


async def test_a_parked_list_outlasts_a_clock_set_back_by_no_more_than_a_look() -> None:
    bench = Bench()
    bench.clock.set_ahead_ms = -30 * 86_400_000.0
    _, *tasks = await parked(bench, after=After(partition=0, offset=9))
    assert [slate.request_id for slate in bench.slates()] == ["free"]
    bench.clock.set_ahead_ms = 86_400_000.0
    async with asyncio.timeout(30.0):
        while len(bench.slates()) < 2:  # noqa: ASYNC110 - what the publisher has got has no event
            await asyncio.sleep(0.01)
    assert bench.slates()[1].reasons == ["stale"]
    await end(*tasks)


async def test_an_unreachable_redis_is_an_error_that_names_the_remedy() -> None:
    store = FailingStore(memory_store(), failing_loads=1)
    with pytest.raises(StoreUnavailableError, match="nothing was acked"):
        await store.load(["u-1"])


async def unparking(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> tuple[ListsAgent, FetchedBatch, asyncio.Event]:
    """Return an agent that is about to rank a list whose `after` has come, and goes on when the event is set."""
    agent, goes_on = ListsAgent(bench.context(), max_records=32), asyncio.Event()
    batch = bench.stream.put(request(after=After(partition=0, offset=9), deadline_ms=60_000))
    await bench.run(agent)
    rank = agent._rank

    async def rank_later(requests: Sequence[ListRequest], *, tried: bool = False) -> None:
        await goes_on.wait()
        await rank(requests, tried=tried)

    monkeypatch.setattr(agent, "_rank", rank_later)
    return agent, batch, goes_on


@pytest.mark.parametrize("revoked", [False, True])
async def test_a_list_that_is_no_longer_parked_is_in_hand_until_it_is_answered_or_revoked(
    monkeypatch: pytest.MonkeyPatch, revoked: bool
) -> None:
    bench = Bench()
    agent, batch, goes_on = await unparking(bench, monkeypatch)
    watching = asyncio.create_task(agent.watch_parked())
    bench.applied.advance(0, 9)
    await asyncio.sleep(0.01)
    draining = asyncio.create_task(agent.drained())
    await asyncio.sleep(0.01)
    assert not draining.done()
    batch.dropped = revoked
    goes_on.set()
    async with asyncio.timeout(5):
        await draining
    assert (len(bench.slates()), batch.done) == ((0, False) if revoked else (1, True))
    watching.cancel()


async def test_asked_to_stop_what_is_parked_is_left_for_the_next_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    agent, batch, goes_on = await unparking(bench, monkeypatch)
    goes_on.set()
    watching = asyncio.create_task(agent.watch_parked())
    await asyncio.sleep(0.01)
    agent.stop()
    bench.applied.advance(0, 9)
    async with asyncio.timeout(5):
        await watching
    assert (bench.publisher.sent, batch.done) == ([], False)
