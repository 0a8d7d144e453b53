"""Records with header names that are not UTF-8, which aiokafka does not read.

Brokers take any bytes as the name of a header, and Java's clients read U+FFFD for what is not UTF-8. aiokafka 0.14
raises out of its fetcher instead, at the same record after every restart: one such record would end every consumer of
its partition. `install` makes aiokafka read as Java does, and unpack no batch beyond the bound of bounded_batches. It
leans on private names of aiokafka, which tests/functional/test_lenient_records.py guards.
"""

from collections.abc import Iterator
from typing import Any

from aiokafka import ConsumerRecord
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy

from stream_app.bounded_batches import BoundedRecords


class _LenientBytes(bytearray):
    """Bytes whose slices decode whatever they hold: the only text in a batch are the names of headers."""

    def __getitem__(self, key: Any, /) -> Any:
        found = super().__getitem__(key)
        return _LenientBytes(found) if isinstance(key, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, errors)


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # aiokafka has no types
    _buffer: Any

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _LenientBytes(self._buffer)


class _LenientRecords(BoundedRecords):
    batch_class = _LenientBatch


class _PartitionRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    _records: Any

    def _unpack_records(self) -> Iterator[ConsumerRecord]:
        try:
            yield from super()._unpack_records()
        except UnicodeDecodeError:
            self._records = _LenientRecords(_behind(self._records.data, self.next_fetch_offset))
            yield from super()._unpack_records()


def _behind(data: bytes, offset: int) -> memoryview:
    """Return the batches from the first one on that holds `offset` or a later one.

    aiokafka sets the next offset back to the end of each batch that it passes, and would yield again what follows.
    """
    batches, start = _MemoryRecordsPy(data), 0
    while batches.has_next():
        end = batches._pos
        if batches.next_batch().next_offset > offset:
            break
        start = end
    return memoryview(data)[start:]


def install() -> None:
    """Let every consumer that is made from now on in this process read such records and bound what it unpacks.

    May be called again.
    """
    fetcher.MemoryRecords = BoundedRecords
    fetcher.PartitionRecords = _PartitionRecords
