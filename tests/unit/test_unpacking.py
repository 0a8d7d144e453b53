"""Codecs up to a bound, as Java's streams in Kafka read them."""

import subprocess
import sys

import cramjam
import pytest

from stream_app.unpacking import LZ4, SNAPPY, UnpackError, unpack
from tests.odd_batches import Frame, damaged_frames, frames_that_java_reads
from tests.raw_batches import PACKINGS

BOUND_BYTES = 10_000
BODY = b"some records, " * 30


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("length", [0, 1, BOUND_BYTES - 1, BOUND_BYTES])
def test_as_many_bytes_as_the_bound_are_unpacked_and_one_more_is_too_many(packing: str, length: int) -> None:
    number, encode = PACKINGS[packing]
    body = bytes(n % 251 for n in range(length))
    assert unpack(number, bytes(encode(body)), BOUND_BYTES) == body
    assert unpack(number, bytes(encode(bytes(BOUND_BYTES + 1))), BOUND_BYTES) is None


@pytest.mark.parametrize("frame", (frames := frames_that_java_reads(BODY)).values(), ids=frames)
def test_what_stands_behind_a_frame_is_read_or_left_as_java_does(frame: Frame) -> None:
    assert unpack(*frame, BOUND_BYTES) == BODY


@pytest.mark.parametrize("options", [{}, {"content_checksum": True}, {"block_linked": False}])
@pytest.mark.parametrize("body", [BODY, bytes(range(256)) * 4_000])
def test_the_end_of_an_lz4_frame_is_found_whatever_it_holds(options: dict[str, bool], body: bytes) -> None:
    compressor = cramjam.lz4.Compressor(**options)
    compressor.compress(body)
    assert unpack(LZ4, bytes(compressor.finish()) + b"behind", 2_000_000) == body


@pytest.mark.parametrize("frame", (damaged := damaged_frames(BODY)).values(), ids=damaged)
def test_what_no_codec_can_unpack_is_an_error_and_not_too_large(frame: Frame) -> None:
    with pytest.raises(UnpackError):
        unpack(*frame, BOUND_BYTES)


def test_members_together_are_as_large_as_all_of_them() -> None:
    member = bytes(PACKINGS["gzip"][1](bytes(BOUND_BYTES // 2)))
    assert unpack(1, member * 2, BOUND_BYTES) == bytes(BOUND_BYTES)
    assert unpack(1, member * 3, BOUND_BYTES) is None


_UNPACK_MUCH = """
import gzip, io, resource
import cramjam
from stream_app.unpacking import unpack

MIB = 1 << 20
MUCH_MIB = 600

def packed(name):
    if name == "gzip":
        into = io.BytesIO()
        with gzip.GzipFile(fileobj=into, mode="wb", compresslevel=1) as stream:
            for _ in range(MUCH_MIB):
                stream.write(bytes(MIB))
        return into.getvalue()
    compressor = getattr(cramjam, name).Compressor()
    for _ in range(MUCH_MIB):
        compressor.compress(bytes(MIB))
    return bytes(compressor.finish())

bombs = {number: packed(name) for name, number in (("gzip", 1), ("lz4", 3), ("zstd", 4))}
resource.setrlimit(resource.RLIMIT_AS, (500 * MIB, 500 * MIB))
print([unpack(number, bomb, 16 * MIB) for number, bomb in bombs.items()])
"""


def test_a_process_that_may_have_500_mebibytes_gives_up_batches_of_600() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _UNPACK_MUCH], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.stdout, done.stderr) == ("[None, None, None]\n", "")


def test_a_snappy_block_says_its_length_before_it_is_unpacked() -> None:
    lies = b"\xff\xff\xff\xff\x0f" + b"short"  # a block of 4 GiB
    assert unpack(SNAPPY, lies, BOUND_BYTES) is None
