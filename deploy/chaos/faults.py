"""The fault table: what each fault does to the world, and how it is undone."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import redis
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import KafkaError

from deploy.chaos.errors import ChaosError
from deploy.chaos.plan import BrokerChoice, FaultKind, Strike, Target
from deploy.chaos.proxy import Proxy, Trouble
from deploy.chaos.world import PARTITIONS, PREFIX, SESSION_TIMEOUT_S, World, start_again
from deploy.local.ports import LOOPBACK
from deploy.local.server import LocalServer
from schemas.topics import CO_PARTITIONED, topic_name
from stream_app import failpoints

Fault = Callable[[World, Strike], AbstractAsyncContextManager[None]]

_MEMBER_STAYS_S = 1.5
_MOST_PASSES = 20
_ZOMBIE_S = 1.0  # of work by one that woke up and does not know yet that its partitions are gone
_SYNC_S = 10.0
_FARTHEST_CLOCK_S = 30 * 86_400.0
_APACHE: tuple[BrokerChoice, ...] = ("apache", "cluster")


@asynccontextmanager
async def kill_worker(world: World, strike: Strike) -> AsyncIterator[None]:
    """Kill -9; the process manager starts it again when the fault ends."""
    worker = world.fleet.workers[strike.index]
    worker.hold()
    if worker.child.is_running:
        worker.child.kill()
    yield
    worker.release()


@asynccontextmanager
async def freeze_worker(world: World, strike: Strike) -> AsyncIterator[None]:
    """Stop it past its session timeout: its partitions move, then it wakes up and goes on writing."""
    worker = world.fleet.workers[strike.index]
    running = worker.child.is_running
    if running:
        worker.child.pause()
        await asyncio.sleep(SESSION_TIMEOUT_S)
    yield
    if running and worker.child.is_running:
        worker.child.resume()


@asynccontextmanager
async def terminate_worker(world: World, strike: Strike) -> AsyncIterator[None]:
    """Send SIGTERM, as a rolling update does, and start it again."""
    worker = world.fleet.workers[strike.index]
    worker.hold()
    await world.fleet.terminate(worker)
    yield
    worker.release()


def stop_at_fail_point(action: str) -> Fault:
    """Return a fault that starts a worker again so that it is stopped in the middle of its work, at a named place."""

    @asynccontextmanager
    async def act(world: World, strike: Strike) -> AsyncIterator[None]:
        rng = random.Random(strike.amount)  # noqa: S311 - reproducible, not secret
        failpoint = f"{rng.choice(failpoints.POINTS)}:{rng.randint(1, _MOST_PASSES)}:{action}"
        world.say(f"    fail-point {failpoint}")
        worker = world.fleet.workers[strike.index]
        worker.hold()
        await world.fleet.terminate(worker)
        worker.start(failpoint)
        yield
        if worker.child.is_running:  # frozen at the place, or it was not reached
            worker.child.resume()
            await asyncio.sleep(_ZOMBIE_S)
            worker.child.kill()
        worker.release()

    return act


def move_clock(sign: int) -> Fault:
    """Return a fault that sets a worker's wall clock, by a second or by up to 30 days, and back when it ends."""

    @asynccontextmanager
    async def act(world: World, strike: Strike) -> AsyncIterator[None]:
        worker, ahead_s = world.fleet.workers[strike.index], sign * _FARTHEST_CLOCK_S**strike.amount
        world.say(f"    its clock is set by {ahead_s:+.0f} s")
        worker.set_clock(ahead_s=ahead_s)
        yield
        worker.set_clock(ahead_s=0.0)

    return act


@asynccontextmanager
async def storm(world: World, strike: Strike) -> AsyncIterator[None]:
    """A member that takes partitions, does nothing, and leaves, again and again."""
    flapping = asyncio.create_task(_flap(world))
    try:
        yield
    finally:
        flapping.cancel()
        await asyncio.gather(flapping, return_exceptions=True)


async def _flap(world: World) -> None:
    while True:
        member = AIOKafkaConsumer(
            *(topic_name(PREFIX, name) for name in CO_PARTITIONED),
            bootstrap_servers=world.direct_servers,
            group_id=world.group_id,
            enable_auto_commit=False,
            session_timeout_ms=int(SESSION_TIMEOUT_S * 1000),
            heartbeat_interval_ms=500,
            request_timeout_ms=8_000,
            partition_assignment_strategy=(RangePartitionAssignor,),
        )
        with suppress(KafkaError):
            try:
                await member.start()
                await asyncio.sleep(_MEMBER_STAYS_S)
            finally:
                await asyncio.wait([asyncio.create_task(member.stop())], timeout=5.0)
        await asyncio.sleep(_MEMBER_STAYS_S)


@asynccontextmanager
async def restart_redis(world: World, strike: Strike) -> AsyncIterator[None]:
    """Restart it with its data."""
    await asyncio.to_thread(world.redis.restart)
    yield


@asynccontextmanager
async def lose_redis(world: World, strike: Strike) -> AsyncIterator[None]:
    """Restart it empty."""
    await asyncio.to_thread(world.redis.restart, keep_data=False)
    yield


@asynccontextmanager
async def flush_redis(world: World, strike: Strike) -> AsyncIterator[None]:
    """FLUSHDB under the workers' feet."""
    await asyncio.to_thread(_flush, world.redis.url)
    yield


def _flush(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushdb()


@asynccontextmanager
async def roll_redis_back(world: World, strike: Strike) -> AsyncIterator[None]:
    """Kill it after a while and let it come back with a snapshot from before: acknowledged writes are gone."""
    await asyncio.to_thread(world.redis.snapshot)
    yield
    world.redis.kill()
    await start_again(world.redis)
    _forget_snapshot(world.redis)


def _forget_snapshot(server: LocalServer) -> None:
    """Let the next start of a Redis be an empty one."""
    (server.directory / "dump.rdb").unlink(missing_ok=True)


@asynccontextmanager
async def kill_redis(world: World, strike: Strike) -> AsyncIterator[None]:
    """Kill -9, nobody listens for a while, then it comes back empty."""
    world.redis.kill()
    yield
    await start_again(world.redis)


@asynccontextmanager
async def fail_over_redis(world: World, strike: Strike) -> AsyncIterator[None]:
    """A replica that had lost touch for a moment takes the place of a killed primary: acknowledged writes are gone."""
    replica = world.spare_redis
    if not replica.is_running:
        await start_again(replica)
    await asyncio.to_thread(_follow, replica.url, world.redis.port)
    for server in (world.redis, replica):
        _forget_snapshot(server)  # both write one to synchronise
    yield
    await asyncio.to_thread(_follow_nobody, replica.url)
    await asyncio.sleep(strike.amount)
    world.promote_spare_redis()


def _follow(url: str, primary_port: int) -> None:
    """Make a replica of an empty server and wait until it has everything."""
    with redis.Redis.from_url(url, socket_timeout=5) as client:
        client.replicaof(LOOPBACK, primary_port)
        until_s = time.monotonic() + _SYNC_S
        while client.info("replication")["master_link_status"] != "up":
            if time.monotonic() > until_s:
                raise redis.TimeoutError(f"the replica has not caught up in {_SYNC_S:.0f} s")
            time.sleep(0.05)


def _follow_nobody(url: str) -> None:
    with redis.Redis.from_url(url, socket_timeout=5) as client:
        client.replicaof("NO", "ONE")


@asynccontextmanager
async def freeze_redis(world: World, strike: Strike) -> AsyncIterator[None]:
    """Stop the process: connections stay open, nothing is answered."""
    world.redis.pause()
    yield
    world.redis.resume()


@asynccontextmanager
async def freeze_broker(world: World, strike: Strike) -> AsyncIterator[None]:
    """Stop the process: connections stay open, nothing is answered."""
    world.nodes[strike.index].pause()
    yield
    world.nodes[strike.index].resume()


@asynccontextmanager
async def restart_broker(world: World, strike: Strike) -> AsyncIterator[None]:
    """Stop it in good order; it comes back with its data."""
    node = world.nodes[strike.index]
    await asyncio.to_thread(node.stop)
    yield
    await start_again(node)


@asynccontextmanager
async def kill_broker(world: World, strike: Strike) -> AsyncIterator[None]:
    """Kill -9; it comes back with what it had written."""
    node = world.nodes[strike.index]
    node.kill()
    yield
    await start_again(node)


@asynccontextmanager
async def kill_leader(world: World, strike: Strike) -> AsyncIterator[None]:
    """Kill -9 the broker that leads a partition of `interactions`."""
    leader = world.outside.leader_of("interactions", int(strike.amount * PARTITIONS))
    index = strike.index if leader is None else leader - 1
    world.say(f"    the leader is broker {index + 1}")
    node = world.nodes[index]
    node.kill()
    yield
    await start_again(node)


@asynccontextmanager
async def flood(world: World, strike: Strike) -> AsyncIterator[None]:
    """Four records of five are rubbish."""
    world.flooding = True
    yield
    world.flooding = False


@asynccontextmanager
async def swap_model(world: World, strike: Strike) -> AsyncIterator[None]:
    """Let the workers' artefact path lead to another model of the state space, and back."""
    models = world.place.models
    models.point_at(models.second)
    yield
    models.point_at(models.first)


@asynccontextmanager
async def offer_corrupt_model(world: World, strike: Strike) -> AsyncIterator[None]:
    """Let the path lead to a model with a flipped bit: who serves goes on as before, who starts must wait."""
    models = world.place.models
    models.point_at(models.corrupt)
    yield
    models.point_at(models.first)


def link_fault(links: Callable[[World, Strike], Proxy], trouble: Callable[[float], Trouble]) -> Fault:
    """Return a fault that makes trouble on a link; how much of it, the strike says."""

    @asynccontextmanager
    async def act(world: World, strike: Strike) -> AsyncIterator[None]:
        links(world, strike).make(trouble(strike.amount))
        yield
        links(world, strike).heal()

    return act


def link_blow(links: Callable[[World, Strike], Proxy], blow: Callable[[Proxy], None]) -> Fault:
    """Return a fault that hits a link again and again."""

    @asynccontextmanager
    async def act(world: World, strike: Strike) -> AsyncIterator[None]:
        rng = random.Random(strike.amount)  # noqa: S311 - reproducible, not secret
        hitting = asyncio.create_task(_hit(links(world, strike), blow, rng))
        try:
            yield
        finally:
            hitting.cancel()
            links(world, strike).heal()

    return act


async def _hit(link: Proxy, blow: Callable[[Proxy], None], rng: random.Random) -> None:
    while True:
        blow(link)
        await asyncio.sleep(0.1 + rng.random())


def _redis_link(world: World, strike: Strike) -> Proxy:
    return world.redis_link


def _broker_link(world: World, strike: Strike) -> Proxy:
    return world.broker_links[strike.index]


_LINKS: tuple[tuple[Target, Callable[[World, Strike], Proxy]], ...] = (
    ("redis link", _redis_link),
    ("broker link", _broker_link),
)
_TROUBLES: dict[str, Callable[[float], Trouble]] = {
    "slow": lambda amount: Trouble(latency_ms=5 + 295 * amount),
    "silent": lambda amount: Trouble(silent=True),
    "answers lost": lambda amount: Trouble(drop_replies=True),
    "cut in the middle of answers": lambda amount: Trouble(cut_after_bytes=20 + int(4_000 * amount)),
    "refusing": lambda amount: Trouble(refuse=True),
}

TABLE: dict[FaultKind, Fault] = {
    FaultKind(name="worker: kill -9", target="worker", steps=(1, 6)): kill_worker,
    FaultKind(name="worker: frozen past its session", target="worker", steps=(2, 10)): freeze_worker,
    FaultKind(name="worker: SIGTERM", target="worker", steps=(1, 4)): terminate_worker,
    **{
        FaultKind(name=f"worker: {what} at a fail-point", target="worker", steps=(12, 24)): stop_at_fail_point(action)
        for what, action in (("kill -9", "kill"), ("frozen", "stop"), ("a bug", "raise"))
    },
    FaultKind(name="worker: clock ahead", target="worker", steps=(2, 12)): move_clock(+1),
    FaultKind(name="worker: clock behind", target="worker", steps=(2, 12)): move_clock(-1),
    FaultKind(name="group: rebalance storm", target="group", steps=(10, 24)): storm,
    FaultKind(name="redis: restart with data", target="redis", steps=(1, 2)): restart_redis,
    FaultKind(name="redis: restart empty", target="redis", steps=(1, 2)): lose_redis,
    FaultKind(name="redis: FLUSHDB", target="redis", steps=(1, 1)): flush_redis,
    FaultKind(name="redis: back with an older snapshot", target="redis", steps=(2, 16)): roll_redis_back,
    FaultKind(name="redis: kill -9, away, back empty", target="redis", steps=(1, 12)): kill_redis,
    FaultKind(name="redis: failover that loses writes", target="redis", steps=(1, 8)): fail_over_redis,
    FaultKind(name="redis: frozen", target="redis", steps=(1, 16)): freeze_redis,
    FaultKind(name="broker: frozen", target="broker", steps=(1, 12)): freeze_broker,
    FaultKind(name="broker: restart", target="broker", steps=(1, 4), brokers=_APACHE): restart_broker,
    FaultKind(name="broker: kill -9", target="broker", steps=(1, 10), brokers=_APACHE): kill_broker,
    FaultKind(name="broker: kill -9 the leader", target="broker", steps=(4, 16), brokers=("cluster",)): kill_leader,
    FaultKind(name="load: poison flood", target="load", steps=(4, 16)): flood,
    FaultKind(name="model: swapped", target="model", steps=(4, 16)): swap_model,
    FaultKind(name="model: corrupt", target="model", steps=(4, 12)): offer_corrupt_model,
    **{
        FaultKind(name=f"{target}: {name}", target=target, steps=(2, 14)): link_fault(link, trouble)
        for target, link in _LINKS
        for name, trouble in _TROUBLES.items()
    },
    **{
        FaultKind(name=f"{target}: {name}", target=target, steps=(1, 8)): link_blow(link, blow)
        for target, link in _LINKS
        for name, blow in (("reset", Proxy.reset), ("half closed", Proxy.half_close))
    },
}


def kinds_named(texts: Sequence[str], broker: BrokerChoice) -> list[FaultKind]:
    """Return the faults whose name contains one of the texts, all without any; of those that the broker can have.

    Raises:
        ChaosError: a text is in no name.
    """
    possible = [kind for kind in TABLE if broker in kind.brokers]
    for text in texts:
        if not any(text in kind.name for kind in possible):
            names = "; ".join(kind.name for kind in possible)
            raise ChaosError(f"{text!r}: no fault on {broker} is called so; nothing is run; there are: {names}")
    return [kind for kind in possible if not texts or any(text in kind.name for text in texts)]


LEFT_OUT = (
    "clocks of brokers and Redis: only a worker's is moved",
    "embedded broker: kill and restart, for it keeps its log in memory",
    "Sentinel and Cluster: a proxy moves the workers to the replica; tests/integration/test_faults_failover.py",
)
