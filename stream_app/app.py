"""The worker: wires settings, artefact, store, producer and agents into a Faust app, and runs it to a clean end."""

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from faust.types import TP

from schemas.topics import CO_PARTITIONED, dead_letter_name, topic_name
from stream_app import failpoints
from stream_app.agents import AgentContext, InteractionsAgent, ListsAgent
from stream_app.breaker import CircuitBreaker
from stream_app.cache import CachedStore
from stream_app.cluster_store import store_of
from stream_app.connection import check_connection, connect, is_cluster
from stream_app.current_rows import CurrentRows
from stream_app.errors import SettingsError, TransientError
from stream_app.faust_app import RerankApp, faust_app
from stream_app.guarded_store import GuardedStore
from stream_app.health import HealthServer
from stream_app.model_watch import ModelWatch
from stream_app.pipeline import Deadlines
from stream_app.ports import AppliedOffsets, InService, RowSource
from stream_app.publisher import KafkaPublisher
from stream_app.settings import Settings
from stream_app.starting import EndRequested, Start
from stream_app.store import RedisStore, RowCodec
from stream_app.store_watch import Hooks, StoreWatch
from stream_app.supervision import Condition, EventLoopLag, Partition, ProgressWatch, Standing, probes, separated
from stream_app.telemetry import Telemetry
from stream_app.topic_admin import OurTopics, our_topics, topic_specs
from stream_app.topic_watch import Inputs, TopicWatch
from stream_app.transport import BATCH_CODEC, BatchConsumer

logger = logging.getLogger(__name__)

REVOKE_GRACE_S = 2.0
# Allocations before a collection. A micro-batch allocates thousands of records that die together and hold no
# cycles; at Python's 700 an interaction costs a fifth more CPU (tests/bench/bench_stages.py).
COLLECT_AFTER = 20_000


class SystemClock:
    """The clocks of this machine."""

    def now_ms(self) -> float:
        """Return milliseconds since 1970."""
        return time.time() * 1000.0

    def steady_ms(self) -> float:
        """Return milliseconds of the monotonic clock."""
        return time.monotonic() * 1000.0


class Worker:
    """One worker process. Owner of everything it starts; `run` returns the exit code."""

    def __init__(self, settings: Settings, *, announce: Callable[[Mapping[str, object]], None]) -> None:
        """Remember the settings; `announce` is called once, when partitions are assigned and the model is warm."""
        self._settings = settings
        self._announce = announce
        self._log = topic_name(settings.topic_prefix, "interactions")
        self._inputs = [topic_name(settings.topic_prefix, name) for name in CO_PARTITIONED]
        self._telemetry = Telemetry()
        self._applied = AppliedOffsets()
        self._end = asyncio.Event()
        self._condition = Condition()
        self._loop_lag = EventLoopLag(self._telemetry)
        self._http_port: int | None = None

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT (0), or until something fails that a restart may mend (1)."""
        failpoints.arm(self._settings.failpoint)
        self._listen_to_signals()
        async with self._health():
            try:
                await self._start_and_serve()
            except EndRequested:
                logger.info("event=stopped before it was ready")
            except TransientError as error:
                self._fail(error)
        return 0 if self._condition.failure is None else 1

    @asynccontextmanager
    async def _health(self) -> AsyncIterator[None]:
        """Measure the event loop and, with a port, answer who asks, for the length of a block."""
        lag = asyncio.create_task(self._loop_lag.watch())
        http = self._settings.http
        server = HealthServer(http, probes=probes(self._condition, self._loop_lag), registry=self._telemetry.registry)
        try:
            if http.port is not None:
                self._telemetry.describe_process()
                self._http_port = await server.start()
            yield
        finally:
            lag.cancel()
            await server.stop()

    async def _start_and_serve(self) -> None:
        settings = self._settings
        models = ModelWatch(_artefact_path(settings), telemetry=self._telemetry, condition=self._condition)
        artefact = models.artefact
        start = Start(end=self._end, timeout_s=settings.join_timeout_s)
        topics = await start.keep_trying("broker", partial(our_topics, settings))
        redis = connect(settings.redis)
        publisher = KafkaPublisher(
            settings.kafka,
            patient=True,
            topics=list(topic_specs(settings.topic_prefix)),
            max_batch_bytes=min([settings.kafka.max_request_bytes, *topics.max_bytes.values()]),
        )
        try:
            await start.keep_trying("broker", publisher.start)
            codec = RowCodec(state_size=artefact.manifest.dims.S, space=artefact.space, telemetry=self._telemetry)
            rows = store_of(
                redis,
                codec=codec,
                key_prefix=settings.row_prefix(),
                log=self._log,
                scripts=settings.redis.scripts,
                cluster=is_cluster(redis),
            )
            epoch = await start.keep_trying("Redis", partial(_enter_epoch, redis, settings, rows, topics))
            self._condition.redis_answers = True
            spare_the_collector()
            await self._serve(models, rows, publisher, topics, epoch)
        finally:
            # A producer flushes first, and goes on trying for as long as the broker is away.
            await _within(0.15 * settings.grace_s, publisher.stop())
            await redis.aclose()

    async def _serve(
        self, models: ModelWatch, rows: RedisStore, publisher: KafkaPublisher, topics: OurTopics, epoch: int
    ) -> None:
        """Run the app until the end is asked for, then let the agents finish and commit."""
        settings = self._settings
        store = CachedStore(rows, max_users=settings.cached_users)
        app = faust_app(settings, self._start_at, self._on_gap)
        rewind = partial(self._rewind, app, store)
        topic_watch = self._topic_watch(app, rows, topics)
        guarded = self._guarded(CurrentRows(store, progress=rows.progress, applied=self._applied, rewind=rewind))
        context = AgentContext(
            in_service=models.in_service,
            store=store,
            publisher=publisher,
            applied=self._applied,
            clock=SystemClock(),
            telemetry=self._telemetry,
            limits=settings.limits(),
            epoch=epoch,
            future_tolerance_ms=settings.future_tolerance_ms,
            deadlines=Deadlines(default_ms=settings.deadline_ms, most_ms=settings.max_deadline_ms),
            reranked_topic=topic_name(settings.topic_prefix, "reranked"),
            dead_letter_topics={
                topic_name(settings.topic_prefix, name): dead_letter_name(settings.topic_prefix, name)
                for name in CO_PARTITIONED
            },
            max_output_bytes=settings.kafka.max_request_bytes,
            topic_bytes=topics.max_bytes,
            rewind=rewind,
            fail=self._fail,
            list_rows=guarded,
            at_hand=store.at_hand,
            is_log_ours=topic_watch.is_sure,
        )
        interactions = InteractionsAgent(context, max_records=settings.micro_batch_interactions)
        lists = ListsAgent(context, max_records=settings.micro_batch_lists)
        self._subscribe(app, interactions, "interactions")
        self._subscribe(app, lists, "candidates")
        app.on_ready = partial(self._on_assigned, models.in_service)

        @app.on_partitions_revoked.connect
        async def on_revoked(*_: object, **__: object) -> None:
            await _within(REVOKE_GRACE_S, interactions.drained(), lists.drained())
            await app.consumer.commit()
            lists.drop_parked()
            store.drop()
            self._applied.drop()
            self._condition.assigned = ()

        tasks = [
            asyncio.create_task(wait)
            for wait in (
                lists.watch_parked(),
                models.run(settings.artefact_check_s),
                self._watch_join(),
                topic_watch.run(),
                self._store_watch(app, rows, guarded, context, store).run(),
                self._progress_watch(app, interactions, lists, guarded, publisher).watch(),
            )
        ]
        for task in tasks:
            task.add_done_callback(self._on_task_ended)
        tasks += self._start(app)
        await self._end.wait()
        self._condition.stopping = True
        interactions.stop()
        lists.stop()
        await _within(0.5 * settings.grace_s, interactions.drained(), lists.drained())
        await _within(0.15 * settings.grace_s, app.consumer.commit())
        await _within(0.15 * settings.grace_s, app.stop())
        for task in tasks:
            task.cancel()

    def _guarded(self, store: RowSource) -> GuardedStore:
        settings = self._settings.redis
        return GuardedStore(
            store,
            breaker=CircuitBreaker(failures=settings.breaker_failures, probe_after_ms=settings.breaker_probe_ms),
            budget_ms=settings.budget_ms,
            clock=SystemClock(),
            telemetry=self._telemetry,
        )

    def _subscribe(self, app: RerankApp, agent: InteractionsAgent | ListsAgent, name: str) -> None:
        topic = app.topic(
            topic_name(self._settings.topic_prefix, name),
            key_serializer=BATCH_CODEC,
            value_serializer=BATCH_CODEC,
            value_type=None,
        )
        app.agent(topic, name=name)(agent.run)

    def _start(self, app: RerankApp) -> "list[asyncio.Task[None]]":
        """Start the app; a start that fails, or a stop that nobody asked for, ends the worker."""
        running = asyncio.create_task(app.start())
        running.add_done_callback(self._on_app_started)
        stopped = asyncio.create_task(app.wait_until_stopped())
        stopped.add_done_callback(lambda _: self._on_app_stopped(app))
        return [running, stopped]

    def _start_at(self, offsets: Mapping[TP, int]) -> None:
        """Take note, before reading starts, that what is committed is applied and its dead letters are safe."""
        for tp, offset in offsets.items():
            if tp.topic == self._log:
                self._applied.advance(tp.partition, offset - 1)
                self._applied.finish(tp.partition, offset - 1)

    def _on_gap(self, tp: TP, offset: int, records: int) -> None:
        """Say that records are gone that were to be read; what is left goes on."""
        self._telemetry.gap_records.labels(tp.topic).inc(records)
        logger.error(
            "event=gap topic=%s partition=%s offset=%s records=%s deleted before they were read; reading goes on at "
            "what is left; keep records longer (retention.ms) than a worker may be away",
            tp.topic,
            tp.partition,
            offset,
            records,
        )

    def _rewind(self, app: RerankApp, store: CachedStore, partition: int, offset: int) -> None:
        """Read interactions again that Redis lost; until they are back, slates say so."""
        logger.warning("event=store_behind partition=%s has=%s: what comes after is read again", partition, offset)
        store.drop()
        self._applied.rewind(partition, offset)
        cast("BatchConsumer", app.consumer).rewind(self._log, partition, offset + 1)
        self._telemetry.rewinds.inc()

    def _on_assigned(self, in_service: InService, partitions: set[TP]) -> None:
        """Take note of an assignment; the first one makes the worker ready."""
        self._telemetry.rebalances.inc()
        self._telemetry.partitions.set(len(partitions))
        assignment = sorted((tp.topic, tp.partition) for tp in partitions)
        logger.info("event=assigned partitions=%s", assignment)
        self._condition.assigned = assignment
        if (problem := separated(assignment, self._inputs)) is not None:
            self._fail(TransientError(problem))
            return
        if not self._condition.was_ready:
            self._condition.was_ready = True
            model = in_service.serving.name
            http = {} if self._http_port is None else {"http_port": self._http_port}
            self._announce(
                {"event": "ready", "model": model.name, "version": model.version, "partitions": assignment, **http}
            )

    def _store_watch(
        self, app: RerankApp, rows: RedisStore, guarded: GuardedStore, context: AgentContext, store: CachedStore
    ) -> StoreWatch:
        hooks = Hooks(
            rewind=context.rewind,
            drop_cache=store.drop,
            fail=self._fail,
            high_waters=lambda: cast("BatchConsumer", app.consumer).high_waters(self._log),
            log_end=lambda partition: cast("BatchConsumer", app.consumer).log_end(self._log, partition),
        )
        return StoreWatch(rows, guarded, self._applied, hooks)

    def _progress_watch(
        self,
        app: RerankApp,
        interactions: InteractionsAgent,
        lists: ListsAgent,
        guarded: GuardedStore,
        publisher: KafkaPublisher,
    ) -> ProgressWatch:
        def standings() -> dict[Partition, Standing]:
            self._condition.circuit = guarded.state
            found = cast("BatchConsumer", app.consumer).standings() if self._condition.assigned else {}
            return {(tp.topic, tp.partition): standing for tp, standing in found.items()}

        def excused() -> set[Partition]:
            waiting = {one for one in self._condition.assigned if one[0] == self._log and interactions.retrying}
            return waiting | lists.parked_partitions()

        return ProgressWatch(
            stall_after_s=self._settings.stall_after_s,
            standings=standings,
            excused=excused,
            broker_answers=publisher.reaches_broker,
            fail=self._fail,
            condition=self._condition,
            telemetry=self._telemetry,
        )

    def _topic_watch(self, app: RerankApp, rows: RedisStore, topics: OurTopics) -> TopicWatch:
        lists = topic_name(self._settings.topic_prefix, "candidates")

        def read_lists_from_their_start() -> None:
            """Our positions were those of another topic."""
            consumer = cast("BatchConsumer", app.consumer)
            for tp in (tp for tp in consumer.assignment() if tp.topic == lists):
                consumer.rewind(tp.topic, tp.partition, 0)

        return TopicWatch(
            Inputs(log=self._log, lists=lists, log_id=topics.log_id, lists_id=topics.lists_id),
            topic_ids=lambda names: cast("BatchConsumer", app.consumer).topic_ids(names),
            owner=rows,
            lists_recreated=read_lists_from_their_start,
            fail=self._fail,
        )

    async def _watch_join(self) -> None:
        """End a worker that does not join: Faust logs a fatal join error once and then idles for ever."""
        await asyncio.sleep(self._settings.join_timeout_s)
        if not self._condition.was_ready:
            self._fail(
                TransientError(
                    f"no partitions assigned in {self._settings.join_timeout_s:g} s; nothing is served; look at the "
                    "broker's answer above, or run `rerank doctor`"
                )
            )

    def _on_app_started(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(TransientError(f"the consumer did not start: {error!r}; check the broker (`rerank doctor`)"))

    def _on_app_stopped(self, app: RerankApp) -> None:
        if not self._end.is_set():
            self._fail(TransientError(f"the consumer stopped by itself: {app.crash_reason!r}; restart the worker"))

    def _on_task_ended(self, task: "asyncio.Task[None]") -> None:
        """End the worker with a task that broke: nobody would do its work."""
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the worker with its input unacked."""
        if self._condition.failure is None:
            self._condition.failure = error
            logger.error("event=failed %s", error, exc_info=error)
            self._end.set()

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        """End gracefully; a second signal ends at once."""
        if self._end.is_set():
            os._exit(128 + number)
        logger.info("event=stopping signal=%s", signal.Signals(number).name)
        self._end.set()


def spare_the_collector() -> None:
    """Leave libraries and items out of every later collection. Affects: the whole process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 20)


def _artefact_path(settings: Settings) -> Path:
    if settings.artefact is None:
        raise SettingsError(
            "RERANK_ARTEFACT is not set; the worker does not start; point it at an artefact directory "
            "(`rerank train --out DIR` makes one)"
        )
    return settings.artefact


async def _enter_epoch(redis: Any, settings: Settings, rows: RedisStore, topics: OurTopics) -> int:
    await check_connection(redis, settings.redis, prefix=settings.row_prefix())
    await rows.claim_log(topics.log_id)
    await rows.claim_rows(cold=settings.redis.foreign_rows == "cold")
    return await rows.enter_epoch(topics.partitions)


async def _within(seconds: float, *waits: Awaitable[object]) -> None:
    """Await all of them, but no longer than `seconds`, whether or not they can be cancelled.

    What fails or is unfinished by then is logged: its input stays unacked and comes again.
    """
    done, unfinished = await asyncio.wait([asyncio.ensure_future(wait) for wait in waits], timeout=seconds)
    for task in unfinished:
        task.cancel()
        logger.warning("event=timeout seconds=%s what is unfinished stays unacked and comes again", seconds)
    for task in done:
        if (error := task.exception()) is not None:
            logger.warning("event=unfinished %r; what is unacked comes again", error)
