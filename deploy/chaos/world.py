"""Everything a run stands on: brokers, Redis, a proxy in front of each, workers, and the world outside."""

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import SecretStr

from deploy.chaos.artefact import Models
from deploy.chaos.errors import ChaosError
from deploy.chaos.fleet import Fleet, Worker
from deploy.chaos.outside import Outside
from deploy.chaos.plan import BrokerChoice
from deploy.chaos.proxy import Proxy
from deploy.local import ApacheKafka, ApacheKafkaCluster, EmbeddedKafka, LocalStackError, RedisServer
from deploy.local.server import LocalServer
from stream_app.settings import KafkaSettings, RedisSettings, Settings
from stream_app.topic_admin import create_topics

PARTITIONS = 6
SESSION_TIMEOUT_S = 3.0
NODES = 3
PREFIX = "chaos-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What to build, and where its files go."""

    broker: BrokerChoice
    workers: int
    models: Models
    directory: Path


async def start_again(server: LocalServer) -> None:
    """Start a server on its ports and with its data; once more if the machine was too busy the first time."""
    try:
        await asyncio.to_thread(server.start)
    except LocalStackError:
        await asyncio.to_thread(server.start)


class World:
    """Starts on entering, is gone on leaving, whatever happened. One event loop owns it."""

    def __init__(self, place: Place, say: Callable[[str], None]) -> None:
        """Remember what to build."""
        self.place = place
        self.flooding = False
        self.step = 0
        self.ending = False
        self.say = say
        self.nodes: list[LocalServer] = []
        self.broker_links: list[Proxy] = []
        self.redis = RedisServer(place.directory)
        self.spare_redis = RedisServer(place.directory)  # runs only while it is a replica
        self.redis_link = Proxy("redis")
        self.fleet = Fleet([], say)
        self.outside = Outside("", PREFIX, PARTITIONS)
        self.turns: defaultdict[tuple[str, int], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._stepped = asyncio.Condition()
        self._running = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start servers, topics and workers, and wait until all workers serve.

        Raises:
            ChaosError, LocalStackError: what is missing or did not start; nothing is left running.
        """
        async with AsyncExitStack() as running:
            await self._start_redis(running)
            await self._start_brokers(running)
            await create_topics(self.settings(), PARTITIONS, len(self.nodes))
            self.outside = Outside(self.direct_servers, PREFIX, PARTITIONS)
            running.push_async_callback(self.outside.stop)
            await self.outside.start()
            environment = self._worker_environment()
            workers = [Worker(number, self.place.directory, environment) for number in range(self.place.workers)]
            self.fleet = Fleet(workers, self.say)
            running.push_async_callback(self.fleet.stop)
            self.fleet.start()
            if not await self.fleet.ready():
                raise ChaosError(f"workers: not ready, nothing was tried; the first says {workers[0].last_words()!r}")
            self._running = running.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        self.heal_links()
        await self._running.aclose()

    @property
    def direct_servers(self) -> str:
        """Brokers, past the proxies where the broker allows it."""
        return ",".join(node.address for node in self.nodes)

    @property
    def worker_servers(self) -> str:
        """Brokers as the workers see them."""
        return ",".join(link.address for link in self.broker_links)

    @property
    def group_id(self) -> str:
        """The group of the workers."""
        return f"{PREFIX}group"

    @property
    def key_prefix(self) -> str:
        """What the keys of this run begin with."""
        return f"{PREFIX}rerank"

    def settings(self) -> Settings:
        """Return the settings of a command that goes past the proxies."""
        return Settings(
            kafka=KafkaSettings(bootstrap_servers=self.direct_servers),
            redis=RedisSettings(url=SecretStr(self.redis.url), key_prefix=self.key_prefix),
            topic_prefix=PREFIX,
            artefact=self.place.models.first,
        )

    async def next_step(self) -> None:
        """Begin the next step of the load."""
        async with self._stepped:
            self.step += 1
            self._stepped.notify_all()

    async def until_step(self, step: int) -> None:
        """Wait for a step, or for the end of the load."""
        async with self._stepped:
            await self._stepped.wait_for(lambda: self.ending or self.step >= step)

    async def end_load(self) -> None:
        """Let every fault end."""
        async with self._stepped:
            self.ending = True
            self._stepped.notify_all()

    def heal_links(self) -> None:
        """Let every proxy pass everything."""
        for link in (self.redis_link, *self.broker_links):
            link.heal()

    def promote_spare_redis(self) -> None:
        """Kill Redis and send everybody to the spare one, which takes its place; the dead one is the next spare."""
        self.redis.kill()
        self.redis, self.spare_redis = self.spare_redis, self.redis
        self.redis_link.target_port = self.redis.port
        self.redis_link.reset()

    async def heal(self) -> None:
        """Undo what a fault may have left behind: links, the model, clocks, frozen and dead servers."""
        self.heal_links()
        self.place.models.point_at(self.place.models.first)
        self.flooding = False
        for worker in self.fleet.workers:
            worker.set_clock(ahead_s=0.0)
        dead = [server for server in (*self.nodes, self.redis) if not server.is_running]
        for server in (*self.nodes, self.redis):
            if server.is_running:
                server.resume()
        for server in dead:  # nodes of one cluster are ready only together
            await asyncio.to_thread(server.launch)
        for server in dead:
            await asyncio.to_thread(server.wait_until_ready)

    async def _start_redis(self, running: AsyncExitStack) -> None:
        await self.redis_link.start()
        running.push_async_callback(self.redis_link.stop)
        running.callback(self.redis.stop)
        running.callback(self.spare_redis.stop)
        await asyncio.to_thread(self.redis.start)
        self.redis_link.target_port = self.redis.port

    async def _start_brokers(self, running: AsyncExitStack) -> None:
        count = NODES if self.place.broker == "cluster" else 1
        self.broker_links = [Proxy(f"broker {number}") for number in range(1, count + 1)]
        for link in self.broker_links:
            await link.start()
            running.push_async_callback(link.stop)
        await asyncio.to_thread(self._start_nodes, running)
        for node, link in zip(self.nodes, self.broker_links, strict=True):
            link.target_port = node.ports[2] if isinstance(node, ApacheKafka) else node.port

    def _start_nodes(self, running: AsyncExitStack) -> None:
        directory, ports = self.place.directory, [link.port for link in self.broker_links]
        if self.place.broker == "cluster":
            proxy_ports = dict(enumerate(ports, start=1))
            cluster = ApacheKafkaCluster(directory, nodes=NODES, proxy_ports=proxy_ports)
            running.callback(cluster.stop)
            with_nodes = cluster.__enter__()
            self.nodes = [with_nodes.node(number) for number in proxy_ports]
            return
        node: LocalServer
        if self.place.broker == "apache":
            node = ApacheKafka(directory, heap_megabytes=384, proxy_port=ports[0])
        else:
            node = EmbeddedKafka(directory, advertised_port=ports[0])
        running.callback(node.stop)
        node.start()
        self.nodes = [node]

    def _worker_environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RERANK_")}
        return {
            **inherited,
            "RERANK_KAFKA__BOOTSTRAP_SERVERS": self.worker_servers,
            "RERANK_KAFKA__SESSION_TIMEOUT_MS": f"{SESSION_TIMEOUT_S * 1000:.0f}",
            "RERANK_KAFKA__HEARTBEAT_INTERVAL_MS": "500",
            "RERANK_KAFKA__REQUEST_TIMEOUT_MS": "8000",
            "RERANK_KAFKA__COMMIT_INTERVAL_MS": "300",
            "RERANK_REDIS__URL": f"redis://{self.redis_link.address}/0",
            "RERANK_REDIS__KEY_PREFIX": self.key_prefix,
            "RERANK_GROUP_ID": self.group_id,
            "RERANK_TOPIC_PREFIX": PREFIX,
            "RERANK_ARTEFACT": str(self.place.models.current),
            "RERANK_ARTEFACT_CHECK_S": "0.2",
            "RERANK_JOIN_TIMEOUT_S": "40",
        }
