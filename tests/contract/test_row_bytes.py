"""Rows that earlier releases wrote. A file is never changed: Redis holds such rows, a rolling upgrade reads them."""

from pathlib import Path

import numpy as np
import pytest

from stream_app.state import ROW_VERSION, Fence, UserRow, unpack_row

ROWS = Path(__file__).parent / "rows"
SPACE = 0x1122334455667788


def test_each_version_of_the_row_has_its_file() -> None:
    assert sorted(path.name for path in ROWS.iterdir()) == [f"v{n}.bin" for n in range(1, ROW_VERSION + 1)]


@pytest.mark.parametrize("path", sorted(ROWS.iterdir()), ids=lambda path: path.stem)
def test_a_row_of_an_earlier_release_is_read(path: Path) -> None:
    assert unpack_row(path.read_bytes(), state_size=3, space=SPACE) == UserRow(
        events=17,
        last_event_time_ms=1_699_999_999_999,
        fence=Fence(3, 11, 9_007_199_254_740_993),
        vector=np.array([1.0, -2.0, 0.5], np.float32).tobytes(),
        ring="i-1\nélan-2".encode(),
    )
