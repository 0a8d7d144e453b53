"""A made-up log whose users change their mind: for machines that cannot reach MovieLens, and for tests."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from schemas.codec import encode
from schemas.records import Interaction

START_MS = 1_700_000_000_000
SPAN_MS = 120 * 24 * 3600 * 1000
GENRES = 12
SESSION_LENGTH = 12.0  # mean number of interactions until a user is in the mood for another genre
LOYALTY = 0.85  # probability that an interaction stays in the genre of the session
MEAN_GAP_S = 40.0


def write(path: Path, seed: int, users: int = 900, items: int = 1_500, interactions: int = 100_000) -> Path:
    """Write a log in the wire format, one interaction a line, by event time. Same arguments: same bytes.

    Each session is devoted to one genre and tastes drift from session to session, so a model that follows the user
    clearly beats one that knows only his past, and that beats popularity by little.
    """
    rows = sorted(_interactions(np.random.default_rng(seed), users, items, interactions), key=lambda row: row[0])
    with path.open("wb") as file:
        for number, (time_ms, user, item, value) in enumerate(rows):
            record = Interaction(
                event_id=f"syn-{number}",
                user_id=f"u{user}",
                item_id=f"i{item}",
                kind="rating",
                event_time_ms=time_ms,
                value=float(value),
            )
            file.write(encode(record) + b"\n")
    return path


def _interactions(
    rng: np.random.Generator, users: int, items: int, interactions: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (event_time_ms, user, item, rating), user by user; nobody meets an item twice."""
    popularity = 1.0 / np.arange(1, items + 1) ** 0.6
    genre_of = rng.integers(0, GENRES, items)
    per_user = np.bincount(rng.choice(users, size=interactions, p=_activity(rng, users)), minlength=users)
    for user, count in enumerate(per_user.tolist()):
        time_ms = START_MS + int(rng.random() * SPAN_MS)
        untouched = popularity.copy()
        genre = int(rng.integers(GENRES))
        for _ in range(min(count, items // 2)):
            if rng.random() < 1.0 / SESSION_LENGTH:
                genre = int(rng.integers(GENRES))
                time_ms += int(rng.exponential(2 * 24 * 3600 * 1000))
            time_ms += 1 + int(rng.exponential(MEAN_GAP_S * 1000))
            at_home = rng.random() < LOYALTY
            weights = np.where(genre_of == genre, untouched, 0.0) if at_home else untouched
            if not weights.any():
                weights = untouched
            item = int(rng.choice(items, p=weights / weights.sum()))
            untouched[item] = 0.0
            yield time_ms, user, item, int(rng.integers(4, 6) if at_home else rng.integers(1, 5))


def _activity(rng: np.random.Generator, users: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return how often each user is about: few are busy, most are not."""
    activity = rng.lognormal(0.0, 0.8, users)
    return np.asarray(activity / activity.sum())
