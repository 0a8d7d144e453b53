"""The doctor's look at the artefact: the checks of the worker, by the worker's own loader."""

from pathlib import Path

from models.manifest import ManifestError, read, verify_files
from stream_app.commands.findings import Finding, fail, ok
from stream_app.errors import RerankError

_TRAIN_ONE = "train one (rerank train) and set RERANK_ARTEFACT to its folder"


def examine_artefact(directory: Path | None) -> list[Finding]:
    """Check manifest, hashes, dims and golden scores of one artefact; the first that fails ends it."""
    if directory is None:
        return [fail("artefact", "RERANK_ARTEFACT is not set: the worker has no model", _TRAIN_ONE)]
    try:
        manifest = read(directory)
        verify_files(manifest, directory)
    except ManifestError as error:
        return [fail("artefact", str(error), f"copy the artefact again, or {_TRAIN_ONE}")]
    dims = manifest.dims
    found = ok(
        "artefact",
        f"{manifest.name} {manifest.version}: files as promised, S={dims.S} V={dims.V} H={dims.H} F={dims.F}",
    )
    return [found, _golden(directory)]


def _golden(directory: Path) -> Finding:
    from stream_app.scorer import load_artefact  # noqa: PLC0415  imports torch, which takes seconds

    try:
        load_artefact(directory)
    except RerankError as error:
        return fail("golden scores", str(error), f"use an artefact made for this version, or {_TRAIN_ONE}")
    return ok("golden scores", "the model gives the scores that its manifest promises")
