"""How long a forward pass takes lately, so that a list is told early that it will not be ranked in time. Pure."""

LATEST_SHARE = 0.2
FORGET_SHARE = 0.9
DEVIATIONS = 2.0


class Pace:
    """Average and deviation of the recent passes. What grew too long is forgotten, or nobody would try any more."""

    def __init__(self) -> None:
        """Expect nothing before the first pass."""
        self._average_ms = 0.0
        self._deviation_ms = 0.0

    @property
    def expected_ms(self) -> float:
        """Return how long a pass takes at most, but for a few."""
        return self._average_ms + DEVIATIONS * self._deviation_ms

    def took(self, duration_ms: float) -> None:
        """Take note of a pass."""
        error_ms = max(0.0, duration_ms) - self._average_ms
        self._average_ms += LATEST_SHARE * error_ms
        self._deviation_ms += LATEST_SHARE * (abs(error_ms) - self._deviation_ms)

    def turned_away(self) -> None:
        """Take note that nobody was served because of what we expect."""
        self._average_ms *= FORGET_SHARE
        self._deviation_ms *= FORGET_SHARE
