"""A real artefact of a few items, written in a fraction of a second, and the formula of any learned moving average.

The numbers of the tiny one are small multiples of 1/8: same format, same checks as a trained one.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deploy.chaos.errors import ChaosError
from models import manifest as manifests
from models.export import Labels, write_artefact
from models.manifest import Training
from models.networks import NETWORKS, VALUE_BUCKETS
from schemas.records import KINDS
from stream_app.scorer import load_artefact

FloatArray = NDArray[np.float32]

ITEMS = 20
DIM = 4


def item_ids(items: int = ITEMS) -> list[str]:
    """Return the ids `i-1` to `i-<items>` of a tiny artefact."""
    return [f"i-{number}" for number in range(1, items + 1)]


def write_tiny_artefact(
    directory: Path,
    *,
    model: str = "learned-ema",
    items: int = ITEMS,
    dim: int = DIM,
    seed: int = 0,
    score_seed: int | None = None,
) -> Path:
    """Write an untrained model over a seeded item table into `directory`, and return it.

    `model` is a name of models.networks.NETWORKS. A rate of 1/2, and kind weights of 1 to 1/4, move its users. Two of
    one `seed` and another `score_seed` share a state space and score differently.
    """
    torch.manual_seed(seed)
    kinds = ["unknown", *KINDS]
    network = NETWORKS[model](dim, kinds)
    slots = torch.arange(len(kinds) * VALUE_BUCKETS)
    still = slots // VALUE_BUCKETS == kinds.index("impression")
    network.fill_moves(torch.tensor(0.5), 1.0 - (slots % 4) / 4.0, still)
    rng = np.random.default_rng(seed)
    vectors = (rng.integers(-8, 9, (items + 1, network.vector_size)) / 8.0).astype(np.float32)  # (N + 1, V)
    if score_seed is not None:
        scoring = vectors[:, network.moving_size() :]
        scoring[:] = np.random.default_rng([seed, score_seed]).integers(-8, 9, scoring.shape) / 8.0
    labels = Labels(
        name=f"tiny-{model}",
        training=Training(from_ms=0, until_ms=1, interactions=1, loss="none", seed=seed),
        created_ms=0,
        metrics={},
    )
    write_artefact(network, item_ids(items), vectors, labels, directory)
    return directory


class Models:
    """Two artefacts of one state space, a corrupt one, and the link `current` that workers serve from: to the first.

    Of a given artefact the second is a copy under another version; of none, a tiny one that scores differently.
    """

    def __init__(self, directory: Path, given: Path | None = None) -> None:
        """Write them into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        self.second, self.corrupt = directory / "second", directory / "corrupt"
        if given is None:
            self.first = write_tiny_artefact(directory / "first", score_seed=1)
            write_tiny_artefact(self.second, score_seed=2)
        else:
            self.first = given.resolve()
            shutil.copytree(self.first, self.second)
            manifest = manifests.read(self.first)
            again = replace(manifest, version=f"{manifest.version}-again")
            manifests.write(again, self.second / manifests.MANIFEST_FILE)
        shutil.copytree(self.second, self.corrupt)
        _flip_a_bit(self.corrupt / manifests.MODEL_FILE)
        self.current = directory / "current"
        self.point_at(self.first)

    def point_at(self, artefact: Path) -> None:
        """Let the link lead to an artefact, in one step."""
        fresh = self.current.with_name("fresh")
        fresh.symlink_to(artefact)
        fresh.replace(self.current)

    def version(self, artefact: Path) -> str:
        """Return the version of an artefact."""
        return manifests.read(artefact).version


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """What the oracle must know of a learned moving average, and the space that names its state vectors."""

    moves: FloatArray  # (kinds * 6, 3): keep, gain, step
    rows: dict[str, FloatArray]  # item id to its vector, "" for the unknown item
    kinds: list[str]
    state_size: int
    space: int

    def items(self) -> list[str]:
        """Return the ids of the known items."""
        return [item_id for item_id in self.rows if item_id]


def formula_of(directory: Path) -> Formula:
    """Read the formula off an artefact by asking its `advance` for zeros and ones, which multiply exactly.

    Raises:
        ChaosError: it is no learned moving average; the oracle knows no other formula.
    """
    artefact = load_artefact(directory)
    manifest = artefact.manifest
    width, size = manifest.dims.V, manifest.dims.S
    if width != 2 * size - 1:
        raise ChaosError(
            f"{directory}: S={size}, V={width} is no learned-ema (V = 2 S - 1); the oracle could not tell right from "
            "wrong, nothing was started; give a learned-ema artefact, or none for the tiny one"
        )
    slots = np.arange(len(manifest.kinds) * VALUE_BUCKETS)
    kinds, values = slots // VALUE_BUCKETS, (slots % VALUE_BUCKETS).astype(np.float32)
    dt_s = np.zeros(len(slots), np.float32)

    def moved(state: float, item: float) -> FloatArray:
        states = np.full((len(slots), size), state, np.float32)  # (B, S)
        items = np.full((len(slots), width), item, np.float32)  # (B, V)
        return artefact.model.advance(states, items, kinds, values, dt_s)

    moves = np.stack([moved(1.0, 0.0)[:, 0], moved(0.0, 1.0)[:, 0], moved(0.0, 0.0)[:, -1]], axis=1)  # (B, 3)
    vectors = np.load(directory / "items.npy", allow_pickle=False)  # (N + 1, V)
    names = (directory / "items.txt").read_text(encoding="utf-8").split("\n")[: len(vectors) - 1]
    return Formula(
        moves=moves,
        rows=dict(zip(["", *names], vectors, strict=True)),
        kinds=list(manifest.kinds),
        state_size=size,
        space=artefact.space,
    )
