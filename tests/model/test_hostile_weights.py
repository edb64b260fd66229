"""Folders of models that others made to hang or to fill the memory before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge.checkpoint.manifest import BaseWeights
from forge.errors import ModelError, PlanError
from forge.model import checkpoint_files as module
from forge.model.transformers_config import load_config
from forge.model.weight_files import open_weight_files


def write_header(folder: Path, header: Any) -> None:
    """A safetensors file of which only the header is what it should be."""
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"0000")


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ([10**4000] * 64, "whole numbers"),
        ([2**63], "whole numbers"),
        ([10**4000] * 65, "65 dimensions"),  # the product of many would take hours
    ],
)
def test_open_weight_files__shape_that_no_tensor_has__is_refused(
    tmp_path: Path, shape: list[int], problem: str
) -> None:
    write_header(tmp_path, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}})
    with pytest.raises(PlanError, match=problem):
        open_weight_files(str(tmp_path))


def test_open_weight_files__header_of_millions_of_values__is_refused(tmp_path: Path) -> None:
    text = b'{"a":[' + b"{}," * 5_000_000 + b"{}]}"
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(PlanError, match="more than 4000000 values"):
        open_weight_files(str(tmp_path))


def test_open_weight_files__index_of_many_files__is_refused(tmp_path: Path) -> None:
    weight_map = {str(number): f"{number}.safetensors" for number in range(10_001)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(PlanError, match="it names 10,001 files"):
        open_weight_files(str(tmp_path))


def test_load_config__a_hundred_million_labels__are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "num_labels": 10**8}))
    with pytest.raises(ModelError, match="num_labels must be at most 1000000"):
        load_config(str(tmp_path))


def test_open_weights__checkpoint_that_refers_to_itself__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "runs/run/checkpoints/step-00000001"
    base = BaseWeights(source=source, revision=None, files={})
    checkpoint = SimpleNamespace(shape=SimpleNamespace(adapters={}, base=base, parameters={}))
    monkeypatch.setattr(module, "open_source", lambda source: checkpoint)
    monkeypatch.setattr(module, "source_digest", lambda source: "0")
    with pytest.raises(PlanError, match="refers to a checkpoint that refers to another"):
        module.open_weights(source)
