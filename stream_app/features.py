"""Gather: turn candidate lists and user rows into the arrays a model scores. Pure: no I/O, no clock."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

import numpy as np
from numpy.typing import NDArray

from schemas.records import CandidateList
from stream_app.errors import ArtefactError
from stream_app.state import FloatArray, IntArray, UserRow

BoolArray = NDArray[np.bool_]


class ItemArena:
    """Item vectors of one artefact, (N + 1, V) float32; row 0 is the cold-start vector of unknown items."""

    def __init__(self, item_ids: Sequence[str], vectors: FloatArray, kinds: Sequence[str]) -> None:
        """Index the rows: item_ids[r] names row r + 1; kinds[0] stands for unknown kinds.

        Raises:
            ArtefactError: the number of ids and vectors differ, or an id stands twice.
        """
        self._row_of = {item_id: row for row, item_id in enumerate(item_ids, start=1)}
        if not len(self._row_of) + 1 == len(item_ids) + 1 == len(vectors):
            raise ArtefactError(
                f"items: {len(item_ids)} ids ({len(self._row_of)} distinct) for {len(vectors) - 1} vectors; "
                "the artefact is not served; export it again"
            )
        self._vectors = np.ascontiguousarray(vectors, dtype=np.float32)  # (N + 1, V)
        self._kind_of = {kind: index for index, kind in enumerate(kinds)}

    def __len__(self) -> int:
        return len(self._row_of)

    def item_row(self, item_id: str) -> int:
        """Return the row of the item, 0 when it is unknown."""
        return self._row_of.get(item_id, 0)

    def item_rows(self, item_ids: Sequence[str]) -> IntArray:
        """Return the rows (C,) of the items, 0 for unknown ones."""
        return np.fromiter(map(self._row_of.get, item_ids, repeat(0)), dtype=np.int64, count=len(item_ids))

    def some_ids(self, count: int) -> list[str]:
        """Return up to `count` item ids, spread over the rows."""
        return list(islice(self._row_of, 0, None, max(1, -(-len(self._row_of) // count))))

    def kind_index(self, kind: str) -> int:
        """Return the number of the kind, 0 when it is unknown."""
        return self._kind_of.get(kind, 0)

    def vectors(self, rows: IntArray) -> FloatArray:
        """Return the vectors (..., V) of rows (...)."""
        return self._vectors.take(rows, axis=0)  # half the time of indexing (tests/bench/bench_stages.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureBatch:
    """Everything a model needs to score B lists, padded to the longest."""

    states: FloatArray  # (B, S)
    history: FloatArray  # (B, H, V)
    history_mask: BoolArray  # (B, H)
    items: FloatArray  # (B, C, V)
    features: FloatArray  # (B, C, F)
    mask: BoolArray  # (B, C), True where there is a candidate
    cold_items: IntArray  # (B,), how many candidates the model does not know

    def for_unknown_user(self) -> "FeatureBatch":
        """Return the same lists as an unknown user would bring them."""
        return FeatureBatch(
            states=np.zeros_like(self.states),
            history=np.zeros_like(self.history),
            history_mask=np.zeros_like(self.history_mask),
            items=self.items,
            features=self.features,
            mask=self.mask,
            cold_items=self.cold_items,
        )


def _retrieval_score(request: CandidateList) -> FloatArray:
    scores = request.retrieval_scores
    if scores is None:
        return np.zeros(len(request.item_ids), dtype=np.float32)
    return np.array(scores, dtype=np.float64).clip(-3.0e38, 3.0e38).astype(np.float32)


def _inverse_retrieval_position(request: CandidateList) -> FloatArray:
    return 1.0 / np.arange(1, len(request.item_ids) + 1, dtype=np.float32)


FEATURES: Mapping[str, Callable[[CandidateList], FloatArray]] = {
    "retrieval_score": _retrieval_score,
    "inverse_retrieval_position": _inverse_retrieval_position,
}


def check_features(names: Sequence[str]) -> None:
    """Refuse a model that wants a feature this worker cannot compute.

    Raises:
        ArtefactError: naming the feature and the known ones.
    """
    for name in names:
        if name not in FEATURES:
            raise ArtefactError(
                f"manifest feature {name!r}: not one of {', '.join(FEATURES)}; the artefact is not served; "
                "export it with features this worker computes"
            )


def gather(
    requests: Sequence[CandidateList],
    rows: Sequence[UserRow],
    *,
    arena: ItemArena,
    history_size: int,
    feature_names: Sequence[str],
) -> FeatureBatch:
    """Return the feature batch of B lists and the rows of their B users.

    Args:
        history_size: H, how many of a user's last items the model reads; 0 when it keeps all in its state.
        feature_names: the F columns of `features`, in the order of the manifest.
    """
    counts = np.array([len(request.item_ids) for request in requests], dtype=np.int64)  # (B,)
    mask: BoolArray = np.arange(counts.max(initial=0)) < counts[:, np.newaxis]  # (B, C)
    item_rows = np.zeros(mask.shape, dtype=np.int64)  # (B, C)
    item_rows[mask] = arena.item_rows([item_id for request in requests for item_id in request.item_ids])
    features = np.zeros((*mask.shape, len(feature_names)), dtype=np.float32)  # (B, C, F)
    for f, name in enumerate(feature_names):
        for b, request in enumerate(requests):
            features[b, : counts[b], f] = FEATURES[name](request)
    history, history_mask = _history(rows, arena, history_size)
    states = np.frombuffer(b"".join(row.vector for row in rows), dtype=np.float32)
    return FeatureBatch(
        states=states.reshape(len(requests), -1),  # (B, S)
        history=history,
        history_mask=history_mask,
        items=arena.vectors(item_rows),  # (B, C, V)
        features=features,
        mask=mask,
        cold_items=((item_rows == 0) & mask).sum(axis=1),  # (B,)
    )


def _history(rows: Sequence[UserRow], arena: ItemArena, history_size: int) -> tuple[FloatArray, BoolArray]:
    """Return the last items of each user, newest last, padded at the front."""
    item_rows = np.zeros((len(rows), history_size), dtype=np.int64)  # (B, H)
    mask = np.zeros((len(rows), history_size), dtype=np.bool_)  # (B, H)
    for b, row in enumerate(rows if history_size else ()):
        recent = row.history()[-history_size:]
        if recent:
            item_rows[b, -len(recent) :] = arena.item_rows(recent)
            mask[b, -len(recent) :] = True
    return arena.vectors(item_rows), mask
