"""Popularity that forgets: the retrieval order of every test list and the baseline of every table."""

import numpy as np
import numpy.typing as npt

HALF_LIFE_MS = 7 * 24 * 3600 * 1000
_RESCALE_AT = 500.0  # exponents stay far below float64's 1023, whatever the length of the log


class DecayedPopularity:
    """Count interactions an item, each losing half of its weight every `half_life_ms` of event time.

    Weights grow with event time instead of all counts shrinking, so that adding one interaction is O(1).
    """

    def __init__(self, items: int, half_life_ms: int = HALF_LIFE_MS) -> None:
        self._weights: npt.NDArray[np.float64] = np.zeros(items)
        self._half_life_ms = half_life_ms
        self._origin_ms: int | None = None

    def add(self, item: int, event_time_ms: int) -> None:
        """Count one interaction with an item index. Event times may come in any order."""
        if self._origin_ms is None:
            self._origin_ms = event_time_ms
        exponent = (event_time_ms - self._origin_ms) / self._half_life_ms
        if exponent > _RESCALE_AT:
            self._weights *= 2.0 ** -min(exponent, 1000.0)
            self._origin_ms, exponent = event_time_ms, 0.0
        self._weights[item] += 2.0 ** max(exponent, -1000.0)

    def scores(self, items: npt.NDArray[np.int64], now_ms: int) -> npt.NDArray[np.float64]:
        """Return the decayed counts of some item indices at an event time; zero for what nobody has touched."""
        if self._origin_ms is None:
            return np.zeros(len(items))
        exponent = min(max((now_ms - self._origin_ms) / self._half_life_ms, -1000.0), 1000.0)
        return np.asarray(self._weights[items] * 2.0**-exponent)
