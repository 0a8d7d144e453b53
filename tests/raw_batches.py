"""Batches of Kafka records as bytes, with what no producer library writes: odd header names, markers, false claims."""

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from aiokafka import codec
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c, encode_varint

NAME = "header-to-be-odd"
ODD_NAME = b"\xff\xfe\x80\xc3(\xed\xa0\x80-is-odd!"
assert len(ODD_NAME) == len(NAME)
READ_NAME = ODD_NAME.decode(errors="replace")

CODECS: Mapping[str, tuple[int, Callable[[bytes], bytes]]] = {
    "gzip": (1, codec.gzip_encode),
    "snappy": (2, codec.snappy_encode),
    "lz4": (3, codec.lz4_encode),
    "zstd": (4, codec.zstd_encode),
}
PACKINGS: Mapping[str, tuple[int, Callable[[bytes], bytes]]] = {
    **CODECS,
    "snappy in one block": (2, partial(codec.snappy_encode, xerial_compatible=False)),  # as librdkafka writes it
}
"""Each form in which a batch may be compressed."""

HEAD_BYTES = 61
_LENGTH, _CRC, _ATTRIBUTES, _LAST_OFFSET_DELTA, _FIRST_TIMESTAMP, _COUNT = 8, 17, 21, 23, 27, 57
_CONTROL = 0x20
_ABORT, _COMMIT = b"\0\0\0\0", b"\0\0\0\1"


def batch(
    base_offset: int,
    headers: Sequence[Sequence[tuple[str, bytes | None]]],
    *,
    odd: bool = False,
    compression: str = "",
    producer_id: int = -1,
) -> bytearray:
    """Return a batch with a record for each element of `headers`; it is transactional where it has a producer id.

    `odd`: each NAME in it is ODD_NAME.
    """
    records = [(b"k-%d" % n, b"v-%d" % (base_offset + n), some) for n, some in enumerate(headers)]
    built = _built(records, producer_id)
    if odd:
        built = with_odd_names(built)
    return _sealed(_compressed(built, compression), base_offset)


def marker(base_offset: int, producer_id: int, *, aborts: bool) -> bytearray:
    """Return the control batch that ends a transaction."""
    built = _built([(_ABORT if aborts else _COMMIT, bytes(6), [])], producer_id)
    built[_ATTRIBUTES + 1] |= _CONTROL
    return _sealed(built, base_offset)


def with_odd_names(built: bytearray) -> bytearray:
    """Return an uncompressed batch with each NAME turned into ODD_NAME."""
    assert NAME.encode() in built
    return _sealed(built.replace(NAME.encode(), ODD_NAME))


def claiming(built: bytearray, records: int) -> bytearray:
    """Return a batch whose header claims a number of records, whatever it holds."""
    struct.pack_into(">i", built, _LAST_OFFSET_DELTA, records - 1)
    struct.pack_into(">i", built, _COUNT, records)
    return _sealed(built)


def holding(
    body: bytes, *, codec: int = 0, claimed: int = 3, counted: int | None = None, control: bool = False
) -> bytearray:
    """Return a batch whose body is as given, whatever the codec and the number of records that its header claims.

    `counted`: the number of records where it is not that of the offsets.
    """
    built = batch(0, [[]])
    built[HEAD_BYTES:] = body
    built[_ATTRIBUTES + 1] |= codec | (_CONTROL if control else 0)
    struct.pack_into(">i", built, _LAST_OFFSET_DELTA, claimed - 1)
    struct.pack_into(">i", built, _COUNT, claimed if counted is None else counted)
    return _sealed(built)


def record_bytes(
    offset_delta: int,
    key: bytes,
    value: bytes,
    *,
    more_bytes: int = 0,
    attributes: int = 0,
    value_bytes: int | None = None,
) -> bytes:
    """Return a record as it stands in a body; it claims to be longer by `more_bytes`, its value to be `value_bytes`."""
    lengths = len(key), len(value) if value_bytes is None else value_bytes
    key_length, value_length = map(varint, lengths)
    parts = bytes([attributes]), varint(0), varint(offset_delta), key_length, key, value_length, value, varint(0)
    body = b"".join(parts)
    return varint(len(body) + more_bytes) + body


def varint(number: int) -> bytes:
    into = bytearray()
    encode_varint(number, into.append)
    return bytes(into)


def stamped(built: bytearray, timestamp_ms: int) -> bytearray:
    """Return a batch with another time for its first record, and for its last."""
    struct.pack_into(">qq", built, _FIRST_TIMESTAMP, timestamp_ms, timestamp_ms)
    return _sealed(built)


class StandIn:
    """Stands in the place of the builder of a producer's batch: what that builds is changed before it is sent."""

    def __init__(self, builder: Any, change: Callable[[bytearray], bytearray]) -> None:
        """Put what `change` returns in the place of what is built."""
        self._builder, self._change = builder, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def build(self) -> bytearray:
        return self._change(bytearray(self._builder.build()))


def odd(built: bytearray, *, compression: str) -> bytearray:
    """Return a batch with odd names, compressed with a codec, "" for none."""
    return _sealed(_compressed(with_odd_names(built), compression))


def _built(records: Sequence[tuple[bytes, bytes, Sequence[tuple[str, bytes | None]]]], producer_id: int) -> bytearray:
    builder = DefaultRecordBatchBuilder(2, 0, producer_id >= 0, producer_id, 0, 0, 1 << 30)
    for number, (key, value, headers) in enumerate(records):
        builder.append(number, 1_000 + number, key, value, headers)
    return bytearray(builder.build())


def _compressed(built: bytearray, compression: str) -> bytearray:
    if compression:
        number, encode = PACKINGS[compression]
        built[HEAD_BYTES:] = encode(bytes(built[HEAD_BYTES:]))
        built[_ATTRIBUTES + 1] |= number
    return built


def _sealed(built: bytearray, base_offset: int | None = None) -> bytearray:
    if base_offset is not None:
        struct.pack_into(">q", built, 0, base_offset)
    struct.pack_into(">i", built, _LENGTH, len(built) - _LENGTH - 4)
    struct.pack_into(">I", built, _CRC, calc_crc32c(bytes(built[_ATTRIBUTES:])))
    return built
