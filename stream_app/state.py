"""The user row: how interactions move it, and its bytes in Redis. Pure: no I/O, no clock.

A row is a fold over one user's interactions in offset order; `fence` is the position of the last one.
The same log therefore always gives the same row, whoever folds it and however often.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from schemas.records import Interaction

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

RING_ITEMS = 50
MAX_GAP_S = 10 * 365 * 86_400.0
ROW_VERSION = 1


class Fence(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Position of the last interaction a row reflects; offset -1: none yet."""

    epoch: int
    partition: int
    offset: int

    def covers(self, other: "Fence") -> bool:
        """Tell whether a row at this fence has already folded the interaction at `other`.

        Inside one topic epoch and partition the offset decides. An older epoch is covered, for its offsets
        mean nothing any more; a newer epoch, or another partition of the same one, is not.
        """
        if self.epoch != other.epoch:
            return other.epoch < self.epoch
        return self.partition == other.partition and other.offset <= self.offset


class UserRow(msgspec.Struct, frozen=True, gc=False):
    """One user's state. A Struct, for one is built once an interaction (tests/bench/bench_stages.py)."""

    events: int
    last_event_time_ms: int
    fence: Fence
    vector: bytes  # float32, (S,)
    ring: bytes  # UTF-8 item ids, newline between them, oldest first, at most RING_ITEMS
    past: tuple[Fence, ...] = ()  # the last of each other partition of the epoch: the user moved when some were added

    def history(self) -> list[str]:
        """Return the last items, oldest first."""
        return self.ring.decode().split("\n") if self.ring else []


def cold_row(state_size: int) -> UserRow:
    """Return the row of a user nobody has seen: no events, a zero vector, a fence that covers nothing."""
    return UserRow(0, 0, Fence(0, 0, -1), bytes(4 * state_size), b"")


class RowUpdate(msgspec.Struct, frozen=True, gc=False):
    """A row to be saved, and the fence of the row it was folded from."""

    user_id: str
    base: Fence
    row: UserRow


def may_replace(stored: Fence | None, update: RowUpdate) -> bool:
    """Tell whether an update may be written over the row stored at `stored` (None: no row)."""
    return stored is None or may_replace_fence(stored, base=update.base, new=update.row.fence)


def may_replace_fence(stored: Fence, *, base: Fence, new: Fence) -> bool:
    """Tell whether a row at `new`, folded from one at `base`, may be written over the row stored at `stored`.

    It may not when the stored row has folded interactions that the base had not (somebody else wrote
    meanwhile: reload and fold again), nor when the stored row already covers the update.
    """
    return base.covers(stored) and not stored.covers(new)


class Progress(msgspec.Struct, frozen=True):
    """How far a save brings a partition of the log: to `offset`, if the store is at `base` or beyond.

    The store keeps the furthest offset beside the rows and refuses to write past a hole, so a store that comes
    back empty or older than it was is noticed by the first save, before a row is folded from nothing.
    """

    partition: int
    base: int
    offset: int


class PositionedInteraction(msgspec.Struct, frozen=True, gc=False):
    """An interaction with its place in the log; `interaction` None forgets the user."""

    user_id: str
    interaction: Interaction | None
    fence: Fence
    record_time_ms: int  # Kafka's; negative when the broker gave none


class UserModel(Protocol):
    """The half of a model that moves users."""

    def advance(
        self, states: FloatArray, items: FloatArray, kinds: IntArray, values: FloatArray, dt_s: FloatArray
    ) -> FloatArray:
        """Return the next states (B, S) after one interaction for each of B users."""
        ...


class Vocabulary(Protocol):
    """What the model knows of items and kinds."""

    def item_row(self, item_id: str) -> int:
        """Return the arena row of the item, 0 when it is unknown."""
        ...

    def kind_index(self, kind: str) -> int:
        """Return the number of the kind, 0 when it is unknown."""
        ...

    def vectors(self, rows: IntArray) -> FloatArray:
        """Return the vectors (B, V) of arena rows (B,)."""
        ...


@dataclass(slots=True)
class FoldCounts:
    """What happened to the interactions of one micro-batch."""

    applied: int = 0
    duplicate: int = 0
    forgotten: int = 0
    late: int = 0
    future: int = 0
    unknown_kind: int = 0
    unknown_item: int = 0

    def add(self, other: "FoldCounts") -> None:
        """Count what `other` counted."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def subtract(self, other: "FoldCounts") -> None:
        """Take back what `other` counted."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) - getattr(other, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    """The rows that changed, and the counts."""

    updates: list[RowUpdate]
    counts: FoldCounts


@dataclass(slots=True)
class _Plan:
    """One user's pending interactions inside a micro-batch."""

    row: UserRow
    events: int
    last_event_time_ms: int
    fence: Fence
    vector: bytes
    ring: bytes
    past: tuple[Fence, ...]
    steps: list[tuple[int, int, float, float]] = field(default_factory=list)  # item row, kind, value, dt_s

    def covers(self, position: Fence) -> bool:
        """Tell whether the interaction at `position` is already folded."""
        return self.fence.covers(position) or any(fence.covers(position) for fence in self.past)

    def move_to(self, position: Fence) -> None:
        """Set the fence, and remember where the user was in the partition that he leaves."""
        left = self.fence
        if (left.epoch, left.partition) != (position.epoch, position.partition):
            kept = [
                fence
                for fence in (*self.past, left)
                if fence.epoch == position.epoch and fence.partition != position.partition and fence.offset >= 0
            ]
            self.past = tuple(sorted(kept, key=lambda fence: fence.partition))
        self.fence = position


def advance(
    rows: Mapping[str, UserRow],
    interactions: Sequence[PositionedInteraction],
    *,
    model: UserModel,
    vocabulary: Vocabulary,
    future_tolerance_ms: int,
) -> Advanced:
    """Fold interactions, in log order, into the rows of their users.

    Args:
        rows: the row of every user that occurs in `interactions`.
        interactions: in offset order inside each partition.
        future_tolerance_ms: an event time further than this ahead of the record's Kafka time is clamped to it.

    Returns:
        The changed rows. An interaction that its row already covers changes nothing.
    """
    counts = FoldCounts()
    plans: dict[str, _Plan] = {}
    for positioned in interactions:
        plan = plans.get(positioned.user_id)
        if plan is None:
            row = rows[positioned.user_id]
            plan = _Plan(row, row.events, row.last_event_time_ms, row.fence, row.vector, row.ring, row.past)
            plans[positioned.user_id] = plan
        if plan.covers(positioned.fence):
            counts.duplicate += 1
        elif positioned.interaction is None:
            _forget(plan, positioned.fence)
            counts.forgotten += 1
        else:
            _append(plan, positioned.interaction, positioned, vocabulary, future_tolerance_ms, counts)
            counts.applied += 1
    changed = {user: plan for user, plan in plans.items() if plan.fence is not plan.row.fence}
    return Advanced(updates=_finish(changed, model, vocabulary), counts=counts)


def _forget(plan: _Plan, fence: Fence) -> None:
    """Reset to a cold row that keeps the fence, so that a replay of older interactions stays without effect."""
    plan.steps.clear()
    plan.move_to(fence)
    plan.events, plan.last_event_time_ms = 0, 0
    plan.vector, plan.ring = bytes(len(plan.vector)), b""


def _append(
    plan: _Plan,
    interaction: Interaction,
    positioned: PositionedInteraction,
    vocabulary: Vocabulary,
    future_tolerance_ms: int,
    counts: FoldCounts,
) -> None:
    event_time_ms = interaction.event_time_ms
    latest_ms = positioned.record_time_ms + future_tolerance_ms
    if event_time_ms > latest_ms and positioned.record_time_ms >= 0:
        event_time_ms = latest_ms
        counts.future += 1
    gap_s = (event_time_ms - plan.last_event_time_ms) / 1000.0 if plan.events else 0.0
    if gap_s < 0.0:
        counts.late += 1
        gap_s = 0.0
    item_row, kind = vocabulary.item_row(interaction.item_id), vocabulary.kind_index(interaction.kind)
    counts.unknown_item += item_row == 0
    counts.unknown_kind += kind == 0
    value = 0.0 if interaction.value is None else interaction.value
    plan.steps.append((item_row, kind, value, min(gap_s, MAX_GAP_S)))
    item_id = interaction.item_id.encode()
    if plan.events >= RING_ITEMS:
        plan.ring = plan.ring[plan.ring.index(b"\n") + 1 :] + b"\n" + item_id
    else:
        plan.ring = plan.ring + b"\n" + item_id if plan.events else item_id
    plan.last_event_time_ms = max(event_time_ms, plan.last_event_time_ms) if plan.events else event_time_ms
    plan.events += 1
    plan.move_to(positioned.fence)


def _finish(plans: Mapping[str, _Plan], model: UserModel, vocabulary: Vocabulary) -> list[RowUpdate]:
    """Run the waves (wave j: the j-th interaction of every user that has one) and cut the rows out."""
    if not plans:
        return []
    ordered = list(plans.values())
    states = np.frombuffer(b"".join(plan.vector for plan in ordered), dtype=np.float32)
    states = states.reshape(len(ordered), -1).copy()  # (U, S)
    wave, waiting = 0, [u for u, plan in enumerate(ordered) if plan.steps]
    while waiting:
        steps = [ordered[u].steps[wave] for u in waiting]
        rows, kinds, values, dt_s = zip(*steps, strict=True)
        moved = model.advance(
            states[waiting],  # (B, S)
            vocabulary.vectors(np.array(rows, dtype=np.int64)),  # (B, V)
            np.array(kinds, dtype=np.int64),
            np.array(values, dtype=np.float64).clip(-3.0e38, 3.0e38).astype(np.float32),
            np.array(dt_s, dtype=np.float32),
        )
        states[waiting] = moved
        wave += 1
        waiting = [u for u in waiting if len(ordered[u].steps) > wave]
    buffer, width = states.tobytes(), 4 * states.shape[1]
    return [
        RowUpdate(
            user_id,
            plan.row.fence,
            UserRow(
                plan.events,
                plan.last_event_time_ms,
                plan.fence,
                buffer[u * width : (u + 1) * width],
                plan.ring,
                plan.past,
            ),
        )
        for u, (user_id, plan) in enumerate(plans.items())
    ]


# Row bytes. The fence comes first, as 32 decimal digits, because the script that guards it compares text:
# Redis's Lua holds no 64-bit integers, and an operator can read it with GETRANGE key 0 31.
#   0  epoch (6 digits) partition (6) offset (20)
#  32  u8 version, u8 flags (1: past fences), u16 S, u32 crc32 of all other bytes, u64 space, u64 events,
#      i64 last_event_time_ms
#  64  float32[S]; past fences, if any: u16 n, then n times u32 partition, u64 offset + 1; then the ring
_HEAD = struct.Struct("<BBHIQQq")
_PAST_COUNT = struct.Struct("<H")
_PAST = struct.Struct("<IQ")
_HAS_PAST = 1
FENCE_BYTES = 32
_BODY_AT = FENCE_BYTES + _HEAD.size


class RowError(ValueError):
    """The bytes are no row: truncated, corrupt, or of another version."""


class ForeignRowError(RowError):
    """A sound row whose vector lives in another artefact's state space."""

    def __init__(self, fence: Fence, past: tuple[Fence, ...], message: str) -> None:
        """Keep the fences: what the row has seen stays true whatever the model."""
        super().__init__(message)
        self.fence = fence
        self.past = past


def fence_text(fence: Fence) -> bytes:
    """Return the fence as the 32 digits that the save script compares."""
    return b"%06d%06d%020d" % (fence.epoch, fence.partition, fence.offset + 1)


def offset_text(offset: int) -> bytes:
    """Return the offset of progress as the 20 digits that the save script compares."""
    return b"%020d" % (offset + 1)


def offset_of(text: bytes) -> int:
    """Return the offset of progress; digits cut short or overwritten count as nothing applied."""
    return int(text) - 1 if text.isdigit() else -1


def fence_of(data: bytes) -> Fence:
    """Return the fence of row bytes."""
    return Fence(int(data[:6]), int(data[6:12]), int(data[12:FENCE_BYTES]) - 1)


def sound_fences(data: bytes) -> tuple[Fence, ...]:
    """Return the fence of a row of any state space, then its past ones.

    Raises:
        RowError: the bytes are no sound row.
    """
    try:
        row: UserRow | ForeignRowError = unpack_row(data, state_size=0, space=0)
    except ForeignRowError as error:
        row = error
    return (row.fence, *row.past)


def pack_row(row: UserRow, space: int) -> bytes:
    """Return the bytes of a row; `space` names the state space (the artefact) its vector lives in."""
    fence, flags = fence_text(row.fence), _HAS_PAST if row.past else 0
    body = row.vector + _pack_past(row.past) + row.ring if row.past else row.vector + row.ring
    size = len(row.vector) // 4
    head = _HEAD.pack(ROW_VERSION, flags, size, 0, space, row.events, row.last_event_time_ms)
    checksum = zlib.crc32(body, zlib.crc32(head, zlib.crc32(fence)))
    return fence + _HEAD.pack(ROW_VERSION, flags, size, checksum, space, row.events, row.last_event_time_ms) + body


def unpack_row(data: bytes, *, state_size: int, space: int) -> UserRow:
    """Return the row.

    Raises:
        RowError: saying what disagrees; the caller sets the bytes aside and starts the user cold.
        ForeignRowError: the row is sound, but of another artefact.
    """
    if len(data) < _BODY_AT:
        raise RowError(f"row of {len(data)} bytes: shorter than its head of {_BODY_AT}")
    version, flags, size, checksum, row_space, events, last_event_time_ms = _HEAD.unpack_from(data, FENCE_BYTES)
    if version != ROW_VERSION or flags & ~_HAS_PAST:
        raise RowError(f"row version={version}, flags={flags}: this worker reads {ROW_VERSION}, 0 or {_HAS_PAST}")
    head = _HEAD.pack(version, flags, size, 0, row_space, events, last_event_time_ms)
    if zlib.crc32(data[_BODY_AT:], zlib.crc32(head, zlib.crc32(data[:FENCE_BYTES]))) != checksum:
        raise RowError(f"row checksum {checksum:#010x} does not match its bytes")
    fence, vector_end = fence_of(data), _BODY_AT + 4 * size
    past, ring_at = _unpack_past(data, vector_end, fence.epoch) if flags else ((), vector_end)
    if size != state_size or row_space != space:
        found = f"row of space {row_space:#x}, S={size}: the model has {space:#x}, S={state_size}"
        raise ForeignRowError(fence, past, found)
    return UserRow(events, last_event_time_ms, fence, data[_BODY_AT:vector_end], data[ring_at:], past)


def _pack_past(past: Sequence[Fence]) -> bytes:
    return _PAST_COUNT.pack(len(past)) + b"".join(_PAST.pack(fence.partition, fence.offset + 1) for fence in past)


def _unpack_past(data: bytes, at: int, epoch: int) -> tuple[tuple[Fence, ...], int]:
    """Return the past fences that begin at byte `at`, and where they end."""
    try:
        (count,) = _PAST_COUNT.unpack_from(data, at)
        end = at + _PAST_COUNT.size + count * _PAST.size
        pairs = _PAST.iter_unpack(data[at + _PAST_COUNT.size : end])
        return tuple(Fence(epoch, partition, following - 1) for partition, following in pairs), end
    except struct.error as error:
        raise RowError(f"row of {len(data)} bytes: past fences cut short: {error}") from None
