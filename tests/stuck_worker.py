"""`rerank worker`, but its lists agent hangs after the first micro-batch: for tests of the watchdog."""

import asyncio
import os
import sys
from collections.abc import Sequence

from stream_app.__main__ import main
from stream_app.agents import ListsAgent
from stream_app.transport import FetchedBatch

_process = ListsAgent._process


async def _process_once(self: ListsAgent, batches: Sequence[FetchedBatch]) -> None:
    if "STUCK_SINCE" in os.environ:
        await asyncio.Event().wait()
    os.environ["STUCK_SINCE"] = "the first list"
    await _process(self, batches)


if __name__ == "__main__":
    ListsAgent._process = _process_once  # type: ignore[method-assign]
    sys.argv = ["rerank", "worker"]
    main()
