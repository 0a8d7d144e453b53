"""How long a forward pass takes lately, so that a list is told early that it will not be ranked in time. Pure."""

LATEST_SHARE = 0.2
FORGET_SHARE = 0.9


class Pace:
    """An average over the recent passes. One that grew too long is forgotten again, or nobody would try any more."""

    def __init__(self) -> None:
        """Expect nothing before the first pass."""
        self.expected_ms = 0.0

    def took(self, duration_ms: float) -> None:
        """Take note of a pass."""
        self.expected_ms += LATEST_SHARE * (max(0.0, duration_ms) - self.expected_ms)

    def turned_away(self) -> None:
        """Take note that somebody was not served because of what we expect."""
        self.expected_ms *= FORGET_SHARE
