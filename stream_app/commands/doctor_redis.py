"""The doctor's questions to Redis; each answer within `_TIMEOUT_S`, also from a server that hangs."""

import hashlib
import statistics
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from stream_app.commands.findings import Finding, fail, ok, skip, warn
from stream_app.settings import RedisSettings

_TIMEOUT_S = 2.0
_PINGS = 5
_SLOW_PING_MS = 10.0
_FULL = 0.9
_SCRIPT = "return 1"

# CVE-2025-49844: a script run by an authenticated user could execute code. First patched release of a line.
_PATCHED_REDIS = {(6, 2): 20, (7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2}
_PATCHED_VALKEY = {(7, 2): 11, (8, 0): 6, (8, 1): 4}


async def examine_redis(settings: RedisSettings) -> list[Finding]:
    """Ask one Redis everything that the worker relies on. The address is shown without user and password."""
    place = _place(settings.url.get_secret_value())
    try:
        client = Redis.from_url(
            settings.url.get_secret_value(), socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
        )
    except ValueError:
        return [fail("redis", f"RERANK_REDIS__URL: not a Redis address ({place})", "use redis://host:port/0")]
    try:
        pings_ms = [await _ping_ms(client) for _ in range(_PINGS)]
        details = await client.info("all")
        return [_latency(place, pings_ms), *_from_info(details), await _scripts(client)]
    except AuthenticationError:
        return [fail("redis", f"{place}: refuses our password", "correct user and password in RERANK_REDIS__URL")]
    except ResponseError as error:
        return [fail("redis", f"{place}: answers {_first_line(error)}", "allow this user PING and INFO")]
    except (RedisError, OSError) as error:
        return [_unreachable(place, error)]
    finally:
        await client.aclose()


def _unreachable(place: str, error: Exception) -> Finding:
    return fail(
        "redis",
        f"{place}: no answer within {_TIMEOUT_S:.0f} s ({type(error).__name__}), every slate is a fallback",
        "start Redis there (rerank up starts one), or correct RERANK_REDIS__URL",
    )


async def _ping_ms(client: Redis) -> float:
    start_s = time.perf_counter()
    await client.ping()
    return (time.perf_counter() - start_s) * 1_000


def _latency(place: str, pings_ms: list[float]) -> Finding:
    median_ms = statistics.median(pings_ms)
    message = f"{place}: answers PING in {median_ms:.1f} ms (median of {len(pings_ms)})"
    if median_ms > _SLOW_PING_MS:
        return warn(
            "redis",
            message,
            f"bring Redis closer: a slate waits for two round trips, {_SLOW_PING_MS:.0f} ms is much",
        )
    return ok("redis", message)


def _from_info(details: Mapping[str, object]) -> list[Finding]:
    return [_version(details), _role(details), _eviction(details), _memory(details)]


def _version(details: Mapping[str, object]) -> Finding:
    name, patched = ("valkey", _PATCHED_VALKEY) if "valkey_version" in details else ("redis", _PATCHED_REDIS)
    text = str(details.get(f"{name}_version", ""))
    numbers = [int(part) for part in text.split(".") if part.isdigit()]
    if len(numbers) < 3:
        return skip("redis version", f"{name} {text!r}: not a version that can be compared")
    line, patch = (numbers[0], numbers[1]), numbers[2]
    if line > max(patched) or patch >= patched.get(line, patch + 1):
        return ok("redis version", f"{name} {text}")
    return warn(
        "redis version",
        f"{name} {text}: CVE-2025-49844 (code execution through a script) is not fixed in it",
        "upgrade to "
        + ", ".join(f"{a}.{b}.{c}" for (a, b), c in patched.items())
        + " or newer; until then let nobody else reach it",
    )


def _role(details: Mapping[str, object]) -> Finding:
    if details.get("role") == "slave":
        return fail("redis role", "a replica: refuses writes", "point RERANK_REDIS__URL at the primary")
    return ok("redis role", "primary")


def _eviction(details: Mapping[str, object]) -> Finding:
    policy = str(details.get("maxmemory_policy", "unknown"))
    if policy.startswith("allkeys-"):
        return fail(
            "redis eviction",
            f"maxmemory-policy {policy}: states vanish when memory is full, their users become unknown",
            "set maxmemory-policy noeviction",
        )
    return ok("redis eviction", f"maxmemory-policy {policy}")


def _memory(details: Mapping[str, object]) -> Finding:
    limit_bytes = int(str(details.get("maxmemory", 0)))
    used_bytes = int(str(details.get("used_memory", 0)))
    if limit_bytes == 0:
        return ok("redis memory", f"{used_bytes / 1e6:.1f} MB used, no maxmemory")
    message = f"{used_bytes / 1e6:.1f} of {limit_bytes / 1e6:.1f} MB used"
    if used_bytes >= limit_bytes:
        return fail("redis memory", f"{message}: writes are refused", "raise maxmemory")
    if used_bytes >= _FULL * limit_bytes:
        return warn("redis memory", message, "raise maxmemory before writes are refused")
    return ok("redis memory", message)


async def _scripts(client: Redis) -> Finding:
    try:
        await client.eval(_SCRIPT, 0)
        await client.evalsha(hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest(), 0)
    except ResponseError as error:
        return fail(
            "redis scripts",
            f"{_first_line(error)}; states are saved by a script, none would be saved",
            "allow this user the commands EVAL and EVALSHA",
        )
    return ok("redis scripts", "EVAL and EVALSHA are allowed")


def _place(url: str) -> str:
    """Return host, port and database of a Redis address, never its user and password."""
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
    except ValueError:
        return "unreadable"
    return f"{parts.hostname or '?'}:{port}{parts.path}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
