"""A circuit breaker: after a few failures in a row nobody asks any more, but for a probe every so often.

Pure: the caller says what time it is, and whether what it tried succeeded.
"""

from enum import IntEnum


class CircuitState(IntEnum):
    """What a dependency is taken for; the numbers are those of `rerank_circuit_state`."""

    CLOSED = 0  # it answers
    PROBING = 1  # one call is out, to see whether it answers again
    OPEN = 2  # it does not answer, and is not asked


class CircuitBreaker:
    """One dependency, as its callers found it. Owner: one event loop."""

    def __init__(self, *, failures: int, probe_after_ms: float) -> None:
        """Open after `failures` in a row; from then on allow one probe every `probe_after_ms`."""
        self.state = CircuitState.CLOSED
        self._failures = failures
        self._probe_after_ms = probe_after_ms
        self._failed_in_a_row = 0
        self._since_ms = 0.0

    def allows(self, now_ms: float) -> bool:
        """Tell whether to make the call; one that is made is followed by `succeeded` or `failed`.

        A probe whose outcome nobody tells is followed by another one. A clock that jumps back costs one probe early.
        """
        if self.state is CircuitState.CLOSED:
            return True
        if 0.0 <= now_ms - self._since_ms < self._probe_after_ms:
            return False
        self.state = CircuitState.PROBING
        self._since_ms = now_ms
        return True

    def succeeded(self) -> None:
        """Take note that a call was answered."""
        self._failed_in_a_row = 0
        self.state = CircuitState.CLOSED

    def failed(self, now_ms: float) -> None:
        """Take note that a call was not answered."""
        self._failed_in_a_row += 1
        if self.state is CircuitState.CLOSED and self._failed_in_a_row < self._failures:
            return
        self.state = CircuitState.OPEN
        self._since_ms = now_ms
