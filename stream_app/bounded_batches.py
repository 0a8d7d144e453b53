"""Compressed batches, unpacked up to a bound: a few kilobytes of zstd may hold gigabytes.

aiokafka unpacks a batch whole before anything of it can be measured. Here a batch that holds more than
MAX_UNPACKED_BYTES is given up at the bound, and each of its offsets reads as a record whose value is NotUnpacked,
which every decoder refuses as too large. Leans on private names of aiokafka, which
tests/functional/test_bounded_batches.py guards.

Batches of the formats before Kafka 0.11 stay with aiokafka: brokers turn what producers send into the present one.
"""

import gzip
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cramjam
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.memory_records import _MemoryRecordsPy

from schemas.limits import MAX_UNPACKED_BYTES
from schemas.refusals import ErrorCode, NotUnpacked

MOST_REFUSED_RECORDS = 10_000
"""At most so many records stand for a batch, for its last offsets: its header may claim two thousand million."""

_HEAD_BYTES = _DefaultRecordBatchPy.HEADER_STRUCT.size
_CODEC_BYTE = _DefaultRecordBatchPy.ATTRIBUTES_OFFSET + 1
_XERIAL_HEAD = b"\x82SNAPPY\0" + b"\0\0\0\1" * 2
_USUAL_RATIO = 16
_LEAST_ROOM_BYTES = 4_096


class BoundedRecords(_MemoryRecordsPy):  # type: ignore[misc]  # aiokafka has no types
    """What one fetch brought of a partition, batch by batch.

    It ends early once MAX_UNPACKED_BYTES are unpacked, for many small batches can hold, and cost, what a large one
    does; the consumer then fetches the rest again.
    """

    batch_class: Callable[[bytearray], Any] = DefaultRecordBatch
    """What reads a batch that is unpacked."""

    def __init__(self, data: bytes | memoryview) -> None:
        """Hold the bytes of the fetch."""
        super().__init__(data)
        self.data = data
        self.unpacked_bytes = 0

    def has_next(self) -> bool:
        """Tell whether there is another batch, and room for it."""
        return self.unpacked_bytes < MAX_UNPACKED_BYTES and bool(super().has_next())

    def next_batch(self) -> Any:
        """Return the next batch, to be unpacked when its records are asked for."""
        data, batch = self._next_slice, super().next_batch()
        if not isinstance(batch, DefaultRecordBatch):
            return batch
        if batch.compression_type in _UNPACK and not batch.is_control_batch:
            return _PackedBatch(data, batch, self)
        return batch if self.batch_class is DefaultRecordBatch else self.batch_class(data)


class _PackedBatch:
    """A compressed batch; its header and its checksum are those of `batch`, as aiokafka reads them."""

    def __init__(self, data: memoryview, batch: Any, records: BoundedRecords) -> None:
        self._data, self._batch, self._records = data, batch, records

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[Any]:
        body = _UNPACK[self._batch.compression_type](bytes(self._data[_HEAD_BYTES:]), MAX_UNPACKED_BYTES)
        self._records.unpacked_bytes += MAX_UNPACKED_BYTES if body is None else len(body)
        if body is None:
            return self._refused()
        plain = bytearray(self._data[:_HEAD_BYTES])
        plain[_CODEC_BYTE] &= ~_DefaultRecordBatchPy.CODEC_MASK
        plain += body
        return iter(self._records.batch_class(plain))

    def _refused(self) -> Iterator[_DefaultRecordPy]:
        batch = self._batch
        first, end = batch.base_offset, batch.next_offset
        value = NotUnpacked.at(first, end - 1, ErrorCode.TOO_LARGE)
        for offset in range(max(first, end - MOST_REFUSED_RECORDS), end):
            yield _DefaultRecordPy(offset, batch.max_timestamp, batch.timestamp_type, None, value, [])


def _unpack_gzip(packed: bytes, most_bytes: int) -> bytes | None:
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        body = stream.read(most_bytes + 1)
    return body if len(body) <= most_bytes else None


def _unpack_snappy(packed: bytes, most_bytes: int) -> bytes | None:
    blocks = list(_snappy_blocks(packed))
    if sum(map(cramjam.snappy.decompress_raw_len, blocks)) > most_bytes:
        return None
    return b"".join(map(cramjam.snappy.decompress_raw, blocks))


def _snappy_blocks(packed: bytes) -> Iterator[bytes]:
    """Yield the blocks, each of which begins with its unpacked length; Java's clients put several into a batch."""
    if not packed.startswith(_XERIAL_HEAD):
        yield packed
        return
    start = len(_XERIAL_HEAD)
    while start < len(packed):
        end = start + 4 + int.from_bytes(packed[start : start + 4], "big")
        yield packed[start + 4 : end]
        start = end


def _into_room(decompress_into: Callable[[bytes, bytearray], int]) -> Callable[[bytes, int], memoryview | None]:
    """Return an unpacker for a codec that tells no length: it ends where its room does, and gets more, up to the bound.

    Room is touched when it is made, so making all of it for every batch would cost more than unpacking does.
    """

    def unpack(packed: bytes, most_bytes: int) -> memoryview | None:
        room_bytes = _LEAST_ROOM_BYTES + _USUAL_RATIO * len(packed)
        while True:
            room = bytearray(min(room_bytes, most_bytes))
            try:
                return memoryview(room)[: decompress_into(packed, room)]
            except cramjam.DecompressionError as error:
                if str(error) != _NO_ROOM:
                    raise
            if room_bytes >= most_bytes:
                return None
            room_bytes *= _USUAL_RATIO

    return unpack


_NO_ROOM = "failed to write whole buffer"

_UNPACK: Mapping[int, Callable[[bytes, int], bytes | memoryview | None]] = {
    _DefaultRecordBatchPy.CODEC_GZIP: _unpack_gzip,
    _DefaultRecordBatchPy.CODEC_SNAPPY: _unpack_snappy,
    _DefaultRecordBatchPy.CODEC_LZ4: _into_room(cramjam.lz4.decompress_into),
    _DefaultRecordBatchPy.CODEC_ZSTD: _into_room(cramjam.zstd.decompress_into),
}
"""By aiokafka's number of a codec: (packed, most_bytes) to what was packed, or None where that is more."""
