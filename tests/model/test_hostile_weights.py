"""Folders of models that others made to hang or to fill the memory before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from forge.checkpoint.manifest import BaseWeights, ModelShape, Parameter
from forge.errors import ModelError, PlanError
from forge.model import auto_classes
from forge.model import checkpoint_files as module
from forge.model.auto_classes import build_on_meta
from forge.model.transformers_config import load_config
from forge.model.weight_files import open_weight_files
from forge.objective.registry import AutoClass


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


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"configuration_files": ["config.4.0.0.json"]}, "it refers to other files by `configuration_files`"),
        ({"attention_types": [[["global"], 10**9]]}, r"attention_types\[0\]\[1\] must be at most 16777216"),
        ({"block_sizes": [1, 10**9]}, r"block_sizes\[1\] must be at most"),
        ({"text_config": {"layer_counts": [10**5]}}, r"text_config.layer_counts\[0\] must be at most 10000"),
    ],
)
def test_load_config__size_that_another_file_or_a_list_hides__is_refused(
    tmp_path: Path, keys: dict[str, Any], problem: str
) -> None:
    hidden = {"model_type": "llama", "num_hidden_layers": 10**9}
    (tmp_path / "config.4.0.0.json").write_text(json.dumps(hidden))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | keys))
    with pytest.raises(ModelError, match=problem):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "keys", "auto_class"),
    [
        ("switch_transformers", {"num_experts": 10**8}, "AutoModelForSeq2SeqLM"),
        ("funnel", {"block_sizes": [10**9]}, "AutoModelForMaskedLM"),
    ],
)
def test_build_on_meta__modules_without_end__are_refused(
    architecture: str, keys: dict[str, Any], auto_class: AutoClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_classes, "MAX_MODULES", 500)
    config = AutoConfig.for_model(architecture, **keys)
    with pytest.raises(ModelError, match="a model of more than 500 modules"):
        build_on_meta(config, auto_class=auto_class)


def test_open_weights__checkpoint_that_refers_to_itself__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "runs/run/checkpoints/step-00000001"
    base = BaseWeights(source=source, revision=None, files={})
    referred = Parameter(shape=(1,), dtype="F32", kind="base")
    checkpoint = SimpleNamespace(shape=ModelShape(parameters={"a": referred}, tied={}, config={}, base=base))
    monkeypatch.setattr(module, "open_source", lambda source: checkpoint)
    monkeypatch.setattr(module, "source_digest", lambda source: "0")
    with pytest.raises(PlanError, match="refers to a checkpoint that refers to another"):
        module.open_weights(source)
