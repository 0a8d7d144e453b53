"""The training part of a log as rows by user, and chunks of them as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.log import InteractionLog
from models.networks import DEFAULT_STRENGTHS, RATING, STILL_KINDS, VALUE_BUCKETS

CONTEXT = 64  # interactions before a chunk's first target; at a rate of .1 what lies before weighs a thousandth
TARGETS = 64
RARE_COUNT = 1  # items with at most so many interactions share the cold-start row and teach it
UNWANTED_KINDS = frozenset({"skip", "dislike"})

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """n chunks of L = CONTEXT + TARGETS interactions of one user each; the last T of them are also targets."""

    items: Tensor  # (n, L) int64, table rows
    slots: Tensor  # (n, L) int64
    present: Tensor  # (n, L) float32, 0.0 for padding
    target_items: Tensor  # (n, T) int64
    labels: Tensor  # (n, T) float32, what `mse` regresses on
    wanted: Tensor  # (n, T) bool, targets of `softmax`
    labelled: Tensor  # (n, T) bool, targets of `mse`

    def seen(self, targets: Tensor) -> Tensor:
        """Return the table rows that stand earlier in the chunk than each chosen target, 0 for none: (P, L).

        `targets` (n, T) bool chooses them.
        """
        length = self.items.shape[1]
        chunk, place = targets.nonzero(as_tuple=True)  # (P,), (P,)
        earlier = torch.arange(length) < (place + length - targets.shape[1]).unsqueeze(1)  # (P, L)
        return self.items[chunk] * earlier  # padding has row 0 already


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRows:
    """R interactions that move a user, ordered by user and then by time, and what is known of their items.

    Table row 0 stands for the cold start and is trained on the rare items; the others follow from 1.
    """

    items: IntArray  # (R,) table rows
    slots: IntArray  # (R,)
    labels: npt.NDArray[np.float32]  # (R,)
    wanted: npt.NDArray[np.bool_]  # (R,)
    positions: IntArray  # (chunks, L) indices into the rows, -1 for padding
    catalogue: IntArray  # (N,) log items that training has seen
    row_of_catalogue: IntArray  # (N,) their table rows
    row_counts: IntArray  # (rows,) interactions of each table row
    slot_counts: IntArray  # (slots,) interactions of each slot
    repeat_share: float  # of the interactions, those with an item that the user has met before

    @classmethod
    def of(cls, log: InteractionLog, m: int, kinds: Sequence[str]) -> "TrainingRows":
        """Take the first m interactions of a log, without those that move nobody."""
        kind_index = np.array([kinds.index(name) for name in log.kind_names], dtype=np.int64)
        still = np.array([name in STILL_KINDS for name in log.kind_names], dtype=bool)
        used = np.flatnonzero(~still[log.kinds[:m]])
        used = used[np.argsort(log.users[used], kind="stable")]
        kind = kind_index[log.kinds[used]]
        value = log.values[used]
        slots = kind * VALUE_BUCKETS + np.clip(np.round(value), 0, VALUE_BUCKETS - 1).astype(np.int64)
        unwanted = np.array([name in UNWANTED_KINDS for name in kinds], dtype=bool)
        catalogue, inverse, counts = np.unique(log.items[used], return_inverse=True, return_counts=True)
        frequent = counts > RARE_COUNT
        row_of_catalogue = np.where(frequent, np.cumsum(frequent), 0)
        items = row_of_catalogue[inverse]
        pairs = log.users[used] * len(log.item_ids) + log.items[used]
        return cls(
            items=items,
            slots=slots,
            labels=_labels(kinds, kind, value),
            wanted=~unwanted[kind],
            positions=_positions(log.users[used]),
            catalogue=catalogue,
            row_of_catalogue=row_of_catalogue,
            row_counts=np.bincount(items, minlength=int(frequent.sum()) + 1),
            slot_counts=np.bincount(slots, minlength=len(kinds) * VALUE_BUCKETS),
            repeat_share=1.0 - len(np.unique(pairs)) / max(len(pairs), 1),
        )

    @property
    def chunk_count(self) -> int:
        """Return the number of chunks."""
        return len(self.positions)

    @property
    def row_count(self) -> int:
        """Return the number of table rows, the shared one included."""
        return len(self.row_counts)

    @property
    def rare_count(self) -> int:
        """Return how many items share row 0."""
        return int((self.row_of_catalogue == 0).sum())

    def chunks(self, picked: Tensor) -> Chunks:
        """Return the chunks with these indices (n,)."""
        positions = self.positions[picked.numpy()]  # (n, L)
        present = positions >= 0
        targets = positions[:, CONTEXT:]  # (n, T)
        labelled = targets >= 0
        return Chunks(
            items=torch.from_numpy(np.where(present, self.items[positions], 0)),
            slots=torch.from_numpy(np.where(present, self.slots[positions], 0)),
            present=torch.from_numpy(present.astype(np.float32)),
            target_items=torch.from_numpy(np.where(labelled, self.items[targets], 0)),
            labels=torch.from_numpy(self.labels[targets]),
            wanted=torch.from_numpy(labelled & self.wanted[targets]),
            labelled=torch.from_numpy(labelled),
        )


def _labels(kinds: Sequence[str], kind: IntArray, value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return what a score shall come to: a rating's value, the default strength of any other kind."""
    strengths = np.array([DEFAULT_STRENGTHS.get(name, DEFAULT_STRENGTHS["unknown"]) for name in kinds])
    rated = (kind == kinds.index(RATING)) & (value > 0)
    return np.where(rated, np.clip(value, 1.0, 5.0), strengths[kind]).astype(np.float32)


def _positions(users: IntArray) -> IntArray:
    """Cut each user's run of rows into chunks: CONTEXT rows before, TARGETS rows in; -1 pads: (chunks, L)."""
    offsets = np.arange(-CONTEXT, TARGETS)
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.array([], dtype=np.int64)
    ends = np.r_[starts[1:], len(users)] if len(users) else starts
    chunks = [
        np.where((rows >= start) & (rows < end), rows, -1)
        for start, end in zip(starts, ends, strict=True)
        for first in range(start, end, TARGETS)
        for rows in (first + offsets,)
    ]
    return np.array(chunks, dtype=np.int64).reshape(-1, CONTEXT + TARGETS)
