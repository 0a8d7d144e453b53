"""A link to one of two artefacts of one state space, as a deployment keeps it, and what each of them must answer."""

from collections.abc import Sequence

import numpy as np

from deploy.chaos.artefact import Models
from models import manifest as manifests
from tests.tiny_artefact import DIM


class ModelPlace(Models):
    """`current` leads to `first`; `second` moves users alike and scores them differently."""

    def scores(self, version: str, state: bytes, item_ids: Sequence[str]) -> list[float]:
        """Return the learned-ema scores that an artefact gives items `i-1`, `i-2`, ... for a user's state vector."""
        directory = {self.version(each): each for each in (self.first, self.second)}[version]
        rows = np.load(directory / manifests.ITEM_VECTORS_FILE)[[int(item_id[2:]) for item_id in item_ids]]  # (C, V)
        *user, count = np.frombuffer(state, np.float32)
        matches = rows[:, DIM : 2 * DIM] @ (np.array(user) / np.sqrt(1.0 + count)) + rows[:, -1]  # (C,)
        return [float(score) for score in matches]
