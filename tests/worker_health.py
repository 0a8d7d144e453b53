"""Ask a worker process over HTTP what an orchestrator and Prometheus ask it."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

POLL_S = 0.1

Samples = Mapping[tuple[str, tuple[str, ...]], float]


async def ask(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Return status and JSON of a path."""
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.status, await answer.json()


async def samples(port: int) -> Samples:
    """Return every sample of /metrics by name and label values, in the order of the labels' names."""
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
        text = await answer.text()
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(found: Samples, name: str, label: str | None = None) -> float:
    """Return the sum of a metric over all its series, or over those that have this label value."""
    return sum(
        value for (sample, labels), value in found.items() if sample == name and (label is None or label in labels)
    )


async def until_metrics(port: int, holds: Callable[[Samples], bool], timeout_s: float = 60.0) -> Samples:
    """Ask for /metrics until something holds of them; return them."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        found = await samples(port)
        if holds(found):
            return found
        if time.monotonic() > give_up_s:
            raise AssertionError(f"after {timeout_s} s: {sorted(found.items())}")
        await asyncio.sleep(POLL_S)


async def until_health(port: int, path: str, status: int, timeout_s: float = 60.0) -> dict[str, Any]:
    """Ask until a path answers with the status; return its JSON."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        found, body = await ask(port, path)
        if found == status:
            return body
        if time.monotonic() > give_up_s:
            raise AssertionError(f"after {timeout_s} s {path} says {found}: {body}")
        await asyncio.sleep(POLL_S)
