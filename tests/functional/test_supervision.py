"""What a worker finds out about itself, with fakes for what it looks at."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from stream_app import supervision
from stream_app.breaker import CircuitState
from stream_app.errors import TransientError
from stream_app.health import Finding, overall
from stream_app.supervision import Condition, EventLoopLag, Partition, ProgressWatch, probes, separated
from stream_app.telemetry import Telemetry
from stream_app.transport import Standing

LISTS = ("candidates", 0)
INTERACTIONS = ("interactions", 0)


def standing(
    *, settled: int, unsettled: int = 0, waiting: int = 0, undecided: int = 0, fetched_ms: int = 0
) -> Standing:
    return Standing(unsettled, waiting, undecided, settled, fetched_ms)


@dataclass(slots=True)
class Scene:
    """A progress watch and what it looks at."""

    standings: dict[Partition, Standing] = field(default_factory=dict)
    excused: set[Partition] = field(default_factory=set)
    broker_answers: bool = True
    failures: list[Exception] = field(default_factory=list)
    condition: Condition = field(default_factory=Condition)
    telemetry: Telemetry = field(default_factory=Telemetry)

    def watch(self) -> ProgressWatch:
        async def broker_answers() -> bool:
            return self.broker_answers

        return ProgressWatch(
            stall_after_s=10.0,
            standings=lambda: self.standings,
            excused=lambda: self.excused,
            broker_answers=broker_answers,
            fail=self.failures.append,
            condition=self.condition,
            telemetry=self.telemetry,
        )

    async def look(self, watch: ProgressWatch, *, from_s: int, to_s: int) -> None:
        """Look once a second."""
        for second in range(from_s, to_s + 1):
            await watch.look(float(second))

    def gauge(self, name: str, partition: Partition) -> float | None:
        labels = {"topic": partition[0], "partition": str(partition[1])}
        return self.telemetry.registry.get_sample_value(name, labels)


def live(condition: Condition) -> Mapping[str, Finding]:
    findings = probes(condition, EventLoopLag(Telemetry()))["/livez"]()
    return {finding.name: finding for finding in findings}


def ready(condition: Condition) -> str:
    return overall(probes(condition, EventLoopLag(Telemetry()))["/readyz"]())


async def test_a_partition_with_records_that_stands_still_fails_livez_and_then_ends_the_worker() -> None:
    scene = Scene({INTERACTIONS: standing(settled=5, waiting=3)})
    watch = scene.watch()
    await scene.look(watch, from_s=0, to_s=9)
    assert live(scene.condition)["progress"].state == "ok"
    await scene.look(watch, from_s=10, to_s=19)
    assert live(scene.condition)["progress"] == Finding("progress", "failed", "interactions-0 for 19 s")
    assert scene.failures == []
    await scene.look(watch, from_s=20, to_s=20)
    [failure] = scene.failures
    assert isinstance(failure, TransientError)
    assert str(failure).startswith("topic=interactions partition=0 stands still for 20 s with 3 records to go")


async def test_a_partition_without_records_is_alive_as_long_as_the_broker_answers_its_fetches() -> None:
    scene = Scene()
    watch = scene.watch()
    for second in range(40):
        scene.standings = {LISTS: standing(settled=5, fetched_ms=1_000 * min(second, 20))}
        await watch.look(float(second))
        assert bool(scene.condition.stalls) == (second >= 30)


async def test_a_partition_that_waits_for_a_transaction_is_alive_as_long_as_the_broker_answers_its_fetches() -> None:
    scene = Scene()
    watch = scene.watch()
    for second in range(60):
        scene.standings = {LISTS: standing(settled=5, undecided=1_000, fetched_ms=1_000 * second)}
        await watch.look(float(second))
        assert (scene.condition.stalls, scene.failures) == ([], [])
    assert scene.gauge("rerank_consumer_lag_records", LISTS) == 0.0
    assert scene.gauge("rerank_undecided_records", LISTS) == 1_000.0


async def test_records_that_are_settled_are_progress_however_far_behind_a_partition_is() -> None:
    scene = Scene()
    watch = scene.watch()
    for second in range(40):
        scene.standings = {LISTS: standing(settled=second, waiting=1_000_000)}
        await watch.look(float(second))
    assert (scene.condition.stalls, scene.failures) == ([], [])


async def test_nothing_is_stalled_while_the_broker_does_not_answer() -> None:
    scene = Scene({INTERACTIONS: standing(settled=5, waiting=3)}, broker_answers=False)
    watch = scene.watch()
    await scene.look(watch, from_s=0, to_s=60)
    assert (scene.condition.stalls, scene.failures) == ([], [])


async def test_a_partition_that_waits_for_redis_or_for_an_after_is_excused() -> None:
    scene = Scene({LISTS: standing(settled=5, unsettled=3)}, excused={LISTS})
    watch = scene.watch()
    await scene.look(watch, from_s=0, to_s=60)
    assert (scene.condition.stalls, scene.failures) == ([], [])


async def test_lag_is_shown_for_each_partition_and_forgotten_when_it_is_gone() -> None:
    scene = Scene({LISTS: standing(settled=1, unsettled=2, waiting=40)})
    watch = scene.watch()
    await watch.look(0.0)
    assert scene.gauge("rerank_consumer_lag_records", LISTS) == 42.0
    assert scene.gauge("rerank_unsettled_records", LISTS) == 2.0
    scene.standings = {}
    await watch.look(1.0)
    assert scene.gauge("rerank_consumer_lag_records", LISTS) is None
    assert scene.gauge("rerank_undecided_records", LISTS) is None


def test_an_assignment_with_both_partitions_of_every_number_serves() -> None:
    topics = ("interactions", "candidates")
    assert separated([("interactions", 1), ("candidates", 1), ("candidates", 3), ("interactions", 3)], topics) is None
    assert separated([], topics) is None


def test_an_assignment_that_separates_the_inputs_is_named() -> None:
    told = separated([("interactions", 1), ("interactions", 2), ("candidates", 2)], ("interactions", "candidates"))
    assert told is not None
    assert told.startswith("the assignment separates the inputs (candidates: not 1): ")


def test_a_failure_fails_livez_and_redis_never_does() -> None:
    down = Condition(model="m:1", assigned=[LISTS], redis_answers=False, circuit=CircuitState.OPEN)
    assert overall(list(live(down).values())) == "ok"
    down.failure = TransientError("no partitions assigned")
    assert live(down)["failure"] == Finding("failure", "failed", "no partitions assigned")


def test_ready_means_a_model_and_partitions_and_redis_away_is_degraded() -> None:
    assert ready(Condition(assigned=[LISTS], redis_answers=True)) == "failed"
    assert ready(Condition(model="m:1", redis_answers=True)) == "failed"
    assert ready(Condition(model="m:1", assigned=[LISTS], redis_answers=True)) == "ok"
    assert ready(Condition(model="m:1", assigned=[LISTS], redis_answers=True, circuit=CircuitState.OPEN)) == "degraded"
    assert ready(Condition(model="m:1", assigned=[LISTS], redis_answers=True, stopping=True)) == "failed"


def test_started_once_is_started() -> None:
    condition = Condition()
    started = probes(condition, EventLoopLag(Telemetry()))["/startupz"]
    assert overall(started()) == "failed"
    condition.was_ready = True
    assert overall(started()) == "ok"


async def test_a_blocked_event_loop_is_measured_and_fails_livez(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "LOOP_LAG_LIMIT_S", 0.2)
    telemetry = Telemetry()
    lag = EventLoopLag(telemetry)
    live = probes(Condition(), lag)["/livez"]
    watching = asyncio.create_task(lag.watch())
    try:
        await asyncio.sleep(0)
        time.sleep(0.4)  # noqa: ASYNC251 - what this test is about
        assert {finding.name: finding.state for finding in live()}["event_loop"] == "failed"
        observed = "rerank_event_loop_lag_seconds_"
        while not telemetry.registry.get_sample_value(f"{observed}count"):  # noqa: ASYNC110 - a metric has no event
            await asyncio.sleep(0.01)
        assert (telemetry.registry.get_sample_value(f"{observed}sum") or 0.0) >= 0.3
    finally:
        watching.cancel()
