"""What aiokafka does not read of what brokers take, read as Java does.

Brokers take any bytes as the name of a header, and Java's clients read U+FFFD for what is not UTF-8. aiokafka 0.14
raises out of its fetcher instead, at the same record after every restart: one such record would end every consumer of
its partition. So it does at attributes of a record above 127, which it takes for a longer number, and at a control
batch without a marker, which compaction leaves. `install` makes aiokafka read them, and every batch within the bounds
of bounded_batches. It leans on private names of aiokafka, which tests/functional/test_lenient_records.py guards.
"""

import struct
from collections.abc import Iterator
from typing import Any

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException, KafkaError
from aiokafka.record.default_records import _DefaultRecordBatchPy, _DefaultRecordPy

from schemas.dead_letter import Header
from stream_app.bounded_batches import BoundedRecords

_HEAD = _DefaultRecordBatchPy.HEADER_STRUCT


class _LenientRecords(BoundedRecords):
    readers = (*BoundedRecords.readers, lambda plain: _records(bytes(plain)))


def _records(plain: bytes) -> Iterator[_DefaultRecordPy]:
    """Yield the records of a batch that is not compressed, bounds checked, as Java reads them.

    Raises:
        CorruptRecordException: a record is none, or there are more bytes than records.
    """
    (base_offset, _, _, _, _, attributes, _, first_timestamp, max_timestamp, *_, count) = _HEAD.unpack_from(plain)
    appended = bool(attributes & _DefaultRecordBatchPy.TIMESTAMP_TYPE_MASK)
    fields = _Fields(plain, _HEAD.size, len(plain))
    for _ in range(count):
        delta, offset_delta, key, value, headers = _record(fields)
        timestamp = max_timestamp if appended else _signed(first_timestamp + delta, 64)
        yield _DefaultRecordPy(base_offset + offset_delta, timestamp, int(appended), key, value, headers)
    fields.check_end()


def _record(fields: "_Fields") -> tuple[int, int, bytes | None, bytes | None, list[Header]]:
    inner = fields.inner(fields.number(32))
    inner.skip(1)  # attributes: a byte, and nothing is defined in it
    head = inner.number(64), inner.number(32), inner.data(), inner.data()
    headers: list[Header] = []
    count = inner.number(32)
    if count < 0:
        raise CorruptRecordException(f"{count} headers")
    for _ in range(count):
        name, value = inner.data(), inner.data()
        if name is None:
            raise CorruptRecordException("a header without a name")
        headers.append((name.decode(errors="replace"), value))
    inner.check_end()
    return (*head, headers)


class _Fields:
    """Reads one field after another, from `start` up to `end`."""

    def __init__(self, buffer: bytes, start: int, end: int) -> None:
        self._buffer, self._start, self._end = buffer, start, end

    def skip(self, length: int) -> int:
        """Go on behind so many bytes, and return where they began."""
        start, behind = self._start, self._start + length
        if not start <= behind <= self._end:
            raise CorruptRecordException(f"{length} bytes at {start}, which ends at {self._end}")
        self._start = behind
        return start

    def inner(self, length: int) -> "_Fields":
        """Return the fields inside so many bytes, and go on behind them."""
        return _Fields(self._buffer, self.skip(length), self._start)

    def number(self, bits: int) -> int:
        """Return a number in zigzag, seven bits a byte, as large as Java's int or long."""
        found, shift = 0, 0
        while True:
            byte = self._buffer[self.skip(1)]
            found |= (byte & 0x7F) << shift
            if byte < 0x80:
                found &= (1 << bits) - 1
                return _signed((found >> 1) ^ -(found & 1), bits)
            shift += 7
            if shift >= bits:
                raise CorruptRecordException(f"a number longer than {bits} bits")

    def data(self) -> bytes | None:
        """Return bytes behind their length; a negative one is that of null."""
        length = self.number(32)
        return None if length < 0 else self._buffer[self.skip(length) : self._start]

    def check_end(self) -> None:
        """Refuse bytes that are left."""
        if self._start != self._end:
            raise CorruptRecordException(f"{self._end - self._start} bytes behind the last field")


def _signed(number: int, bits: int) -> int:
    half = 1 << (bits - 1)
    return (number + half) % (2 * half) - half


class _PartitionRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    _tp: TopicPartition

    def _unpack_records(self) -> Iterator[ConsumerRecord]:
        try:
            yield from super()._unpack_records()
        except CorruptRecordException as error:
            raise CorruptRecordException(
                f"{self._tp.topic}, partition {self._tp.partition}, offset {self.next_fetch_offset}: {error}: damaged "
                "since the broker took it; nothing is read from there on; read again, and if it stays, from another "
                "replica, or delete the records of the partition up to behind it"
            ) from None

    def _contains_abort_marker(self, next_batch: Any) -> bool:
        try:
            return bool(super()._contains_abort_marker(next_batch))
        except (KafkaError, TypeError, struct.error):  # no record, a damaged one, no key, a short one
            return False


def install() -> None:
    """Let every consumer that is made from now on in this process read such records and bound what it unpacks.

    May be called again.
    """
    fetcher.MemoryRecords = _LenientRecords
    fetcher.PartitionRecords = _PartitionRecords
