"""The model in service is replaced whole, by a sound artefact of its own state space, or not at all."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from schemas.codec import decode_slate
from schemas.records import Slate, SlateModel
from stream_app.agents import ListsAgent
from stream_app.model_watch import ModelWatch
from stream_app.ports import InService, Serving
from stream_app.scorer import Artefact, load_artefact
from stream_app.supervision import Condition, EventLoopLag, probes
from stream_app.telemetry import Telemetry
from tests.agent_bench import Bench
from tests.bad_artefacts import BAD_ARTEFACTS, cut
from tests.builders import candidate_list
from tests.fakes import HalvingModel, HungStore, arena, memory_store, record_of
from tests.model_place import ModelPlace
from tests.tiny_artefact import write_tiny_artefact


class Place(ModelPlace):
    """A link to one of two artefacts of one state space, and a watch of it."""

    def __init__(self, directory: Path, load: Callable[[Path], Artefact] = load_artefact) -> None:
        super().__init__(directory)
        self.condition, self.telemetry = Condition(), Telemetry()
        self.watch = ModelWatch(self.current, telemetry=self.telemetry, condition=self.condition, load=load)

    async def look(self, times: int = 2) -> None:
        for _ in range(times):
            await self.watch.look()

    def serves(self, directory: Path) -> bool:
        serving = self.watch.in_service.serving.name
        assert self.condition.model == f"{serving.name}:{serving.version}"
        return serving.version == self.version(directory)

    def outcomes(self) -> dict[str, float]:
        totals = self.telemetry.totals().items()
        return {name.split("{")[1][:-1]: count for name, count in totals if name.startswith("rerank_model_reload")}

    def ready(self) -> str:
        """Return what /readyz says of the model."""
        (model, *_) = probes(self.condition, EventLoopLag(self.telemetry))["/readyz"]()
        return f"{model.state}: {model.told}"


async def test_another_artefact_of_the_state_space_is_put_in_service(tmp_path: Path) -> None:
    place = Place(tmp_path)
    await place.look()
    assert (place.serves(place.first), place.outcomes()) == (True, {})
    place.point_at(place.second)
    await place.look()
    assert (place.serves(place.second), place.outcomes()) == (True, {"ok": 1})
    (shown,) = (sample for metric in place.telemetry.model_info.collect() for sample in metric.samples)
    assert shown.labels["version"] == place.watch.in_service.serving.name.version


async def test_a_directory_that_is_replaced_in_place_is_put_in_service(tmp_path: Path) -> None:
    place = Place(tmp_path)
    write_tiny_artefact(place.first, score_seed=2)
    await place.look()
    assert place.serves(place.second)


@pytest.mark.parametrize(("spoil", "outcome"), BAD_ARTEFACTS.values(), ids=BAD_ARTEFACTS)
async def test_a_bad_artefact_is_refused_once_and_the_one_in_service_stays(
    tmp_path: Path, spoil: Callable[[Path], None], outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path)
    spoil(place.second)
    place.point_at(place.second)
    await place.look(times=5)
    assert place.serves(place.first)
    assert place.outcomes() == {outcome: 1}
    assert caplog.text.count("event=model_rejected") == 1
    assert place.ready().startswith(f"degraded: {place.condition.model} stays in service: ")


async def test_pointing_the_link_back_ends_the_refusal_and_loads_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    serving = place.watch.in_service.serving
    cut("model.pt")(place.second)
    place.point_at(place.second)
    await place.look()
    place.point_at(place.first)
    await place.look()
    assert place.ready() == f"ok: {place.condition.model}"
    assert place.watch.in_service.serving is serving
    assert place.outcomes() == {"rejected_hash": 1}


async def test_a_refused_copy_is_tried_again_when_it_is_whole(tmp_path: Path) -> None:
    place = Place(tmp_path)
    whole = (place.second / "items.npy").read_bytes()
    cut("items.npy")(place.second)
    place.point_at(place.second)
    await place.look()
    (place.second / "items.npy").write_bytes(whole)
    await place.look()
    assert place.serves(place.second)
    assert place.outcomes() == {"rejected_hash": 1, "ok": 1}


async def test_a_copy_under_way_is_left_alone_until_it_stands_still(tmp_path: Path) -> None:
    place = Place(tmp_path)
    whole = (place.second / "items.npy").read_bytes()
    place.point_at(place.second)
    for size in range(1, 6):
        (place.second / "items.npy").write_bytes(whole[: size * len(whole) // 5])
        await place.look(times=1)
    assert (place.serves(place.first), place.outcomes()) == (True, {})
    await place.look(times=1)
    assert (place.serves(place.second), place.outcomes()) == (True, {"ok": 1})


async def test_what_changes_while_it_is_loaded_is_not_put_in_service_before_it_stands_still(tmp_path: Path) -> None:
    loads: list[Path] = []

    def load(directory: Path) -> Artefact:
        loads.append(directory)
        if len(loads) == 2:
            place.point_at(place.first)
        return load_artefact(directory)

    place = Place(tmp_path, load)
    place.point_at(place.second)
    await place.look(times=6)
    assert (len(loads), place.serves(place.first), place.outcomes()) == (2, True, {})
    place.point_at(place.second)
    await place.look()
    assert place.serves(place.second)


async def test_a_load_that_raises_anything_leaves_the_one_in_service(tmp_path: Path) -> None:
    def load(directory: Path) -> Artefact:
        if directory.name == "second":
            raise ZeroDivisionError("a model from outside")
        return load_artefact(directory)

    place = Place(tmp_path, load)
    place.point_at(place.second)
    await place.look()
    assert (place.serves(place.first), place.outcomes()) == (True, {"load_error": 1})


async def test_without_an_interval_nothing_is_looked_at(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.point_at(place.second)
    await asyncio.wait_for(place.watch.run(0.0), 10)
    assert place.serves(place.first)


def constant(number: int, candidates: int) -> Serving:
    """Return a model whose every score is its number, under a version of that number."""
    scores = np.full((1, candidates), number, np.float32)
    name = SlateModel(name="constant", version=str(number), variant="control")
    return Serving(model=HalvingModel(scores=scores), arena=arena(), history_size=0, feature_names=(), name=name)


async def test_a_model_swapped_under_lists_mixes_no_slate() -> None:
    """Lists are under way, waiting for their rows, whenever the model is replaced."""
    store = HungStore(memory_store())
    bench = Bench(store=store)
    stream, publisher, in_service = bench.stream, bench.publisher, InService(constant(0, 2))
    agent = ListsAgent(bench.context(in_service=in_service), max_records=1)
    running = asyncio.create_task(agent.run(stream))  # type: ignore[arg-type]
    swaps = 20
    for swap in range(1, swaps + 1):
        request = candidate_list(request_id=f"r-{swap}", after=None, deadline_ms=1_000)
        stream.put(record_of(request, offset=swap))
        while store.loads < swap:  # noqa: ASYNC110 - until its rows are asked for, under the model before
            await asyncio.sleep(0)
        in_service.serving = constant(swap, 2)
        store.answers.set()
        while len(publisher.sent) < swap:  # noqa: ASYNC110
            await asyncio.sleep(0)
        store.answers.clear()
    stream.end()
    await asyncio.wait_for(running, 10)
    slates: list[Slate] = [decode_slate(sent.value or b"") for sent in publisher.sent]
    assert [slate.model.version for slate in slates] == [str(number) for number in range(swaps)]
    for slate in slates:
        number = float(slate.model.version)
        assert slate.scores == [number, number]
        assert [(one.score, one.cold_score) for one in slate.explanations or []] == [(number, number)] * 2
