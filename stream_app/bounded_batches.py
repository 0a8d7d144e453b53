"""Batches of records, unpacked up to a bound, and read whatever they hold.

aiokafka unpacks a batch whole before anything of it can be measured, a few kilobytes of zstd may hold gigabytes, and it
raises out of its fetcher at what it cannot unpack or parse: at the same batch after every restart. Here a batch that
holds more than MAX_UNPACKED_BYTES is given up at the bound, and one that cannot be unpacked, or read on, at that place:
each of its offsets from there on reads as a record whose value is NotUnpacked, which every decoder refuses. Leans on
private names of aiokafka, which tests/functional/test_bounded_batches.py guards.

A wrong checksum stays an error: brokers refuse it from producers, so what was stored was sound, and may be again.
Batches of the formats before Kafka 0.11 stay with aiokafka: brokers take none from producers any more.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.memory_records import _MemoryRecordsPy

from schemas.limits import MAX_UNPACKED_BYTES
from schemas.refusals import ErrorCode, NotUnpacked
from stream_app.unpacking import UnpackError, unpack

MOST_REFUSED_RECORDS = 10_000
"""At most so many records stand for a batch, for its last offsets: its header may claim two thousand million."""

MOST_READ_AGAIN_RECORDS = 20_000
"""A batch of more is read by aiokafka alone: in Python millions would take longer than a member may be silent."""

_HEAD_BYTES = _DefaultRecordBatchPy.HEADER_STRUCT.size
_CODEC_BYTE = _DefaultRecordBatchPy.ATTRIBUTES_OFFSET + 1


class BoundedRecords(_MemoryRecordsPy):  # type: ignore[misc]  # aiokafka has no types
    """What one fetch brought of a partition, batch by batch.

    It ends early once MAX_UNPACKED_BYTES are unpacked, for many small batches can hold, and cost, what a large one
    does; the consumer then fetches the rest again.
    """

    readers: Sequence[Callable[[Any], Any]] = (DefaultRecordBatch,)
    """What reads a batch that is unpacked; each takes over at the first record that the one before it cannot read."""

    def __init__(self, data: bytes | memoryview) -> None:
        """Hold the bytes of the fetch."""
        super().__init__(data)
        self.unpacked_bytes = 0

    def has_next(self) -> bool:
        """Tell whether there is another batch, and room for it."""
        return self.unpacked_bytes < MAX_UNPACKED_BYTES and bool(super().has_next())

    def next_batch(self) -> Any:
        """Return the next batch, to be unpacked when its records are asked for."""
        data, batch = self._next_slice, super().next_batch()
        if not isinstance(batch, DefaultRecordBatch) or batch.is_control_batch:
            return batch
        return _Batch(data, batch, self)


class _Batch:
    """A batch; its header and its checksum are those of `batch`, as aiokafka reads them."""

    def __init__(self, data: memoryview, batch: Any, records: BoundedRecords) -> None:
        self._data, self._batch, self._records = data, batch, records

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[Any]:
        """Yield its records, and from the first one that cannot be read on what stands for them.

        A record at an offset that is not its batch's would move the consumer, its commits and the fence of a row there.
        """
        offset, end, read = self._batch.base_offset, self._batch.next_offset, 0
        try:
            plain = self._unpacked()
        except UnpackError:
            yield from self._refused(offset, ErrorCode.NOT_JSON)
            return
        if plain is None:
            yield from self._refused(offset, ErrorCode.TOO_LARGE)
            return
        for reader in self._records.readers:
            if reader is not DefaultRecordBatch and self._count() > MOST_READ_AGAIN_RECORDS:
                break
            try:
                for record in islice(reader(plain), read, None):
                    if not offset <= record.offset < end:
                        break
                    offset, read = record.offset + 1, read + 1
                    yield record
                else:
                    return
            except (CorruptRecordException, UnicodeDecodeError):
                continue
            except (OverflowError, MemoryError):  # wild lengths make aiokafka ask for more memory than there is
                if reader is not DefaultRecordBatch:
                    raise
        yield from self._refused(offset, ErrorCode.NOT_JSON)

    def _count(self) -> int:
        *_, count = _DefaultRecordBatchPy.HEADER_STRUCT.unpack_from(self._data)
        return int(count)

    def _unpacked(self) -> Any:
        """Return the batch without compression, None where that is more than the bound."""
        if not self._batch.compression_type:
            return self._data
        self._records.unpacked_bytes += MAX_UNPACKED_BYTES  # what cannot be unpacked may cost as much before it shows
        body = unpack(self._batch.compression_type, bytes(self._data[_HEAD_BYTES:]), MAX_UNPACKED_BYTES)
        if body is None:
            return None
        self._records.unpacked_bytes += len(body) - MAX_UNPACKED_BYTES
        plain = bytearray(self._data[:_HEAD_BYTES])
        plain[_CODEC_BYTE] &= ~_DefaultRecordBatchPy.CODEC_MASK
        plain += body
        return plain

    def _refused(self, offset: int, code: ErrorCode) -> Iterator[_DefaultRecordPy]:
        batch, end = self._batch, self._batch.next_offset
        value = NotUnpacked.at(batch.base_offset, end - 1, code)
        for one in range(max(offset, end - MOST_REFUSED_RECORDS), end):
            yield _DefaultRecordPy(one, batch.max_timestamp, batch.timestamp_type, None, value, [])
