"""Write an artefact: TorchScript, item tables, golden answers and the manifest, checked before anything is visible.

The only module of `models` that touches `torch.jit`.
"""

import hashlib
import io
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import manifest as manifests
from models.networks import RATING, Network

TOLERANCE = 1e-5
HISTORY = 0  # our models carry the past in the state, so no history crosses the border
FEATURES: Sequence[str] = ()


class ExportError(Exception):
    """A model is not fit to serve; nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What the manifest says about a model, as opposed to what it computes."""

    name: str
    training: manifests.Training
    created_ms: int
    metrics: dict[str, float]


def write_artefact(
    network: Network,
    item_ids: Sequence[str],
    item_vectors: npt.NDArray[np.float32],
    labels: Labels,
    directory: Path,
) -> manifests.Manifest:
    """Check a network and write it as the artefact `directory`, all of it or nothing; an older one there is replaced.

    item_vectors is (N+1, V), row 0 the cold-start vector and row r+1 that of item_ids[r]. The version is a digest of
    the contents. Raises ExportError when a check fails or when the directory holds something that is not an artefact.
    """
    check_replaceable(directory)
    _check_items(item_ids, item_vectors, network)
    scripted = script(network)
    golden = check_scripted(network, scripted, item_vectors)
    staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    staging.mkdir(parents=True)
    try:
        save_scripted(scripted, staging / manifests.MODEL_FILE)
        np.save(staging / manifests.ITEM_VECTORS_FILE, item_vectors, allow_pickle=False)
        (staging / manifests.ITEM_IDS_FILE).write_bytes("".join(f"{item_id}\n" for item_id in item_ids).encode())
        (staging / manifests.GOLDEN_FILE).write_text(json.dumps(golden, allow_nan=False) + "\n")
        manifest = _manifest(network, labels, staging, state_space(network, item_ids, item_vectors))
        manifests.write(manifest, staging / manifests.MANIFEST_FILE)
        _replace(directory, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def state_space(network: Network, item_ids: Sequence[str], item_vectors: npt.NDArray[np.float32]) -> str:
    """Return the sha256, as 64 hex digits, of all that decides what `advance` makes of a row, and of nothing else.

    So models that only score differently have one state space, and the rows of one are the rows of the other.
    """
    head = {
        "formula": network.formula,
        "kinds": network.kinds,
        "dims": [network.state_size, network.vector_size],
        "item_ids": list(item_ids),
    }
    moving = item_vectors[:, : network.moving_size()]  # (N+1, D)
    content = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for numbers in (network.moves.numpy(), moving):
        content.update(np.ascontiguousarray(numbers, dtype="<f4").tobytes())
    return content.hexdigest()


def script(network: Network) -> torch.jit.ScriptModule:
    """Return the network as TorchScript with its exported methods, in evaluation mode.

    It is not frozen: that gains nothing measurable here, and would put a counter of the process into the bytes.
    """
    scripted: torch.jit.ScriptModule = torch.jit.script(network.eval())
    return scripted


def save_scripted(scripted: torch.jit.ScriptModule, path: Path) -> None:
    """Save a module without its debug records, whose source paths would make every checkout's bytes differ."""
    whole = io.BytesIO()
    torch.jit.save(scripted, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as kept:
        for record in archive.infolist():
            if not record.filename.endswith(".debug_pkl"):
                kept.writestr(zipfile.ZipInfo(record.filename), archive.read(record))


def load_scripted(directory: Path) -> torch.jit.ScriptModule:
    """Load the TorchScript module of an artefact after checking its hashes. Raises ManifestError."""
    manifests.verify_files(manifests.read(directory), directory)
    path = str(directory / manifests.MODEL_FILE)
    module: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]  # torch
    return module


def load_items(directory: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Load the item ids and the item vectors (N+1, V) of an artefact; row 0 is the cold-start vector."""
    item_ids = (directory / manifests.ITEM_IDS_FILE).read_bytes().decode().split("\n")[:-1]
    vectors: npt.NDArray[np.float32] = np.load(directory / manifests.ITEM_VECTORS_FILE, allow_pickle=False)
    return item_ids, vectors


def check_scripted(network: Network, scripted: Any, item_vectors: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Return golden inputs and answers, after checking that the scripted module gives them in every way of asking.

    Eager and scripted agree to TOLERANCE; batch size and padding change no score beyond it, and no state at all. Nor
    does what the state space leaves out of the item vectors.
    """
    advance = _advance_inputs(network, item_vectors)
    score = _score_inputs(network, item_vectors, scripted.advance(*advance.values()))
    with torch.inference_mode():
        states, scores = scripted.advance(*advance.values()), scripted.score(*score.values())
        _check_close("advance, eager and scripted", network.advance(*advance.values()), states, 0.0)
        _check_close("score, eager and scripted", network.score(*score.values()), scores, TOLERANCE)
        _check_close("advance, with the numbers that only score", _advance_unscored(network, advance), states, 0.0)
        for row in range(len(states)):
            one = scripted.advance(*(tensor[row : row + 1] for tensor in advance.values()))
            _check_close("advance, alone and in a batch", one[0], states[row], 0.0)
        for row in range(len(scores)):
            _check_close("score, alone and padded", _score_alone(scripted, score, row), scores[row], TOLERANCE)
    return {
        "advance": {**_as_json(advance), "expected": _tensor_as_json(states)},
        "score": {**_as_json(score), "expected": _tensor_as_json(scores)},
        "tolerance": TOLERANCE,
    }


def _advance_unscored(network: Network, advance: dict[str, Tensor]) -> Tensor:
    """Return the states when the part of the item vectors that only scores is zero."""
    moving = torch.arange(network.vector_size) < network.moving_size()  # (V,)
    return network.advance(*(advance | {"items": advance["items"] * moving}).values())


def _score_alone(scripted: Any, score: dict[str, Tensor], row: int) -> Tensor:
    """Return the scores of one list, its first half asked for without the second."""
    alone = {name: tensor[row : row + 1] for name, tensor in score.items()}
    half = alone["items"].shape[1] // 2
    halves = []
    for part in (slice(0, half), slice(half, None)):
        cut = {name: alone[name][:, part] for name in ("items", "features", "mask")}
        halves.append(scripted.score(*(alone | cut).values())[0])
    return torch.cat(halves)


def _advance_inputs(network: Network, item_vectors: npt.NDArray[np.float32]) -> dict[str, Tensor]:
    """Return one interaction of every kind, and ratings of 1 to 5, from states that have seen something."""
    rng = np.random.default_rng(0)
    kind = torch.tensor([*range(len(network.kinds)), *[network.kinds.index(RATING)] * 5])  # (B,)
    value = torch.tensor([*[0.0] * len(network.kinds), 1.0, 2.0, 3.0, 4.0, 5.0])  # (B,)
    rows = len(kind)
    return {
        "state": torch.from_numpy(rng.uniform(0.0, 1.0, (rows, network.state_size)).astype(np.float32)),
        "items": torch.from_numpy(item_vectors[rng.integers(0, len(item_vectors), rows)]),
        "kind": kind,
        "value": value,
        "dt_s": torch.from_numpy(rng.uniform(0.0, 1e5, rows).astype(np.float32)),
    }


def _score_inputs(network: Network, item_vectors: npt.NDArray[np.float32], states: Tensor) -> dict[str, Tensor]:
    """Return three lists: of an unknown user, of a known one, and one that is padding only."""
    rng = np.random.default_rng(1)
    lists, candidates = 3, 8
    mask = torch.ones((lists, candidates), dtype=torch.bool)
    mask[1, 6:], mask[2] = False, False
    items = torch.from_numpy(item_vectors[rng.integers(0, len(item_vectors), (lists, candidates))])
    return {
        "state": torch.stack((torch.zeros_like(states[0]), states[0], states[1])),  # (B, S)
        "history": torch.zeros((lists, HISTORY, network.vector_size)),
        "history_mask": torch.zeros((lists, HISTORY), dtype=torch.bool),
        "items": items * mask.unsqueeze(2),  # (B, C, V)
        "features": torch.zeros((lists, candidates, len(FEATURES))),
        "mask": mask,
    }


def _check_close(what: str, left: Tensor, right: Tensor, tolerance: float) -> None:
    worst = float((left - right).abs().max()) if left.numel() else 0.0
    if not worst <= tolerance:
        raise ExportError(f"{what}: answers differ by {worst:g}, allowed is {tolerance:g}; nothing was written")


def _check_items(item_ids: Sequence[str], item_vectors: npt.NDArray[np.float32], network: Network) -> None:
    expected = (len(item_ids) + 1, network.vector_size)
    if item_vectors.shape != expected or item_vectors.dtype != np.float32:
        raise ExportError(
            f"item vectors are {item_vectors.dtype} {item_vectors.shape}, not float32 {expected}; nothing was written"
        )
    if not np.isfinite(item_vectors).all():
        raise ExportError(
            "item vectors are not all finite: training diverged; nothing was written, train with another seed"
        )
    if len(set(item_ids)) != len(item_ids) or any("\n" in item_id for item_id in item_ids):
        raise ExportError("item ids repeat or hold a line break; nothing was written, mend the log")


def check_replaceable(directory: Path) -> None:
    """Raise ExportError unless an artefact can be written as `directory`; for whoever trains for minutes before."""
    if directory.resolve() == Path.cwd():
        raise ExportError(f"{directory}: is where you stand; nothing was written, name a directory below it")
    above = next(one for one in directory.absolute().parents if one.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ExportError(f"{directory}: {above} cannot be written to; nothing was written, name another directory")
    replaceable = not directory.exists() or (directory / manifests.MANIFEST_FILE).is_file()
    if not replaceable and not (directory.is_dir() and not any(directory.iterdir())):
        raise ExportError(f"{directory}: exists and is not an artefact; nothing was written, name another directory")


def _replace(directory: Path, staging: Path) -> None:
    """Put the staged artefact in place. A reader sees the old one or the new one, whole, or for a moment none.

    A worker that looks in that moment keeps what it serves: stream_app/model_watch.py.
    """
    if directory.exists():
        retired = staging.with_name(f"{staging.name}.retired")
        directory.rename(retired)
        staging.rename(directory)
        shutil.rmtree(retired)
    else:
        staging.rename(directory)


def _manifest(network: Network, labels: Labels, staging: Path, space: str) -> manifests.Manifest:
    files = {name: manifests.sha256_of(staging / name) for name in manifests.REQUIRED_FILES}
    contents = "".join(f"{name}={digest};" for name, digest in sorted(files.items()))
    return manifests.Manifest(
        name=labels.name,
        version=manifests.digest_of(contents.encode())[:12],
        format="torchscript",
        torch_version=str(torch.__version__),
        files=files,
        dims=manifests.Dims(S=network.state_size, V=network.vector_size, H=HISTORY, F=len(FEATURES)),
        features=list(FEATURES),
        kinds=network.kinds,
        metrics=labels.metrics,
        training=labels.training,
        created_ms=labels.created_ms,
        state_space=space,
    )


def _as_json(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: _tensor_as_json(tensor) for name, tensor in tensors.items()}


def _tensor_as_json(tensor: Tensor) -> list[Any]:
    """Return nested lists; axes after one of length zero are lost and come back from the manifest's dims."""
    return tensor.tolist()
