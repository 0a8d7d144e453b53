"""The doctor's look at the artefact: what the worker's loader refuses, the doctor names."""

from pathlib import Path

import numpy as np
import torch

from models.export import Labels, write_artefact
from models.manifest import Training
from models.networks import DEFAULT_STRENGTHS, VALUE_BUCKETS, LearnedEma
from stream_app.commands.doctor_artefact import examine_artefact


def write_small_artefact(directory: Path) -> None:
    kinds = list(DEFAULT_STRENGTHS)
    network = LearnedEma(4, kinds)
    slots = len(kinds) * VALUE_BUCKETS
    network.fill_moves(torch.tensor(0.1), torch.ones(slots), torch.zeros(slots, dtype=torch.bool))
    vectors = np.random.default_rng(7).normal(size=(4, network.vector_size)).astype(np.float32)
    training = Training(from_ms=0, until_ms=1, interactions=1, loss="softmax", seed=7)
    labels = Labels(name="small", training=training, created_ms=1, metrics={})
    write_artefact(network, ["i-1", "i-2", "i-3"], vectors, labels, directory)


def test_a_good_artefact_passes_with_its_dims(tmp_path: Path) -> None:
    write_small_artefact(tmp_path / "small")
    findings = examine_artefact(tmp_path / "small")
    assert [(finding.check, finding.verdict) for finding in findings] == [
        ("artefact", "ok"),
        ("golden scores", "ok"),
    ]
    assert findings[0].message.endswith("files as promised, S=5 V=9 H=0 F=0")


def test_a_changed_file_fails_by_its_name(tmp_path: Path) -> None:
    write_small_artefact(tmp_path / "small")
    (tmp_path / "small" / "items.txt").write_text("i-1\ni-2\ni-4\n")
    (finding,) = examine_artefact(tmp_path / "small")
    assert (finding.check, finding.verdict) == ("artefact", "fail")
    assert "items.txt: sha256" in finding.message


def test_no_artefact_fails_and_says_how_to_get_one(tmp_path: Path) -> None:
    for directory in (None, tmp_path):
        (finding,) = examine_artefact(directory)
        assert (finding.check, finding.verdict) == ("artefact", "fail")
        assert "rerank train" in finding.remedy
