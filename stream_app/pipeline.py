"""The path, in one place.

    decode -> load -> advance -> save                                              interactions
    decode -> load -> gather -> score -> select -> explain -> encode               candidate lists

Batches in, batches out. What it needs of the world (store, model, clock) stands in `ports`. Publishing and acks are
the agents'.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import msgspec

from schemas.codec import (
    CandidateListHead,
    DecodeError,
    decode_candidate_list,
    decode_interaction,
    decode_user_id,
    encode_slate,
    peek_candidate_list,
)
from schemas.dead_letter import DeadLetter
from schemas.limits import Limits
from schemas.records import CandidateList, Slate, SlateTiming
from stream_app.errors import ContestedRowsError, ModelError, StoreUnavailableError
from stream_app.explain import explain
from stream_app.features import gather
from stream_app.pace import Pace
from stream_app.ports import (
    AppliedOffsets,
    Batch,
    Clock,
    Record,
    RowsAtHand,
    RowSource,
    Serving,
    UserStore,
    no_rows_at_hand,
    reached,
)
from stream_app.slate import fallback_slate, ranked_slate, select, shed_slate
from stream_app.state import (
    Fence,
    FoldCounts,
    PositionedInteraction,
    Progress,
    RowUpdate,
    UserRow,
    advance,
)

STALE = "stale"
DEADLINE = "deadline"
STORE_UNAVAILABLE = "store_unavailable"
MODEL_ERROR = "model_error"
MODEL_NONFINITE = "model_nonfinite"

REFOLDS = 5
FALLBACK_MS = 2.0  # with less left, even the retrieval order would come past the deadline
LONG_AGO_MS = float("-inf")  # a deadline that has passed whatever the clock says


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long lists may wait, from their Kafka time on: one that asks for more holds its partition no longer."""

    default_ms: float
    most_ms: float

    def of(self, record: Record, asked_ms: int | None) -> float:
        """Return the time, on the clock of the record's Kafka time, when the answer to a list is useless."""
        allowed_ms = self.default_ms if asked_ms is None else min(asked_ms, self.most_ms)
        return record.timestamp + allowed_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What became of a micro-batch of interactions."""

    counts: FoldCounts
    dead_letters: list[DeadLetter]


class ListRequest(msgspec.Struct, frozen=True):
    """A decoded candidate list with the record it came in, and the batch that waits for its outcome."""

    record: Record
    request: CandidateList
    deadline_ms: float  # wall clock; infinity in a replay
    batch: Batch


class Answer(msgspec.Struct, frozen=True):
    """A slate and its bytes."""

    to: ListRequest
    slate: Slate
    value: bytes


def without_explanations(answer: Answer) -> Answer:
    """Return the answer without what only people read."""
    slate = msgspec.structs.replace(answer.slate, explanations=None)
    return Answer(answer.to, slate, encode_slate(slate))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """Answers, and the lists that still wait for the interaction their `after` names."""

    answers: list[Answer]
    waiting: list[ListRequest]


def refused(record: Record, *, code: str, stage: str, error_class: str, message: str) -> DeadLetter:
    """Return the record as a dead letter: untouched bytes, and why."""
    return DeadLetter(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        value=record.value,
        headers=record.headers,
        code=code,
        stage=stage,
        error_class=error_class,
        message=message,
    )


def dead_letter(record: Record, error: DecodeError) -> DeadLetter:
    """Return the dead letter of a record that cannot be decoded."""
    return refused(record, code=error.code, stage="DECODE", error_class=type(error).__name__, message=error.message)


def decode_interactions(
    records: Sequence[Record], *, epoch: int, limits: Limits
) -> tuple[list[PositionedInteraction], list[DeadLetter]]:
    """Decode a micro-batch; a null value forgets the user of the key."""
    interactions, dead_letters = [], []
    for record in records:
        try:
            if record.value is None:
                user_id, interaction = decode_user_id(record.key, limits), None
            else:
                interaction = decode_interaction(record.key, record.value, limits)
                user_id = interaction.user_id
        except DecodeError as error:
            dead_letters.append(dead_letter(record, error))
            continue
        fence = Fence(epoch, record.partition, record.offset)
        interactions.append(PositionedInteraction(user_id, interaction, fence, record.timestamp))
    return interactions, dead_letters


async def apply_interactions(
    records: Sequence[Record],
    *,
    serving: Serving,
    store: UserStore,
    epoch: int,
    limits: Limits,
    future_tolerance_ms: int,
    progress: Sequence[Progress] = (),
) -> Applied:
    """Fold a micro-batch of interactions into the rows of their users.

    Args:
        progress: how far the records bring each partition; () where no log is followed.

    Raises:
        StoreUnavailableError: nothing may be acked; the same call again is harmless.
        StoreBehindError: the store lost interactions before these; they must be read again first.
        ContestedRowsError: others write the same users; nothing may be acked, the same call again is harmless.
        ModelError: the model cannot advance; nothing may be acked.
    """
    interactions, dead_letters = decode_interactions(records, epoch=epoch, limits=limits)
    counts = FoldCounts()
    for _ in range(REFOLDS):
        user_ids = list({interaction.user_id: None for interaction in interactions})
        rows = dict(zip(user_ids, await store.load(user_ids), strict=True))

        def fold(
            some: list[PositionedInteraction], rows: dict[str, UserRow] = rows
        ) -> tuple[list[RowUpdate], FoldCounts]:
            advanced = advance(
                rows,
                some,
                model=serving.model,
                vocabulary=serving.arena,
                future_tolerance_ms=future_tolerance_ms,
            )
            return advanced.updates, advanced.counts

        updates, folded = fold(interactions)
        written = await store.save(updates, progress)
        refused = {update.user_id for update, ok in zip(updates, written, strict=True) if not ok}
        counts.add(folded)
        if not refused:
            return Applied(counts=counts, dead_letters=dead_letters)
        interactions = [interaction for interaction in interactions if interaction.user_id in refused]
        counts.subtract(fold(interactions)[1])
    raise ContestedRowsError(
        f"{len(interactions)} interactions refused {REFOLDS} times: others write the same users; nothing was acked, "
        "they are tried again; check that no two groups share a Redis key prefix, and that producers put a user into "
        "one partition"
    )


def decode_lists(
    records: Sequence[Record],
    batch: Batch,
    *,
    limits: Limits,
    deadlines: Deadlines,
    backlog_at_ms: float | None = None,
) -> tuple[list[ListRequest], list[DeadLetter]]:
    """Decode candidate lists; deadlines count from the record's Kafka time.

    With `backlog_at_ms`, the time of an overloaded worker, a list that is late by then is only looked at: it will be
    shed, whatever its items are.
    """
    requests, dead_letters = [], []
    for record in records:
        if backlog_at_ms is not None:
            head = peek_candidate_list(record.key, record.value, limits)
            if head is not None and backlog_at_ms >= deadlines.of(record, head.deadline_ms):
                requests.append(ListRequest(record, _without_items(head), LONG_AGO_MS, batch))
                continue
        try:
            request = decode_candidate_list(record.key, record.value, limits)
        except DecodeError as error:
            dead_letters.append(dead_letter(record, error))
            continue
        requests.append(ListRequest(record, request, deadlines.of(record, request.deadline_ms), batch))
    return requests, dead_letters


def _without_items(head: CandidateListHead) -> CandidateList:
    return CandidateList(
        request_id=head.request_id, user_id=head.user_id, event_time_ms=head.event_time_ms, item_ids=[]
    )


class Ranker:
    """Ranks micro-batches of candidate lists with one model, `serving`."""

    def __init__(
        self,
        *,
        serving: Serving,
        store: RowSource,
        applied: AppliedOffsets,
        clock: Clock,
        at_hand: RowsAtHand = no_rows_at_hand,
    ) -> None:
        """Take rows that are `at_hand`, load the others from `store`; `applied` tells how far the interactions are."""
        self.serving = serving
        self._store = store
        self._applied = applied
        self._clock = clock
        self._at_hand = at_hand
        self._pace = Pace()
        self._loads: set[asyncio.Task[dict[str, UserRow]]] = set()

    async def rank(self, requests: Sequence[ListRequest]) -> AsyncIterator[Ranked]:
        """Yield one answer for each list, but for those that wait for their `after`; in parts, as they are ready.

        Lists whose user is at hand wait for no store. The others wait for one load, each until its own deadline: a
        neighbour in a hurry costs nobody his ranking.
        """
        started_ms = self._clock.now_ms()
        answers, due = self._turn_away(requests, started_ms)
        known = dict(self._applied.offsets)  # what every row that is read from here on reflects
        rows = self._rows_at_hand(due)
        missing = [request for request in due if request.request.user_id not in rows]
        loading = self._load(missing) if missing else None
        if loading is not None and rows:
            await asyncio.sleep(0)  # the question is on its way while those at hand are scored
        if answers or rows:
            ready = [(request, rows[request.request.user_id]) for request in due if request.request.user_id in rows]
            ranked = self._rank(ready, known, started_ms)
            yield Ranked(answers=answers + ranked.answers, waiting=ranked.waiting)
        while loading is not None and missing:
            missing, ranked = await self._rank_loaded(missing, loading, known, started_ms)
            yield ranked

    def stale(self, request: ListRequest) -> Answer:
        """Answer a list whose `after` was not reached by its deadline."""
        return self._fallback(request, STALE, None, self._clock.now_ms())

    def _turn_away(self, requests: Sequence[ListRequest], now_ms: float) -> tuple[list[Answer], list[ListRequest]]:
        """Shed what is past its deadline, fall back where a forward pass would be; return what is worth the work."""
        late: list[ListRequest] = []
        due: list[ListRequest] = []
        hurried: list[ListRequest] = []
        for request in requests:
            if self._has_time(request, now_ms):
                due.append(request)
            else:
                (hurried if request.deadline_ms - now_ms >= FALLBACK_MS else late).append(request)
        if not due and any(request.deadline_ms > now_ms for request in chain(hurried, late)):
            self._pace.turned_away()
        answers = [self._fallback(request, DEADLINE, None, now_ms) for request in hurried]  # first: they have no time
        return answers + [self._shed(request, now_ms) for request in late], due

    def _has_time(self, request: ListRequest, now_ms: float) -> bool:
        return now_ms < request.deadline_ms - self._pace.expected_ms

    def _rows_at_hand(self, requests: Sequence[ListRequest]) -> Mapping[str, UserRow]:
        return self._at_hand([request.request.user_id for request in requests])

    def _load(self, requests: Sequence[ListRequest]) -> "asyncio.Task[dict[str, UserRow]]":
        """Begin to load. When its lists give it up it goes on by itself, for whoever counts outcomes of the store."""
        loading = asyncio.create_task(self._rows(list({request.request.user_id: None for request in requests})))
        self._loads.add(loading)
        loading.add_done_callback(self._loaded)
        return loading

    async def _rows(self, user_ids: Sequence[str]) -> dict[str, UserRow]:
        return dict(zip(user_ids, await self._store.load(user_ids), strict=True))

    def _loaded(self, loading: "asyncio.Task[dict[str, UserRow]]") -> None:
        self._loads.discard(loading)
        if not loading.cancelled():
            loading.exception()  # whoever still waits raises it; else it is nobody's

    async def _rank_loaded(
        self,
        requests: list[ListRequest],
        loading: "asyncio.Task[dict[str, UserRow]]",
        known: Mapping[int, int],
        started_ms: float,
    ) -> tuple[list[ListRequest], Ranked]:
        """Rank when the load ends; before, answer those whose time is up. Return who still waits, and the answers."""
        give_up_ms = min(request.deadline_ms for request in requests) - self._pace.expected_ms
        wait_ms = give_up_ms - self._clock.now_ms()
        await asyncio.wait([loading], timeout=None if wait_ms == float("inf") else max(0.0, wait_ms) / 1000.0)
        if not loading.done():
            now_ms = max(self._clock.now_ms(), give_up_ms)
            late = [request for request in requests if not self._has_time(request, now_ms)]
            in_time = [request for request in requests if self._has_time(request, now_ms)]
            return in_time, self._without_store(late, started_ms)
        try:
            rows = loading.result()
        except StoreUnavailableError:
            # An `after` that is not applied yet has time until the deadline, whatever the store says now.
            waiting = [request for request in requests if not self._is_reached(request)]
            others = self._without_store([request for request in requests if self._is_reached(request)], started_ms)
            return [], Ranked(answers=others.answers, waiting=waiting)
        loaded = [(request, rows[request.request.user_id]) for request in requests]
        return [], self._rank(loaded, self._applied.still(known), started_ms)

    def _is_reached(self, request: ListRequest) -> bool:
        after = request.request.after
        return after is None or reached(after, None, self._applied.offsets)

    def _without_store(self, requests: Sequence[ListRequest], started_ms: float) -> Ranked:
        return Ranked(
            answers=[self._fallback(request, STORE_UNAVAILABLE, None, started_ms) for request in requests], waiting=[]
        )

    def _rank(
        self, loaded: Sequence[tuple[ListRequest, UserRow]], known: Mapping[int, int], started_ms: float
    ) -> Ranked:
        """Score the lists that may be answered now; the others wait for their `after`.

        `known` is how far the interactions were when the rows were read: an interaction applied since then may not be
        in them.
        """
        loaded_ms, began_ms = self._clock.now_ms(), self._clock.steady_ms()
        ready, waiting, answers = [], [], []
        for request, row in loaded:
            after = request.request.after
            if not self._has_time(request, loaded_ms):
                answers.append(self._fallback(request, DEADLINE, row, started_ms))
            elif after is None or reached(after, row, known):
                ready.append((request, row))
            else:
                waiting.append(request)
        if ready:
            answers += self._score(ready, started_ms, loaded_ms)
            self._pace.took(self._clock.steady_ms() - began_ms)
        return Ranked(answers=answers, waiting=waiting)

    def _score(self, ready: Sequence[tuple[ListRequest, UserRow]], started_ms: float, loaded_ms: float) -> list[Answer]:
        serving = self.serving
        requests = [request.request for request, _ in ready]
        batch = gather(
            requests,
            [row for _, row in ready],
            arena=serving.arena,
            history_size=serving.history_size,
            feature_names=serving.feature_names,
        )
        try:
            scores = serving.model.score(batch)  # (B, C)
            wants_why = any(request.explain for request in requests)
            cold_scores = serving.model.score(batch.for_unknown_user()) if wants_why else scores  # (B, C)
        except ModelError:
            return [self._fallback(request, MODEL_ERROR, row, started_ms) for request, row in ready]
        selections = select(scores, batch.mask, [request.k for request in requests])
        scored_ms = self._clock.now_ms()
        answers = []
        for b, (request, row) in enumerate(ready):
            selection = selections[b]
            if selection.all_nonfinite:
                answers.append(self._fallback(request, MODEL_NONFINITE, row, started_ms))
                continue
            slate = ranked_slate(
                request.request,
                selection,
                row=row,
                cold_items=int(batch.cold_items[b]),
                model=serving.name,
                degraded=self._applied.degraded(request.record.partition),
                timing_ms=_timing(request, started_ms, loaded_ms, scored_ms),
                explanations=explain(request.request, selection, cold_scores[b]) if request.request.explain else None,
            )
            answers.append(Answer(request, slate, encode_slate(slate)))
        return answers

    def _shed(self, request: ListRequest, now_ms: float) -> Answer:
        waited_ms = round(now_ms - request.record.timestamp, 3)
        timing_ms = SlateTiming(queue=waited_ms, state=0.0, score=0.0, total=waited_ms)
        slate = shed_slate(request.request, DEADLINE, model=self.serving.name, timing_ms=timing_ms)
        return Answer(request, slate, encode_slate(slate))

    def _fallback(self, request: ListRequest, reason: str, row: UserRow | None, started_ms: float) -> Answer:
        now_ms = self._clock.now_ms()
        slate = fallback_slate(
            request.request,
            reason,
            row=row,
            model=self.serving.name,
            timing_ms=_timing(request, started_ms, now_ms, now_ms),
        )
        return Answer(request, slate, encode_slate(slate))


def _timing(request: ListRequest, started_ms: float, loaded_ms: float, scored_ms: float) -> SlateTiming:
    """Return the stages in ms; the queue starts at the record's Kafka time, whatever clock that was."""
    return SlateTiming(
        queue=round(started_ms - request.record.timestamp, 3),
        state=round(loaded_ms - started_ms, 3),
        score=round(scored_ms - loaded_ms, 3),
        total=round(scored_ms - request.record.timestamp, 3),
    )
