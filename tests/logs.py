"""Interaction logs for tests: a few made-up interactions, or a small drifting one."""

from collections.abc import Sequence
from pathlib import Path

from models import synthetic
from models.log import InteractionLog, from_interactions, read_log
from tests.builders import EVENT_TIME_MS, interaction


def rating_log(rows: Sequence[tuple[str, str, float, int]]) -> InteractionLog:
    """Build a log of ratings from (user_id, item_id, value, seconds after the start)."""
    return from_interactions(
        interaction(
            event_id=f"e-{number}",
            user_id=user_id,
            item_id=item_id,
            kind="rating",
            value=value,
            event_time_ms=EVENT_TIME_MS - EVENT_TIME_MS % 1000 + 1000 * second,
        )
        for number, (user_id, item_id, value, second) in enumerate(rows)
    )


def small_log(folder: Path, *, seed: int = 0, interactions: int = 3_000) -> InteractionLog:
    """Write and read a small synthetic log: 60 users, 150 items."""
    path = synthetic.write(folder / "small.jsonl", seed, users=60, items=150, interactions=interactions)
    return read_log(path)
