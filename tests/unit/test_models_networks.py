"""Rules of the four networks, eager."""

import math

import pytest
import torch
from torch import Tensor

from models.networks import DEFAULT_STRENGTHS, NETWORKS, VALUE_BUCKETS, Cosine, Dot, LearnedEma, Mlp, Network
from schemas.records import KINDS

ALL_KINDS = ["unknown", *KINDS]
USERS = torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
ITEMS = torch.tensor([[0.5, 1.0, 1.5], [1.0, 1.0, 2.0]])


def filled(network: Network, rate: float = 0.5) -> Network:
    """Give every kind its default strength, and impressions none."""
    strengths = torch.tensor([DEFAULT_STRENGTHS[kind] for kind in ALL_KINDS]).repeat_interleave(VALUE_BUCKETS)
    still = torch.tensor([kind == "impression" for kind in ALL_KINDS]).repeat_interleave(VALUE_BUCKETS)
    network.fill_moves(torch.tensor(rate), strengths, still)
    return network.eval()


def scores(network: Network, state: Tensor, items: Tensor) -> Tensor:
    """Score every item for every user: (B, S), (C, V) -> (B, C)."""
    lists, candidates = len(state), len(items)
    return network.score(
        state,
        torch.zeros((lists, 0, items.shape[1])),
        torch.zeros((lists, 0), dtype=torch.bool),
        items.expand(lists, -1, -1),
        torch.zeros((lists, candidates, 0)),
        torch.ones((lists, candidates), dtype=torch.bool),
    )


def advanced(network: Network, state: Tensor, item: list[float], kind: str, value: float = 0.0) -> Tensor:
    """Return the state of one user after one interaction."""
    return network.advance(
        state, torch.tensor([item]), torch.tensor([ALL_KINDS.index(kind)]), torch.tensor([value]), torch.zeros(1)
    )


# The article prints 8.5 for u2.i1 and .92 for a cosine. Its numbers are wrong; those below are by hand:
# u1.i1 = .5 + 2 + 4.5, u1.i2 = 1 + 2 + 6, u2.i1 = 1 + 3 + 6, u2.i2 = 2 + 3 + 8;
# |u1|^2 = 14, |u2|^2 = 29, |i1|^2 = 3.5, |i2|^2 = 6, and i1 = u1 / 2, so their cosine is 1.
def test_dot_gives_the_right_values_for_the_articles_example() -> None:
    items = torch.cat((ITEMS, torch.zeros(2, 1)), dim=1)
    assert scores(Dot(3, ALL_KINDS), USERS, items).tolist() == [[7.0, 9.0], [10.0, 13.0]]


def test_cosine_gives_the_right_values_for_the_articles_example() -> None:
    items = torch.cat((ITEMS, torch.zeros(2, 1)), dim=1)
    expected = [[1.0, 9 / math.sqrt(84)], [10 / math.sqrt(101.5), 13 / math.sqrt(174)]]
    with torch.inference_mode():
        found = scores(Cosine(3, ALL_KINDS), USERS, items).tolist()
    assert found == [pytest.approx(row, abs=1e-6) for row in expected]


def test_mlp_is_relu_on_user_item_and_product() -> None:
    network = Mlp(1, ALL_KINDS, hidden=2)
    with torch.no_grad():
        network.from_user.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        network.from_user.bias.zero_()
        network.from_item.weight.copy_(torch.tensor([[2.0], [0.0]]))
        network.from_product.weight.copy_(torch.tensor([[3.0], [0.0]]))
        network.out.weight.copy_(torch.tensor([[1.0, 10.0]]))
    with torch.inference_mode():
        found = scores(network, torch.tensor([[1.0]]), torch.tensor([[0.5, 0.25], [-2.0, 0.0]]))
    # relu(1 + 2 * .5 + 3 * .5) + 10 * relu(-1) + .25; relu(1 - 4 - 6) + 10 * relu(-1)
    assert found.tolist() == [[3.75, 0.0]]


def test_mlp_offers_its_sigmoid_as_probability() -> None:
    assert Mlp(2, ALL_KINDS).probability(torch.tensor([0.0])).tolist() == [0.5]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_zero_state_scores_the_bias(name: str) -> None:
    network = NETWORKS[name](4, ALL_KINDS)
    torch.manual_seed(0)
    items = torch.randn(5, network.vector_size)
    with torch.inference_mode():
        assert torch.equal(scores(network, torch.zeros(1, network.state_size), items)[0], items[:, -1])


def test_plain_models_move_by_the_articles_average() -> None:
    moved = advanced(filled(Dot(2, ALL_KINDS), rate=0.25), torch.tensor([[1.0, 0.0]]), [0.0, 2.0, 9.0], "click")
    assert moved.tolist() == [[0.75, 0.5]]


def test_learned_ema_moves_user_and_count() -> None:
    network = filled(LearnedEma(1, ALL_KINDS), rate=0.25)
    moved = advanced(network, torch.tensor([[4.0, 2.0]]), [3.0, 7.0, 9.0], "purchase")
    assert moved.tolist() == [[0.75 * 4 + 2 * 3, 0.75 * 2 + 1]]


def test_learned_ema_divides_by_the_root_of_one_plus_count() -> None:
    found = scores(LearnedEma(1, ALL_KINDS), torch.tensor([[4.0, 3.0]]), torch.tensor([[9.0, 2.0, 0.5]]))
    assert found.tolist() == [[2.0 * 4 / 2 + 0.5]]


@pytest.mark.parametrize("name", NETWORKS)
def test_an_impression_moves_nobody(name: str) -> None:
    network = filled(NETWORKS[name](2, ALL_KINDS))
    state = torch.rand(1, network.state_size)
    assert torch.equal(advanced(network, state, [1.0] * network.vector_size, "impression"), state)


def test_dislike_and_skip_move_away() -> None:
    network = filled(Dot(1, ALL_KINDS))
    for kind in ("dislike", "skip"):
        assert advanced(network, torch.zeros(1, 1), [1.0, 0.0], kind).item() < 0.0


def test_a_rating_moves_by_the_slot_of_its_value() -> None:
    network = Dot(1, ALL_KINDS)
    rows = torch.arange(len(ALL_KINDS) * VALUE_BUCKETS, dtype=torch.float32)
    network.fill_moves(torch.tensor(1.0), rows, torch.zeros(len(rows), dtype=torch.bool))
    first = ALL_KINDS.index("rating") * VALUE_BUCKETS
    for value, bucket in ((-3.0, 0), (0.0, 0), (1.0, 1), (3.4, 3), (5.0, 5), (1e30, 5)):
        assert advanced(network, torch.zeros(1, 1), [1.0, 0.0], "rating", value).item() == first + bucket


def test_every_known_kind_has_a_default_strength() -> None:
    assert set(DEFAULT_STRENGTHS) == set(ALL_KINDS)
