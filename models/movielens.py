"""MovieLens-100K, fetched at run time into the user's cache folder and never stored anywhere else.

The rows come from the wheel of recbole (its example data). GroupLens allows research use without redistribution, so no
row of it may enter this repository, tests included.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

WHEEL = "recbole==1.2.1"
MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
TERMS = (
    "MovieLens-100K is provided by GroupLens Research, University of Minnesota. Terms: research use only, "
    "no commercial use, no redistribution without permission. Cite: F. M. Harper and J. A. Konstan. 2015. "
    "The MovieLens Datasets: History and Context. ACM Transactions on Interactive Intelligent Systems 5, 4. "
    "https://doi.org/10.1145/2827872"
)
_TIES_SEED = 0
_DOWNLOAD_TIMEOUT_S = 120


class MovieLensUnavailableError(Exception):
    """The ratings are neither cached nor within reach."""


def default_cache_dir() -> Path:
    """Return the folder for downloads: stream-rerank under XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stream-rerank"


def fetch(cache_dir: Path | None = None, announce: Callable[[str], None] = lambda _: None) -> Path:
    """Return the path of the ratings as wire-format JSONL, downloading them when the cache does not hold them.

    `announce` gets the licence terms, once: when the ratings enter the cache. Raises MovieLensUnavailableError.
    """
    folder = cache_dir or default_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    ratings, log = folder / "ml-100k.inter", folder / "ml-100k.jsonl"
    if not (ratings.exists() and hashlib.sha256(ratings.read_bytes()).hexdigest() == SHA256):
        announce(TERMS)
        _replace(ratings, _download())
        log.unlink(missing_ok=True)
    if not log.exists():
        _replace(log, to_wire(ratings.read_text(encoding="utf-8")).encode())
    return log


def to_wire(ratings: str) -> str:
    """Turn lines of "user TAB item TAB rating TAB seconds" under a header into wire-format interactions by time.

    Ratings of one second come in a seeded random order, so that no id and no file order gives anything away.
    """
    rows = [line.split("\t") for line in ratings.splitlines()[1:]]
    random.Random(_TIES_SEED).shuffle(rows)  # noqa: S311 - an order, not a secret
    rows.sort(key=lambda row: float(row[3]))
    return "".join(
        json.dumps(
            {
                "event_id": f"ml-{number}",
                "user_id": f"u{user}",
                "item_id": f"i{item}",
                "kind": "rating",
                "event_time_ms": int(float(seconds)) * 1000,
                "value": float(rating),
            }
        )
        + "\n"
        for number, (user, item, rating, seconds) in enumerate(rows)
    )


def _download() -> bytes:
    """Return the ratings out of the wheel, which is downloaded and not installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_DOWNLOAD_TIMEOUT_S)  # noqa: S603 - fixed words
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                content = wheel.read(MEMBER)
        except (subprocess.SubprocessError, OSError, StopIteration, KeyError, zipfile.BadZipFile) as error:
            raise MovieLensUnavailableError(
                f"MovieLens-100K is not in the cache and {WHEEL} cannot be downloaded ({type(error).__name__}); "
                "go online, or go on with `--data synthetic`"
            ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise MovieLensUnavailableError(
            f"MovieLens-100K: sha256 {found[:12]} is not the expected {SHA256[:12]}; nothing was kept, "
            "go on with `--data synthetic`"
        )
    return content


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whoever else does the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
