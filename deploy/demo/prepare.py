"""From a word on the command line to a log, its test lists and an artefact that has been checked."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.demo.arms import LONGEST_PREFIX_BYTES
from deploy.demo.errors import DataError, DemoError
from models import movielens, synthetic
from models.export import ExportError, Labels, write_artefact
from models.log import InteractionLog, LogError, read_log, split_by_time
from models.manifest import Manifest, Training
from models.protocol import TestList, test_lists
from models.training import Recipe, TrainingError, train
from schemas.limits import Limits

MOVIELENS = "movielens"
SYNTHETIC = "synthetic"
MODEL = "learned-ema"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What the demo runs on: the first m interactions of the log are for training, the lists come from the rest."""

    name: str
    path: Path
    log: InteractionLog
    m: int
    lists: Sequence[TestList]
    all_lists: int

    @property
    def title(self) -> str:
        """The name as people write it."""
        return {MOVIELENS: "MovieLens-100K", SYNTHETIC: "synthetic log"}.get(self.name, self.path.name)


def find_log(data: str, seed: int, out: Path, say: Callable[[str], None]) -> Path:
    """Return the log that `data` names; licence terms go to `say` when ratings are downloaded.

    Raises:
        DataError: offline and not cached, or no such file.
    """
    if data == MOVIELENS:
        try:
            return movielens.fetch(announce=say)
        except movielens.MovieLensUnavailableError as error:
            raise DataError(str(error)) from error
    if data == SYNTHETIC:
        return synthetic.write(out / "demo-synthetic.jsonl", seed)
    return Path(data)


def load(data: str, path: Path, seed: int, most_lists: int | None) -> Dataset:
    """Read the log and make its first `most_lists` test lists, all of them if None.

    Raises:
        DataError: the log cannot be read, or holds nothing to rank.
    """
    try:
        log = read_log(path)
    except LogError as error:
        raise DataError(str(error)) from error
    longest = max(log.user_ids, key=lambda user_id: len(user_id.encode()))
    room_bytes = Limits().max_id_bytes - LONGEST_PREFIX_BYTES
    if len(longest.encode()) > room_bytes:
        raise DataError(
            f"{path}: user id {longest[:40]!r}... has {len(longest.encode())} bytes; nothing was streamed, the demo "
            f"puts the arm in front of user ids; shorten it to {room_bytes}"
        )
    m = split_by_time(log)
    lists = test_lists(log, m, seed)
    if not lists:
        raise DataError(
            f"{path}: {len(log)} interactions and no list to rank: the last 20 % hold no wanted interaction with an "
            "item seen before; nothing was streamed; name a longer log"
        )
    return Dataset(name=data, path=path, log=log, m=m, lists=lists[:most_lists], all_lists=len(lists))


def train_artefact(
    dataset: Dataset, seed: int, directory: Path, on_step: Callable[[int, int, float], None]
) -> Manifest:
    """Train the default model on the training part and export it, checked.

    Raises:
        DemoError: there was nothing to learn, or the export's checks failed; nothing was written.
    """
    log, m = dataset.log, dataset.m
    recipe = Recipe(model=MODEL, seed=seed)
    try:
        trained = train(log, m, recipe, on_step)
        labels = Labels(
            name=MODEL,
            training=Training(
                from_ms=int(log.event_times_ms[0]),
                until_ms=int(log.event_times_ms[m - 1]),
                interactions=m,
                loss=recipe.loss,
                seed=seed,
            ),
            created_ms=int(time.time() * 1_000),
            metrics={"final_loss": trained.final_loss},
        )
        return write_artefact(trained.network, trained.item_ids, trained.item_vectors, labels, directory)
    except (TrainingError, ExportError) as error:
        raise DemoError(str(error)) from error
