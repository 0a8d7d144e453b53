"""A worker whose artefact path leads to another artefact while it serves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.local import LocalStack
from schemas.records import CandidateList
from tests.bad_artefacts import BAD_ARTEFACTS
from tests.builders import candidate_list, interaction
from tests.fault_kit import stored_rows
from tests.model_place import ModelPlace
from tests.tiny_artefact import item_ids
from tests.worker_health import ask, total, until_metrics
from tests.worker_kit import Client, Site, WorkerProcess, client, site

pytestmark = pytest.mark.integration

USERS = [f"u-{number}" for number in range(8)]
SWAPS = 8


@pytest.fixture
def place(tmp_path: Path) -> ModelPlace:
    return ModelPlace(tmp_path / "artefacts")


@pytest.fixture
def where(local_stack: LocalStack, place: ModelPlace, tmp_path: Path) -> Site:
    return site(local_stack, place.current, tmp_path, RERANK_HTTP__PORT="0", RERANK_ARTEFACT_CHECK_S="0.1")


async def know_the_users(outsider: Client) -> None:
    """Give every user a state, and wait until slates reflect it."""
    for number, user_id in enumerate(USERS):
        at = await outsider.interact(interaction(user_id=user_id, item_id=f"i-{1 + number}", event_id=user_id))
        slate = await outsider.ask(a_list(f"known-{user_id}", user_id, after=at))
        assert slate.state.events == 1


def a_list(request_id: str, user_id: str, **changes: object) -> CandidateList:
    fields: dict[str, object] = {"after": None, "deadline_ms": 20_000}
    return candidate_list(request_id=request_id, user_id=user_id, item_ids=item_ids()[:10], **(fields | changes))


@asynccontextmanager
async def lists_without_end(outsider: Client) -> AsyncIterator[list[str]]:
    """Ask for slates in the background; yield the ids of the requests so far."""
    sent: list[str] = []

    async def send() -> None:
        while True:
            some = [a_list(f"r-{len(sent) + n}", user_id) for n, user_id in enumerate(USERS)]
            await outsider.send_many(some)
            sent.extend(one.request_id for one in some)
            await asyncio.sleep(0.01)

    sending = asyncio.create_task(send())
    try:
        yield sent
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def until_slates_of(outsider: Client, version: str, more: int = 20) -> None:
    """Wait until so many more slates name a version."""

    def count() -> int:
        return sum(slate.model.version == version for slate in outsider.slates)

    had = count()
    await outsider.until(lambda: count() >= had + more)


async def test_a_model_swapped_under_load_mixes_no_slate(where: Site, place: ModelPlace) -> None:
    await where.create_topics()
    with WorkerProcess(where) as worker:
        port = worker.ready()["http_port"]
        async with client(where) as outsider:
            await know_the_users(outsider)
            states = {user_id: row.vector for user_id, row in stored_rows(where).items()}
            async with lists_without_end(outsider) as sent:
                for swap in range(1, SWAPS + 1):
                    directory = (place.first, place.second)[swap % 2]
                    place.point_at(directory)
                    await until_slates_of(outsider, place.version(directory))
            await outsider.until(lambda: {one.request_id for one in outsider.slates} >= set(sent))
        found = await until_metrics(port, lambda found: found["rerank_model_reload_total", ("ok",)] == SWAPS)
        assert total(found, "rerank_bad_rows_total") == 0
    for slate in outsider.slates:
        assert (slate.outcome, slate.state.events) == ("ranked", 1)
        expected = place.scores(slate.model.version, states[slate.user_id], slate.item_ids)
        cold = place.scores(slate.model.version, bytes(len(states[slate.user_id])), slate.item_ids)
        assert slate.scores == pytest.approx(expected, abs=1e-5)
        assert [one.cold_score for one in slate.explanations or []] == pytest.approx(cold, abs=1e-5)


@pytest.mark.parametrize("how", ["a byte of the module flipped", "the item ids cut", "other dims", "other moves"])
async def test_a_bad_model_is_refused_in_flight_and_the_one_in_service_stays(
    where: Site, place: ModelPlace, how: str
) -> None:
    spoil, outcome = BAD_ARTEFACTS[how]
    spoil(place.second)
    await where.create_topics()
    with WorkerProcess(where) as worker:
        port = worker.ready()["http_port"]
        async with client(where) as outsider:
            await know_the_users(outsider)
            async with lists_without_end(outsider):
                place.point_at(place.second)
                await until_metrics(port, lambda found: found["rerank_model_reload_total", (outcome,)] == 1)
                await until_slates_of(outsider, place.version(place.first), more=100)
            assert {(slate.outcome, slate.state.events) for slate in outsider.slates} == {("ranked", 1)}
            assert {slate.model.version for slate in outsider.slates} == {place.version(place.first)}
        status, body = await ask(port, "/readyz")
        assert (status, body["status"]) == (200, "degraded")
        assert "stays in service" in body["checks"]["model"]["told"]
        found = await until_metrics(port, lambda found: True)
        assert found["rerank_model_reload_total", (outcome,)] == 1
        assert worker.log().count("event=model_rejected") == 1
