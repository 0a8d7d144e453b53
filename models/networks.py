"""The four models as the worker runs them: `advance` moves users, `score` scores candidate lists.

Every model moves a user by a decayed sum over the items of his interactions:

    user <- keep[slot] * user + gain[slot] * item

A slot is a kind and a value bucket (no value, 1, 2, 3, 4, 5); only ratings differ between buckets. `fill_moves` fills
the table from what training has learned. `advance` uses separate multiplications and additions only, so that batch
size changes no bit of a row; neither does it in `score`, which sums over the last axis, but for the matrix products of
`Mlp` (last digits).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

RATING = "rating"
VALUE_BUCKETS = 6
# How far an interaction of each kind moves a user, where a click is 1: used for kinds that training has never seen.
DEFAULT_STRENGTHS: Mapping[str, float] = {
    "unknown": 0.5, "impression": 0.0, "view": 0.5, "click": 1.0, "like": 1.5, "dislike": -1.0, "skip": -0.5,
    "rating": 1.0, "add_to_cart": 1.5, "purchase": 2.0, "share": 1.5, "complete": 1.5,
}  # fmt: skip
STILL_KINDS = frozenset({"impression"})  # what was merely shown neither moves a user nor ages his state


class Network(nn.Module):
    """Base of the models: an item vector is [embedding (D) | bias], a state is the user embedding (D)."""

    moves: Tensor
    # Names what `advance` computes of moves, state and item. Part of the state space: another formula, another name.
    formula = "decayed-sum/1"

    def __init__(self, dim: int, kinds: Sequence[str]) -> None:
        super().__init__()
        self.dim = dim
        self.kinds = list(kinds)
        self.state_size = dim
        self.vector_size = dim + 1
        self.register_buffer("moves", torch.zeros(len(kinds) * VALUE_BUCKETS, 3))

    def fill_moves(self, rate: Tensor, strengths: Tensor, still: Tensor) -> None:
        """Set what each slot does: [keep | gain | step].

        rate () is a; strengths (slots,) are w; still (slots,) bool marks slots that leave the state alone.
        """
        keep = torch.where(still, 1.0, 1.0 - rate)
        gain = torch.where(still, 0.0, self.gains(rate, strengths))
        step = torch.where(still, 0.0, 1.0)
        self.moves.copy_(torch.stack((keep, gain, step), dim=1).detach())

    def moving_size(self) -> int:
        """Return how many leading numbers of an item vector `advance` reads; the others only score."""
        return self.dim

    def gains(self, rate: Tensor, strengths: Tensor) -> Tensor:
        """Return how much of an item each slot adds: the article's moving average adds a * w of it."""
        return rate * strengths

    def slots(self, kind: Tensor, value: Tensor) -> Tensor:
        """Return the slot of each interaction: kind (B,) int64, value (B,) with 0.0 for none -> (B,) int64."""
        return kind * 6 + value.round().clamp(0.0, 5.0).to(torch.int64)

    @torch.jit.export
    def advance(self, state: Tensor, items: Tensor, kind: Tensor, value: Tensor, dt_s: Tensor) -> Tensor:
        """Return the states after one interaction each: state (B, S), items (B, V), the rest (B,) -> (B, S)."""
        moves = self.moves[self.slots(kind, value)]  # (B, 3)
        return state * moves[:, 0:1] + items[:, : self.dim] * moves[:, 1:2]  # (B, D)

    @torch.jit.export
    def score(
        self,
        state: Tensor,
        history: Tensor,
        history_mask: Tensor,
        items: Tensor,
        features: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Return the scores of candidates: state (B, S), items (B, C, V) -> (B, C). Masked-out scores mean nothing."""
        embeddings = items[:, :, : self.dim]  # (B, C, D)
        return self.match(state.unsqueeze(1), embeddings) + items[:, :, self.dim]  # (B, C)

    def match(self, user: Tensor, item: Tensor) -> Tensor:
        """Return how well items suit users, without the item bias: (B, 1, D), (B, C, D) -> (B, C)."""
        raise NotImplementedError

    def users(self, state: Tensor) -> Tensor:
        """Return the user embeddings that `match_all` takes: (P, S) -> (P, D)."""
        return state

    def match_all(self, user: Tensor, item: Tensor) -> Tensor:
        """Return `match` of every user with every item, fast, for training: (P, D), (M, D) -> (P, M)."""
        raise NotImplementedError


class Dot(Network):
    """The dot product of user and item."""

    def match(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the dot products."""
        return (user * item).sum(-1)

    def match_all(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the dot products of all pairs."""
        return user @ item.T


class Cosine(Network):
    """The cosine of user and item, times a learned scale; zero for a user without interactions."""

    def __init__(self, dim: int, kinds: Sequence[str]) -> None:
        super().__init__(dim, kinds)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def unit(self, vectors: Tensor) -> Tensor:
        """Return the vectors at length one; zero stays zero: (..., D) -> (..., D)."""
        return vectors / ((vectors * vectors).sum(-1, keepdim=True) + 1e-12).sqrt()

    def match(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the scaled cosines."""
        return (self.unit(user) * self.unit(item)).sum(-1) * self.scale

    def match_all(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the scaled cosines of all pairs."""
        return self.unit(user) @ self.unit(item).T * self.scale


class Mlp(Network):
    """A fully connected network on [u; i; u*i], ReLU inside; silent for a user without interactions.

    The first layer is kept as three matrices, one for each part of its input: the user's part is then computed
    once a list in `score`, and each part once a row in `match_all`.
    """

    def __init__(self, dim: int, kinds: Sequence[str], hidden: int = 64) -> None:
        super().__init__(dim, kinds)
        self.from_user = nn.Linear(dim, hidden)
        self.from_item = nn.Linear(dim, hidden, bias=False)
        self.from_product = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, 1, bias=False)

    def match(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the network's answers, zero where the user is zero."""
        hidden = self.from_user(user) + self.from_item(item) + self.from_product(user * item)  # (B, C, hidden)
        known = (user != 0.0).any(-1)  # (B, 1)
        answers: Tensor = self.out(torch.relu(hidden)).squeeze(-1)  # (B, C)
        return answers * known

    def match_all(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the network's answers for all pairs."""
        return self.match(user.unsqueeze(1), item.unsqueeze(0))

    @torch.jit.export
    def probability(self, scores: Tensor) -> Tensor:
        """Return the article's sigmoid reading of scores, of any shape."""
        return torch.sigmoid(scores)


class LearnedEma(Network):
    """The default: own input and output item tables, and a count that decays like the user.

    An item vector is [input F (D) | output E (D) | bias], a state is [u (D) | c]:
    u <- (1-a) u + w F[item], c <- (1-a) c + 1, score = E[item].u / sqrt(1+c) + bias.
    """

    formula = "decayed-sum-and-count/1"

    def __init__(self, dim: int, kinds: Sequence[str]) -> None:
        super().__init__(dim, kinds)
        self.state_size = dim + 1
        self.vector_size = 2 * dim + 1

    def gains(self, rate: Tensor, strengths: Tensor) -> Tensor:
        """Return the strengths as they are: dividing by sqrt(1+c) keeps the user bounded."""
        return strengths

    @torch.jit.export
    def advance(self, state: Tensor, items: Tensor, kind: Tensor, value: Tensor, dt_s: Tensor) -> Tensor:
        """Return the states after one interaction each: state (B, S), items (B, V), the rest (B,) -> (B, S)."""
        moves = self.moves[self.slots(kind, value)]  # (B, 3)
        arrived = torch.cat((items[:, : self.dim] * moves[:, 1:2], moves[:, 2:3]), dim=1)  # (B, S)
        return state * moves[:, 0:1] + arrived  # (B, S)

    @torch.jit.export
    def score(
        self,
        state: Tensor,
        history: Tensor,
        history_mask: Tensor,
        items: Tensor,
        features: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Return the scores of candidates: state (B, S), items (B, C, V) -> (B, C). Masked-out scores mean nothing."""
        outputs = items[:, :, self.dim : 2 * self.dim]  # (B, C, D)
        return self.match(self.users(state).unsqueeze(1), outputs) + items[:, :, 2 * self.dim]  # (B, C)

    def users(self, state: Tensor) -> Tensor:
        """Return u / sqrt(1+c): (P, S) -> (P, D)."""
        return state[:, : self.dim] / (state[:, self.dim :] + 1.0).sqrt()

    def match(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the dot products."""
        return (user * item).sum(-1)

    def match_all(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the dot products of all pairs."""
        return user @ item.T


NETWORKS: Mapping[str, type[Network]] = {"cosine": Cosine, "dot": Dot, "mlp": Mlp, "learned-ema": LearnedEma}
