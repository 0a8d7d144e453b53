"""Connect to Redis: one server, a primary that Sentinel names, or a cluster.

`RERANK_REDIS__URL`: `redis://` and `rediss://` (TLS) for one server, `redis+sentinel://HOST:PORT,HOST:PORT/SERVICE`,
`redis+cluster://HOST:PORT,HOST:PORT`, and the same two with `rediss+`. User and password stand before the first host.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import redis.asyncio as redis_asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisClusterException, RedisError, ResponseError

from stream_app.errors import SettingsError
from stream_app.settings import RedisSettings

DEFAULT_PORT = 6379
SENTINEL_PORT = 26379
_VARIABLE = "RERANK_REDIS__URL"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    """A URL with several hosts, taken apart."""

    hosts: list[tuple[str, int]]
    service: str
    username: str | None
    password: str | None
    tls: bool


def connect(settings: RedisSettings) -> "redis_asyncio.Redis":
    """Return a client whose every wait is bounded: redis-py's own defaults try a hung server again and again.

    Raises:
        SettingsError: the URL is none of the kinds above.
    """
    url = settings.url.get_secret_value()
    options = _options(settings)
    scheme = url.partition("://")[0]
    try:
        if scheme in ("redis", "rediss", "unix"):
            if scheme == "rediss":
                options |= _tls(settings)
            return redis_asyncio.Redis.from_pool(_ConnectedFirst.from_url(url, retry=Retry(NoBackoff(), 0), **options))
        address = _address(url)
    except ValueError:
        raise SettingsError(f"{_VARIABLE}: not a Redis address; the process does not start; use {_KINDS}") from None
    options |= {"username": address.username, "password": address.password}
    if address.tls:
        options |= {"ssl": True, **_tls(settings)}
    if scheme.endswith("+sentinel"):
        return _through_sentinel(address, options)
    client: Any = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in address.hosts],
        retry=Retry(NoBackoff(), 1),  # a slot that moved is asked for once more, at its new place
        **options,
    )
    cluster: redis_asyncio.Redis = client
    return cluster


class _ConnectedFirst(redis_asyncio.ConnectionPool):
    """Hands out what is connected first: after the password was changed nothing else works, until we start again."""

    def get_available_connection(self) -> Any:
        """Return a connection that nobody uses."""
        self._available_connections.sort(key=lambda one: one.is_connected)  # the last one is taken
        return super().get_available_connection()  # type: ignore[no-untyped-call]


_KINDS = (
    "redis://HOST:PORT/0, rediss://HOST:PORT/0, redis+sentinel://HOST:PORT,HOST:PORT/SERVICE or "
    "redis+cluster://HOST:PORT,HOST:PORT"
)


def is_cluster(client: Any) -> bool:
    """Tell whether a client speaks to a cluster."""
    return isinstance(client, RedisCluster)


async def check_connection(client: Any, settings: RedisSettings, *, prefix: str | None = None) -> None:
    """Try at start all that a worker does: what only a person can mend is said in one sentence without a secret.

    Nothing is written: each question concerns one key below `prefix` (None: that of the settings) that nobody uses, and
    those that would write are asked wrongly, which a server notices after it has looked at the permission.

    Raises:
        SettingsError: wrong password, missing permission, or a certificate that cannot be trusted. A server that
            is merely away is no such case: nothing is raised.
    """
    prefix = prefix or settings.key_prefix
    try:
        await client.ping()
        for words in _questions(f"{prefix}:{{log}}:", settings, cluster=is_cluster(client)):
            await _ask(client, words)
        if settings.scripts == "watch" and not is_cluster(client):
            await _ask_in_a_transaction(client, f"{prefix}:{{log}}:")
    except (RedisError, RedisClusterException, OSError) as error:
        wrong = wrong_setting(error, settings, prefix=prefix)
        if wrong is not None:
            raise wrong from None


def wrong_setting(error: BaseException, settings: RedisSettings, *, prefix: str | None = None) -> SettingsError | None:
    """Return what only a person can mend in an error of the client, in one sentence; None: time may mend it."""
    for cause in _causes(error):
        problem = _problem(cause, settings, prefix or settings.key_prefix)
        if problem is not None:
            return SettingsError(f"Redis {place_of(settings)}: {problem}")
    return None


def _questions(key: str, settings: RedisSettings, *, cluster: bool) -> list[tuple[str | int, ...]]:
    """Return one harmless use of every command that a worker sends (docs/operators.md, Redis)."""
    common: list[tuple[str | int, ...]] = [
        *(("MGET", key), ("GET", key), ("HGET", key, "epoch"), ("HMGET", key, "epoch"), ("GETRANGE", key, 0, 31)),
        *(("SET", key, "", "XX"), ("DEL", key), ("RENAME", key, key)),
        *(("HSET", key, "a", "b", "c"), ("HINCRBY", key, "rebuilds", "x")),
    ]
    if cluster:
        common += [("HEXISTS", key, "bucket"), ("INFO", "replication"), ("CLUSTER", "SLOTS"), ("ASKING",)]
    if settings.scripts == "watch":
        return [*common, ("HGETALL", key)]
    return [*common, ("EVAL", "return redis.call('GET', KEYS[1])", 1, key), ("EVALSHA", "0" * 40, 1, key)]


async def _ask(client: Any, words: tuple[str | int, ...]) -> None:
    """Send one question; an answer about its words, not about us, is a good one."""
    place = {"target_nodes": client.PRIMARIES} if is_cluster(client) and words[0] in _OF_A_NODE else {}
    try:
        await client.execute_command(*words, **place)
    except NoPermissionError:
        raise
    except ResponseError as error:
        if "unknown command" in str(error) or str(error).startswith(("NOPERM", "NOAUTH", "WRONGPASS")):
            raise


_OF_A_NODE = ("INFO", "ASKING", "CLUSTER")


async def _ask_in_a_transaction(client: Any, key: str) -> None:
    async with client.pipeline(transaction=True) as pipe:
        await pipe.watch(key)
        await pipe.unwatch()
        await pipe.watch(key)
        pipe.multi()
        pipe.get(key)
        try:
            await pipe.execute()
        except ResponseError as error:
            text = str(error)
            if "no permissions" in text:  # a refused EXEC comes as an aborted transaction
                raise NoPermissionError(text.rpartition(": ")[2]) from None
            if "without MULTI" in text:
                raise NoPermissionError("this user has no permissions to run the 'multi' command") from None


def _problem(error: BaseException, settings: RedisSettings, prefix: str) -> str | None:
    text = str(error)
    if isinstance(error, AuthenticationError) or text.startswith(("WRONGPASS", "NOAUTH", "invalid username-password")):
        return f"refuses our user or password; the process does not start; correct them in {_VARIABLE}"
    if isinstance(error, NoPermissionError) or text.startswith("NOPERM"):
        return (
            f"our user may not do what a worker does ({_permission(text)}); the process does not start; "
            f"allow it (docs/operators.md, Redis), keys ~{prefix}:*"
            + (", or set RERANK_REDIS__SCRIPTS=watch" if settings.scripts == "lua" and "eval" in text else "")
        )
    if "CERTIFICATE" in text.upper() or "SSL" in text.upper():
        return (
            f"TLS failed ({_tls_reason(text)}); the process does not start; renew the server's certificate, or "
            "name the authority that signed it in RERANK_REDIS__CA_FILE"
        )
    if isinstance(error, ResponseError) and "unknown command" in text and "eval" in text.lower():
        return "scripts are forbidden there; the process does not start; set RERANK_REDIS__SCRIPTS=watch"
    return None


def _permission(text: str) -> str:
    return text.removeprefix("NOPERM ").splitlines()[0][:120]


def _tls_reason(text: str) -> str:
    _, _, reason = text.partition("certificate verify failed: ")
    return reason.split(" (_ssl")[0].rstrip(".")[:120] if reason else text.split(" (_ssl", maxsplit=1)[0][:120]


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def place_of(settings: RedisSettings) -> str:
    """Return where the URL points, without user and password."""
    url = settings.url.get_secret_value()
    return url.partition("://")[2].rpartition("@")[2].partition("?")[0] or "?"


def _options(settings: RedisSettings) -> dict[str, Any]:
    return {
        "socket_timeout": settings.timeout_ms / 1000.0,
        "socket_connect_timeout": settings.connect_timeout_ms / 1000.0,
        "health_check_interval": 0,
    }


def _tls(settings: RedisSettings) -> dict[str, Any]:
    files = {
        "ssl_ca_certs": settings.ca_file,
        "ssl_certfile": settings.certificate_file,
        "ssl_keyfile": settings.key_file,
    }
    return {name: str(path) for name, path in files.items() if path is not None}


def _address(url: str) -> _Address:
    scheme, _, rest = url.partition("://")
    if scheme not in {f"redis{s}+{kind}" for s in ("", "s") for kind in ("sentinel", "cluster")}:
        raise ValueError(scheme)
    credentials, _, places = rest.rpartition("@")
    hosts, _, service = places.partition("/")
    default_port = SENTINEL_PORT if scheme.endswith("sentinel") else DEFAULT_PORT
    username, _, password = credentials.partition(":")
    address = _Address(
        hosts=[_host(part.strip(), default_port) for part in hosts.split(",")],
        service=service.partition("/")[0],
        username=unquote(username) or None,
        password=unquote(password) or None,
        tls=scheme.startswith("rediss"),
    )
    if scheme.endswith("sentinel") and not address.service:
        raise ValueError(url)
    return address


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(text)
    return parts.hostname, parts.port or default_port


class _SentinelPool(_ConnectedFirst, SentinelConnectionPool):
    """The same, of the primary that the sentinels name."""


class _PrimaryClient(redis_asyncio.Redis):
    """A client of the primary that closes what it asked the sentinels with: redis-py leaves those open."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the connections to the primary and to the sentinels."""
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _through_sentinel(address: _Address, options: dict[str, Any]) -> "redis_asyncio.Redis":
    """Return a client that asks the sentinels for the primary whenever it connects."""
    own = {name: value for name, value in options.items() if name not in ("username", "password")}
    sentinel = Sentinel(address.hosts, sentinel_kwargs={**own, "retry": Retry(NoBackoff(), 0)})  # type: ignore[no-untyped-call]
    client: redis_asyncio.Redis = sentinel.master_for(
        address.service,
        redis_class=_PrimaryClient,
        connection_pool_class=_SentinelPool,
        retry=Retry(NoBackoff(), 0),
        **options,
    )
    return client
