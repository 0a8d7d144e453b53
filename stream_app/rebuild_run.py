"""Run a rebuild: ask broker and Redis, share the partitions out to processes, add up what they did."""

import asyncio
import gc
import multiprocessing
import os
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from schemas.topics import topic_name
from stream_app.cluster_store import store_of
from stream_app.connection import check_connection, connect, is_cluster
from stream_app.errors import REBUILDING, LogRecreatedError, RerankError, SettingsError, TransientError
from stream_app.interactions_log import KafkaLog, LogEnd, log_ends, start_offsets
from stream_app.rebuild import Fold, RebuildCounts, fold_layout, rebuild
from stream_app.scorer import Artefact, load_artefact, read_manifest, space_of
from stream_app.settings import Settings
from stream_app.store import RedisStore, RowCodec, home_partition, space_text
from stream_app.telemetry import Telemetry
from stream_app.topic_admin import admin_client, partition_counts

TIMEOUT_MS = 10_000  # a rebuild has time: an answer that a worker would call late is none here
MAX_USERS = 200_000
REPORT_S = 0.2
RECORDS_WORTH_A_PROCESS = 1_000_000  # one more takes seconds to import torch

Report = Callable[[RebuildCounts], None]
"""Takes what was done so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildRequest:
    """What to rebuild, and how."""

    user_id: str | None = None
    until_offsets: Mapping[int, int] = field(default_factory=dict)
    accept_truncated: bool = False
    processes: int | None = None  # None: what the log is worth, at most one a core
    max_users: int = MAX_USERS  # in memory, of each process

    @property
    def whole(self) -> bool:
        """Whether every row is rebuilt, to the end of the log."""
        return self.user_id is None and not self.until_offsets


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """The partitions of one process, and where they end."""

    settings: Settings
    request: RebuildRequest
    layouts: Sequence[int]
    ends: Mapping[int, int]
    in_order: bool

    @property
    def partitions(self) -> int:
        """How many partitions the log has."""
        return self.layouts[-1]


def run_rebuild(settings: Settings, request: RebuildRequest, report: Report) -> RebuildCounts:
    """Rebuild and return what was done.

    Raises:
        SettingsError: no artefact, a partition that is not there, or a log that lost its start.
        LogRecreatedError: Redis has more than the log.
        TransientError: broker or Redis do not answer; run it again, it starts over and loses nothing.
    """
    if settings.artefact is None:
        raise SettingsError("RERANK_ARTEFACT is not set; nothing was rebuilt; name the artefact that the workers serve")
    patient = settings.redis.model_copy(update={"timeout_ms": TIMEOUT_MS, "connect_timeout_ms": TIMEOUT_MS})
    artefact = settings.artefact.resolve()  # a link that is moved meanwhile leads nobody astray
    settings = settings.model_copy(update={"redis": patient, "artefact": artefact})
    space = space_text(space_of(read_manifest(artefact)))
    layouts, ends = asyncio.run(_prepare(settings, request, space))
    count = request.processes or min(os.cpu_count() or 1, 1 + sum(ends.values()) // RECORDS_WORTH_A_PROCESS)
    share = _Share(settings=settings, request=request, layouts=layouts, ends=ends, in_order=len(layouts) > 1)
    if count == 1 or len(ends) == 1 or share.in_order:
        counts = _run_here(share, report)
    else:
        parts = [dict(list(ends.items())[n::count]) for n in range(min(count, len(ends)))]
        counts = _run_apart([replace(share, ends=part) for part in parts], report)
    if counts.stray_users and not share.in_order:  # they have several partitions: one process puts them in order
        read = RebuildCounts(offsets_to_read=counts.offsets_to_read, offsets_read=counts.offsets_read)
        counts = _run_here(replace(share, in_order=True), lambda done: report(_sum([read, done])))
    if request.whole:
        asyncio.run(_set_row_space(settings, space))
    return counts


async def _set_row_space(settings: Settings, space: str) -> None:
    async with store_without_rows(settings) as store:
        await store.set_row_space(space)


async def _prepare(settings: Settings, request: RebuildRequest, space: str) -> tuple[Sequence[int], dict[int, int]]:
    """Return the partition counts the log has had, and the ends of the partitions to be read; check that they can be.

    Rows of another state space are nobody's from here on, until all of them are rebuilt.
    """
    log = topic_name(settings.topic_prefix, "interactions")
    async with admin_client(settings.kafka, settings.kafka.request_timeout_ms / 1000.0) as admin:
        partitions = (await partition_counts(admin)).get(log, 0)
    unknown = sorted(set(request.until_offsets) - set(range(partitions)))
    if not partitions or unknown:
        raise SettingsError(
            f"{log} on {settings.kafka.bootstrap_servers} has {partitions} partitions, not {unknown or 'one'}; nothing "
            "was rebuilt; correct --until-offset, RERANK_TOPIC_PREFIX or RERANK_KAFKA__BOOTSTRAP_SERVERS"
        )
    async with store_without_rows(settings) as store:
        said = await store.row_space()
        if said not in ("", space) and not request.whole:
            raise SettingsError(
                f"the rows are of state space {said}, the artefact is of {space}: a part of them cannot be rebuilt "
                "alone; nothing was rebuilt; run it without --user and --until-offset, or name the artefact of the rows"
            )
        epoch = await store.enter_epoch(partitions)
        layouts = store.layouts
        applied = await store.progress(range(partitions))
    found = await log_ends(settings.kafka, log, range(partitions))  # after progress: it cannot be beyond
    for partition, offset in enumerate(applied):
        check_end(log, partition, offset, found[partition])
    ends = {partition: end.stable for partition, end in found.items()}
    if request.user_id is not None and epoch == 1:
        ends = {home: ends[home] for home in store.homes(request.user_id)}
    await _check_starts(settings, log, ends, request)
    if said not in ("", space):
        await _set_row_space(settings, REBUILDING + space)
    return layouts, ends


def check_end(log: str, partition: int, applied_offset: int, end: LogEnd) -> None:
    """Compare how far Redis has a partition with where it ends.

    Raises:
        LogRecreatedError: Redis has more than the log.
        TransientError: Redis has what may yet be aborted.
    """
    if applied_offset >= end.high_water:
        raise LogRecreatedError(partition, applied_offset, end.high_water)
    if applied_offset >= end.stable:  # by a worker from before they read committed: the rows would lose what comes
        raise TransientError(
            f"{log}: partition {partition} is applied up to offset {applied_offset}, but a transaction is open from "
            f"{end.stable} on; nothing was rebuilt; end the transaction (kafka-transactions.sh), then run it again"
        )


@asynccontextmanager
async def store_without_rows(settings: Settings) -> AsyncIterator[RedisStore]:
    """Connect for what needs no artefact: epochs and progress.

    Raises:
        SettingsError: what only a person can mend.
    """
    client: Any = connect(settings.redis)
    try:
        await check_connection(client, settings.redis, prefix=settings.row_prefix())
        yield _store(client, settings, RowCodec(state_size=0, space=0, telemetry=Telemetry()))
    finally:
        await client.aclose()


async def _check_starts(settings: Settings, log: str, ends: Mapping[int, int], request: RebuildRequest) -> None:
    starts = await start_offsets(settings.kafka, log, list(ends))
    gone = {partition: offset for partition, offset in starts.items() if offset > 0}
    if gone and not request.accept_truncated:
        raise SettingsError(
            f"{log}: retention took what lay before offsets {gone}; rows rebuilt from the rest would lack it, "
            "nothing was rebuilt; pass --accept-truncated if that is better than what Redis holds"
        )


def _run_here(share: _Share, report: Report) -> RebuildCounts:
    return asyncio.run(_rebuild_share(share, report))


async def _rebuild_share(share: _Share, report: Report) -> RebuildCounts:
    settings, request = share.settings, share.request
    artefact = load_artefact(settings.artefact) if settings.artefact else None
    assert artefact is not None  # noqa: S101 - run_rebuild refuses before
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)  # records die young and hold no cycles: halves the cost (bench_rebuild.py)
    client: Any = connect(settings.redis)

    def new_log(*, in_order: bool) -> KafkaLog:
        name = topic_name(settings.topic_prefix, "interactions")
        return KafkaLog(settings.kafka, name, share.ends, request.until_offsets, in_order=in_order)

    log = new_log(in_order=share.in_order)
    store = _store(client, settings, _codec(artefact))
    fold = None
    try:
        epoch = await store.enter_epoch(share.partitions)
        fold = Fold(
            artefact.serving(),
            _codec(artefact),
            epoch=epoch,
            limits=settings.limits(),
            future_tolerance_ms=settings.future_tolerance_ms,
            max_users=request.max_users,
            is_home=lambda user_id, partition: home_partition(user_id, share.partitions) == partition,
        )
        fold.counts.offsets_to_read = len(share.layouts) * log.total
        for partition_count in share.layouts[:-1]:
            earlier = new_log(in_order=False)
            try:
                await fold_layout(earlier, fold, partition_count, user_id=request.user_id, report=report)
            finally:
                await earlier.close()
        await rebuild(log, fold, store, user_id=request.user_id, in_order=share.in_order, report=report)
        return fold.counts
    finally:
        if fold is not None:
            fold.close()
        await log.close()
        await client.aclose()


def _run_apart(shares: Sequence[_Share], report: Report) -> RebuildCounts:
    """Rebuild each share in a process of its own; the first that fails ends all."""
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    children = [context.Process(target=_child, args=(n, share, news), daemon=True) for n, share in enumerate(shares)]
    latest = {n: RebuildCounts(offsets_to_read=sum(share.ends.values())) for n, share in enumerate(shares)}
    done: set[int] = set()
    try:
        for child in children:
            child.start()
        while len(done) < len(children):
            number, counts, failure, finished = _next_news(news, children)
            if failure is not None:
                raise failure
            latest[number] = counts
            done |= {number} if finished else set()
            report(_sum(latest.values()))
    finally:
        for child in children:
            if child.is_alive() and len(done) < len(children):
                child.terminate()
            child.join()
    return _sum(latest.values())


def _next_news(news: Any, children: Sequence[Any]) -> tuple[int, RebuildCounts, Exception | None, bool]:
    while True:
        try:
            told: tuple[int, RebuildCounts, Exception | None, bool] = news.get(timeout=1.0)
        except queue.Empty:
            ended = [child.exitcode for child in children if child.exitcode]
            if ended:
                raise TransientError(
                    f"a process of the rebuild ended with exit code {ended[0]}; the rest was stopped; run it again, "
                    "with --processes 1 or a smaller --max-users if memory is short"
                ) from None
        else:
            return told


def _child(number: int, share: _Share, news: Any) -> None:
    """Rebuild one share; runs in a process of its own."""
    told_s = 0.0

    def report(counts: RebuildCounts) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= REPORT_S:
            told_s = time.monotonic()
            news.put((number, counts, None, False))

    try:
        counts = asyncio.run(_rebuild_share(share, report))
    except RerankError as error:
        news.put((number, RebuildCounts(), TransientError(str(error)), True))
    else:
        news.put((number, counts, None, True))


def _sum(some: Iterable[RebuildCounts]) -> RebuildCounts:
    total = RebuildCounts()
    for counts in some:
        total.add(counts)
    return total


def _codec(artefact: Artefact) -> RowCodec:
    return RowCodec(state_size=artefact.manifest.dims.S, space=artefact.space, telemetry=Telemetry())


def _store(client: Any, settings: Settings, codec: RowCodec) -> RedisStore:
    return store_of(
        client,
        codec=codec,
        key_prefix=settings.row_prefix(),
        log=topic_name(settings.topic_prefix, "interactions"),
        scripts=settings.redis.scripts,
        cluster=is_cluster(client),
    )
