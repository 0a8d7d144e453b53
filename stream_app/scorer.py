"""The scorer: loads an artefact, checks every promise of its manifest, and hosts its TorchScript module.

The only module of the worker that imports torch.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import manifest as manifests
from models.manifest import Manifest, ManifestError
from schemas.records import CandidateList, SlateModel
from stream_app.errors import ArtefactError, ArtefactGoldenError, ArtefactHashError, ArtefactSpaceError, ModelError
from stream_app.features import FeatureBatch, ItemArena, check_features, gather
from stream_app.ports import Serving
from stream_app.state import FloatArray, IntArray, cold_row

WARM_UP_LISTS = (1, 32)
WARM_UP_CANDIDATES = 100
PROBE_ROWS = 64
WARM_UP_ROUNDS = 3  # TorchScript's profiling executor settles after two runs of a shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """A model that passed every check, warm, with its items."""

    manifest: Manifest
    model: "TorchScriptModel"
    arena: ItemArena
    space: int  # names the state space: a row of another one is never read as this one's

    def serving(self) -> Serving:
        """Return what the path must know of the artefact."""
        manifest = self.manifest
        return Serving(
            model=self.model,
            arena=self.arena,
            history_size=manifest.dims.H,
            feature_names=manifest.features,
            name=SlateModel(name=manifest.name, version=manifest.version, variant="control"),
        )


class TorchScriptModel:
    """Host of a module with `advance` and `score` (DESIGN.md, model artefact)."""

    def __init__(self, module: Any) -> None:
        """Wrap a loaded TorchScript module."""
        self._module = module

    def advance(
        self, states: FloatArray, items: FloatArray, kinds: IntArray, values: FloatArray, dt_s: FloatArray
    ) -> FloatArray:
        """Return the next states (B, S) after one interaction for each of B users.

        Raises:
            ModelError: the module raised, or returned another shape.
        """
        moved = self._call(self._module.advance, states, items, kinds, values, dt_s)
        if moved.shape != states.shape:
            raise ModelError(f"advance returned {moved.shape} for states {states.shape}; nothing was saved")
        return moved

    def score(self, batch: FeatureBatch) -> FloatArray:
        """Return the scores (B, C) of a feature batch.

        Raises:
            ModelError: the module raised, or returned another shape.
        """
        scores = self._call(
            self._module.score,
            batch.states,
            batch.history,
            batch.history_mask,
            batch.items,
            batch.features,
            batch.mask,
        )
        if scores.shape != batch.mask.shape:
            raise ModelError(f"score returned {scores.shape} for {batch.mask.shape} candidates; fallback")
        return scores

    @staticmethod
    def _call(method: Any, *arrays: np.ndarray[Any, Any]) -> FloatArray:
        # The module is known by its duck type alone: torch.jit has no static types.
        try:
            with torch.inference_mode():
                result = method(*map(_tensor, arrays))
            return np.asarray(result.numpy(), dtype=np.float32)
        except (RuntimeError, torch.jit.Error, TypeError, AttributeError) as error:
            raise ModelError(f"the model raised {type(error).__name__}: {str(error)[-300:]}") from error


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if not array.flags.writeable:  # torch warns on read-only memory, though no module may write to its input
        array = array.copy()
    return torch.from_numpy(array)


def load_artefact(directory: Path) -> Artefact:
    """Load `directory` and check, in this order: hashes, dims, golden scores; then warm up.

    Raises:
        ArtefactError: what disagrees and what to do; the artefact must not serve.
    """
    # Of this thread too: two busy OpenMP threads beside another process cost 100x (docs/benchmarks.md).
    torch.set_num_threads(1)
    manifest = read_manifest(directory)
    check_files(manifest, directory)
    if manifest.format != "torchscript":
        raise ArtefactError(
            f"{directory}: format={manifest.format!r}; the artefact is not served; this worker loads 'torchscript'"
        )
    check_features(manifest.features)
    arena = _load_items(directory, manifest)
    model = TorchScriptModel(_load_module(directory / manifests.MODEL_FILE))
    _check_golden(directory / manifests.GOLDEN_FILE, manifest, model)
    artefact = Artefact(manifest=manifest, model=model, arena=arena, space=space_of(manifest))
    _warm_up(artefact)
    return artefact


def read_manifest(directory: Path) -> Manifest:
    """Return what the artefact promises.

    Raises:
        ArtefactError: there is no manifest, or it cannot be read.
    """
    try:
        return manifests.read(directory)
    except ManifestError as error:
        raise ArtefactError(str(error)) from error


def check_files(manifest: Manifest, directory: Path) -> None:
    """Compare every file with the hash that the manifest promises.

    Raises:
        ArtefactHashError: naming the first file that is not as promised.
    """
    try:
        manifests.verify_files(manifest, directory)
    except ManifestError as error:
        raise ArtefactHashError(str(error)) from error


def check_same_moves(artefact: Artefact, other: Artefact) -> None:
    """Compare what two artefacts of one state space make of the same interactions, bit by bit.

    A manifest written by hand may claim a state space that is not its own.

    Raises:
        ArtefactSpaceError: they differ.
    """
    if not _same_names(artefact, other) or not np.array_equal(_moved(artefact, other), _moved(other, other)):
        raise ArtefactSpaceError(
            f"{artefact.manifest.name}:{artefact.manifest.version} claims the state space {artefact.space:016x} of "
            f"{other.manifest.name}:{other.manifest.version} and moves users otherwise; it is not served; "
            "correct `state_space` in its manifest"
        )


def _same_names(artefact: Artefact, other: Artefact) -> bool:
    names = [(one.manifest.kinds, one.manifest.dims.S, len(one.arena)) for one in (artefact, other)]
    some = other.arena.some_ids(PROBE_ROWS)
    return names[0] == names[1] and np.array_equal(artefact.arena.item_rows(some), other.arena.item_rows(some))


def _moved(artefact: Artefact, other: Artefact) -> FloatArray:
    """Return states (B, S) that `artefact` has moved by interactions of every kind with some items of `other`."""
    manifest, rng = artefact.manifest, np.random.default_rng(0)
    item_rows = artefact.arena.item_rows(["", *other.arena.some_ids(PROBE_ROWS)])  # (B,)
    count = max(len(item_rows), len(manifest.kinds))
    return artefact.model.advance(
        rng.uniform(-1.0, 1.0, (count, manifest.dims.S)).astype(np.float32),
        artefact.arena.vectors(np.resize(item_rows, count)),
        np.resize(np.arange(len(manifest.kinds)), count),
        np.resize(np.arange(6, dtype=np.float32), count),
        rng.uniform(0.0, 1e5, count).astype(np.float32),
    )


def space_of(manifest: Manifest) -> int:
    """Return 64 bits that name what a state vector means: the manifest's state space, or the files that made it."""
    if manifest.state_space is not None:
        return int(manifest.state_space[:16], 16)
    parts = manifest.files[manifests.MODEL_FILE] + manifest.files[manifests.ITEM_VECTORS_FILE]
    return int(hashlib.sha256(parts.encode()).hexdigest()[:16], 16)


def _load_module(path: Path) -> Any:
    # torch.jit.load runs code of the file: only a file whose hash the manifest promised comes this far.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        # Fused kernels may round otherwise than unfused ones, and only after some runs.
        torch.jit.set_fusion_strategy([])
        try:
            return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            raise ArtefactError(
                f"{path}: torch cannot load it ({str(error).splitlines()[0]}); the artefact is not served; "
                "export it again"
            ) from error


def _load_items(directory: Path, manifest: Manifest) -> ItemArena:
    vectors_path = directory / manifests.ITEM_VECTORS_FILE
    try:
        vectors = np.load(vectors_path, allow_pickle=False)
        item_ids = (directory / manifests.ITEM_IDS_FILE).read_text(encoding="utf-8").split("\n")
    except (ValueError, OSError) as error:
        raise ArtefactError(f"{directory}: items unreadable ({error}); the artefact is not served") from error
    if item_ids[-1] == "":
        item_ids.pop()
    if vectors.ndim != 2 or vectors.shape[1] != manifest.dims.V or vectors.dtype != np.float32:
        raise ArtefactError(
            f"{vectors_path}: {vectors.dtype} {vectors.shape}, the manifest says float32 (N, {manifest.dims.V}); "
            "the artefact is not served; export it again"
        )
    if not np.isfinite(vectors).all():
        raise ArtefactError(f"{vectors_path}: holds NaN or infinity; the artefact is not served; train it again")
    return ItemArena(item_ids, vectors, manifest.kinds)


def _check_golden(path: Path, manifest: Manifest, model: TorchScriptModel) -> None:
    """Compare both methods with the outputs recorded at export."""
    try:
        golden: Mapping[str, Any] = json.loads(path.read_bytes())
        moves, lists = golden["advance"], golden["score"]
        tolerance = float(golden["tolerance"])
        moved = model.advance(**_golden_moves(moves, manifest))
        scores = model.score(_golden_lists(lists, manifest))
        expected = (np.array(moves["expected"], np.float32), np.array(lists["expected"], np.float32))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtefactError(f"{path}: unreadable ({error!r}); the artefact is not served; export it again") from error
    except ModelError as error:
        raise ArtefactGoldenError(f"{path}: {error}; the artefact is not served; export it again") from error
    for method, got, want in (("advance", moved, expected[0]), ("score", scores, expected[1])):
        if got.shape != want.shape or not np.allclose(got, want, rtol=0.0, atol=tolerance):
            raise ArtefactGoldenError(
                f"{path}: {method} disagrees with its golden output by more than {tolerance:g}; "
                "the artefact is not served; export it again with this torch version"
            )


def _golden_moves(moves: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    dims, count = manifest.dims, len(moves["kind"])
    return {
        "states": np.array(moves["state"], np.float32).reshape(count, dims.S),
        "items": np.array(moves["items"], np.float32).reshape(count, dims.V),
        "kinds": np.array(moves["kind"], np.int64),
        "values": np.array(moves["value"], np.float32),
        "dt_s": np.array(moves["dt_s"], np.float32),
    }


def _golden_lists(lists: Mapping[str, Any], manifest: Manifest) -> FeatureBatch:
    dims, mask = manifest.dims, np.array(lists["mask"], np.bool_)
    count, candidates = mask.shape
    return FeatureBatch(
        states=np.array(lists["state"], np.float32).reshape(count, dims.S),
        history=np.array(lists["history"], np.float32).reshape(count, dims.H, dims.V),
        history_mask=np.array(lists["history_mask"], np.bool_).reshape(count, dims.H),
        items=np.array(lists["items"], np.float32).reshape(count, candidates, dims.V),
        features=np.array(lists["features"], np.float32).reshape(count, candidates, dims.F),
        mask=mask,
        cold_items=np.zeros(count, np.int64),
    )


def _warm_up(artefact: Artefact) -> None:
    """Run both methods until TorchScript has specialised them, so that no user pays for it."""
    dims = artefact.manifest.dims
    row = cold_row(dims.S)
    item_ids = [f"warm-up-{c}" for c in range(WARM_UP_CANDIDATES)]
    request = CandidateList(request_id="warm-up", user_id="warm-up", event_time_ms=0, item_ids=item_ids)
    for count in WARM_UP_LISTS * WARM_UP_ROUNDS:
        batch = gather(
            [request] * count,
            [row] * count,
            arena=artefact.arena,
            history_size=dims.H,
            feature_names=artefact.manifest.features,
        )
        artefact.model.score(batch)
        artefact.model.advance(
            batch.states,
            np.zeros((count, dims.V), np.float32),
            np.zeros(count, np.int64),
            np.zeros(count, np.float32),
            np.zeros(count, np.float32),
        )
