"""Rules of the manifest."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.manifest import (
    REQUIRED_FILES,
    Dims,
    Manifest,
    ManifestError,
    Training,
    digest_of,
    read,
    verify_files,
    write,
)


def manifest(files: dict[str, str] | None = None) -> Manifest:
    """Build a manifest; `files` replaces the promised ones."""
    return Manifest(
        name="dot",
        version="1",
        format="torchscript",
        torch_version="2.13.0",
        files={name: digest_of(b"x") for name in REQUIRED_FILES} if files is None else files,
        dims=Dims(S=2, V=3, H=0, F=0),
        features=[],
        kinds=["unknown", "click"],
        metrics={"loss": 1.5},
        training=Training(from_ms=1, until_ms=2, interactions=3, loss="softmax", seed=4),
        created_ms=5,
    )


def written(folder: Path) -> Path:
    """Write a manifest and the files it promises."""
    for name in REQUIRED_FILES:
        (folder / name).write_bytes(b"x")
    write(manifest(), folder / "manifest.json")
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read(written(tmp_path)) == manifest()


def test_a_state_space_is_optional_and_read_back(tmp_path: Path) -> None:
    named = replace(manifest(), state_space="0a" * 32)
    write(named, tmp_path / "manifest.json")
    assert read(tmp_path) == named


@pytest.mark.parametrize("space", ["", "0a", "0A" * 32, 7])
def test_a_state_space_that_is_no_hash_is_refused(tmp_path: Path, space: object) -> None:
    file = written(tmp_path) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state_space": space}))
    with pytest.raises(ManifestError, match="state_space"):
        read(tmp_path)


def test_an_unknown_kind_has_index_0() -> None:
    assert [manifest().kind_index(kind) for kind in ("click", "hug")] == [1, 0]


def test_a_changed_file_is_refused_by_name(tmp_path: Path) -> None:
    (written(tmp_path) / "items.txt").write_bytes(b"y")
    with pytest.raises(ManifestError, match=r"items\.txt: sha256"):
        verify_files(manifest(), tmp_path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    (written(tmp_path) / "model.pt").unlink()
    with pytest.raises(ManifestError, match=r"model\.pt: No such file"):
        verify_files(manifest(), tmp_path)


def test_a_promise_that_lacks_a_required_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"promises no model\.pt"):
        verify_files(manifest(files={}), tmp_path)


@pytest.mark.parametrize("name", ["../model.pt", "/etc/passwd", "..", "a\\b"])
def test_a_file_name_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="leads out"):
        manifest(files={name: ""})


def test_kinds_without_unknown_in_front_are_refused() -> None:
    with pytest.raises(ManifestError, match="index 0"):
        replace(manifest(), kinds=["click"])


def test_a_directory_without_manifest_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="rerank train"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", 1), ("dims", {"S": 1, "V": 1, "H": 0}), ("dims", {"S": -1, "V": 1, "H": 0, "F": 0}), ("kinds", "click"),
     ("kinds", [1]), ("files", []), ("created_ms", True), ("training", None)],
)  # fmt: skip
def test_a_field_of_the_wrong_type_is_named(tmp_path: Path, field: str, value: object) -> None:
    file = written(tmp_path) / "manifest.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ManifestError, match=r"field '"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError):
        read(tmp_path)
