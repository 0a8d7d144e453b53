"""A link to one of two artefacts of one state space, as a deployment keeps it, and what each of them must answer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models import manifest as manifests
from tests.tiny_artefact import DIM, write_tiny_artefact


class ModelPlace:
    """`current` leads to `first`; both move users alike and score them differently."""

    def __init__(self, directory: Path) -> None:
        """Write both and point at the first."""
        self.first = write_tiny_artefact(directory / "first", score_seed=1)
        self.second = write_tiny_artefact(directory / "second", score_seed=2)
        self.current = directory / "current"
        self.point_at(self.first)

    def point_at(self, directory: Path) -> None:
        """Replace the link in one step, as `ln -s` and `mv -T` do."""
        fresh = self.current.with_name("fresh")
        fresh.symlink_to(directory)
        fresh.replace(self.current)

    def version(self, directory: Path) -> str:
        """Return the version of an artefact."""
        return manifests.read(directory).version

    def scores(self, version: str, state: bytes, item_ids: Sequence[str]) -> list[float]:
        """Return the learned-ema scores that an artefact gives items `i-1`, `i-2`, ... for a user's state vector."""
        directory = {self.version(each): each for each in (self.first, self.second)}[version]
        rows = np.load(directory / manifests.ITEM_VECTORS_FILE)[[int(item_id[2:]) for item_id in item_ids]]  # (C, V)
        *user, count = np.frombuffer(state, np.float32)
        matches = rows[:, DIM : 2 * DIM] @ (np.array(user) / np.sqrt(1.0 + count)) + rows[:, -1]  # (C,)
        return [float(score) for score in matches]
