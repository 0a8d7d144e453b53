"""Where a log ends, and what a rebuild makes of it."""

import pytest

from stream_app.errors import LogRecreatedError, TransientError
from stream_app.interactions_log import LogEnd, stable_offset
from stream_app.rebuild_run import check_end


@pytest.mark.parametrize(
    ("last_stable", "stable"), [(7, 7), (40, 40), (41, 40), (0, 0), (-1, 40), (None, 40)]
)  # the last two: a broker that does not know
def test_no_more_may_be_read_than_either_end_allows(last_stable: int | None, stable: int) -> None:
    assert stable_offset(40, last_stable) == stable


def test_an_open_transaction_is_not_taken_for_a_log_that_lost_its_end() -> None:
    end = LogEnd(high_water=20, stable=10)
    check_end("interactions", 3, 9, end)
    with pytest.raises(TransientError, match="a transaction is open from 10 on") as open_transaction:
        check_end("interactions", 3, 10, end)
    assert not isinstance(open_transaction.value, LogRecreatedError)
    with pytest.raises(LogRecreatedError):
        check_end("interactions", 3, 20, end)
