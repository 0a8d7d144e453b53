"""Rows in a Redis Cluster: every bucket of users lives in one slot, so a batch is split by bucket.

No call spans slots, so what one script does on one server takes three steps here: ask the log's slot whether this
writer may write, save every bucket (one round trip to each node, rows and the bucket's own progress as one
atom), then move the log's progress. DESIGN.md, "Redis Cluster", says what that is worth and what covers the rest.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stream_app.errors import StoreBehindError
from stream_app.guarded_calls import BEHIND, Call, save_call
from stream_app.state import Progress, RowUpdate, fence_text, offset_of
from stream_app.store import BUCKETS, RedisStore, Replacement, RowCodec, bucket_of, unavailable

_NEVER = -1
_BUCKETS = [f"b{bucket:02x}" for bucket in range(BUCKETS)]


class ClusterStore(RedisStore):
    """The store over a cluster client. Same contract; what is atomic is a bucket, not a batch."""

    def __init__(self, client: Any, *, codec: RowCodec, key_prefix: str, log: str) -> None:
        """Use a cluster client, which the caller closes."""
        super().__init__(client, codec=codec, key_prefix=key_prefix, log=log)
        self._bucket_offsets: dict[tuple[str, int], int] = {}  # how far this writer brought a bucket
        self._unanswered: dict[tuple[str, int], int] = {}  # how far a write went whose answer never came
        self._histories: frozenset[str] = frozenset()  # the replication ids of the primaries, when last compared

    async def _get(self, keys: list[str]) -> list[bytes | None]:
        by_tag: dict[str, list[int]] = defaultdict(list)
        for at, key in enumerate(keys):
            by_tag[key[key.index("{") : key.index("}")]].append(at)
        pipe: Any = self.client.pipeline(transaction=False)
        for places in by_tag.values():
            pipe.execute_command("MGET", *(keys[at] for at in places))  # `mget` itself is barred there
        found: list[bytes | None] = [None] * len(keys)
        for places, answers in zip(by_tag.values(), await pipe.execute(), strict=True):
            for at, answer in zip(places, answers, strict=True):
                found[at] = answer
        return found

    async def _look_up_again(self) -> None:
        """Do nothing: a cluster's client follows its nodes by what they answer."""

    async def _save(self, updates: Sequence[RowUpdate], progress: Sequence[Progress], *, completes: bool) -> list[bool]:
        await super()._save([], progress, completes=False)
        by_bucket: dict[str, list[int]] = defaultdict(list)
        for at, update in enumerate(updates):
            by_bucket[bucket_of(update.user_id)].append(at)
        written = [False] * len(updates)
        if by_bucket:
            calls = [
                self._bucket_call(bucket, [updates[at] for at in places], progress)
                for bucket, places in by_bucket.items()
            ]
            self._unanswered |= {(bucket, step.partition): step.offset for bucket in by_bucket for step in progress}
            answers = dict(zip(by_bucket, await self._call(calls), strict=True))
            self._check_buckets(answers, progress)
            for bucket, places in by_bucket.items():
                for at, ok in zip(places, self._bucket_written(bucket, answers[bucket], progress), strict=True):
                    written[at] = ok
        if completes and all(written) and progress:
            await super()._save([], progress, completes=True)
            self._settle_unanswered(progress)
        return written

    def _settle_unanswered(self, progress: Sequence[Progress]) -> None:
        """Count writes without an answer as done, once their micro-batch is: it found their rows written."""
        for step in progress:
            for place in [one for one in self._unanswered if one[1] == step.partition]:
                offset = self._unanswered.pop(place)
                if offset <= step.offset:
                    self._bucket_offsets[place] = max(offset, self._bucket_offsets.get(place, _NEVER))

    def _bucket_log_key(self, bucket: str) -> str:
        return f"{self._prefix}:{{{bucket}}}:log:{self._log}"

    def _bucket_call(self, bucket: str, updates: Sequence[RowUpdate], progress: Sequence[Progress]) -> Call:
        log_key = self._bucket_log_key(bucket)
        steps = [
            Progress(step.partition, self._bucket_offsets.get((bucket, step.partition), _NEVER), step.offset)
            for step in progress
        ]
        keys = [log_key, *(f"{log_key}:{self._epoch}:{step.partition}" for step in steps)]
        keys += [self.key(update.user_id) for update in updates]
        arguments = self._save_arguments(steps, completes=True, rebuilds=b"")
        arguments += [part for update in updates for part in (fence_text(update.base), self._codec.pack(update.row))]
        return save_call(keys, arguments)

    def _check_buckets(self, answers: Mapping[str, list[Any]], progress: Sequence[Progress]) -> None:
        """Raise for the partition of which a bucket lost most of what we wrote.

        What is known of the other partitions stays, so their loss shows at the next write.
        """
        behind: dict[int, dict[str, int]] = defaultdict(dict)
        for bucket, (verdict, *details) in answers.items():
            if verdict == BEHIND:
                behind[progress[details[0] - 1].partition][bucket] = offset_of(details[1])
        for step in progress:
            if lost := behind.get(step.partition):
                self._bucket_offsets |= {(bucket, step.partition): has for bucket, has in lost.items()}
                raise StoreBehindError(step.partition, min(step.base, *lost.values()))

    def _bucket_written(self, bucket: str, answer: list[Any], progress: Sequence[Progress]) -> list[bool]:
        written = self._written(answer, progress)
        if all(written):
            for step in progress:
                place = (bucket, step.partition)
                self._bucket_offsets[place] = max(step.offset, self._bucket_offsets.get(place, _NEVER))
        return written

    async def progress(self, partitions: Sequence[int]) -> list[int]:
        """Return the offset up to which each partition is applied; what a node lost counts as not applied.

        One question to each node tells whether it still is the one that was compared, with its data. Only when one is
        not, every bucket is asked.
        """
        if partitions and self._partitions:
            histories = await self._current_histories()
            if histories is None or histories != self._histories:
                await self._take_back_what_was_lost()
                self._histories = histories or frozenset()
        return await super().progress(partitions)

    async def _current_histories(self) -> frozenset[str] | None:
        """Return the replication id of every primary; None when one has no mark. A failover or a restart changes it."""
        client: Any = self.client
        with unavailable("marks"):
            told, marks = await asyncio.gather(
                client.execute_command("INFO", "replication", target_nodes=client.PRIMARIES),
                self._marks(self._bucket_of_each_node()),
            )
        if not all(marks.values()):
            return None
        found = told.values() if all(isinstance(one, dict) for one in told.values()) else [told]
        return frozenset(str(one["master_replid"]) for one in found)

    def _bucket_of_each_node(self) -> list[str]:
        client: Any = self.client
        nodes = {client.get_node_from_key(self._bucket_log_key(bucket)): bucket for bucket in _BUCKETS}
        return list(nodes.values())

    async def _take_back_what_was_lost(self) -> None:
        """Lower the log's progress to what every bucket still has; a bucket without a mark has nothing at all.

        Progress first, what is known of the buckets afterwards: whoever is stopped in between finds the loss again.
        """
        known = dict(self._bucket_offsets)  # before asking: what is written meanwhile is in the answer
        marks, offsets = await asyncio.gather(self._marks(_BUCKETS), self._stored_offsets(list(known)))
        if not all(marks.values()):
            if await self._take_back(dict.fromkeys(range(self._partitions), _NEVER)):
                self._bucket_offsets.clear()  # all of it is read again, so nothing can hide
                await self._mark()
            return
        lost = {place: has for place, has in offsets.items() if has < known[place]}
        lowest: dict[int, int] = {}
        for (_, partition), has in lost.items():
            lowest[partition] = min(has, lowest.get(partition, has))
        await self._take_back(lowest)
        self._bucket_offsets |= lost

    async def _stored_offsets(self, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        keys = [f"{self._bucket_log_key(bucket)}:{self._epoch}:{partition}" for bucket, partition in places]
        with unavailable("marks"):
            answers = await self._get(keys) if keys else []
        return {
            place: _NEVER if answer is None else offset_of(answer)
            for place, answer in zip(places, answers, strict=True)
        }

    async def enter_epoch(self, partitions: int) -> int:
        """As for one server; also marks every bucket, so that a node which comes back empty is noticed.

        A bucket whose mark is missing although the log has one lost its rows: nothing counts as applied any more.
        """
        is_marked = await self._is_marked()
        lost = is_marked and not all((await self._marks(_BUCKETS)).values())
        epoch = await super().enter_epoch(partitions)
        if lost:  # before marking: a crash between the two is noticed
            await self._take_back(dict.fromkeys(range(partitions), _NEVER))
        await self._mark()
        return epoch

    async def reset_epoch(self, partitions: int) -> int:
        """Start a new epoch, in every bucket; what is known of buckets belonged to the old one.

        A writer of the old epoch that asked the log's slot before, and went to sleep, is refused by the buckets.
        """
        self._bucket_offsets.clear()
        self._unanswered.clear()
        epoch = await super().reset_epoch(partitions)
        await self._mark()
        return epoch

    async def _is_marked(self) -> bool:
        with unavailable("enter_epoch"):
            marked: Any = await self.client.hget(self._log_key, "buckets")
        return marked is not None

    async def _marks(self, buckets: Sequence[str]) -> dict[str, bool]:
        """Return whether each bucket has its mark."""
        pipe: Any = self.client.pipeline(transaction=False)
        for bucket in buckets:
            pipe.hexists(self._bucket_log_key(bucket), "bucket")
        with unavailable("marks"):
            answers = await pipe.execute()
        return {bucket: bool(marked) for bucket, marked in zip(buckets, answers, strict=True)}

    async def _mark(self) -> None:
        """Mark every bucket and say its epoch there, then mark the log: it has marks."""
        await self._call([self._bucket_call(bucket, [], []) for bucket in _BUCKETS])
        with unavailable("marks"):
            pipe: Any = self.client.pipeline(transaction=False)
            for bucket in _BUCKETS:
                pipe.hset(self._bucket_log_key(bucket), "bucket", 1)
            await pipe.execute()
            marking: Any = self.client.hset(self._log_key, "buckets", "1")
            await marking

    async def replace(self, replacements: Sequence[Replacement]) -> list[bool]:
        """As for one server, bucket by bucket."""
        by_bucket: dict[str, list[int]] = defaultdict(list)
        for at, one in enumerate(replacements):
            by_bucket[bucket_of(one.user_id)].append(at)
        written = [False] * len(replacements)
        if not by_bucket:
            return written
        calls = [
            self._replace_call([replacements[at] for at in places], self._bucket_log_key(bucket))
            for bucket, places in by_bucket.items()
        ]
        for places, answer in zip(by_bucket.values(), await self._call(calls), strict=True):
            self._check_epoch(answer[0])
            for at, ok in zip(places, answer[1:], strict=True):
                written[at] = bool(ok)
        return written

    async def rebuilt(self, offsets: Mapping[int, int], *, mended: bool) -> None:
        """As for one server; the rows of every bucket are there, so all of them are marked."""
        await self._mark()
        await super().rebuilt(offsets, mended=mended)


def store_of(
    client: Any, *, codec: RowCodec, key_prefix: str, log: str, scripts: Literal["lua", "watch"], cluster: bool
) -> RedisStore:
    """Return the store for a client of one server or of a cluster."""
    if cluster:  # the settings let it have scripts
        return ClusterStore(client, codec=codec, key_prefix=key_prefix, log=log)
    return RedisStore(client, codec=codec, key_prefix=key_prefix, log=log, scripts=scripts)
