"""Play the scripts through Kafka: what a product does, list by list, click by click, many users at once."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from deploy.demo.arms import Script
from deploy.demo.client import Client, Received
from deploy.demo.measure import Ledger
from models.log import InteractionLog
from models.protocol import TestList
from schemas.records import After, CandidateList, Interaction

DEADLINE_MS = 60_000  # a demo on a busy laptop measures latency, it does not throw lists away
ANSWER_TIMEOUT_S = 90.0
USERS_AT_ONCE = 16  # more would raise throughput a little and, on two cores, queueing a lot
_WATCH_EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was produced."""

    interactions: int
    lists: int
    before_s: float
    replay_s: float


@dataclass(slots=True)
class _User:
    """A script being played; `unseen` are clicks that no slate has reflected: when produced, and where they lie."""

    script: Script
    place: After | None = None
    unseen: list[tuple[float, After]] = field(default_factory=list)


class Traffic:
    """Plays scripts and books every slate. One per demo."""

    def __init__(
        self,
        client: Client,
        log: InteractionLog,
        lists: Sequence[TestList],
        ledger: Ledger,
        on_slate: Callable[[bytes], None],
    ) -> None:
        """Read interactions from `log`, candidates from `lists`; tell `on_slate` the bytes of each booked slate."""
        self._client = client
        self._log = log
        self._lists = lists
        self._ledger = ledger
        self._on_slate = on_slate
        self._user_slots = asyncio.Semaphore(USERS_AT_ONCE)
        self._list_slots = asyncio.Semaphore(USERS_AT_ONCE)
        self._interactions = 0

    async def play(self, arms: Sequence[Sequence[Script]], check: Callable[[], None]) -> Counts:
        """Bring all users to where their first list finds them, then play one arm after the other.

        `check` is called now and then and raises when the worker is gone.
        """
        users = [[_User(script) for script in scripts] for scripts in arms]
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._client.stop)
            await self._client.start()
            playing = asyncio.create_task(self._play(users))
            tasks = {playing, asyncio.create_task(self._client.read()), asyncio.create_task(_watch(check))}
            try:
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for guard in ended - {playing}:
                    guard.result()  # a guard ends by raising, and then the play is over
                return playing.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _play(self, users: Sequence[Sequence[_User]]) -> Counts:
        start_s = time.perf_counter()
        await self._play_before([user for arm in users for user in arm])
        before_s = time.perf_counter()
        for arm in users:
            await asyncio.gather(*(self._play_in_turn(user) for user in arm))
        return Counts(
            interactions=self._interactions,
            lists=self._ledger.slates,
            before_s=before_s - start_s,
            replay_s=time.perf_counter() - before_s,
        )

    async def _play_before(self, users: Sequence[_User]) -> None:
        """Send what precedes the first lists, and wait until the worker has applied it, or the first latencies would
        be those of catching up: an empty list a partition, with `after`, is answered no sooner."""
        everything = [self._interaction(user, index) for user in users for index in user.script.before]
        places = iter(await self._send(everything))
        last: dict[int, tuple[After, str]] = {}
        for user in users:
            for _ in user.script.before:
                user.place = next(places)
                if user.place.partition not in last or last[user.place.partition][0].offset < user.place.offset:
                    last[user.place.partition] = (user.place, user.script.user_id)
        await asyncio.gather(
            *(self._client.ask(_empty_list(place, user_id), ANSWER_TIMEOUT_S) for place, user_id in last.values())
        )

    async def _play_in_turn(self, user: _User) -> None:
        """Play one script when a place is free; waiting for one is no part of any latency."""
        async with self._user_slots:
            await self._play_user(user)

    async def _play_user(self, user: _User) -> None:
        """Play one script: the lists of a step, their slates, the interactions of the step; then the next step."""
        for step in user.script.steps:
            await asyncio.gather(*(self._rank(user, index) for index in step.lists))
            if step.interactions:
                sent_s = time.perf_counter()
                places = await self._send([self._interaction(user, index) for index in step.interactions])
                user.place = places[-1]
                if user.script.arm == "live":
                    user.unseen += [(sent_s, place) for place in places]

    async def _rank(self, user: _User, list_index: int) -> None:
        """Produce one list, read its slate, book both."""
        request = self._request(user, list_index)
        async with self._list_slots:
            sent_s = time.perf_counter()
            received = await self._client.ask(request, ANSWER_TIMEOUT_S)
        self._ledger.add_slate(user.script.arm, list_index, received.slate, 1_000.0 * (received.read_s - sent_s))
        self._book_clicks(user, received)
        self._on_slate(received.value)

    def _book_clicks(self, user: _User, received: Received) -> None:
        """Book the clicks that this slate is the first to reflect."""
        state = received.slate.state
        still_unseen = []
        for clicked_s, place in user.unseen:
            if state.partition == place.partition and state.offset >= place.offset:
                self._ledger.add_click(1_000.0 * (received.read_s - clicked_s))
            else:
                still_unseen.append((clicked_s, place))
        user.unseen = still_unseen

    async def _send(self, interactions: Sequence[Interaction]) -> list[After]:
        self._interactions += len(interactions)
        return await self._client.send_interactions(interactions)

    def _interaction(self, user: _User, index: int) -> Interaction:
        row = self._log.interaction(index)
        return Interaction(
            event_id=row.event_id,
            user_id=user.script.user_id,
            item_id=row.item_id,
            kind=row.kind,
            event_time_ms=row.event_time_ms,
            value=row.value,
        )

    def _request(self, user: _User, list_index: int) -> CandidateList:
        one = self._lists[list_index]
        return CandidateList(
            request_id=request_id(user.script.arm, list_index),
            user_id=user.script.user_id,
            event_time_ms=int(self._log.event_times_ms[one.event_index]),
            item_ids=[self._log.item_ids[item] for item in one.candidate_items],
            retrieval_scores=[float(score) for score in one.retrieval_scores],
            deadline_ms=DEADLINE_MS,
            after=user.place,
        )


def request_id(arm: str, list_index: int) -> str:
    """Return the request id of a test list in an arm, by which its slate is found."""
    return f"{arm}/{list_index}"


def _empty_list(place: After, user_id: str) -> CandidateList:
    return CandidateList(
        request_id=f"before/{place.partition}",
        user_id=user_id,
        event_time_ms=0,
        item_ids=[],
        deadline_ms=DEADLINE_MS,
        after=place,
    )


async def _watch(check: Callable[[], None]) -> None:
    while True:
        check()
        await asyncio.sleep(_WATCH_EVERY_S)
