"""A real artefact of a few items, written in a fraction of a second: same format, same checks as a trained one.

Its numbers are small multiples of 1/8, so that sums of a few of them are exact in float32, whatever adds them up.
"""

from pathlib import Path

import numpy as np
import torch

from models.export import Labels, write_artefact
from models.manifest import Training
from models.networks import NETWORKS, VALUE_BUCKETS
from schemas.records import KINDS

ITEMS = 20
DIM = 4


def item_ids(items: int = ITEMS) -> list[str]:
    """Return the ids `i-1` to `i-<items>` of a tiny artefact."""
    return [f"i-{number}" for number in range(1, items + 1)]


def write_tiny_artefact(
    directory: Path, *, model: str = "learned-ema", items: int = ITEMS, dim: int = DIM, seed: int = 0
) -> Path:
    """Write an untrained model over a seeded item table into `directory`, and return it.

    `model` is a name of models.networks.NETWORKS. A rate of 1/2, and kind weights of 1 to 1/4, move its users.
    """
    torch.manual_seed(seed)
    kinds = ["unknown", *KINDS]
    network = NETWORKS[model](dim, kinds)
    slots = torch.arange(len(kinds) * VALUE_BUCKETS)
    still = slots // VALUE_BUCKETS == kinds.index("impression")
    network.fill_moves(torch.tensor(0.5), 1.0 - (slots % 4) / 4.0, still)
    rng = np.random.default_rng(seed)
    vectors = (rng.integers(-8, 9, (items + 1, network.vector_size)) / 8.0).astype(np.float32)  # (N + 1, V)
    labels = Labels(
        name=f"tiny-{model}",
        training=Training(from_ms=0, until_ms=1, interactions=1, loss="none", seed=seed),
        created_ms=0,
        metrics={},
    )
    write_artefact(network, item_ids(items), vectors, labels, directory)
    return directory
