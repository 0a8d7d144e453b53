"""Batches that no client library writes: what is read of each, and which brokers take it."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cramjam
from aiokafka import codec

from tests.raw_batches import CODECS, holding, record_bytes

SLOTS = 3
GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4

Pair = tuple[bytes, bytes]
"""Key and value."""

Frame = tuple[int, bytes]
"""Codec, and what it packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OddBatch:
    """A batch of SLOTS records, of which the first `read` are read and the others are refused."""

    built: bytearray
    read: int
    apache: bool
    """Apache Kafka takes it from a producer. The embedded broker looks into no batch, and takes all known codecs."""
    codec: int = 0

    def is_taken_by(self, broker: str) -> bool:
        """Tell whether a broker takes it from a producer."""
        return self.apache if broker == "apache" else self.codec <= ZSTD


def odd_batches(pairs: Sequence[Pair]) -> dict[str, OddBatch]:
    """Return batches of SLOTS records with these keys and values, by what is odd about them."""
    body = _body(pairs)
    sound = {name: (frame, SLOTS) for name, frame in frames_that_java_reads(body).items()}
    damaged = {name: (frame, 0) for name, frame in damaged_frames(body).items()}
    frames = {
        name: OddBatch(built=holding(packed, codec=number), codec=number, read=read, apache=read == SLOTS)
        for name, ((number, packed), read) in (sound | damaged).items()
    }
    return {**frames, **_odd_records(pairs)}


def frames_that_java_reads(body: bytes) -> dict[str, Frame]:
    """Return the body, packed in ways that Java's codecs unpack and Python's do not."""
    cut = len(body) // 2
    halves = body[:cut], body[cut:]
    blocks = b"".join(struct.pack(">i", len(one)) + one for one in map(_snappy_block, halves))
    head = b"\x82SNAPPY\0" + struct.pack(">ii", 7, 7)
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"
    return {
        "gzip, bytes behind": (GZIP, _gzip(body) + b"not a member, but long enough for one"),
        "gzip, a few bytes behind": (GZIP, _gzip(body) + b"\x1f\x8b\x08"),
        "gzip, zeros and a member behind": (GZIP, _gzip(body) + bytes(9) + _gzip(b"which nobody reads")),
        "gzip, two members": (GZIP, b"".join(map(_gzip, halves))),
        "snappy, bytes behind": (SNAPPY, _snappy(body) + b"\xff\xff\xff"),
        "snappy, two streams": (SNAPPY, b"".join(map(_snappy, halves))),
        "snappy, another version": (SNAPPY, head + blocks),
        "lz4, bytes behind": (LZ4, _lz4(body) + b"not a frame"),
        "lz4, another frame behind": (LZ4, _lz4(body) + _lz4(b"which nobody reads")),
        "zstd, two frames": (ZSTD, b"".join(map(_zstd, halves))),
        "zstd, a frame to skip": (ZSTD, _zstd(body) + skippable),
    }


def damaged_frames(body: bytes) -> dict[str, Frame]:
    """Return what nobody can unpack, or holds nothing."""
    damaged: dict[str, Frame] = {
        "snappy in one block, bytes behind": (SNAPPY, _snappy_block(body) + b"behind"),
        "snappy, a block of no bytes": (SNAPPY, _snappy(body) + bytes(4)),
        "zstd, bytes behind": (ZSTD, _zstd(body) + b"not a frame"),
        "gzip, a damaged member behind": (GZIP, _gzip(body) + _gzip(body)[:-9]),
    }
    for name, (number, encode) in CODECS.items():
        damaged[f"{name}, cut short"] = number, bytes(encode(body))[:-9]
        damaged[f"{name}, garbage"] = number, b"garbage" * 9
        damaged[f"{name}, nothing"] = number, b""
    return damaged | {f"codec {number}": (number, body) for number in (5, 6, 7)}


def _odd_records(pairs: Sequence[Pair]) -> dict[str, OddBatch]:
    def of(second: bytes, *, read: int = 1, apache: bool = False, packs: bool = False) -> OddBatch:
        body = record_bytes(0, *pairs[0]) + second + record_bytes(2, *pairs[2])
        built = holding(_gzip(body), codec=GZIP) if packs else holding(body)
        return OddBatch(built=built, read=read, apache=apache)

    changed = partial(record_bytes, key=pairs[1][0], value=pairs[1][1])
    body, two = _body(pairs), _body(pairs[:2])
    return {
        # Of a compressed batch Apache Kafka skips what it does not need, by the lengths inside a record.
        "gzip, a record that claims more bytes": of(changed(1, more_bytes=9), apache=True, packs=True),
        "gzip, a record that claims fewer bytes": of(changed(1, more_bytes=-9), apache=True, packs=True),
        "gzip, a record of a negative length": of(changed(1, more_bytes=-10_000), apache=True, packs=True),
        # Of a batch that is not compressed it does not look at the offsets.
        "an offset behind the batch": of(changed(2**31 - 1), apache=True),
        "an offset before the batch": of(changed(-5), apache=True),
        "an offset twice": of(changed(0), apache=True),
        # A byte to Java, a number of several bytes to aiokafka.
        "attributes that look like a longer number": of(changed(1, attributes=0xFF), read=SLOTS, apache=True),
        "a record that claims more bytes": of(changed(1, more_bytes=1)),
        "a record of a negative length": of(changed(1, more_bytes=-10_000)),
        "a value that claims more bytes than there are": of(changed(1, value_bytes=1_000_000)),
        "fewer records than claimed": OddBatch(built=holding(two), read=2, apache=False),
        "more bytes than its records": OddBatch(built=holding(body + b"behind"), read=SLOTS, apache=False),
        "fewer records than offsets, and bytes behind": OddBatch(built=holding(body, counted=2), read=2, apache=False),
        "a negative number of records": OddBatch(built=holding(body, counted=-1), read=0, apache=False),
        "no record": OddBatch(built=holding(b""), read=0, apache=False),
        "lz4, records behind a frame": OddBatch(
            built=holding(_lz4(b"") + _lz4(body), codec=LZ4), codec=LZ4, read=0, apache=False
        ),
        "garbage": OddBatch(built=holding(b"\xff" * 40), read=0, apache=False),
        "zeros": OddBatch(built=holding(bytes(40)), read=0, apache=False),
    }


def _body(pairs: Sequence[Pair]) -> bytes:
    return b"".join(record_bytes(number, *pair) for number, pair in enumerate(pairs))


def _bytes_of(encode: Callable[[bytes], Any]) -> Callable[[bytes], bytes]:
    return lambda body: bytes(encode(body))


_gzip, _snappy, _lz4, _zstd, _snappy_block = map(
    _bytes_of,
    (codec.gzip_encode, codec.snappy_encode, codec.lz4_encode, codec.zstd_encode, cramjam.snappy.compress_raw),
)
