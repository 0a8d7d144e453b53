"""P11: same log, same slates, byte for byte, however the log is batched, cut or redelivered."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.codec import decode_slate
from schemas.limits import DEFAULT_LIMITS
from schemas.records import After, Slate
from stream_app.errors import SettingsError
from stream_app.pipeline import Answer
from stream_app.ports import Record
from stream_app.recorded_log import LogRecord, read_log
from stream_app.replay import Checkpoint, Replay, ReplayCounts, TopicRoles, replay_of
from stream_app.scorer import Artefact, load_artefact
from tests.log_writing import LogWriter, seeded_log, write_log
from tests.tiny_artefact import item_ids, write_tiny_artefact

MODELS = ("learned-ema", "mlp")
ITEM_IDS = item_ids(8)
LOG_RECORDS = 150
few_examples = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module", params=MODELS)
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """Return an artefact whose kernels do not see the batch, and one whose matrix products may."""
    return load_artefact(write_tiny_artefact(tmp_path_factory.mktemp("a") / "m", model=request.param, items=8))


class Slates:
    """The slates of one or more replays, by their number in the log."""

    def __init__(self) -> None:
        self.values: dict[int, bytes] = {}

    def put(self, number: int, answer: Answer) -> None:
        assert number not in self.values
        self.values[number] = answer.value

    def in_order(self) -> list[bytes]:
        return [self.values[number] for number in range(len(self.values))]

    def decoded(self) -> list[Slate]:
        return [decode_slate(value) for value in self.in_order()]


def start(artefact: Artefact, slates: Slates, *, batch: int = 1_000, resume: Checkpoint | None = None) -> Replay:
    return replay_of(
        artefact,
        slates.put,
        limits=DEFAULT_LIMITS,
        future_tolerance_ms=300_000,
        micro_batch_records=batch,
        resume=resume,
    )


async def replayed(artefact: Artefact, records: Iterable[Record], *, batch: int = 1_000) -> list[bytes]:
    return (await replayed_with_counts(artefact, records, batch=batch))[0]


async def replayed_with_counts(
    artefact: Artefact, records: Iterable[Record], *, batch: int = 1_000
) -> tuple[list[bytes], ReplayCounts]:
    slates = Slates()
    replay = start(artefact, slates, batch=batch)
    await replay.feed(records)
    await replay.finish()
    return slates.in_order(), replay.counts


async def decoded(artefact: Artefact, records: Iterable[Record]) -> list[Slate]:
    return [decode_slate(value) for value in await replayed(artefact, records)]


def log() -> list[LogRecord]:
    return seeded_log(1, records=LOG_RECORDS, item_ids=ITEM_IDS)


async def test_two_replays_agree_byte_for_byte(artefact: Artefact) -> None:
    assert await replayed(artefact, log()) == await replayed(artefact, log())


@pytest.mark.parametrize("batch", [1, 7, 1_000])
async def test_the_micro_batch_changes_no_byte(artefact: Artefact, batch: int) -> None:
    slates, counts = await replayed_with_counts(artefact, log(), batch=batch)
    expected, expected_counts = await replayed_with_counts(artefact, log(), batch=2)
    assert slates == expected
    assert counts == expected_counts


@few_examples
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 64))
async def test_no_log_has_a_micro_batch_that_changes_a_byte(artefact: Artefact, seed: int, batch: int) -> None:
    records = seeded_log(seed, records=60, item_ids=ITEM_IDS, users=4)
    assert await replayed(artefact, records, batch=batch) == await replayed(artefact, records, batch=1)


@few_examples
@given(cuts=st.sets(st.integers(0, LOG_RECORDS), max_size=5), batch=st.integers(1, 64))
async def test_a_replay_resumes_anywhere(artefact: Artefact, cuts: set[int], batch: int) -> None:
    records, slates, checkpoint = log(), Slates(), None
    for start_at, end_at in pairwise([0, *sorted(cuts), len(records)]):
        replay = start(artefact, slates, batch=batch, resume=checkpoint)
        await replay.feed(records[start_at:end_at])
        checkpoint = await replay.checkpoint()
    await start(artefact, slates, resume=checkpoint).finish()
    assert slates.in_order() == await replayed(artefact, records)


@few_examples
@given(again_from=st.integers(0, LOG_RECORDS), read_until=st.integers(0, LOG_RECORDS), batch=st.integers(1, 64))
async def test_redelivery_changes_no_byte(artefact: Artefact, again_from: int, read_until: int, batch: int) -> None:
    records = log()
    redelivered = [*records[:read_until], *records[min(again_from, read_until) : read_until], *records[read_until:]]
    assert await replayed(artefact, redelivered, batch=batch) == await replayed(artefact, records)


async def test_a_redelivered_record_is_counted_once(artefact: Artefact) -> None:
    _, expected = await replayed_with_counts(artefact, log())
    _, counts = await replayed_with_counts(artefact, log() + log())
    assert counts.redelivered == LOG_RECORDS
    assert (counts.interactions, counts.dead_letters, counts.outcomes) == (
        expected.interactions,
        expected.dead_letters,
        expected.outcomes,
    )


async def test_a_click_is_in_the_next_slate_of_its_user_only(artefact: Artefact) -> None:
    writer = LogWriter()
    writer.candidates("u-1", ITEM_IDS)
    position = writer.interaction("u-1", "i-1")
    writer.candidates("u-2", ITEM_IDS)
    writer.candidates("u-1", ITEM_IDS)
    before, other, after = await decoded(artefact, writer.records)
    assert (before.state.events, other.state.events, after.state.events) == (0, 0, 1)
    assert (after.state.partition, after.state.offset) == (position.partition, position.offset)


async def test_a_list_waits_for_its_after_and_for_no_later_interaction(artefact: Artefact) -> None:
    writer = LogWriter()
    writer.candidates("u-1", ITEM_IDS, after=writer.next_position("u-1"))
    writer.interaction("u-1", "i-1")
    writer.interaction("u-1", "i-2")
    (slate,) = await decoded(artefact, writer.records)
    assert (slate.outcome, slate.state.events) == ("ranked", 1)


async def test_a_list_whose_after_never_comes_is_stale(artefact: Artefact) -> None:
    writer = LogWriter()
    writer.candidates("u-1", ["i-2", "i-1"], after=After(partition=0, offset=99))
    writer.candidates("u-2", ITEM_IDS)
    stale, other = await decoded(artefact, writer.records)
    assert (stale.outcome, stale.reasons, stale.item_ids) == ("fallback", ["stale"], ["i-2", "i-1"])
    assert other.outcome == "ranked"


async def test_no_list_has_a_deadline(artefact: Artefact) -> None:
    writer = LogWriter()
    writer.candidates("u-1", ITEM_IDS, deadline_ms=0)
    (slate,) = await decoded(artefact, writer.records)
    assert slate.outcome == "ranked"


async def test_a_tombstone_makes_a_user_unknown(artefact: Artefact) -> None:
    writer = LogWriter()
    writer.candidates("u-1", ITEM_IDS)
    writer.interaction("u-1", "i-1")
    writer.forget("u-1")
    writer.candidates("u-1", ITEM_IDS)
    unknown, forgotten = await decoded(artefact, writer.records)
    assert forgotten.state.events == 0
    assert (forgotten.item_ids, forgotten.scores) == (unknown.item_ids, unknown.scores)
    assert forgotten.reasons == ["cold_user"]


async def test_bad_records_are_counted_by_code_and_leave_the_others_alone(artefact: Artefact) -> None:
    writer = LogWriter()
    writer.raw("interactions", b"u-1", b"\xff{")
    writer.raw("candidates", b"u-1", None)
    writer.candidates("u-1", ITEM_IDS)
    slates, counts = await replayed_with_counts(artefact, writer.records)
    assert (len(slates), dict(counts.dead_letters)) == (1, {"not_json": 1, "value_missing": 1})


async def test_other_topics_are_ignored_and_counted(artefact: Artefact) -> None:
    writer = LogWriter()
    writer.raw("reranked", b"u-1", b"{}")
    writer.raw("interactions.dlq", b"u-1", b"{}")
    slates, counts = await replayed_with_counts(artefact, writer.records)
    assert (slates, counts.other_topics, counts.records) == ([], 2, 2)


async def test_a_prefix_changes_no_byte(artefact: Artefact) -> None:
    prefixed = seeded_log(1, records=LOG_RECORDS, item_ids=ITEM_IDS, prefix="shop-")
    assert await replayed(artefact, prefixed) == await replayed(artefact, log())


async def test_a_log_file_holds_the_records_that_were_written(tmp_path: Path) -> None:
    assert list(read_log(write_log(tmp_path / "log.jsonl", log()))) == log()


@pytest.mark.parametrize(
    ("prefix", "topic", "role"),
    [
        ("", "interactions", "interactions"),
        ("", "shop-candidates", "candidates"),
        ("", "interactions.dlq", None),
        ("shop-", "shop-interactions", "interactions"),
        ("shop-", "interactions", "interactions"),
        ("shop-", "other-interactions", None),
    ],
)
def test_a_topic_is_recognised_by_its_name(prefix: str, topic: str, role: str | None) -> None:
    assert TopicRoles(prefix).role(topic) == role


def test_two_topics_of_one_role_are_refused() -> None:
    roles = TopicRoles("")
    assert [roles.role(topic) for topic in two_shops()[:2]] == ["interactions", "candidates"]
    with pytest.raises(SettingsError, match="'a-interactions' and 'b-interactions': both hold interactions"):
        roles.role(two_shops()[2])


def two_shops() -> Sequence[str]:
    return ("a-interactions", "a-candidates", "b-interactions")
