"""The health server over real HTTP."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from stream_app.errors import SettingsError
from stream_app.health import Finding, HealthServer
from stream_app.settings import HttpSettings
from stream_app.telemetry import Telemetry


@asynccontextmanager
async def serving(*findings: Finding, telemetry: Telemetry | None = None) -> AsyncIterator[str]:
    """Serve the findings as /livez; yield the address."""
    registry = (telemetry or Telemetry()).registry
    server = HealthServer(HttpSettings(port=0), probes={"/livez": lambda: findings}, registry=registry)
    port = await server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop()


async def get(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.json()


FINE = Finding("event_loop", "ok", "0 ms late")
SLOW = Finding("redis", "degraded", "no answer")
BAD = Finding("progress", "failed", "interactions-0 for 61 s")


async def test_all_checks_ok_is_200_and_short() -> None:
    async with serving(FINE) as url:
        assert await get(f"{url}/livez") == (200, {"status": "ok", "checks": {}})


async def test_a_failed_check_is_503_and_named() -> None:
    async with serving(FINE, SLOW, BAD) as url:
        status, body = await get(f"{url}/livez")
    assert (status, body["status"]) == (503, "failed")
    assert body["checks"]["progress"] == {"state": "failed", "told": "interactions-0 for 61 s"}
    assert list(body["checks"]) == ["redis", "progress"]


async def test_degraded_is_200() -> None:
    async with serving(SLOW) as url:
        status, body = await get(f"{url}/livez")
    assert (status, body["status"]) == (200, "degraded")


async def test_verbose_names_every_check() -> None:
    async with serving(FINE, SLOW) as url:
        _, body = await get(f"{url}/livez?verbose")
    assert list(body["checks"]) == ["event_loop", "redis"]


async def test_an_excluded_check_does_not_count() -> None:
    async with serving(FINE, SLOW, BAD) as url:
        assert await get(f"{url}/livez?exclude=progress&exclude=redis") == (200, {"status": "ok", "checks": {}})


async def test_metrics_are_prometheus_text_of_the_registry() -> None:
    telemetry = Telemetry()
    telemetry.events.labels("applied").inc(3)
    async with (
        serving(FINE, telemetry=telemetry) as url,
        aiohttp.ClientSession() as session,
        session.get(f"{url}/metrics") as answer,
    ):
        text = await answer.text()
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert 'rerank_events_total{outcome="applied"} 3.0\n' in text


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = HealthServer(HttpSettings(port=port), probes={}, registry=Telemetry().registry)
        with pytest.raises(SettingsError, match=f"RERANK_HTTP__PORT={port}"):
            await server.start()
        await server.stop()
