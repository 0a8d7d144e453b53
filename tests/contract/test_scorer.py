"""An artefact serves only if every promise of its manifest holds; the hosted module answers as the trained one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import manifest as manifests
from stream_app.errors import ArtefactError, ModelError
from stream_app.features import FeatureBatch
from stream_app.scorer import TorchScriptModel, load_artefact
from stream_app.state import FloatArray
from tests.bad_artefacts import promise, rewrite
from tests.tiny_artefact import DIM, ITEMS, item_ids, write_tiny_artefact

rng = np.random.default_rng(5)


def floats(*shape: int) -> FloatArray:
    return rng.normal(size=shape).astype(np.float32)


def batch(lists: int, candidates: int, state_size: int, vector_size: int) -> FeatureBatch:
    return FeatureBatch(
        states=floats(lists, state_size),
        history=floats(lists, 0, vector_size),
        history_mask=np.zeros((lists, 0), np.bool_),
        items=floats(lists, candidates, vector_size),
        features=floats(lists, candidates, 0),
        mask=np.ones((lists, candidates), np.bool_),
        cold_items=np.zeros(lists, np.int64),
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_artefact(tmp_path / "tiny")


def test_a_sound_artefact_loads_with_its_items(directory: Path) -> None:
    artefact = load_artefact(directory)
    assert len(artefact.arena) == ITEMS
    assert artefact.arena.item_rows(["i-1", "nobody", "i-20"]).tolist() == [1, 0, 20]
    assert artefact.manifest.dims.S == DIM + 1


def test_rows_belong_to_the_state_space_that_the_manifest_names(directory: Path, tmp_path: Path) -> None:
    other = load_artefact(write_tiny_artefact(tmp_path / "other", score_seed=1))
    assert load_artefact(directory).space == other.space == int(str(other.manifest.state_space)[:16], 16)


def test_rows_of_an_artefact_that_names_no_state_space_are_its_own(directory: Path, tmp_path: Path) -> None:
    other = write_tiny_artefact(tmp_path / "other", score_seed=1)
    for one in (directory, other):
        rewrite(one, lambda manifest: manifest.pop("state_space"))
    assert load_artefact(directory).space != load_artefact(other).space


@pytest.mark.parametrize("file", manifests.REQUIRED_FILES)
def test_a_changed_file_is_refused(directory: Path, file: str) -> None:
    path = directory / file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ArtefactError, match="sha256"):
        load_artefact(directory)


@pytest.mark.parametrize("file", manifests.REQUIRED_FILES)
def test_a_missing_file_is_refused(directory: Path, file: str) -> None:
    (directory / file).unlink()
    with pytest.raises(ArtefactError, match=file):
        load_artefact(directory)


def test_an_empty_directory_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="rerank train"):
        load_artefact(tmp_path)


def test_other_dims_than_promised_are_refused(directory: Path) -> None:
    rewrite(directory, lambda manifest: manifest["dims"].update(V=manifest["dims"]["V"] + 1))
    with pytest.raises(ArtefactError, match="not served"):
        load_artefact(directory)


def test_another_format_is_refused(directory: Path) -> None:
    rewrite(directory, lambda manifest: manifest.update(format="pickle"))
    with pytest.raises(ArtefactError, match="torchscript"):
        load_artefact(directory)


def test_a_feature_that_the_worker_cannot_compute_is_refused(directory: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["features"] = ["moon_phase"]
        manifest["dims"]["F"] = 1

    rewrite(directory, change)
    with pytest.raises(ArtefactError, match="moon_phase"):
        load_artefact(directory)


@pytest.mark.parametrize("method", ["advance", "score"])
def test_a_golden_answer_that_differs_is_refused(directory: Path, method: str) -> None:
    def change(golden: dict[str, Any]) -> None:
        golden[method]["expected"][0][0] += 0.01

    rewrite(directory, change, file=manifests.GOLDEN_FILE)
    with pytest.raises(ArtefactError, match=f"{method} disagrees"):
        load_artefact(directory)


def test_item_vectors_with_nan_are_refused(directory: Path) -> None:
    path = directory / manifests.ITEM_VECTORS_FILE
    vectors = np.load(path)
    vectors[3, 1] = np.nan
    np.save(path, vectors)
    promise(directory, manifests.ITEM_VECTORS_FILE)
    with pytest.raises(ArtefactError, match="NaN"):
        load_artefact(directory)


def test_an_item_without_a_vector_is_refused(directory: Path) -> None:
    (directory / manifests.ITEM_IDS_FILE).write_text("".join(f"{item_id}\n" for item_id in [*item_ids(), "i-21"]))
    promise(directory, manifests.ITEM_IDS_FILE)
    with pytest.raises(ArtefactError, match="21 ids"):
        load_artefact(directory)


def test_bytes_that_are_no_torchscript_are_refused(directory: Path) -> None:
    (directory / manifests.MODEL_FILE).write_bytes(b"junk")
    promise(directory, manifests.MODEL_FILE)
    with pytest.raises(ArtefactError, match="torch cannot load it"):
        load_artefact(directory)


@pytest.mark.parametrize("name", ["learned-ema", "dot", "cosine", "mlp"])
def test_a_state_moves_the_same_bits_alone_and_in_a_batch(tmp_path: Path, name: str) -> None:
    artefact = load_artefact(write_tiny_artefact(tmp_path / name, model=name, dim=64))
    dims, model = artefact.manifest.dims, artefact.model
    states, items = floats(33, dims.S), floats(33, dims.V)
    kinds, values = rng.integers(0, 12, 33), rng.integers(0, 6, 33).astype(np.float32)
    dt_s = np.zeros(33, np.float32)
    together = model.advance(states, items, kinds, values, dt_s)
    alone = [
        model.advance(states[b : b + 1], items[b : b + 1], kinds[b : b + 1], values[b : b + 1], dt_s[b : b + 1])[0]
        for b in range(33)
    ]
    assert [row.tobytes() for row in together] == [row.tobytes() for row in alone]


@pytest.mark.parametrize("name", ["learned-ema", "dot", "cosine"])
def test_a_score_has_the_same_bits_whatever_its_neighbours(tmp_path: Path, name: str) -> None:
    artefact = load_artefact(write_tiny_artefact(tmp_path / name, model=name, dim=64))
    dims, model = artefact.manifest.dims, artefact.model
    together = batch(32, 100, dims.S, dims.V)
    scores = model.score(together)
    for b, c in [(0, 1), (5, 7), (31, 100), (17, 99)]:
        alone = FeatureBatch(
            states=together.states[b : b + 1],
            history=together.history[b : b + 1],
            history_mask=together.history_mask[b : b + 1],
            items=together.items[b : b + 1, :c],
            features=together.features[b : b + 1, :c],
            mask=together.mask[b : b + 1, :c],
            cold_items=together.cold_items[b : b + 1],
        )
        assert model.score(alone)[0].tobytes() == scores[b, :c].tobytes()


class Rude(nn.Module):
    """Raises, or returns another shape than it was asked for."""

    @torch.jit.export
    def advance(self, state: Tensor, items: Tensor, kind: Tensor, value: Tensor, dt_s: Tensor) -> Tensor:
        return state[:, :1]

    @torch.jit.export
    def score(
        self, state: Tensor, history: Tensor, history_mask: Tensor, items: Tensor, features: Tensor, mask: Tensor
    ) -> Tensor:
        if items.size(1) == 1:
            raise RuntimeError("rude")
        return items


def rude() -> TorchScriptModel:
    return TorchScriptModel(torch.jit.script(Rude()))


def test_a_module_that_raises_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="rude"):
        rude().score(batch(2, 1, 3, 4))


def test_a_module_that_returns_another_shape_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="score returned"):
        rude().score(batch(2, 5, 3, 4))
    with pytest.raises(ModelError, match="advance returned"):
        rude().advance(floats(2, 3), floats(2, 4), np.zeros(2, np.int64), floats(2), floats(2))
