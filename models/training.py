"""Train a model on a log: all states at once, by a matrix of decays instead of a loop over interactions."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.log import InteractionLog
from models.networks import (
    DEFAULT_STRENGTHS,
    NETWORKS,
    RATING,
    STILL_KINDS,
    VALUE_BUCKETS,
    LearnedEma,
    Mlp,
    Network,
)
from models.sequences import Chunks, TrainingRows
from models.threads import one_thread
from schemas.records import KINDS

NO_REPEATS = 0.01  # share of interactions with an item that the user has met before
LOSSES = ("softmax", "mse")
FULL_SOFTMAX_ITEMS = 20_000  # beyond that, each step draws SAMPLED_ITEMS of the catalogue
SAMPLED_ITEMS = 4_096
SAMPLED_ITEMS_MLP = 64  # its answers for all pairs cost a hidden layer each


class TrainingError(Exception):
    """The log or the recipe cannot be trained on; nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train. The defaults were chosen on the 60-80 % slice of MovieLens-100K, never on its test part."""

    model: str = "learned-ema"
    loss: str = "softmax"
    seed: int = 0
    dim: int = 64
    epochs: int = 12
    chunks_a_step: int = 8
    learning_rate: float = 0.005
    weight_decay: float = 0.4
    dropout: float = 0.4
    embedding_std: float = 0.05
    initial_rate: float = 0.15

    def __post_init__(self) -> None:
        """Refuse names that do not exist."""
        if self.model not in NETWORKS:
            raise TrainingError(f"model {self.model!r}: not one of {', '.join(NETWORKS)}; nothing was trained")
        if self.loss not in LOSSES:
            raise TrainingError(f"loss {self.loss!r}: not one of {', '.join(LOSSES)}; nothing was trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A network ready for export, with the vectors (N+1, V) of the items that training has seen."""

    network: Network
    item_ids: list[str]
    item_vectors: npt.NDArray[np.float32]
    final_loss: float


def train(
    log: InteractionLog,
    m: int,
    recipe: Recipe,
    on_step: Callable[[int, int, float], None] = lambda _done, _total, _loss: None,
) -> Trained:
    """Train on the first m interactions of a log; nothing after them is read. Same arguments: same bits.

    `on_step` is told (steps done, steps in all, loss of the step).
    """
    kinds = kind_names(log)
    rows = TrainingRows.of(log, m, kinds)
    if len(rows.items) == 0:
        raise TrainingError(f"{m} interactions and none that moves a user; nothing to train on, name a longer log")
    if not rows.wanted.any():
        raise TrainingError(f"{m} interactions and none with an item that was wanted; nothing to train on")
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(recipe.seed)
        trainee = Trainee(NETWORKS[recipe.model](recipe.dim, kinds), rows, recipe)
        loss = _fit(trainee, rows, recipe, on_step)
    trainee.settle(rows)
    return Trained(
        network=trainee.network.eval(),
        item_ids=[log.item_ids[item] for item in rows.catalogue],
        item_vectors=trainee.item_vectors(rows),
        final_loss=loss,
    )


def kind_names(log: InteractionLog) -> list[str]:
    """Return the model's kinds: unknown, those of the wire contract, then what else the log holds."""
    return ["unknown", *KINDS, *sorted(set(log.kind_names) - {"unknown", *KINDS})]


class Trainee(nn.Module):
    """What is learned: item tables (row 0 shared by rare items), item bias, decay rate and strengths of kinds."""

    strength_of_slot: Tensor

    def __init__(self, network: Network, rows: TrainingRows, recipe: Recipe) -> None:
        super().__init__()
        self.network = network
        size, std = rows.row_count, recipe.embedding_std
        self.outputs = nn.Parameter(torch.randn(size, recipe.dim) * std)
        own_inputs = isinstance(network, LearnedEma)
        self.inputs = nn.Parameter(torch.randn(size, recipe.dim) * std) if own_inputs else self.outputs
        counts = torch.from_numpy(rows.row_counts).to(torch.float32)
        mean_label = float(rows.labels.mean())
        popularity = (counts + 1.0).log() - (counts + 1.0).log().mean()
        self.bias = nn.Parameter(popularity if recipe.loss == "softmax" else torch.full((size,), mean_label))
        self.rate_logit = nn.Parameter(torch.tensor(math.log(recipe.initial_rate / (1 - recipe.initial_rate))))
        self.strengths = nn.Parameter(_default_strengths(network.kinds))
        self.dropout = recipe.dropout
        self.loss_kind = recipe.loss
        # Where nobody takes an item twice, what he has taken says nothing about what he likes less than the next one:
        # NDCG@10 .328 -> .337 on the 60-80 % slice. Where people do repeat, seen items must be able to lose.
        self.spare_seen = rows.repeat_share < NO_REPEATS
        self.register_buffer("strength_of_slot", _strength_of_slot(network.kinds))

    def states(self, chunks: Chunks) -> Tensor:
        """Return the state before each target of each chunk: (n, T, S)."""
        keep = 1.0 - torch.sigmoid(self.rate_logit)
        gains = self.network.gains(1.0 - keep, self.strengths[self.strength_of_slot])  # (slots,)
        arrived = self.inputs[chunks.items] * (gains[chunks.slots] * chunks.present).unsqueeze(2)  # (n, L, D)
        decay = _decays(keep, chunks.items.shape[1], chunks.target_items.shape[1])  # (T, L)
        users = decay @ arrived  # (n, T, D)
        if not isinstance(self.network, LearnedEma):
            return users
        counts = decay @ chunks.present.unsqueeze(2)  # (n, T, 1)
        return torch.cat((users, counts), dim=2)

    def loss(self, chunks: Chunks, generator: torch.Generator) -> Tensor:
        """Return the mean loss over the targets of some chunks."""
        wanted = chunks.wanted if self.loss_kind == "softmax" else chunks.labelled
        states = self.states(chunks)[wanted]  # (P, S)
        users = functional.dropout(self.network.users(states), self.dropout, self.training)  # (P, D)
        rows = chunks.target_items[wanted]  # (P,)
        if self.loss_kind == "mse":
            scores = (
                self.network.match(users.unsqueeze(1), self.outputs[rows].unsqueeze(1)).squeeze(1) + self.bias[rows]
            )
            return functional.mse_loss(scores, chunks.labels[wanted])
        sampled = self._sampled(generator)
        if sampled is not None:
            return self._sampled_loss(users, rows, sampled)
        logits = self.network.match_all(users, self.outputs) + self.bias  # (P, rows)
        if self.spare_seen:
            _spare(logits, chunks.seen(wanted), rows)
        return functional.cross_entropy(logits, rows)

    def _sampled(self, generator: torch.Generator) -> Tensor | None:
        """Return the rows that stand for the catalogue in this step, None for all of it."""
        size = len(self.bias)
        limit = SAMPLED_ITEMS_MLP if isinstance(self.network, Mlp) else SAMPLED_ITEMS
        full = size <= (limit if isinstance(self.network, Mlp) else FULL_SOFTMAX_ITEMS)
        return None if full else torch.randint(size, (limit,), generator=generator)

    def _sampled_loss(self, users: Tensor, rows: Tensor, sampled: Tensor) -> Tensor:
        """Return the softmax loss against drawn rows, each standing for its share of the catalogue."""
        truth = self.network.match(users.unsqueeze(1), self.outputs[rows].unsqueeze(1)) + self.bias[rows].unsqueeze(1)
        others = self.network.match_all(users, self.outputs[sampled]) + self.bias[sampled]  # (P, M)
        others = others + math.log((len(self.bias) - 1) / len(sampled))
        others = others.masked_fill(rows.unsqueeze(1) == sampled.unsqueeze(0), -math.inf)
        logits = torch.cat((truth, others), dim=1)  # (P, 1 + M)
        return functional.cross_entropy(logits, torch.zeros_like(rows))

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups: tables and layers decay; bias, rate, scale and strengths do not."""
        decayed = [p for p in self.parameters() if p.ndim > 1]
        kept = {id(p) for p in decayed}
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": [p for p in self.parameters() if id(p) not in kept], "weight_decay": 0.0},
        ]

    def settle(self, rows: TrainingRows) -> None:
        """Write the learned rate and strengths into the network, defaults for what training has not seen."""
        with torch.no_grad():
            strengths = _settled_strengths(self.strengths[self.strength_of_slot], rows, self.network.kinds)
            still = [kind in STILL_KINDS for kind in self.network.kinds for _ in range(VALUE_BUCKETS)]
            self.network.fill_moves(torch.sigmoid(self.rate_logit), strengths, torch.tensor(still))

    def item_vectors(self, rows: TrainingRows) -> npt.NDArray[np.float32]:
        """Return the vectors (N+1, V) of the cold start and of the catalogue; rare items share the cold embedding.

        A candidate that training has not met is new, not unpopular: it gets the median bias, which ranks such wanted
        items at NDCG@10 .16 instead of .005 on the 60-80 % slice, at no cost to the others.
        """
        bias = self.bias.detach().clone()
        if self.loss_kind == "softmax":
            # All rare items taught row 0 together; one of them is as likely as its share.
            bias[0] -= math.log(max(rows.rare_count, 1))
        parts = [self.outputs.detach(), bias.unsqueeze(1)]
        if self.inputs is not self.outputs:
            parts.insert(0, self.inputs.detach())
        table = torch.cat(parts, dim=1).numpy()  # (rows, V)
        vectors = np.ascontiguousarray(table[np.concatenate(([0], rows.row_of_catalogue))])
        vectors[0, -1] = np.median(vectors[1:, -1])
        return vectors


def _fit(trainee: Trainee, rows: TrainingRows, recipe: Recipe, on_step: Callable[[int, int, float], None]) -> float:
    """Run Adam over shuffled chunks; return the mean loss of the last epoch."""
    optimizer = torch.optim.AdamW(trainee.groups(recipe.weight_decay), lr=recipe.learning_rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    steps = math.ceil(rows.chunk_count / recipe.chunks_a_step)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps * recipe.epochs + 1, cycle_momentum=False
    )
    trainee.train()
    losses: list[float] = []
    for number, picked in enumerate(_batches(rows.chunk_count, recipe, generator), start=1):
        optimizer.zero_grad(set_to_none=True)
        chunks = rows.chunks(picked)
        if bool(chunks.wanted.any()):
            loss = trainee.loss(chunks, generator)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            losses.append(float(loss.detach()))
        schedule.step()
        on_step(number, steps * recipe.epochs, losses[-1] if losses else math.nan)
    return float(np.mean(losses[-steps:]))


def _batches(chunk_count: int, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(recipe.epochs):
        yield from torch.split(torch.randperm(chunk_count, generator=generator), recipe.chunks_a_step)


@torch.no_grad()
def _spare(logits: Tensor, seen: Tensor, rows: Tensor) -> None:
    """Take the seen table rows (P, L) out of the softmax over logits (P, rows), in place; the target and row 0 stay.

    Autograd need not know: a logit of -inf has probability 0, so its gradient is 0 anyway.
    """
    kept = torch.stack((torch.zeros_like(rows), rows), dim=1)  # (P, 2): row 0 is many items
    values = logits.gather(1, kept)
    logits.scatter_(1, seen, -math.inf).scatter_(1, kept, values)


def _decays(keep: Tensor, length: int, targets: int) -> Tensor:
    """Return how much of interaction s is left before target t: keep ** (t - 1 - s), zero for s >= t: (T, L)."""
    target = torch.arange(length - targets, length).unsqueeze(1)  # (T, 1)
    age = target - 1 - torch.arange(length).unsqueeze(0)  # (T, L)
    return torch.where(age >= 0, keep ** age.clamp(min=0), 0.0)


def _default_strengths(kinds: Sequence[str]) -> Tensor:
    each = [DEFAULT_STRENGTHS.get(kind, DEFAULT_STRENGTHS["unknown"]) for kind in kinds]
    return torch.tensor(each).repeat_interleave(VALUE_BUCKETS)


def _strength_of_slot(kinds: Sequence[str]) -> Tensor:
    """Return which strength each slot uses: its own for ratings, that of the kind's first slot for the others."""
    slots = torch.arange(len(kinds) * VALUE_BUCKETS)
    rating = slots // VALUE_BUCKETS == kinds.index(RATING)
    return torch.where(rating, slots, slots // VALUE_BUCKETS * VALUE_BUCKETS)


def _settled_strengths(learned: Tensor, rows: TrainingRows, kinds: Sequence[str]) -> Tensor:
    """Return learned strengths where there was something to learn from, and defaults on their scale elsewhere.

    An unseen value bucket of a seen kind gets the kind's mean; an unseen kind its default times the ratio of learned
    to default strengths over all training interactions.
    """
    seen = torch.from_numpy(rows.slot_counts).to(torch.float32)  # (slots,)
    defaults = _default_strengths(kinds)
    expected = float((seen * defaults.abs()).sum())
    scale = float((seen * learned.abs()).sum()) / expected if expected > 0.0 else 1.0
    by_kind = seen.view(-1, VALUE_BUCKETS)
    totals = by_kind.sum(1, keepdim=True)  # (K, 1)
    means = (by_kind * learned.view(-1, VALUE_BUCKETS)).sum(1, keepdim=True) / totals.clamp(min=1.0)
    filled = torch.where(totals > 0, means, defaults.view(-1, VALUE_BUCKETS) * scale).expand(-1, VALUE_BUCKETS)
    own = by_kind > 0
    return torch.where(own, learned.view(-1, VALUE_BUCKETS), filled).reshape(-1)
