"""No list waits past its deadline, whatever Redis does; and one in a hurry costs its neighbours nothing."""

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from schemas.records import After, CandidateList
from stream_app.breaker import CircuitBreaker, CircuitState
from stream_app.cache import CachedStore
from stream_app.errors import StoreUnavailableError
from stream_app.guarded_store import GuardedStore
from stream_app.pipeline import Answer, ListRequest, Ranker
from stream_app.ports import AppliedOffsets, RowSource, no_rows_at_hand
from stream_app.state import Fence, RowUpdate, UserRow
from stream_app.telemetry import Telemetry
from tests.builders import candidate_list
from tests.fakes import (
    RECORD_TIME_MS,
    CountingBatch,
    FailingStore,
    FakeClock,
    HalvingModel,
    HungStore,
    memory_store,
    record_of,
    serving,
)


def a_list(user_id: str, *, deadline_ms: float = 1_000.0, **changes: object) -> ListRequest:
    """Return a decoded list whose deadline is so long after the record."""
    fields: dict[str, object] = {"user_id": user_id, "request_id": user_id, "after": None, "explain": False}
    request: CandidateList = candidate_list(**(fields | changes))
    return ListRequest(record_of(request), request, RECORD_TIME_MS + deadline_ms, CountingBatch())


def ranker(store: RowSource, *, clock: FakeClock | None = None, cached: CachedStore | None = None) -> Ranker:
    return Ranker(
        serving=serving(),
        store=store,
        applied=AppliedOffsets(),
        clock=clock or FakeClock(),
        at_hand=no_rows_at_hand if cached is None else cached.at_hand,
    )


def guarded(store: RowSource, *, budget_ms: float = 10_000.0, clock: FakeClock | None = None) -> GuardedStore:
    return GuardedStore(
        store,
        breaker=CircuitBreaker(failures=2, probe_after_ms=500.0),
        budget_ms=budget_ms,
        clock=clock or FakeClock(),
        telemetry=Telemetry(),
    )


async def answers_of(one: Ranker, requests: Sequence[ListRequest]) -> list[list[Answer]]:
    """Return the answers, part by part."""
    return [ranked.answers async for ranked in one.rank(requests)]


def told(answers: Sequence[Answer]) -> Mapping[str, tuple[str, list[str]]]:
    return {answer.slate.user_id: (answer.slate.outcome, answer.slate.reasons) for answer in answers}


async def with_cached_user(store: CachedStore, user_id: str) -> None:
    row = UserRow(1, RECORD_TIME_MS, Fence(1, 0, 0), bytes(8), b"i-1")
    await store.save([RowUpdate(user_id, Fence(0, 0, -1), row)])


FELL_BACK = ("fallback", ["store_unavailable"])


async def test_while_redis_hangs_each_list_falls_back_at_its_own_deadline_and_the_patient_one_is_ranked() -> None:
    hung = HungStore(memory_store())
    parts = ranker(hung).rank([a_list("patient", deadline_ms=60_000.0), a_list("hurried", deadline_ms=20.0)])
    first = await anext(parts)
    hung.answers.set()
    second = await anext(parts)
    assert told(first.answers) == {"hurried": FELL_BACK}
    assert told(second.answers) == {"patient": ("ranked", ["cold_user"])}
    assert hung.loads == 1


async def test_cached_users_are_ranked_while_redis_hangs() -> None:
    cached = CachedStore(HungStore(memory_store(), answers=(up := asyncio.Event())), max_users=10)
    up.set()
    await with_cached_user(cached, "known")
    up.clear()
    parts = await answers_of(
        ranker(guarded(cached, budget_ms=20.0), cached=cached), [a_list("unknown"), a_list("known")]
    )
    assert [told(part) for part in parts] == [{"known": ("ranked", [])}, {"unknown": FELL_BACK}]


async def test_cached_users_ask_no_store() -> None:
    hung = HungStore(memory_store(), answers=(up := asyncio.Event()))
    up.set()
    cached = CachedStore(hung, max_users=10)
    await with_cached_user(cached, "known")
    await answers_of(ranker(cached, cached=cached), [a_list("known")])
    assert hung.loads == 0


async def test_a_store_slower_than_the_budget_is_no_store() -> None:
    store = guarded(HungStore(memory_store()), budget_ms=5.0)
    [part] = await answers_of(ranker(store), [a_list("u-1", deadline_ms=60_000.0)])
    assert told(part) == {"u-1": FELL_BACK}


async def test_a_list_whose_after_is_not_applied_yet_outwaits_a_store_that_is_away() -> None:
    one = ranker(FailingStore(memory_store(), failing_loads=1))
    ahead = a_list("ahead", deadline_ms=60_000.0, after=After(partition=0, offset=9))
    [ranked] = [part async for part in one.rank([ahead, a_list("u-1", deadline_ms=60_000.0)])]
    assert told(ranked.answers) == {"u-1": FELL_BACK}
    assert ranked.waiting == [ahead]


async def test_after_failures_in_a_row_redis_is_not_asked_until_a_probe_is_due() -> None:
    clock = FakeClock()
    failing = FailingStore(memory_store(), failing_loads=2)
    store = guarded(failing, clock=clock)
    one = ranker(store, clock=clock)
    outcomes = []
    for later_ms in (0.0, 0.0, 499.0, 1.0, 0.0):
        clock.time_ms += later_ms
        [part] = await answers_of(one, [a_list("u-1", deadline_ms=10_000.0)])
        outcomes.append((part[0].slate.outcome, store.state))
    assert outcomes == [
        ("fallback", CircuitState.CLOSED),
        ("fallback", CircuitState.OPEN),
        ("fallback", CircuitState.OPEN),
        ("ranked", CircuitState.CLOSED),
        ("ranked", CircuitState.CLOSED),
    ]


async def test_a_list_in_a_hurry_says_nothing_about_redis() -> None:
    hung = HungStore(memory_store())
    store = guarded(hung)
    for _ in range(5):
        await answers_of(ranker(store), [a_list("u-1", deadline_ms=1.0)])
    assert store.state is CircuitState.CLOSED
    hung.answers.set()
    await asyncio.sleep(0.01)


async def test_lists_that_gave_up_still_let_redis_be_found_slow() -> None:
    store = guarded(HungStore(memory_store()), budget_ms=30.0)
    for _ in range(2):
        await answers_of(ranker(store), [a_list("u-1", deadline_ms=1.0)])
    async with asyncio.timeout(10):
        while store.state is CircuitState.CLOSED:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.005)
    with pytest.raises(StoreUnavailableError, match="not asked"):
        await store.load(["u-1"])


async def test_the_circuit_is_shown() -> None:
    telemetry, clock = Telemetry(), FakeClock()
    store = GuardedStore(
        FailingStore(memory_store(), failing_loads=1),
        breaker=CircuitBreaker(failures=1, probe_after_ms=500.0),
        budget_ms=1_000.0,
        clock=clock,
        telemetry=telemetry,
    )
    shown = []
    for later_ms in (0.0, 500.0):
        clock.time_ms += later_ms
        await answers_of(ranker(store), [a_list("u-1")])
        shown.append(telemetry.registry.get_sample_value("rerank_circuit_state", {"dependency": "redis"}))
    assert shown == [2.0, 0.0]
    assert telemetry.totals() == {"rerank_circuit_openings_total{redis}": 1.0}


class SlowModel(HalvingModel):
    """Takes so long for a forward pass, on the fake clock."""

    def __init__(self, clock: FakeClock, pass_ms: float) -> None:
        super().__init__()
        self._clock, self._pass_ms = clock, pass_ms

    def score(self, batch):  # type: ignore[no-untyped-def]
        self._clock.time_ms += self._pass_ms
        return super().score(batch)


async def test_a_list_with_less_time_left_than_a_pass_takes_falls_back_while_that_is_in_time() -> None:
    clock = FakeClock()
    model = SlowModel(clock, 100.0)
    one = Ranker(serving=serving(model), store=memory_store(), applied=AppliedOffsets(), clock=clock)
    for _ in range(40):
        clock.time_ms = float(RECORD_TIME_MS)
        await answers_of(one, [a_list("u-1")])
    clock.time_ms = float(RECORD_TIME_MS)
    calls = model.calls
    [part] = await answers_of(one, [a_list("u-1", deadline_ms=80.0), a_list("u-2", deadline_ms=1.0)])
    assert told(part) == {"u-1": ("fallback", ["deadline"]), "u-2": ("shed", ["deadline"])}
    assert (part[0].slate.timing_ms.total, model.calls) == (0.0, calls)


class ClockSetModel(HalvingModel):
    """Somebody sets the wall clock a month ahead while it scores."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._clock = clock

    def score(self, batch):  # type: ignore[no-untyped-def]
        self._clock.set_ahead_ms = 30 * 86_400_000.0
        return super().score(batch)


async def test_a_clock_set_ahead_during_a_pass_makes_no_later_list_hurry() -> None:
    clock = FakeClock()
    one = Ranker(serving=serving(ClockSetModel(clock)), store=memory_store(), applied=AppliedOffsets(), clock=clock)
    await answers_of(one, [a_list("u-1")])
    clock.set_ahead_ms = 0.0
    [part] = await answers_of(one, [a_list("u-1", deadline_ms=80.0)])
    assert told(part) == {"u-1": ("ranked", ["cold_user"])}


async def test_late_lists_cost_no_load_and_no_forward_pass() -> None:
    clock = FakeClock(RECORD_TIME_MS + 80.0)
    hung, model = HungStore(memory_store()), HalvingModel()
    one = Ranker(serving=serving(model), store=hung, applied=AppliedOffsets(), clock=clock)
    [part] = await answers_of(one, [a_list(f"u-{n}", deadline_ms=80.0) for n in range(100)])
    assert {answer.slate.outcome for answer in part} == {"shed"}
    assert (hung.loads, model.calls) == (0, 0)
