"""Every second: are the inputs still the topics that they were? A name may come back with other records."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from stream_app.errors import OtherLogError, StoreUnavailableError

logger = logging.getLogger(__name__)

TOPIC_LOOK_S = 1.0
AWAKE_S = 0.5
SURE_FOR_S = 2.5  # a worker that was seen awake no longer ago than this has not slept


class LogOwner(Protocol):
    """What the store keeps of the log as a whole."""

    async def claim_log(self, topic_id: str) -> None:
        """Say from which topic the rows are, if nobody has; raise OtherLogError if they are from another one."""
        ...

    async def restore_layouts(self) -> None:
        """Say again which partition counts the log has had, if the store lost it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The names of both inputs, and the ids of their topics when the worker started; "": the broker gave none."""

    log: str
    lists: str
    log_id: str
    lists_id: str


class TopicWatch:
    """Ends a worker whose log is another one, and has lists of a topic created anew read from its start.

    Owner: the worker's event loop. Runs until cancelled, or until the log proves to be another one.
    """

    def __init__(
        self,
        inputs: Inputs,
        *,
        topic_ids: Callable[[Sequence[str]], Awaitable[Mapping[str, str]]],
        owner: LogOwner,
        lists_recreated: Callable[[], None],
        fail: Callable[[Exception], None],
    ) -> None:
        """Ask `topic_ids`, which leaves out what is not known now."""
        self._inputs = inputs
        self._log_id, self._lists_id = inputs.log_id, inputs.lists_id
        self._left_ids: set[str] = set()  # of topics that `lists` was before
        self._topic_ids, self._owner = topic_ids, owner
        self._lists_recreated, self._fail = lists_recreated, fail
        self._sure_s = float("-inf")  # monotonic; when we were sure last, by an answer or awake ever since

    async def run(self) -> None:
        """Look once a second."""
        staying_sure = asyncio.create_task(self._stay_sure())
        try:
            await self._look_on()
        finally:
            staying_sure.cancel()

    async def _stay_sure(self) -> None:
        """Who is awake and was sure stays so, however long the broker takes to answer; who slept must look first."""
        while True:
            await asyncio.sleep(AWAKE_S)
            if self._still_sure():
                self._sure_s = time.monotonic()

    def _still_sure(self) -> bool:
        return time.monotonic() - self._sure_s <= SURE_FOR_S

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(TOPIC_LOOK_S)
            try:
                if await self._look():
                    await self._owner.claim_log(self._log_id)
                await self._owner.restore_layouts()
            except OtherLogError as error:
                self._fail(error)
                return
            except StoreUnavailableError:
                continue  # the store watch tells of it

    async def is_sure(self, doubtful: bool) -> bool:
        """Tell whether the interactions that were fetched so far are of the topic that the epoch belongs to.

        Asks the broker only if they are `doubtful` or this process slept since the last look: it may have fetched
        from a topic that was created anew meanwhile. False: nobody knows now.

        Raises:
            OtherLogError: they are of another topic.
        """
        if not self._log_id:  # a broker without ids: the store watch compares where the log ends
            return True
        return (not doubtful and self._still_sure()) or await self._look()

    async def _look(self) -> bool:
        """Ask for the ids; tell whether that of the log is known, and the same."""
        asked_s, inputs = time.monotonic(), self._inputs
        found = await self._topic_ids([inputs.log, inputs.lists])
        log_id, lists_id = found.get(inputs.log, ""), found.get(inputs.lists, "")
        if lists_id in self._left_ids:
            lists_id = ""  # from a broker that has not heard of the new topic
        if lists_id and self._lists_id not in ("", lists_id):
            self._left_ids.add(self._lists_id)
            logger.error(
                "event=lists_recreated topic=%s is another one by now; it is read from its start", inputs.lists
            )
            self._lists_recreated()
        self._lists_id = lists_id or self._lists_id
        if not log_id:
            return False
        self._log_id = self._log_id or log_id
        if log_id != self._log_id:
            self._sure_s = float("-inf")
            raise OtherLogError(inputs.log, self._log_id, log_id)
        self._sure_s = max(asked_s, self._sure_s)
        return True
