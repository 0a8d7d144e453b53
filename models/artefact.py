"""An artefact as the worker sees it, for offline use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models import manifest as manifests
from models.export import load_items, load_scripted

LISTS_A_BATCH = 256

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class UnsupportedModelError(Exception):
    """The artefact is sound, but wants inputs that evaluation does not have."""


class Model:
    """An artefact as the worker sees it: item rows, kind indices, `advance` and `score` over arrays."""

    def __init__(self, directory: Path) -> None:
        """Load an artefact. Raises ManifestError, or UnsupportedModelError for one that needs more than states."""
        self.manifest = manifests.read(directory)
        self._module: Any = load_scripted(directory)
        item_ids, vectors = load_items(directory)
        self._vectors = torch.from_numpy(vectors)  # (N+1, V)
        self._row_of = {item_id: row for row, item_id in enumerate(item_ids, start=1)}
        dims = self.manifest.dims
        if dims.H or dims.F:
            raise UnsupportedModelError(
                f"{directory}: the model wants H={dims.H} history items and F={dims.F} features; "
                "evaluation feeds states only, replay the log through the worker instead"
            )

    def item_rows(self, item_ids: Sequence[str]) -> IntArray:
        """Return the table row of each item, 0 for items that the artefact does not know."""
        return np.array([self._row_of.get(item_id, 0) for item_id in item_ids], dtype=np.int64)

    def kind_indices(self, kinds: Sequence[str]) -> IntArray:
        """Return the model's index of each kind, 0 for kinds that it does not know."""
        return np.array([self.manifest.kind_index(kind) for kind in kinds], dtype=np.int64)

    def cold_states(self, users: int) -> FloatArray:
        """Return the states (B, S) of users without interactions."""
        return np.zeros((users, self.manifest.dims.S), dtype=np.float32)

    def advance(
        self, states: FloatArray, rows: IntArray, kinds: IntArray, values: FloatArray, dt_s: FloatArray
    ) -> FloatArray:
        """Return the states (B, S) after one interaction each."""
        with torch.inference_mode():
            moved = self._module.advance(
                torch.from_numpy(states),
                self._vectors[torch.from_numpy(rows)],
                torch.from_numpy(kinds),
                torch.from_numpy(values),
                torch.from_numpy(dt_s),
            )
        return np.asarray(moved.numpy(), dtype=np.float32)

    def score(self, states: FloatArray, rows: IntArray) -> FloatArray:
        """Return the scores (L, C) of candidate rows (L, C), -1 for padding, which scores -inf."""
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        for first in range(0, len(rows), LISTS_A_BATCH):
            part = slice(first, first + LISTS_A_BATCH)
            mask = rows[part] >= 0
            scores[part] = np.where(mask, self._score(states[part], np.maximum(rows[part], 0), mask), -np.inf)
        return scores

    def _score(self, states: FloatArray, rows: IntArray, mask: npt.NDArray[np.bool_]) -> FloatArray:
        lists, candidates = rows.shape
        with torch.inference_mode():
            scores = self._module.score(
                torch.from_numpy(states),
                torch.zeros((lists, 0, self._vectors.shape[1])),
                torch.zeros((lists, 0), dtype=torch.bool),
                self._vectors[torch.from_numpy(rows)],  # (B, C, V)
                torch.zeros((lists, candidates, 0)),
                torch.from_numpy(mask),
            )
        return np.asarray(scores.numpy(), dtype=np.float32)
