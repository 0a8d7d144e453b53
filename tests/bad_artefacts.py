"""Ways in which an artefact is bad, each with what a running worker calls it. They spoil a sound copy in place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models import manifest as manifests
from tests.tiny_artefact import DIM, write_tiny_artefact

Spoil = Callable[[Path], None]


def flip_a_byte(file: str) -> Spoil:
    """Return what flips one bit in the middle of a file."""

    def spoil(directory: Path) -> None:
        content = bytearray((directory / file).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / file).write_bytes(content)

    return spoil


def cut(file: str) -> Spoil:
    """Return what leaves half of a file, as a copy under way or a full disk does."""

    def spoil(directory: Path) -> None:
        content = (directory / file).read_bytes()
        (directory / file).write_bytes(content[: len(content) // 2])

    return spoil


def remove(file: str) -> Spoil:
    """Return what removes a file."""
    return lambda directory: (directory / file).unlink()


def replaced_by(**changes: Any) -> Spoil:
    """Return what puts another tiny artefact in its place."""

    def spoil(directory: Path) -> None:
        write_tiny_artefact(directory, **changes)

    return spoil


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None], file: str = manifests.MANIFEST_FILE) -> None:
    """Change the manifest, or another JSON file together with its promised hash."""
    content = json.loads((directory / file).read_text())
    change(content)
    (directory / file).write_text(json.dumps(content))
    if file != manifests.MANIFEST_FILE:
        promise(directory, file)


def promise(directory: Path, file: str) -> None:
    """Make the manifest promise a file as it is."""
    digest = manifests.sha256_of(directory / file)
    rewrite(directory, lambda manifest: manifest["files"].update({file: digest}))


def answer_otherwise(directory: Path) -> None:
    """Change a golden score, and promise it."""

    def change(golden: dict[str, Any]) -> None:
        golden["score"]["expected"][0][0] += 0.01

    rewrite(directory, change, manifests.GOLDEN_FILE)


def claim_the_state_space(directory: Path) -> None:
    """Put a model in its place that moves users otherwise, and say that it does not."""
    space = manifests.read(directory).state_space
    write_tiny_artefact(directory, seed=5)
    rewrite(directory, lambda manifest: manifest.update(state_space=space))


def rename_the_state_space(directory: Path) -> None:
    """Say that rows are of another state space, though nothing moves them otherwise."""
    rewrite(directory, lambda manifest: manifest.update(state_space="0" * 64))


def spoil_the_vectors(directory: Path) -> None:
    """Put NaN into the item vectors, and promise them."""
    path = directory / manifests.ITEM_VECTORS_FILE
    vectors = np.load(path, allow_pickle=False)
    vectors[1, 0] = np.nan
    np.save(path, vectors, allow_pickle=False)
    promise(directory, manifests.ITEM_VECTORS_FILE)


BAD_ARTEFACTS: dict[str, tuple[Spoil, str]] = {
    "a byte of the module flipped": (flip_a_byte(manifests.MODEL_FILE), "rejected_hash"),
    "a byte of the item vectors flipped": (flip_a_byte(manifests.ITEM_VECTORS_FILE), "rejected_hash"),
    "the module cut": (cut(manifests.MODEL_FILE), "rejected_hash"),
    "the item ids cut": (cut(manifests.ITEM_IDS_FILE), "rejected_hash"),
    "the golden answers missing": (remove(manifests.GOLDEN_FILE), "rejected_hash"),
    "the manifest cut": (cut(manifests.MANIFEST_FILE), "load_error"),
    "the manifest missing": (remove(manifests.MANIFEST_FILE), "load_error"),
    "nothing there": (shutil.rmtree, "load_error"),
    "item vectors with NaN": (spoil_the_vectors, "load_error"),
    "other golden answers": (answer_otherwise, "rejected_golden"),
    "other dims": (replaced_by(dim=DIM + 1), "rejected_space"),
    "other items": (replaced_by(items=7), "rejected_space"),
    "other moves": (replaced_by(seed=5), "rejected_space"),
    "the same moves under another name": (rename_the_state_space, "rejected_space"),
    "other moves under the same name": (claim_the_state_space, "rejected_space"),
}
