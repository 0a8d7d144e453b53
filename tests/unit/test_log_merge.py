"""The order of a recorded log: offsets inside a partition, Kafka time across them."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from stream_app.log_merge import LogMerge, Place
from stream_app.recorded_log import LogRecord

PLACES: Sequence[Place] = [("interactions", 0), ("interactions", 1), ("candidates", 0)]


def record(topic: str, partition: int, offset: int, time_ms: int) -> LogRecord:
    return LogRecord(topic, partition, offset, time_ms, None, None, [])


def merge() -> LogMerge:
    return LogMerge(["interactions", "candidates"], PLACES)


def merged(*records: LogRecord) -> list[LogRecord]:
    log = merge()
    for one in records:
        log.add(one)
    return list(log.take(PLACES))


def test_across_partitions_the_kafka_time_decides() -> None:
    first, second, third = (
        record("candidates", 0, 5, 1),
        record("interactions", 1, 9, 2),
        record("interactions", 0, 0, 3),
    )
    assert merged(third, second, first) == [first, second, third]


def test_in_one_millisecond_an_interaction_comes_before_a_list() -> None:
    candidates, interaction = record("candidates", 0, 0, 1), record("interactions", 1, 0, 1)
    assert merged(candidates, interaction) == [interaction, candidates]


def test_inside_a_partition_offsets_decide_though_time_runs_backwards() -> None:
    first, second, between = (
        record("interactions", 0, 0, 5),
        record("interactions", 0, 1, 2),
        record("interactions", 1, 0, 4),
    )
    assert merged(first, second, between) == [between, first, second]


def test_nothing_is_taken_while_a_partition_may_still_have_an_earlier_record() -> None:
    log = merge()
    log.add(record("interactions", 0, 0, 5))
    assert list(log.take([("interactions", 1)])) == []
    log.add(record("candidates", 0, 0, 1))
    assert [one.timestamp for one in log.take([("interactions", 1)])] == [1]


def test_a_record_that_comes_after_its_place_was_written_is_counted_late() -> None:
    log = merge()
    log.add(record("interactions", 0, 0, 5))
    list(log.take(PLACES))
    log.add(record("interactions", 1, 0, 4))
    assert [one.timestamp for one in log.take(PLACES)] == [4]
    assert log.late == 1


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.integers(0, 5)), max_size=30), st.integers(1, 5))
def test_every_record_comes_out_once_and_in_offset_order(feed: list[tuple[Place, int]], chunk: int) -> None:
    log, taken = merge(), []
    for number, ((topic, partition), time_ms) in enumerate(feed):
        log.add(record(topic, partition, number, time_ms))
        if number % chunk == 0:
            taken += list(log.take([PLACES[0]]))
    taken += list(log.take(PLACES))
    for place in PLACES:
        offsets = [one.offset for one in taken if (one.topic, one.partition) == place]
        assert offsets == [number for number, (of, _) in enumerate(feed) if of == place]
