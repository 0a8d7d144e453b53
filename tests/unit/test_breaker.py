"""The circuit breaker and the pace: pure, so every history can be tried."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_app.breaker import CircuitBreaker, CircuitState
from stream_app.pace import Pace

FAILURES = 3
PROBE_AFTER_MS = 500.0
# A step is how much later it is, and what a call would get: an answer, none, or nobody tells.
# Halves of milliseconds, which add up without rounding.
PAUSES_MS = st.integers(0, 4_000).map(lambda halves: halves / 2.0)
STEPS = st.lists(st.tuples(PAUSES_MS, st.sampled_from(["answer", "none", "untold"])), max_size=60)


def breaker() -> CircuitBreaker:
    return CircuitBreaker(failures=FAILURES, probe_after_ms=PROBE_AFTER_MS)


def opened(now_ms: float) -> CircuitBreaker:
    """Return a breaker that opened at `now_ms`."""
    opening = breaker()
    for _ in range(FAILURES):
        opening.failed(now_ms)
    return opening


def test_it_opens_at_the_last_of_so_many_failures_in_a_row() -> None:
    one = breaker()
    states = []
    for _ in range(FAILURES):
        one.failed(0.0)
        states.append(one.state)
    assert states == [CircuitState.CLOSED, CircuitState.CLOSED, CircuitState.OPEN]


def test_an_answer_in_between_starts_the_count_again() -> None:
    one = breaker()
    for outcome in ("none", "none", "answer", "none", "none"):
        one.succeeded() if outcome == "answer" else one.failed(0.0)
    assert one.state is CircuitState.CLOSED


def test_open_it_allows_one_probe_an_interval() -> None:
    one = opened(1_000.0)
    asked_ms = [now_ms for now_ms in range(1_000, 2_600, 100) if one.allows(now_ms)]
    assert asked_ms == [1_500, 2_000, 2_500]


def test_a_probe_that_is_answered_closes_it_and_one_that_is_not_keeps_it_open() -> None:
    one = opened(0.0)
    assert one.allows(500.0)
    one.failed(550.0)
    assert (one.state, one.allows(1_000.0)) == (CircuitState.OPEN, False)
    assert one.allows(1_050.0)
    one.succeeded()
    assert (one.state, one.allows(1_050.0)) == (CircuitState.CLOSED, True)


def test_a_clock_that_jumps_back_does_not_keep_it_open() -> None:
    assert opened(1_000_000.0).allows(0.0)


@given(STEPS)
def test_it_is_never_asked_twice_in_an_interval_after_so_many_failures(steps: list[tuple[float, str]]) -> None:
    one, now_ms, in_a_row, last_asked_ms = breaker(), 0.0, 0, 0.0
    for later_ms, outcome in steps:
        now_ms += later_ms
        if not one.allows(now_ms):
            assert in_a_row >= FAILURES
            assert now_ms - last_asked_ms < PROBE_AFTER_MS
            continue
        if in_a_row >= FAILURES:
            assert now_ms - last_asked_ms >= PROBE_AFTER_MS
        last_asked_ms = now_ms
        if outcome == "answer":
            one.succeeded()
            in_a_row = 0
        elif outcome == "none":
            one.failed(now_ms)
            in_a_row += 1


@given(STEPS)
def test_whatever_happened_it_asks_again_after_an_interval_and_one_answer_closes_it(
    steps: list[tuple[float, str]],
) -> None:
    one, now_ms = breaker(), 0.0
    for later_ms, outcome in steps:
        now_ms += later_ms
        if one.allows(now_ms) and outcome != "untold":
            one.succeeded() if outcome == "answer" else one.failed(now_ms)
    assert one.allows(now_ms + PROBE_AFTER_MS)
    one.succeeded()
    assert one.state is CircuitState.CLOSED


@given(st.floats(0.0, 10_000.0))
def test_passes_that_all_take_the_same_are_expected_to(duration_ms: float) -> None:
    pace = Pace()
    for _ in range(200):
        pace.took(duration_ms)
    assert pace.expected_ms == pytest.approx(duration_ms, abs=1e-6)


@given(st.lists(st.floats(-10.0, 10_000.0), max_size=50))
def test_the_expected_pass_lies_between_nothing_and_thrice_the_longest(durations_ms: list[float]) -> None:
    pace = Pace()
    for duration_ms in durations_ms:
        pace.took(duration_ms)
    assert 0.0 <= pace.expected_ms <= 3.0 * max([0.0, *durations_ms])


@given(st.floats(0.0, 1e6), st.floats(1e-3, 1e6))
def test_whatever_a_pass_once_took_lists_are_tried_again(duration_ms: float, patience_ms: float) -> None:
    pace = Pace()
    pace.took(duration_ms)
    for _ in range(1_000):
        pace.turned_away()
    assert pace.expected_ms < patience_ms
