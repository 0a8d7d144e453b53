"""What every benchmark sends: a random artefact, seeded records, and users that have a past."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import torch

from models.export import Labels, write_artefact
from models.manifest import Manifest, Training
from models.networks import LearnedEma
from schemas.codec import encode
from schemas.records import KINDS, CandidateList, Interaction
from stream_app.scorer import load_artefact
from stream_app.state import Fence, PositionedInteraction, UserRow, advance, cold_row

EMBEDDING_SIZE = 64
FIRST_EVENT_TIME_MS = 1_700_000_000_000
INTERACTIONS_A_USER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes of a seeded load; users and items are drawn uniformly, the worst case for a cache and for folding."""

    seed: int = 7
    users: int = 20_000
    items: int = 20_000
    candidates: int = 100
    k: int = 10

    def item_id(self, index: int) -> str:
        """Return the id of an item."""
        return f"i-{index}"

    def user_id(self, index: int) -> str:
        """Return the id of a user."""
        return f"u-{index}"

    def interactions(self, count: int) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values of interactions, every field filled (about 270 bytes)."""
        for record in self._interactions(count):
            yield record.user_id.encode(), encode(record)

    def _interactions(self, count: int) -> Iterator[Interaction]:
        rng = np.random.default_rng(self.seed)
        users, items = rng.integers(0, self.users, count).tolist(), rng.integers(0, self.items, count).tolist()
        kinds = rng.integers(0, len(KINDS), count).tolist()
        for n in range(count):
            yield Interaction(
                event_id=f"e-{n:012d}",
                user_id=self.user_id(users[n]),
                item_id=self.item_id(items[n]),
                kind=KINDS[kinds[n]],
                event_time_ms=FIRST_EVENT_TIME_MS + n,
                value=float(n % 5 + 1),
                request_id=f"r-{n:012d}",
                position=n % 20,
                context={"surface": "home"},
            )

    def lists(self, count: int, *, deadline_ms: int | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values of candidate lists with retrieval scores (about 1.7 kB for 100 candidates)."""
        rng = np.random.default_rng(self.seed + 1)
        names = np.array([self.item_id(index) for index in range(self.items)], dtype=object)
        scores = [round(1.0 / (position + 1), 4) for position in range(self.candidates)]
        for n in range(count):
            user_id = self.user_id(int(rng.integers(0, self.users)))
            picked = rng.choice(self.items, self.candidates, replace=False, shuffle=False)
            request = CandidateList(
                request_id=f"r-{n}",
                user_id=user_id,
                event_time_ms=FIRST_EVENT_TIME_MS + 3_600_000 + n,
                item_ids=names[picked].tolist(),
                retrieval_scores=scores,
                k=self.k,
                deadline_ms=deadline_ms,
                context={"surface": "home"},
            )
            yield user_id.encode(), encode(request)

    def write_artefact(self, directory: Path) -> Manifest:
        """Write a learned moving average with random items: what it ranks means nothing, what it costs is real."""
        network = LearnedEma(EMBEDDING_SIZE, ["unknown", *KINDS])
        slots = len(network.moves)
        network.fill_moves(torch.tensor(0.17), torch.ones(slots), torch.zeros(slots, dtype=torch.bool))
        vectors = np.random.default_rng(self.seed).normal(0.0, 0.1, (self.items + 1, network.vector_size))
        training = Training(from_ms=0, until_ms=1, interactions=1, loss="softmax", seed=self.seed)
        return write_artefact(
            network,
            [self.item_id(index) for index in range(self.items)],
            vectors.astype(np.float32),
            Labels(name="learned-ema", training=training, created_ms=0, metrics={}),
            directory,
        )

    def user_rows(self, directory: Path) -> dict[str, UserRow]:
        """Return the row of every user after a few interactions, as the artefact's `advance` makes them."""
        artefact = load_artefact(directory)
        past = list(self._interactions(self.users * INTERACTIONS_A_USER))
        return {
            update.user_id: update.row
            for update in advance(
                {self.user_id(index): cold_row(artefact.manifest.dims.S) for index in range(self.users)},
                [PositionedInteraction(one.user_id, one, Fence(0, 0, n), -1) for n, one in enumerate(past)],
                model=artefact.model,
                vocabulary=artefact.arena,
                future_tolerance_ms=0,
            ).updates
        }


def slate_order(value: bytes) -> tuple[str, list[str]]:
    """Return the request id of a slate and its items."""
    slate = orjson.loads(value)
    return slate["request_id"], slate["item_ids"]
