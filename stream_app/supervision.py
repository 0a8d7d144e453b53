"""What watches a worker from inside: the event loop, the partitions, and what /livez, /readyz and /startupz say."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from stream_app.breaker import CircuitState
from stream_app.errors import TransientError
from stream_app.health import Finding, Probe
from stream_app.telemetry import Telemetry
from stream_app.watchdog import Stall, Watchdog

LOOP_TICK_S = 0.1
LOOP_LAG_LIMIT_S = 5.0
PROGRESS_TICK_S = 1.0

Partition = tuple[str, int]  # topic, partition


class Standing(Protocol):
    """Where a partition stands."""

    @property
    def unsettled_records(self) -> int: ...
    @property
    def undecided_records(self) -> int: ...
    @property
    def lag_records(self) -> int: ...
    @property
    def mark(self) -> tuple[int, int | None]: ...


@dataclass(slots=True, kw_only=True)
class Condition:
    """What the worker knows of itself. Owner: `app`, which keeps it up to date; the probes read it."""

    model: str = ""
    model_refused: str = ""  # why the artefact that the path leads to does not serve
    assigned: Collection[Partition] = ()
    was_ready: bool = False
    stopping: bool = False
    failure: Exception | None = None
    redis_answers: bool = False
    circuit: CircuitState = CircuitState.CLOSED
    stalls: "Sequence[Stall[Partition]]" = ()


class EventLoopLag:
    """Measures how late the event loop is, ten times a second."""

    def __init__(self, telemetry: Telemetry) -> None:
        """Observe into `rerank_event_loop_lag_seconds`."""
        self._telemetry = telemetry
        self._ticked_s = time.monotonic()

    def lag_s(self) -> float:
        """Return how much later than it should the last tick was, or the next one is by now."""
        return max(0.0, time.monotonic() - self._ticked_s - LOOP_TICK_S)

    async def watch(self) -> None:
        """Measure, for ever."""
        while True:
            await asyncio.sleep(LOOP_TICK_S)
            self._telemetry.event_loop_lag.observe(self.lag_s())
            self._telemetry.event_loop_tasks.set(len(asyncio.all_tasks()))
            self._ticked_s = time.monotonic()


class ProgressWatch:
    """Ends a worker whose partition has records and does not move, though Redis and the broker answer."""

    def __init__(
        self,
        *,
        stall_after_s: float,
        standings: Callable[[], Mapping[Partition, Standing]],
        excused: Callable[[], Iterable[Partition]],
        broker_answers: Callable[[], Awaitable[bool]],
        fail: Callable[[Exception], None],
        condition: Condition,
        telemetry: Telemetry,
    ) -> None:
        """Call a partition stalled after `stall_after_s`, and `fail` after twice that.

        `excused` are partitions that wait with a reason: Redis is away, or lists wait for their `after`.
        """
        self._stall_after_s = stall_after_s
        self._standings = standings
        self._excused = excused
        self._broker_answers = broker_answers
        self._fail = fail
        self._condition = condition
        self._telemetry = telemetry
        self._watchdog: Watchdog[Partition] = Watchdog(stall_after_s=stall_after_s)
        self._shown: set[Partition] = set()

    async def watch(self) -> None:
        """Look once a second, for ever."""
        while True:
            await asyncio.sleep(PROGRESS_TICK_S)
            await self.look(time.monotonic())

    async def look(self, now_s: float) -> None:
        """Take note of where the partitions stand at `now_s`, monotonic."""
        standings = self._standings()
        self._show(standings)
        marks = {partition: standing.mark for partition, standing in standings.items()}
        self._watchdog.observe(now_s, marks, self._excused())
        stalls = self._watchdog.stalls(now_s)
        if stalls and not await self._broker_answers():
            self._watchdog.excuse_all(now_s)
            stalls = []
        self._condition.stalls = stalls
        if stalls and stalls[0].for_s >= 2.0 * self._stall_after_s:
            (topic, partition), for_s = stalls[0].partition, stalls[0].for_s
            lag = standings[topic, partition].lag_records
            self._fail(
                TransientError(
                    f"topic={topic} partition={partition} stands still for {for_s:.0f} s with {lag} records to go, "
                    "though Redis and the broker answer; the worker ends with them unacked; a restart reads them again"
                )
            )

    def _show(self, standings: Mapping[Partition, Standing]) -> None:
        telemetry = self._telemetry
        for partition in self._shown - standings.keys():
            telemetry.lag.remove(*map(str, partition))
            telemetry.unsettled.remove(*map(str, partition))
            telemetry.undecided.remove(*map(str, partition))
        for (topic, number), standing in standings.items():
            telemetry.lag.labels(topic, str(number)).set(standing.lag_records)
            telemetry.unsettled.labels(topic, str(number)).set(standing.unsettled_records)
            telemetry.undecided.labels(topic, str(number)).set(standing.undecided_records)
        self._shown = set(standings)


def separated(assigned: Collection[Partition], topics: Collection[str]) -> str | None:
    """Return why an assignment cannot serve, None when every partition number comes from all of `topics` or from none.

    A click is applied by the worker that ranks the next list only if both inputs' partitions of a number are its own.
    """
    numbers = {topic: {number for name, number in assigned if name == topic} for topic in topics}
    union = set().union(*numbers.values())
    missing = {topic: sorted(union - own) for topic, own in numbers.items() if union - own}
    if not missing:
        return None
    told = "; ".join(f"{topic}: not {', '.join(map(str, lacking))}" for topic, lacking in missing.items())
    return (
        f"the assignment separates the inputs ({told}): a click would not be in the next slate; nothing is served; "
        "give both topics the same partition count, and let only this program's workers join the group"
    )


def _model(condition: Condition) -> Finding:
    if not condition.model:
        return Finding("model", "failed", "not loaded")
    if condition.model_refused:
        return Finding("model", "degraded", f"{condition.model} stays in service: {condition.model_refused}")
    return Finding("model", "ok", condition.model)


def probes(condition: Condition, loop_lag: EventLoopLag) -> Mapping[str, Probe]:
    """Return what each path of the health server says."""

    def live() -> list[Finding]:
        lag_s, stalls = loop_lag.lag_s(), condition.stalls
        stalled = ", ".join(f"{s.partition[0]}-{s.partition[1]} for {s.for_s:.0f} s" for s in stalls)
        return [
            Finding("event_loop", "failed" if lag_s > LOOP_LAG_LIMIT_S else "ok", f"{1000.0 * lag_s:.0f} ms late"),
            Finding("progress", "failed" if stalls else "ok", stalled or "every partition moves"),
            Finding("failure", "failed" if condition.failure else "ok", str(condition.failure or "none")),
        ]

    def ready() -> list[Finding]:
        redis_down = not condition.redis_answers or condition.circuit is not CircuitState.CLOSED
        no_redis = "no answer: users held here are ranked, others fall back, interactions wait"
        return [
            _model(condition),
            Finding(
                "partitions",
                "ok" if condition.assigned else "failed",
                f"{len(condition.assigned)} assigned",
            ),
            Finding(
                "redis",
                "degraded" if redis_down else "ok",
                no_redis if redis_down else "answers",
            ),
            Finding("stopping", "failed" if condition.stopping else "ok", "yes" if condition.stopping else "no"),
        ]

    def started() -> list[Finding]:
        return [
            Finding(
                "started",
                "ok" if condition.was_ready else "failed",
                "served partitions" if condition.was_ready else "no partitions yet",
            )
        ]

    return {"/livez": live, "/readyz": ready, "/startupz": started}
