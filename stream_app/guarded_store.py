"""What candidate lists see of Redis: an answer inside a budget, or at once the news that there is none."""

import asyncio
import logging
from collections.abc import Sequence

from stream_app.breaker import CircuitBreaker, CircuitState
from stream_app.errors import EpochError, StoreUnavailableError
from stream_app.ports import Clock, RowSource
from stream_app.state import UserRow
from stream_app.telemetry import Telemetry

logger = logging.getLogger(__name__)

DEPENDENCY = "redis"


class GuardedStore:
    """Loads rows through a circuit breaker. Interactions do not come through here: they wait for Redis themselves."""

    def __init__(
        self, store: RowSource, *, breaker: CircuitBreaker, budget_ms: float, clock: Clock, telemetry: Telemetry
    ) -> None:
        """Wait at most `budget_ms` for a load from `store`."""
        self._store = store
        self._breaker = breaker
        self._budget_ms = budget_ms
        self._clock = clock
        self._circuit_state = telemetry.circuit_state.labels(DEPENDENCY)
        self._circuit_openings = telemetry.circuit_openings.labels(DEPENDENCY)

    @property
    def state(self) -> CircuitState:
        """Whether the store is asked."""
        return self._breaker.state

    async def load(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Return the row of each user.

        Raises:
            StoreUnavailableError: the store failed, was slower than the budget, was not asked, or is of another epoch.
        """
        if not self._breaker.allows(self._clock.now_ms()):
            raise StoreUnavailableError("Redis did not answer lately; it was not asked; lists fall back until it does")
        try:
            async with asyncio.timeout(self._budget_ms / 1000.0):
                rows = await self._store.load(user_ids)
        except (StoreUnavailableError, EpochError, TimeoutError) as error:
            told = str(error) or f"no answer in {self._budget_ms:g} ms"
            self.failed(told)
            raise StoreUnavailableError(f"Redis load for {len(user_ids)} users: {told}; lists fall back") from error
        self.succeeded()
        return rows

    def succeeded(self) -> None:
        """Take note that Redis answered, to a load of ours or to somebody else."""
        if self._breaker.state is not CircuitState.CLOSED:
            logger.warning("event=circuit_closed dependency=%s lists are ranked again", DEPENDENCY)
        self._breaker.succeeded()
        self._circuit_state.set(self._breaker.state)

    def failed(self, why: str) -> None:
        """Take note that Redis did not answer."""
        was_closed = self._breaker.state is CircuitState.CLOSED
        self._breaker.failed(self._clock.now_ms())
        if was_closed and self._breaker.state is CircuitState.OPEN:
            self._circuit_openings.inc()
            logger.warning("event=circuit_open dependency=%s lists fall back at once: %s", DEPENDENCY, why)
        self._circuit_state.set(self._breaker.state)
