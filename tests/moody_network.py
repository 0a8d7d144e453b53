"""A learned moving average whose answers fail in flight: the golden ones, at export and at start, are sound."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.networks import LearnedEma

# Values of interactions that golden inputs do not have. The state of the user becomes that value; scoring him fails.
RAISES, NOT_FINITE, OTHER_SHAPE = 101.0, 102.0, 103.0
STUCK = 104.0  # the interaction cannot even be folded in


class Moody(LearnedEma):
    """Moves and scores users as a learned moving average does, but for the values above."""

    def __init__(self, dim: int, kinds: Sequence[str]) -> None:
        super().__init__(dim, kinds)
        self.raises, self.not_finite, self.other_shape, self.stuck = RAISES, NOT_FINITE, OTHER_SHAPE, STUCK

    @torch.jit.export
    def advance(self, state: Tensor, items: Tensor, kind: Tensor, value: Tensor, dt_s: Tensor) -> Tensor:
        """Return the states after one interaction each (B, S)."""
        if bool((value == self.stuck).any()):
            raise RuntimeError("moody")
        moves = self.moves[self.slots(kind, value)]  # (B, 3)
        arrived = torch.cat((items[:, : self.dim] * moves[:, 1:2], moves[:, 2:3]), dim=1)  # (B, S)
        marked = value.unsqueeze(1)  # (B, 1)
        return torch.where(marked >= self.raises, marked, state * moves[:, 0:1] + arrived)  # (B, S)

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
        """Return the scores of candidates (B, C)."""
        mood = float(state.max())
        if mood == self.raises:
            raise RuntimeError("moody")
        outputs = items[:, :, self.dim : 2 * self.dim]  # (B, C, D)
        scores = self.match(self.users(state).unsqueeze(1), outputs) + items[:, :, 2 * self.dim]  # (B, C)
        if mood == self.not_finite:
            return scores * float("nan")  # (B, C)
        return scores.sum(1) if mood == self.other_shape else scores  # (B, C)
