"""The artefact: eager equals TorchScript on values, and no row depends on its batch."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import manifest as manifests
from models.export import ExportError, Labels, load_items, load_scripted, script, state_space, write_artefact
from models.networks import NETWORKS, Dot, Network
from schemas.records import KINDS
from tests.tiny_artefact import write_tiny_artefact

ALL_KINDS = ["unknown", *KINDS]
DIM, SLOTS = 64, 72
ONE_LIST_TOLERANCE = {"mlp": 1e-5}  # its matrix products round by batch size; the others are bit-identical


def network(name: str) -> Network:
    """Build a network with random weights."""
    torch.manual_seed(0)
    built = NETWORKS[name](DIM, ALL_KINDS)
    built.fill_moves(torch.tensor(0.17), torch.randn(SLOTS), torch.arange(SLOTS) // 6 == ALL_KINDS.index("impression"))
    return built.eval()


def score_inputs(net: Network, lists: int, candidates: int) -> dict[str, torch.Tensor]:
    """Build B lists of C candidates; the last list, if not the only one, is padding only."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones((lists, candidates), dtype=torch.bool)
    if lists > 1:
        mask[-1] = False
    items = torch.randn((lists, candidates, net.vector_size), generator=generator)
    return {
        "state": torch.rand((lists, net.state_size), generator=generator),
        "history": torch.zeros((lists, 0, net.vector_size)),
        "history_mask": torch.zeros((lists, 0), dtype=torch.bool),
        "items": items * mask.unsqueeze(2),
        "features": torch.zeros((lists, candidates, 0)),
        "mask": mask,
    }


def advance_inputs(net: Network, users: int) -> dict[str, torch.Tensor]:
    """Build one interaction for each of B users, of all kinds in turn."""
    generator = torch.Generator().manual_seed(2)
    return {
        "state": torch.rand((users, net.state_size), generator=generator),
        "items": torch.randn((users, net.vector_size), generator=generator),
        "kind": torch.arange(users) % len(ALL_KINDS),
        "value": torch.arange(users) % 6 * 1.0,
        "dt_s": torch.rand(users, generator=generator),
    }


@pytest.mark.parametrize("candidates", [1, 5, 100])
@pytest.mark.parametrize("lists", [1, 7])
@pytest.mark.parametrize("name", NETWORKS)
def test_scripted_scores_are_the_eager_ones(name: str, lists: int, candidates: int) -> None:
    net = network(name)
    inputs = score_inputs(net, lists, candidates)
    with torch.inference_mode():
        eager, scripted = net.score(*inputs.values()), _call(script(net), "score", inputs)
    assert eager.shape == scripted.shape == (lists, candidates)
    assert torch.isfinite(scripted).all()
    assert torch.allclose(eager, scripted, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("users", [1, 7])
@pytest.mark.parametrize("name", NETWORKS)
def test_scripted_states_are_the_eager_ones_bit_by_bit(name: str, users: int) -> None:
    net = network(name)
    inputs = advance_inputs(net, users)
    with torch.inference_mode():
        assert torch.equal(net.advance(*inputs.values()), _call(script(net), "advance", inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_state_does_not_depend_on_its_batch(name: str) -> None:
    scripted, inputs = script(network(name)), advance_inputs(network(name), 64)
    with torch.inference_mode():
        together = _call(scripted, "advance", inputs)
        for row in range(64):
            alone = _call(scripted, "advance", {key: tensor[row : row + 1] for key, tensor in inputs.items()})
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("candidates", [1, 3, 37, 100])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_score_does_not_depend_on_batch_and_padding(name: str, candidates: int) -> None:
    scripted, inputs = script(network(name)), score_inputs(network(name), 7, 100)
    with torch.inference_mode():
        together = _call(scripted, "score", inputs)
        for row in range(7):
            one = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
            one |= {key: one[key][:, :candidates].contiguous() for key in ("items", "features", "mask")}
            worst = float((_call(scripted, "score", one)[0] - together[row, :candidates]).abs().max())
            assert worst <= ONE_LIST_TOLERANCE.get(name, 0.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_artefact_gives_its_golden_answers(name: str, tmp_path: Path) -> None:
    directory = write_tiny_artefact(tmp_path / name, model=name)
    golden = json.loads((directory / "golden.json").read_bytes())
    dims = manifests.read(directory).dims
    module = load_scripted(directory)
    for method in ("advance", "score"):
        inputs = {key: torch.tensor(value) for key, value in golden[method].items()}
        expected = inputs.pop("expected")
        if method == "score":
            inputs["history"] = inputs["history"].reshape(len(inputs["state"]), dims.H, dims.V)
        with torch.inference_mode():
            assert torch.allclose(_call(module, method, inputs), expected, rtol=0.0, atol=golden["tolerance"])


def test_items_come_back_with_the_cold_start_row_in_front(tmp_path: Path) -> None:
    directory = write_tiny_artefact(tmp_path / "tiny", items=3)
    item_ids, vectors = load_items(directory)
    assert item_ids == ["i-1", "i-2", "i-3"]
    assert vectors.shape == (4, 9)
    assert vectors.dtype == np.float32


def test_the_same_model_has_the_same_version_and_bytes(tmp_path: Path) -> None:
    first, again = (manifests.read(write_tiny_artefact(tmp_path / name)) for name in ("a", "b"))
    assert (first.version, first.files) == (again.version, again.files)


def test_no_path_of_this_machine_is_in_an_artefact(tmp_path: Path) -> None:
    directory = write_tiny_artefact(tmp_path / "tiny")
    with zipfile.ZipFile(directory / manifests.MODEL_FILE) as archive:
        contents = b"".join(archive.read(record) for record in archive.infolist())
    assert str(Path(__file__).resolve().parents[2]).encode() not in contents


def test_another_model_has_another_version(tmp_path: Path) -> None:
    first, other = (manifests.read(write_tiny_artefact(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert first.version != other.version


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_space_stays_when_only_the_score_changes(name: str, tmp_path: Path) -> None:
    first, other = (
        manifests.read(write_tiny_artefact(tmp_path / str(seed), model=name, score_seed=seed)) for seed in (1, 2)
    )
    assert first.version != other.version
    assert first.state_space == other.state_space


def space_of(change: Callable[[Network, list[str], Any], None]) -> str:
    """Return the state space of a model of two items after a change to it."""
    net, item_ids = network("learned-ema"), ["i-1", "i-2"]
    vectors = np.ones((3, net.vector_size), dtype=np.float32)
    change(net, item_ids, vectors)
    return state_space(net, item_ids, vectors)


@pytest.mark.parametrize(
    "change",
    [
        lambda net, ids, vectors: net.moves[3, 1].add_(0.25),
        lambda net, ids, vectors: net.kinds.reverse(),
        lambda net, ids, vectors: setattr(net, "formula", "another/1"),
        lambda net, ids, vectors: ids.reverse(),
        lambda net, ids, vectors: vectors.__setitem__((0, DIM - 1), 2.0),
    ],
    ids=["moves", "kinds", "formula", "item ids", "an item's vector"],
)
def test_a_state_space_changes_with_whatever_moves_a_row(change: Callable[[Network, list[str], Any], None]) -> None:
    assert space_of(lambda *_: None) == space_of(lambda net, ids, vectors: vectors.__setitem__((0, DIM), 2.0))
    assert space_of(change) != space_of(lambda *_: None)


def test_a_model_whose_advance_reads_what_the_state_space_leaves_out_is_not_written(tmp_path: Path) -> None:
    class Wrong(Dot):
        def moving_size(self) -> int:
            return self.dim - 1

    net = Wrong(4, ALL_KINDS)
    net.fill_moves(torch.tensor(0.5), torch.ones(SLOTS), torch.zeros(SLOTS, dtype=torch.bool))
    training = manifests.Training(from_ms=0, until_ms=1, interactions=1, loss="softmax", seed=0)
    labels = Labels(name="wrong", training=training, created_ms=0, metrics={})
    with pytest.raises(ExportError, match="numbers that only score"):
        write_artefact(net, ["a"], np.ones((2, 5), dtype=np.float32), labels, tmp_path / "wrong")


def test_an_older_artefact_is_replaced_whole(tmp_path: Path) -> None:
    directory = write_tiny_artefact(tmp_path / "a", items=3)
    (directory / "stray").touch()
    write_tiny_artefact(directory, items=4)
    assert len(load_items(directory)[0]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert not (directory / "stray").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="not an artefact"):
        write_tiny_artefact(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("item_ids", "vectors", "told"),
    [
        (["a"], np.zeros((2, 4), dtype=np.float32), "not float32"),
        (["a"], np.zeros((2, 65), dtype=np.float64), "not float32"),
        (["a"], np.full((2, 65), np.nan, dtype=np.float32), "not all finite"),
        (["a", "a"], np.zeros((3, 65), dtype=np.float32), "repeat"),
    ],
)
def test_items_that_cannot_serve_are_refused_and_nothing_is_written(
    tmp_path: Path, item_ids: list[str], vectors: Any, told: str
) -> None:
    training = manifests.Training(from_ms=0, until_ms=1, interactions=1, loss="softmax", seed=0)
    labels = Labels(name="dot", training=training, created_ms=0, metrics={})
    with pytest.raises(ExportError, match=told):
        write_artefact(network("dot"), item_ids, vectors, labels, tmp_path / "dot")
    assert list(tmp_path.iterdir()) == []


def test_the_mlp_artefact_offers_probability(tmp_path: Path) -> None:
    module: Any = load_scripted(write_tiny_artefact(tmp_path / "mlp", model="mlp"))
    assert module.probability(torch.tensor([0.0, 100.0])).tolist() == [0.5, 1.0]


def _call(module: Any, method: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = getattr(module, method)(*inputs.values())
    return result
