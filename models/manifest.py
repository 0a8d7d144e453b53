"""What an artefact promises: the fields of `manifest.json` and the hashes of the files beside it.

Stdlib only, because the worker imports this module and must not import torch or training code through it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.pt"
ITEM_VECTORS_FILE = "items.npy"
ITEM_IDS_FILE = "items.txt"
GOLDEN_FILE = "golden.json"
REQUIRED_FILES = (MODEL_FILE, ITEM_VECTORS_FILE, ITEM_IDS_FILE, GOLDEN_FILE)
UNKNOWN_KIND = "unknown"
_HEX_SHA256 = re.compile("[0-9a-f]{64}")


class ManifestError(Exception):
    """The manifest cannot be read, or a file is not what it promises; the artefact must not serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """Sizes of the tensors that cross the border: S state, V item vector, H history, F features."""

    S: int
    V: int
    H: int
    F: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Which interactions the artefact has seen: event times in ms, both ends included."""

    from_ms: int
    until_ms: int
    interactions: int
    loss: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The promise of one artefact. `kinds[0]` is the unknown kind; `features` are in the order of the F axis.

    `state_space`, 64 hex digits, names what `advance` makes of a row: artefacts of one state space share rows. None, in
    artefacts that do not say: the rows are theirs alone.
    """

    name: str
    version: str
    format: str
    torch_version: str
    files: dict[str, str]
    dims: Dims
    features: list[str]
    kinds: list[str]
    metrics: dict[str, float]
    training: Training
    created_ms: int
    state_space: str | None = None
    _kind_indices: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse names that would lead out of the directory, and kinds without the unknown one in front."""
        if self.kinds[:1] != [UNKNOWN_KIND]:
            raise ManifestError(f"kinds start with {self.kinds[:1]!r}: index 0 must be {UNKNOWN_KIND!r}; export again")
        if len(self.features) != self.dims.F:
            raise ManifestError(f"{len(self.features)} feature names for F={self.dims.F}: export again")
        for name in self.files:
            if name in {"", ".", ".."} or "/" in name or "\\" in name:
                raise ManifestError(f"file name {name!r} leads out of the artefact; refused")
        object.__setattr__(self, "_kind_indices", {kind: i for i, kind in enumerate(self.kinds)})

    def kind_index(self, kind: str) -> int:
        """Return the model's index of an interaction kind, 0 when the model does not know it."""
        return self._kind_indices.get(kind, 0)


def read(path: Path) -> Manifest:
    """Read `manifest.json` (its path, or the directory it lies in). Raises ManifestError with the field at fault."""
    file = path / MANIFEST_FILE if path.is_dir() else path
    try:
        fields = json.loads(file.read_bytes())
    except OSError as error:
        raise ManifestError(f"{file}: {error.strerror}; no artefact there, train one with `rerank train`") from error
    except ValueError as error:
        raise ManifestError(f"{file}: not JSON ({error}); train or copy the artefact again") from error
    try:
        return _from_json(fields)
    except ManifestError as error:
        raise ManifestError(f"{file}: {error}") from None


def write(manifest: Manifest, path: Path) -> None:
    """Write `manifest.json` at path (a file), readable by `read`."""
    fields = {name: value for name, value in asdict(manifest).items() if not name.startswith("_") and value is not None}
    path.write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def verify_files(manifest: Manifest, directory: Path) -> None:
    """Check that every promised file is there with the promised sha256. Raises ManifestError on the first failure."""
    missing = [name for name in REQUIRED_FILES if name not in manifest.files]
    if missing:
        raise ManifestError(f"{directory}: the manifest promises no {missing[0]}; export the artefact again")
    for name, promised in manifest.files.items():
        try:
            found = sha256_of(directory / name)
        except OSError as error:
            raise ManifestError(f"{directory / name}: {error.strerror}; copy the artefact again, whole") from error
        if found != promised:
            raise ManifestError(
                f"{directory / name}: sha256 {found[:12]} is not the promised {promised[:12]}; "
                "the file was changed or cut short, copy the artefact again"
            )


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content: bytes) -> str:
    """Return the sha256 of some bytes as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def _from_json(fields: Any) -> Manifest:
    return Manifest(
        name=_get(fields, "name", str),
        version=_get(fields, "version", str),
        format=_get(fields, "format", str),
        torch_version=_get(fields, "torch_version", str),
        files=_get_map(fields, "files", str),
        dims=Dims(**{axis: _get(_get(fields, "dims", dict), axis, int) for axis in ("S", "V", "H", "F")}),
        features=_get_list(fields, "features"),
        kinds=_get_list(fields, "kinds"),
        metrics=_get_map(fields, "metrics", float, int),
        training=_training(_get(fields, "training", dict)),
        created_ms=_get(fields, "created_ms", int),
        state_space=_state_space(fields),
    )


def _state_space(fields: Mapping[str, Any]) -> str | None:
    if "state_space" not in fields:
        return None
    value: str = _get(fields, "state_space", str)
    if _HEX_SHA256.fullmatch(value) is None:
        raise ManifestError(f"field 'state_space' is {value!r}, not 64 hex digits; export the artefact again")
    return value


def _training(fields: Any) -> Training:
    return Training(
        from_ms=_get(fields, "from_ms", int),
        until_ms=_get(fields, "until_ms", int),
        interactions=_get(fields, "interactions", int),
        loss=_get(fields, "loss", str),
        seed=_get(fields, "seed", int),
    )


def _get(fields: Any, name: str, *types: type) -> Any:
    if not isinstance(fields, Mapping) or name not in fields:
        raise ManifestError(f"field {name!r} is missing; export the artefact again")
    value = fields[name]
    if not isinstance(value, types) or isinstance(value, bool):
        raise ManifestError(f"field {name!r} is {value!r}, not {types[0].__name__}; export the artefact again")
    if isinstance(value, int) and value < 0:
        raise ManifestError(f"field {name!r} is {value!r}, below zero; export the artefact again")
    return value


def _get_list(fields: Any, name: str) -> list[str]:
    values = _get(fields, name, list)
    if not all(isinstance(value, str) for value in values):
        raise ManifestError(f"field {name!r} holds {values!r}, not names only; export the artefact again")
    return list(values)


def _get_map(fields: Any, name: str, *types: type) -> dict[str, Any]:
    values = _get(fields, name, dict)
    return {key: _get(values, key, *types) for key in values}
