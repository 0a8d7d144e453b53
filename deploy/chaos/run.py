"""A chaos run from its first step to its verdict."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import redis

from deploy.chaos import checks
from deploy.chaos.artefact import Formula, Models, formula_of
from deploy.chaos.checks import Check
from deploy.chaos.faults import LEFT_OUT, TABLE, kinds_named
from deploy.chaos.ledger import Ledger, Struck
from deploy.chaos.load import Load
from deploy.chaos.plan import BrokerChoice, Strike, plan
from deploy.chaos.world import NODES, PREFIX, Place, World
from deploy.local import LocalStackError
from schemas.topics import topic_name
from stream_app.state import offset_of

STEP_S = 0.5
QUIET_TIMEOUT_S = 180.0
QUIET_S = 2.5  # longer than a worker takes to notice that Redis lost something
_POLL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller chooses; `artefact` None: the tiny one; `out` None: logs go away with the run.

    `only`: parts of names of faults, () for all faults.
    """

    seed: int
    minutes: float
    broker: BrokerChoice
    workers: int
    artefact: Path | None = None
    out: Path | None = None
    only: Sequence[str] = ()

    @property
    def steps(self) -> int:
        """How many steps the load takes."""
        return max(1, round(self.minutes * 60.0 / STEP_S))

    def plan(self) -> list[Strike]:
        """Return the faults of this run; raise ChaosError for one in `only` that there is not."""
        return plan(
            kinds_named(self.only, self.broker),
            seed=self.seed,
            steps=self.steps,
            workers=self.workers,
            brokers=NODES if self.broker == "cluster" else 1,
        )


@dataclass(slots=True)
class _Account:
    """What a run has done so far."""

    started_s: float
    faults: list[Struck] = field(default_factory=list)
    quiet_after_s: float | None = None

    def now_s(self) -> float:
        return time.monotonic() - self.started_s


async def run(options: Options, say: Callable[[str], None]) -> Ledger:
    """Do it all and return the account. Whatever happens, nothing that was started is left running.

    Raises:
        ChaosError, LocalStackError: what is missing or did not start, and what to do.
    """
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="rerank-chaos-", dir=options.out))
    try:
        return await _run(options, directory, say)
    finally:
        if options.out is None:
            shutil.rmtree(directory, ignore_errors=True)


async def _run(options: Options, directory: Path, say: Callable[[str], None]) -> Ledger:
    if options.artefact is not None:
        formula_of(options.artefact)  # refuse what cannot serve, or has another formula, before it is copied
    models = Models(directory / "artefacts", options.artefact)
    formula = formula_of(models.first)
    place = Place(broker=options.broker, workers=options.workers, models=models, directory=directory)
    strikes = options.plan()
    say(f"seed {options.seed}: {len(strikes)} faults in {options.steps} steps; starting {options.broker} and the rest")
    async with World(place, say) as world:
        account = _Account(time.monotonic())
        say(f"{options.workers} workers are ready; the load begins")
        supervising = asyncio.create_task(world.fleet.supervise())
        try:
            await _storm(world, account, strikes, Load(options.seed, formula.items()), options.steps)
            found = await _verdict(world, account, formula)
        finally:
            supervising.cancel()
        await world.fleet.stop()
        found.append(_check_ends(world))
        return Ledger(
            seed=options.seed,
            broker=options.broker,
            workers=options.workers,
            took_s=account.now_s(),
            faults=account.faults,
            counts={
                **checks.input_counts(world.outside.seen),
                "slates of the second model": checks.slates_of(world.outside.seen, models.version(models.second)),
                "records not sent, for the broker took none": world.outside.not_sent,
                "records whose fate the broker did not tell": world.outside.not_acknowledged,
            },
            worker_starts=sum(worker.starts for worker in world.fleet.workers),
            ended_by_themselves=world.fleet.ended_by_themselves,
            quiet_after_s=account.quiet_after_s,
            checks=found,
            left_out=LEFT_OUT,
        )


async def _storm(world: World, account: _Account, strikes: list[Strike], load: Load, steps: int) -> None:
    """Send the load step by step and let the faults strike; then let every fault end, and heal."""
    striking: list[asyncio.Task[None]] = []
    begun_s = time.monotonic()
    for step in range(steps):
        await world.next_step()
        due = [strike for strike in strikes if strike.step == step]
        striking += [asyncio.create_task(_strike(world, account, strike)) for strike in due]
        records = load.step(int(time.time() * 1000), world.outside.places, flood=world.flooding)
        world.outside.send(records)
        await asyncio.sleep(max(0.0, begun_s + (step + 1) * STEP_S - time.monotonic()))
    await world.end_load()
    await asyncio.gather(*striking)
    await world.heal()
    world.say(f"{account.now_s():7.1f} s  everything is healed; waiting for quiet")


async def _strike(world: World, account: _Account, strike: Strike) -> None:
    """Strike when the last fault of the same target is over: a server may take longer to start than was planned."""
    async with world.turns[strike.kind.target, strike.index if strike.kind.target == "worker" else 0]:
        await _strike_now(world, account, strike)


async def _strike_now(world: World, account: _Account, strike: Strike) -> None:
    at_s, trouble = account.now_s(), None
    whom = (
        f" ({strike.kind.target} {strike.index})" if strike.kind.target in ("worker", "broker", "broker link") else ""
    )
    world.say(f"{at_s:7.1f} s  step {strike.step:5}  {strike.kind.name}{whom}, for {strike.steps} steps")
    try:
        async with TABLE[strike.kind](world, strike):
            await world.until_step(world.step + strike.steps)
    except (LocalStackError, redis.RedisError, OSError) as error:
        trouble = f"{type(error).__name__}: {str(error)[:200]}"
        world.say(f"{account.now_s():7.1f} s  {strike.kind.name}: {trouble}")
    account.faults.append(Struck(at_s=at_s, step=strike.step, name=strike.kind.name, trouble=trouble))


async def _verdict(world: World, account: _Account, formula: Formula) -> list[Check]:
    """Wait for quiet and check; a run that never becomes quiet is checked all the same, to say what is missing."""
    began_s = time.monotonic()
    quiet = await _quiet(world)
    if quiet:
        account.quiet_after_s = round(time.monotonic() - began_s - QUIET_S, 1)
        world.say(f"{account.now_s():7.1f} s  quiet; checking")
    stored, aside = await asyncio.to_thread(_stored_rows, world)
    seen, models = world.outside.seen, world.place.models
    missing = (
        [] if quiet else [f"not quiet {QUIET_TIMEOUT_S:.0f} s after the last fault was healed: {await _behind(world)}"]
    )
    return [
        Check(name="the system comes to rest", cases=1, problems=missing),
        checks.check_log(seen, world.outside.acknowledged),
        checks.check_conservation(checks.input_counts(seen)),
        checks.check_states(seen, stored, formula),
        Check(name="no row was set aside as corrupt", cases=len(stored), problems=aside),
        checks.check_dead_letters(seen),
        checks.check_outcomes(seen),
        checks.check_freshness(seen),
        checks.check_models(seen, {models.version(each) for each in (models.first, models.second)}),
    ]


async def _quiet(world: World) -> bool:
    """Wait until all is read, applied and answered, and stays so for a while; return whether it came to that."""
    until_s = time.monotonic() + QUIET_TIMEOUT_S
    since_s, last = time.monotonic(), ""
    with suppress(TimeoutError):
        await asyncio.wait_for(world.outside.sent(), QUIET_TIMEOUT_S / 2.0)
    while time.monotonic() < until_s:
        behind = await _behind(world)
        if behind or behind != last:
            since_s, last = time.monotonic(), behind
        elif time.monotonic() - since_s >= QUIET_S:
            return True
        await asyncio.sleep(_POLL_S)
    return False


async def _behind(world: World) -> str:
    """Say what is not done yet, "" when all is done."""
    seen = world.outside.seen
    problems = []
    if not all(worker.is_ready for worker in world.fleet.workers):
        problems.append("a worker is not ready")
    unread = sum(len(places - seen.inputs[name].keys()) for name, places in world.outside.acknowledged.items())
    if unread:
        problems.append(f"{unread} records are not read back")
    problems += [
        f"{check.name}: {len(check.problems)} of {check.cases} not, {check.problems[0]}"
        for check in (checks.check_dead_letters(seen), checks.check_outcomes(seen))
        if not check.holds
    ]
    ends = seen.ends("interactions")
    applied = await asyncio.to_thread(_applied_offsets, world, sorted(ends))
    lag = {
        partition: ends[partition] - applied[partition] for partition in ends if ends[partition] != applied[partition]
    }
    if lag:
        problems.append(f"interactions not applied, by partition: {lag}")
    return "; ".join(problems)


def _applied_offsets(world: World, partitions: list[int]) -> dict[int, int]:
    log_key = f"{world.key_prefix}:{{log}}:{topic_name(PREFIX, 'interactions')}"
    with redis.Redis.from_url(world.redis.url) as client:
        answers = [client.get(f"{log_key}:{partition}") for partition in partitions]
    texts = [answer if isinstance(answer, bytes) else b"" for answer in answers]
    return {partition: offset_of(text) for partition, text in zip(partitions, texts, strict=True)}


def _stored_rows(world: World) -> tuple[dict[str, bytes], list[str]]:
    """Return the row bytes of every user in Redis, and the keys that were set aside."""
    rows, aside = {}, []
    with redis.Redis.from_url(world.redis.url) as client:
        for key in client.scan_iter(match=f"{world.key_prefix}:*", count=1_000):
            _, bucket, kind, *user = key.decode().split(":", 3)
            if bucket != "{log}" and kind == "u":
                rows[user[0]] = client.get(key)
            elif kind == "bad":
                aside.append(key.decode())
    return {user: data for user, data in rows.items() if isinstance(data, bytes)}, aside


def _check_ends(world: World) -> Check:
    """SIGTERM ended every worker that served in time, during the run and at its end, and nothing is left running."""
    problems = [*world.fleet.slow_ends, *(f"process {pid} still runs" for pid in world.fleet.leftovers())]
    starts = sum(worker.starts for worker in world.fleet.workers)
    return Check(name="SIGTERM ends a worker in time, no worker is left running", cases=starts, problems=problems)
