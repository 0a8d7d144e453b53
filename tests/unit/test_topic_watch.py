"""Inputs are told from topics of the same name by their ids, before anything of another topic is applied."""

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from stream_app import topic_watch
from stream_app.errors import OtherLogError, StoreUnavailableError
from stream_app.topic_watch import Inputs, TopicWatch

OURS = {"interactions": "1a", "candidates": "1b"}


class Broker:
    """Tells ids, one answer after the other; the last one again and again."""

    def __init__(self, *answers: Mapping[str, str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def topic_ids(self, names: Sequence[str]) -> Mapping[str, str]:
        assert names == ["interactions", "candidates"]
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Owner:
    """Takes what is claimed; the first `failures` times it is away."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.claimed: list[str] = []

    async def claim_log(self, topic_id: str) -> None:
        self.claimed.append(topic_id)
        if len(self.claimed) <= self.failures:
            raise StoreUnavailableError("away")

    async def restore_layouts(self) -> None: ...


class Watched:
    """A watch over a broker, and what it did."""

    def __init__(self, broker: Broker, owner: Owner | None = None, *, log_id: str = "1a", lists_id: str = "1b") -> None:
        self.failures: list[Exception] = []
        self.rereads = 0
        self.watch = TopicWatch(
            Inputs(log="interactions", lists="candidates", log_id=log_id, lists_id=lists_id),
            topic_ids=broker.topic_ids,
            owner=owner or Owner(),
            lists_recreated=self.reread,
            fail=self.failures.append,
        )

    def reread(self) -> None:
        self.rereads += 1


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic_watch, "TOPIC_LOOK_S", 0.0)


async def test_a_topic_of_another_id_ends_the_worker_however_long_it_is() -> None:
    owner = Owner()
    watched = Watched(Broker(OURS, {}, OURS, OURS | {"interactions": "2a"}), owner)
    await watched.watch.run()
    assert [str(failure)[:34] for failure in watched.failures] == ["topic interactions has id 2a, but "]
    assert owner.claimed == ["1a", "1a"]


async def test_a_log_that_the_operator_gave_to_another_epoch_ends_the_worker_of_the_old_one() -> None:
    """Redis names the new topic by then: what counts is what the worker began with."""
    watched = Watched(Broker({"interactions": "2a"}))
    await watched.watch.run()
    assert [type(failure) for failure in watched.failures] == [OtherLogError]


async def test_a_store_that_is_away_ends_no_watch() -> None:
    owner = Owner(failures=2)
    watched = Watched(Broker(OURS, OURS, OURS, {"interactions": "2a"}), owner)
    await watched.watch.run()
    assert owner.claimed == ["1a"] * 3


async def test_lists_of_another_topic_are_read_from_its_start_once() -> None:
    """Though a broker that lags tells of the earlier one in between."""
    new = OURS | {"candidates": "2b"}
    watched = Watched(Broker(OURS, {"interactions": "1a"}, new, OURS, new, {"interactions": "2a"}))
    await watched.watch.run()
    assert watched.rereads == 1


async def test_lists_whose_id_was_never_told_are_not_read_again() -> None:
    watched = Watched(Broker({"candidates": "1b"}, {"interactions": "2a"}), lists_id="")
    await watched.watch.run()
    assert watched.rereads == 0


async def test_who_is_awake_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic_watch, "SURE_FOR_S", 1e9)
    broker = Broker(OURS)
    watched = Watched(broker)
    assert [await watched.watch.is_sure(False) for _ in range(3)] == [True] * 3
    assert broker.asked == 1


@pytest.mark.parametrize(("sure_for_s", "doubtful"), [(-1.0, False), (1e9, True)], ids=["slept", "offsets begin again"])
async def test_who_slept_or_meets_old_offsets_asks_before_anything_is_applied(
    monkeypatch: pytest.MonkeyPatch, sure_for_s: float, doubtful: bool
) -> None:
    monkeypatch.setattr(topic_watch, "SURE_FOR_S", sure_for_s)
    watched = Watched(Broker(OURS, OURS, {}, {"interactions": "2a"}))
    assert await watched.watch.is_sure(False)
    assert await watched.watch.is_sure(doubtful)
    assert not await watched.watch.is_sure(doubtful)  # the broker does not tell now
    with pytest.raises(OtherLogError):
        await watched.watch.is_sure(doubtful)


class HungBroker(Broker):
    """Answers once."""

    async def topic_ids(self, names: Sequence[str]) -> Mapping[str, str]:
        if self.asked:
            await asyncio.Event().wait()
        return await super().topic_ids(names)


async def test_a_broker_that_does_not_answer_holds_up_who_slept_and_not_who_is_awake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr("stream_app.topic_watch.time.monotonic", lambda: now_s)
    monkeypatch.setattr(topic_watch, "AWAKE_S", 0.0)
    watched = Watched(HungBroker(OURS))
    assert await watched.watch.is_sure(False)
    running = asyncio.create_task(watched.watch.run())
    for _ in range(20):
        now_s += 1.0
        for _ in range(5):
            await asyncio.sleep(0)
    assert await watched.watch.is_sure(False)
    now_s += 10.0
    asking = asyncio.create_task(watched.watch.is_sure(False))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not asking.done()
    for task in (asking, running):
        task.cancel()


async def test_who_met_another_topic_once_is_never_sure_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic_watch, "SURE_FOR_S", 1e9)
    watched = Watched(Broker(OURS, {"interactions": "2a"}))
    assert await watched.watch.is_sure(False)
    for doubtful in (True, False):
        with pytest.raises(OtherLogError):
            await watched.watch.is_sure(doubtful)


async def test_a_broker_without_ids_is_never_asked_by_who_applies() -> None:
    broker = Broker({})
    watched = Watched(broker, log_id="", lists_id="")
    assert await watched.watch.is_sure(True)
    assert broker.asked == 0
