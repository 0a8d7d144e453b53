"""The model in service: the one that the worker starts with, and every later one that its artefact path leads to.

The path is a directory, or a link to one. A changed artefact is loaded in a thread with every check of a start; then
one reference is replaced between micro-batches. Whatever is wrong with it, the model in service stays.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.manifest import MANIFEST_FILE, REQUIRED_FILES, Manifest
from stream_app.errors import ArtefactError, ArtefactSpaceError
from stream_app.ports import InService
from stream_app.scorer import Artefact, check_files, check_same_moves, load_artefact, read_manifest, space_of
from stream_app.supervision import Condition
from stream_app.telemetry import Telemetry

logger = logging.getLogger(__name__)

FileMark = tuple[int, int, int]  # inode, bytes, time of the last change in ns


@dataclass(frozen=True, slots=True)
class Look:
    """What an artefact path led to at one moment: the directory, and a mark of each file, None for a missing one."""

    directory: Path
    marks: tuple[FileMark | None, ...]


def look_at(path: Path) -> Look:
    """Follow links and take the marks; what is not there is no error."""
    directory = Path(os.path.realpath(path))
    return Look(directory, tuple(_mark(directory / name) for name in (MANIFEST_FILE, *REQUIRED_FILES)))


def _mark(file: Path) -> FileMark | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class ModelWatch:
    """Owner of the model in service. Affects: `in_service`, `condition.model` and what telemetry shows of the model."""

    def __init__(
        self,
        path: Path,
        *,
        telemetry: Telemetry,
        condition: Condition,
        load: Callable[[Path], Artefact] = load_artefact,
    ) -> None:
        """Load what the path leads to.

        Raises:
            ArtefactError: it must not serve; there is none in service that could stay.
        """
        self._path, self._load = path, load
        self._telemetry, self._condition = telemetry, condition
        self._last = self._judged = look_at(path)  # before it is loaded: what changes meanwhile is seen
        self.artefact = load(self._judged.directory)
        self.in_service = InService(self.artefact.serving())
        self._show()

    async def run(self, check_s: float) -> None:
        """Look every `check_s` seconds, for ever; 0: never."""
        while check_s:
            await asyncio.sleep(check_s)
            await self.look()

    async def look(self) -> None:
        """Judge what changed and has stood still since the look before: a copy under way is left alone."""
        found = await asyncio.to_thread(look_at, self._path)
        stands_still, self._last = found == self._last, found
        if not stands_still or found == self._judged:
            return
        verdict = await asyncio.to_thread(self._examine, found.directory)
        if await asyncio.to_thread(look_at, self._path) != found:
            return  # what was read may be half of each
        self._judged = found
        if isinstance(verdict, ArtefactError):
            self._reject(verdict)
        else:
            self._accept(verdict)

    def _examine(self, directory: Path) -> Artefact | ArtefactError:
        """Load an artefact if it may take the place of the one in service. Runs in a thread."""
        try:
            manifest = read_manifest(directory)
            if manifest == self.artefact.manifest:
                check_files(manifest, directory)
                return self.artefact
            self._check_space(manifest)
            artefact = self._load(directory)
            check_same_moves(artefact, self.artefact)
        except ArtefactError as error:
            return error
        except Exception as error:  # a file from outside may break anything; the model in service stays
            logger.exception("event=model_load_error directory=%s", directory)
            return ArtefactError(f"{directory}: loading raised {error!r}; the artefact is not served; export it again")
        else:
            return artefact

    def _check_space(self, manifest: Manifest) -> None:
        rows, space = self.artefact.space, space_of(manifest)
        if space != rows or manifest.dims.S != self.artefact.manifest.dims.S:
            raise ArtefactSpaceError(
                f"{manifest.name}:{manifest.version} is of state space {space:016x}, S={manifest.dims.S}; the rows "
                f"in service are of {rows:016x}, S={self.artefact.manifest.dims.S}: every user would start cold; it is "
                "not served; make its rows with `rerank rebuild --artefact` (docs/operators.md, A new model)"
            )

    def _accept(self, artefact: Artefact) -> None:
        """Put a model in service; the one that serves already is merely no longer followed by a refused one."""
        self._condition.model_refused = ""
        if artefact is self.artefact:
            return
        before, self.artefact = self._condition.model, artefact
        self.in_service.serving = artefact.serving()
        self._show()
        self._telemetry.model_reloads.labels("ok").inc()
        logger.info("event=model_swapped from=%s to=%s", before, self._condition.model)

    def _reject(self, error: ArtefactError) -> None:
        self._condition.model_refused = str(error)
        self._telemetry.model_reloads.labels(error.outcome).inc()
        logger.error("event=model_rejected outcome=%s in_service=%s %s", error.outcome, self._condition.model, error)

    def _show(self) -> None:
        manifest = self.artefact.manifest
        self._condition.model = f"{manifest.name}:{manifest.version}"
        self._telemetry.show_model(manifest)
