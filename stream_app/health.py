"""What an orchestrator and Prometheus ask a worker over HTTP: /livez, /readyz, /startupz, /metrics.

A dependency never fails /livez: a Redis outage must not restart the fleet.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from stream_app.errors import SettingsError
from stream_app.settings import HttpSettings

State = Literal["ok", "degraded", "failed"]
_WORST_LAST: tuple[State, ...] = ("ok", "degraded", "failed")


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: its name, its state, and in words what was found."""

    name: str
    state: State
    told: str


Probe = Callable[[], Sequence[Finding]]


def overall(findings: Sequence[Finding]) -> State:
    """Return the worst state; nothing to check is ok."""
    return max((finding.state for finding in findings), key=_WORST_LAST.index, default="ok")


def body(findings: Sequence[Finding], *, verbose: bool) -> bytes:
    """Return the JSON of an answer: the overall state and what is not ok; with `verbose` every check."""
    shown = [finding for finding in findings if verbose or finding.state != "ok"]
    checks = {finding.name: {"state": finding.state, "told": finding.told} for finding in shown}
    return orjson.dumps({"status": overall(findings), "checks": checks})


class HealthServer:
    """A small HTTP server in the worker's own event loop: a loop that hangs does not answer, which is an answer."""

    def __init__(self, settings: HttpSettings, *, probes: Mapping[str, Probe], registry: CollectorRegistry) -> None:
        """Answer each path of `probes` with its findings, and /metrics with the registry."""
        self._settings = settings
        self._registry = registry
        application = web.Application()
        for path, probe in probes.items():
            application.router.add_get(path, _handler(probe))
        application.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False)

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            SettingsError: the address cannot be listened on.
        """
        host, port = self._settings.host, self._settings.port
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise SettingsError(
                f"RERANK_HTTP__HOST={host!r} RERANK_HTTP__PORT={port}: {error.strerror}; the worker does not start; "
                "choose another address, or port 0 for any free one"
            ) from error
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Close the port; an answer under way is cut."""
        await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        # In a thread: a registry of a few hundred series takes milliseconds that lists would wait.
        text = await asyncio.to_thread(generate_latest, self._registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _handler(probe: Probe) -> Callable[[web.Request], "asyncio.Future[web.Response]"]:
    async def answer(request: web.Request) -> web.Response:
        excluded = request.query.getall("exclude", [])
        findings = [finding for finding in probe() if finding.name not in excluded]
        status = 503 if overall(findings) == "failed" else 200
        return web.Response(
            status=status,
            body=body(findings, verbose="verbose" in request.query),
            content_type="application/json",
        )

    return answer  # type: ignore[return-value]  # aiohttp takes coroutine functions
