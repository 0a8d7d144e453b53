"""A start keeps trying, for a while, and ends at once when asked."""

import asyncio
import logging

import pytest

from stream_app.errors import EpochError, PublishError, SettingsError, StoreUnavailableError, TransientError
from stream_app.starting import EndRequested, Start


class Server:
    """Away for so many attempts; None: it never answers."""

    def __init__(self, *, away: int | None, error: Exception | None = None) -> None:
        self.attempts = 0
        self._away = away
        self._error = error or StoreUnavailableError("connection refused")

    async def connect(self) -> str:
        self.attempts += 1
        if self._away is None:
            await asyncio.Event().wait()
        if self.attempts <= (self._away or 0):
            raise self._error
        return "connected"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_app.starting.FIRST_PAUSE_S", 0.001)


def start(*, timeout_s: float = 30.0) -> tuple[Start, asyncio.Event]:
    end = asyncio.Event()
    return Start(end=end, timeout_s=timeout_s), end


async def test_it_tries_until_the_server_is_there() -> None:
    server = Server(away=3)
    assert await start()[0].keep_trying("Redis", server.connect) == "connected"
    assert server.attempts == 4


async def test_a_server_that_stays_away_is_named_with_the_remedy() -> None:
    with pytest.raises(TransientError, match=r"Redis away for 0.05 s \(connection refused\).*rerank doctor"):
        await start(timeout_s=0.05)[0].keep_trying("Redis", Server(away=10**6).connect)


async def test_a_server_that_hangs_is_one_that_is_away() -> None:
    with pytest.raises(TransientError, match="broker away"):
        await start(timeout_s=0.05)[0].keep_trying("broker", Server(away=None).connect)


@pytest.mark.parametrize("away", [10**6, None])
async def test_asked_to_end_it_tries_no_more(away: int | None) -> None:
    one, end = start()
    trying = asyncio.create_task(one.keep_trying("broker", Server(away=away).connect))
    await asyncio.sleep(0.02)
    end.set()
    async with asyncio.timeout(5):
        with pytest.raises(EndRequested):
            await trying


@pytest.mark.parametrize("error", [SettingsError("x"), PublishError("x"), EpochError("x")])
async def test_what_waiting_does_not_mend_is_not_tried_again(error: Exception) -> None:
    server = Server(away=10**6, error=error)
    with pytest.raises(type(error)):
        await start()[0].keep_trying("Redis", server.connect)
    assert server.attempts == 1


async def test_waiting_is_said_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        await start()[0].keep_trying("Redis", Server(away=8).connect)
    assert [record.message.split(" ")[:2] for record in caplog.records] == [["event=waiting", "for=Redis"]]
