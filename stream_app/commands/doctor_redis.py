"""The doctor's questions to Redis: one server, the primary that sentinels name, or every primary of a cluster.

It connects as the worker does, and waits `_TIMEOUT_MS` for an answer, also of a server that hangs.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

from redis.exceptions import AuthenticationError, RedisClusterException, RedisError, ResponseError

from stream_app.commands.findings import Finding, fail, ok, skip, warn
from stream_app.connection import check_connection, connect, is_cluster, place_of, wrong_setting
from stream_app.errors import SettingsError
from stream_app.settings import RedisSettings

_TIMEOUT_MS = 1_000
_PINGS = 5
_SLOW_PING_MS = 10.0
_FULL = 0.9

# CVE-2025-49844: a script run by an authenticated user could execute code. First patched release of a line.
_PATCHED_REDIS = {(6, 2): 20, (7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2}
_PATCHED_VALKEY = {(7, 2): 11, (8, 0): 6, (8, 1): 4}

Details = Mapping[str, object]


async def examine_redis(settings: RedisSettings, *, prefix: str | None = None) -> list[Finding]:
    """Ask Redis everything that the worker relies on, with rows below `prefix` (None: that of the settings).

    The address is shown without user and password.
    """
    place = place_of(settings)
    try:
        client: Any = connect(
            settings.model_copy(update={"timeout_ms": _TIMEOUT_MS, "connect_timeout_ms": _TIMEOUT_MS})
        )
    except SettingsError as error:
        return [_from_sentence("redis", error)]
    try:
        pings_ms = [await _ping_ms(client) for _ in range(_PINGS)]
        return [_latency(place, pings_ms), *await _told(client), await _permissions(client, settings, prefix)]
    except AuthenticationError:
        return [fail("redis", f"{place}: refuses our password", "correct user and password in RERANK_REDIS__URL")]
    except ResponseError as error:
        return [fail("redis", f"{place}: answers {_first_line(error)}", "allow this user PING")]
    except (RedisError, RedisClusterException, OSError) as error:
        return [_unreachable(settings, error)]
    finally:
        await client.aclose()


def _unreachable(settings: RedisSettings, error: Exception) -> Finding:
    """Say why nobody answers; a certificate or a password inside that is named."""
    wrong = wrong_setting(error, settings)
    if wrong is not None:
        return _from_sentence("redis", wrong)
    return fail(
        "redis",
        f"{place_of(settings)}: no answer within {_TIMEOUT_MS / 1_000:.0f} s ({type(error).__name__}), "
        "every slate is a fallback",
        "start Redis there (rerank up starts one), or correct RERANK_REDIS__URL",
    )


def _from_sentence(check: str, error: SettingsError) -> Finding:
    """Take a sentence apart: value, consequence, remedy."""
    message, _, remedy = str(error).rpartition("; ")
    return fail(check, message, remedy)


async def _ping_ms(client: Any) -> float:
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


async def _told(client: Any) -> list[Finding]:
    """Return what every primary tells of itself; where all are well, one finding for all of them."""
    try:
        if not is_cluster(client):
            return _from_info(await client.info("all"))
        told = await client.execute_command("INFO", "all", target_nodes=client.PRIMARIES)
    except ResponseError as error:
        message = f"not told ({_first_line(error)}): version, role, eviction, memory and persistence are not checked"
        return [warn("redis info", message, "allow this user INFO")]
    if not all(isinstance(one, dict) for one in told.values()):  # one primary is told without its name
        return _from_info(told)
    by_check = zip(*(_from_info(one) for one in told.values()), strict=True)
    return [finding for findings in by_check for finding in _merged(list(told), findings)]


def _merged(nodes: list[str], findings: tuple[Finding, ...]) -> list[Finding]:
    first = findings[0]
    if all(finding.verdict == "ok" for finding in findings):
        messages = ", ".join(dict.fromkeys(finding.message for finding in findings))
        return [ok(first.check, f"{len(nodes)} primaries: {messages}")]
    return [
        Finding(check=one.check, verdict=one.verdict, message=f"{node}: {one.message}", remedy=one.remedy)
        for node, one in zip(nodes, findings, strict=True)
        if one.verdict != "ok"
    ]


def _from_info(details: Details) -> list[Finding]:
    return [_version(details), _role(details), _eviction(details), _memory(details), _persistence(details)]


def _version(details: Details) -> Finding:
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


def _role(details: Details) -> Finding:
    if details.get("role") == "slave":
        return fail("redis role", "a replica: refuses writes", "point RERANK_REDIS__URL at the primary")
    return ok("redis role", "primary")


def _eviction(details: Details) -> Finding:
    policy = str(details.get("maxmemory_policy", "unknown"))
    if policy.startswith("allkeys-"):
        return fail(
            "redis eviction",
            f"maxmemory-policy {policy}: states vanish when memory is full, their users become unknown",
            "set maxmemory-policy noeviction",
        )
    return ok("redis eviction", f"maxmemory-policy {policy}")


def _memory(details: Details) -> Finding:
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


def _persistence(details: Details) -> Finding:
    check, appends = "redis persistence", str(details.get("aof_enabled")) == "1"
    broken = [
        name
        for name in ("rdb_last_bgsave_status", "aof_last_bgrewrite_status", "aof_last_write_status")
        if details.get(name, "ok") != "ok"
    ]
    if broken:
        return fail(
            check,
            f"{broken[0]} {details[broken[0]]}: it cannot write its disk, and may refuse writes for that",
            "look at its log and at the free space of its disk",
        )
    if appends:
        return ok(check, "appendonly yes")
    return warn(
        check,
        "appendonly no: a restart brings back an old snapshot or nothing, and what it lost is read again from "
        "interactions, with slates degraded meanwhile",
        "set appendonly yes, or accept the time that reading again takes",
    )


async def _permissions(client: Any, settings: RedisSettings, prefix: str | None) -> Finding:
    try:
        await check_connection(client, settings, prefix=prefix)
    except SettingsError as error:
        return _from_sentence("redis permissions", error)
    means = "EVAL and EVALSHA" if settings.scripts == "lua" else "WATCH and MULTI"
    return ok("redis permissions", f"every command of a worker is allowed, {means} among them")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
