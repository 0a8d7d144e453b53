"""What Kafka's codecs packed, unpacked up to a bound, and no stricter than Java's streams in Kafka.

Where Python's codecs raise at what stands behind the end of a frame, those read on or leave it alone: gzip takes
members one after another and leaves what is none, snappy takes streams and leaves up to three bytes, lz4 leaves all
behind one frame, zstd takes frames and leaves nothing.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping

import cramjam

GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4

_CHUNK_BYTES = 16_384
_GZIP_HEAD = b"\x1f\x8b\x08"
_GZIP_LEAST_BYTES = 18  # of head and trailer
_XERIAL_MAGIC = b"\x82SNAPPY\0"
_XERIAL_HEAD_BYTES = 16  # magic, version, least version that can read it
_USUAL_RATIO = 16
_LEAST_ROOM_BYTES = 4_096
_NO_ROOM = "failed to write whole buffer"


class UnpackError(ValueError):
    """These bytes are not what the codec packs."""


def unpack(codec: int, packed: bytes, most_bytes: int) -> bytes | bytearray | memoryview | None:
    """Return what was packed, or None where that is more than `most_bytes`; `codec` is Kafka's number of it.

    Raises:
        UnpackError: the bytes cannot be unpacked, or Kafka has no such codec.
    """
    if codec not in _UNPACK:
        raise UnpackError(f"codec {codec}: not one of Kafka's")
    try:
        return _UNPACK[codec](packed, most_bytes)
    except (cramjam.DecompressionError, zlib.error) as error:
        raise UnpackError(str(error)) from error


def _unpack_gzip(packed: bytes, most_bytes: int) -> bytearray | None:
    view, body, start = memoryview(packed), bytearray(), 0
    while not start or _is_gzip_member(packed, start):
        stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        while not stream.eof:
            chunk = view[start : start + _CHUNK_BYTES]  # of thousands of tiny members, each is copied as `unused_data`
            if not chunk:
                raise UnpackError("gzip: cut short")
            body += stream.decompress(chunk, most_bytes + 1 - len(body))
            start += len(chunk) - len(stream.unused_data)
            if len(body) > most_bytes:
                return None
    return body


def _is_gzip_member(packed: bytes, start: int) -> bool:
    return len(packed) - start > _GZIP_LEAST_BYTES and packed.startswith(_GZIP_HEAD, start)


def _unpack_snappy(packed: bytes, most_bytes: int) -> bytes | None:
    blocks = list(_snappy_blocks(packed))
    if sum(map(cramjam.snappy.decompress_raw_len, blocks)) > most_bytes:
        return None
    return b"".join(map(cramjam.snappy.decompress_raw, blocks))


def _snappy_blocks(packed: bytes) -> Iterator[bytes]:
    """Yield the blocks, each of which begins with its unpacked length; Java's clients put several into a batch."""
    if not packed.startswith(_XERIAL_MAGIC):
        yield packed
        return
    start = 0
    while start + 4 <= len(packed):
        if packed.startswith(_XERIAL_MAGIC, start):
            start += _XERIAL_HEAD_BYTES
            continue
        end = start + 4 + int.from_bytes(packed[start : start + 4], "big")
        yield packed[start + 4 : end]
        start = end


def _unpack_lz4(packed: bytes, most_bytes: int) -> memoryview | None:
    return _unpack_into_room(cramjam.lz4.decompress_into, packed[: _lz4_frame_end(packed)], most_bytes)


def _lz4_frame_end(packed: bytes) -> int:
    flags = int.from_bytes(packed[4:5], "little")
    start = 7 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0)  # length of the content, dictionary
    while block_bytes := int.from_bytes(packed[start : start + 4], "little") & 0x7FFF_FFFF:
        start += 4 + block_bytes + (4 if flags & 0x10 else 0)  # its checksum
    return start + 4 + (4 if flags & 0x04 else 0)  # checksum of the content


def _unpack_zstd(packed: bytes, most_bytes: int) -> memoryview | None:
    return _unpack_into_room(cramjam.zstd.decompress_into, packed, most_bytes)


def _unpack_into_room(
    decompress_into: Callable[[bytes, bytearray], int], packed: bytes, most_bytes: int
) -> memoryview | None:
    """Unpack with a codec that tells no length: it ends where its room does, and gets more, up to the bound.

    Room is touched when it is made, so making all of it for every batch would cost more than unpacking does.
    """
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


_UNPACK: Mapping[int, Callable[[bytes, int], bytes | bytearray | memoryview | None]] = {
    GZIP: _unpack_gzip,
    SNAPPY: _unpack_snappy,
    LZ4: _unpack_lz4,
    ZSTD: _unpack_zstd,
}
