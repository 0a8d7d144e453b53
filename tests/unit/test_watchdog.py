"""The progress watchdog: pure, so every history can be tried."""

from hypothesis import given
from hypothesis import strategies as st

from stream_app.watchdog import Stall, Watchdog

STALL_AFTER_S = 60.0


def watchdog() -> Watchdog[str]:
    return Watchdog(stall_after_s=STALL_AFTER_S)


def test_a_partition_that_does_not_move_is_stalled_and_its_neighbour_is_not() -> None:
    dog = watchdog()
    for second in range(61):
        dog.observe(float(second), {"stuck": 7, "moving": second})
    assert dog.stalls(60.0) == [Stall("stuck", 60.0)]


def test_before_the_time_is_up_nothing_is_stalled() -> None:
    dog = watchdog()
    for second in range(60):
        dog.observe(float(second), {"stuck": 7})
    assert dog.stalls(59.9) == []


def test_a_partition_with_an_excuse_starts_again_when_it_ends() -> None:
    dog = watchdog()
    for second in range(100):
        dog.observe(float(second), {"waiting": 7}, ["waiting"] if second < 50 else [])
    assert dog.stalls(108.0) == []
    assert dog.stalls(109.0) == [Stall("waiting", 60.0)]


def test_a_partition_that_was_lost_and_comes_back_starts_again() -> None:
    dog = watchdog()
    dog.observe(0.0, {"p": 7})
    dog.observe(20.0, {})
    dog.observe(40.0, {"p": 7})
    assert dog.stalls(99.0) == []


def test_a_process_that_was_itself_stopped_has_seen_no_stall() -> None:
    dog = watchdog()
    dog.observe(0.0, {"p": 7})
    dog.observe(1_000.0, {"p": 7})
    assert dog.stalls(1_000.0) == []


def test_after_an_excuse_for_all_nothing_is_stalled() -> None:
    dog = watchdog()
    for second in range(100):
        dog.observe(float(second), {"p": 7})
    dog.excuse_all(99.0)
    assert dog.stalls(100.0) == []


@given(st.lists(st.tuples(st.floats(0.1, 25.0), st.integers(0, 1)), min_size=1, max_size=60))
def test_stalled_is_what_has_shown_the_same_mark_for_so_long(steps: list[tuple[float, int]]) -> None:
    dog, now_s, since_s, last = watchdog(), 0.0, 0.0, -1
    for later_s, mark in steps:
        now_s += later_s
        if mark != last:
            since_s, last = now_s, mark
        dog.observe(now_s, {"p": mark})
        expected = [Stall("p", now_s - since_s)] if now_s - since_s >= STALL_AFTER_S else []
        assert dog.stalls(now_s) == expected
