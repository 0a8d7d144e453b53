"""Keep trying to reach what a worker needs, for a while, and be interruptible meanwhile."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from stream_app.errors import EpochError, OtherLogError, PublishError, TransientError

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
TELL_EVERY_S = 10.0

T = TypeVar("T")


class EndRequested(Exception):  # noqa: N818 - no error: somebody asked for the end
    """The end was asked for before the start was done."""


class Start:
    """One start of a worker: everything it needs is tried until it works, time is up, or the end is asked for."""

    def __init__(self, *, end: asyncio.Event, timeout_s: float) -> None:
        """Give up `timeout_s` from now on, and as soon as `end` is set."""
        self._end = end
        self._timeout_s = timeout_s
        self._until_s = time.monotonic() + timeout_s
        self._tell_at_s = 0.0

    async def keep_trying(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what `attempt` returns once it works.

        Raises:
            EndRequested: the end was asked for.
            TransientError: it did not work in time; a message without hope of a better answer is not tried again.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._interruptible(attempt)
            except (PublishError, EpochError, OtherLogError):
                raise
            except TransientError as error:
                self._tell(what, error)
                if time.monotonic() + pause_s >= self._until_s:
                    raise TransientError(
                        f"{what} away for {self._timeout_s:g} s ({error}); nothing is served; start it, or correct its "
                        "address (`rerank doctor` says which is wrong)"
                    ) from error
            await self._interruptible(lambda seconds=pause_s: asyncio.sleep(seconds))  # type: ignore[misc]
            pause_s = min(2.0 * pause_s, LONGEST_PAUSE_S)

    async def _interruptible(self, attempt: Callable[[], Awaitable[T]]) -> T:
        trying = asyncio.ensure_future(attempt())
        ended = asyncio.ensure_future(self._end.wait())
        try:
            remaining_s = max(0.0, self._until_s - time.monotonic())
            await asyncio.wait({trying, ended}, timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)
            if self._end.is_set():
                raise EndRequested
            if not trying.done():
                raise TransientError(f"no answer in {remaining_s:.0f} s")
            return trying.result()
        finally:
            for task in (trying, ended):
                task.cancel()
            await asyncio.wait({trying, ended}, timeout=1.0)

    def _tell(self, what: str, error: TransientError) -> None:
        now_s = time.monotonic()
        if now_s >= self._tell_at_s:
            self._tell_at_s = now_s + TELL_EVERY_S
            logger.warning("event=waiting for=%s seconds_left=%.0f %s", what, self._until_s - now_s, error)
