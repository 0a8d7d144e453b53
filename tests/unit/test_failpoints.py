"""Fail-points act where and when they are told, and nowhere else."""

from collections.abc import Iterator

import pytest

from stream_app import failpoints


@pytest.fixture(autouse=True)
def disarmed_afterwards() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_nothing_happens_unless_armed() -> None:
    failpoints.arm("")
    for name in failpoints.POINTS:
        failpoints.reach(name)


def test_only_the_nth_pass_of_the_named_place_acts() -> None:
    failpoints.arm("after_save:3:raise")
    failpoints.reach("before_save")
    failpoints.reach("after_save")
    failpoints.reach("after_save")
    with pytest.raises(failpoints.FailpointError):
        failpoints.reach("after_save")
    failpoints.reach("after_save")
