"""Stopping a consumer whose own task was cancelled before it began."""

import asyncio
from typing import Any, cast

import pytest
from aiokafka.consumer.group_coordinator import NoGroupCoordinator

from stream_app.interactions_log import stop_reading


class Consumer:
    """Stops as AIOKafkaConsumer without a group does."""

    def __init__(self) -> None:
        """Start nothing but the task of a coordinator."""
        self._coordinator: Any = NoGroupCoordinator.__new__(NoGroupCoordinator)
        self._coordinator._reset_committed_task = asyncio.create_task(self._coordinator._reset_committed_routine())

    async def stop(self) -> None:
        """Stop the coordinator."""
        await self._coordinator.close()


async def test_aiokafka_says_cancelled_of_a_task_of_its_own() -> None:
    with pytest.raises(asyncio.CancelledError):
        await Consumer().stop()


async def test_a_consumer_that_never_began_is_stopped_without_a_word() -> None:
    await stop_reading(cast("Any", Consumer()))


async def test_whoever_is_cancelled_while_he_stops_is_told() -> None:
    class Hanging:
        async def stop(self) -> None:
            await asyncio.Event().wait()

    stopping = asyncio.create_task(stop_reading(cast("Any", Hanging())))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
