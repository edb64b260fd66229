"""Mutated checkpoints of LoRA runs: the record of adapters, the weights that they refer to, evaluations."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forge.checkpoint.adapter_config import AdapterConfig
from forge.checkpoint.best import open_verified
from forge.checkpoint.intervals import Interval, pack
from forge.checkpoint.manifest import (
    MANIFEST,
    BaseWeights,
    ModelShape,
    Parameter,
    Part,
    manifest_bytes,
    part_header,
    part_name,
    state_bytes,
    state_name,
    step_name,
)
from forge.checkpoint.source import choose_source
from forge.checkpoint.storage import open_storage
from forge.errors import ForgeError
from forge.model.adapter_names import is_adapter, unwrapped_name
from forge.model.adapters import add_adapters
from forge.model.auto_classes import build_on_meta
from forge.model.checkpoint_files import open_weights
from forge.model.weight_files import content_digests, open_weight_files
from forge.runs.checkpoints import entries
from forge.serve.export import ExportRequest, export
from tests.support.checkpoints import progress
from tests.support.fuzz import NASTY, mutate_json, run_cases

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 9,
}
ADAPTERS = AdapterConfig(
    rank=2, alpha=4.0, dropout=0.0, use_dora=True, use_rslora=False, parameters=(),
    modules=("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"),
)  # fmt: skip
TOKEN = "aaaaaaaa0001"


def write_lora(folder: Path, *, base: Path, step: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a checkpoint with adapters alone, its state changed and every checksum right."""
    config = AutoConfig.for_model("llama", **CONFIG)
    model = build_on_meta(config, auto_class="AutoModelForCausalLM")
    add_adapters(model, ADAPTERS)
    parameters = {}
    for wrapped, value in model.named_parameters():
        name = unwrapped_name(wrapped)
        kind = "master" if is_adapter(name) else "base"
        parameters[name] = Parameter(shape=tuple(value.shape), dtype="F32", kind=kind)
    digests = content_digests(open_weight_files(str(base)), cache=base / "digests")
    shape = ModelShape(
        parameters=parameters,
        tied={},
        config=config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        base=BaseWeights(source=str(base), revision=None, files=digests),
        adapters=asdict(ADAPTERS),
    )
    trained = {name: one for name, one in parameters.items() if one.kind == "master"}
    layout = pack(
        Interval(kind="master", name=name, start=0, stop=torch.Size(one.shape).numel(), dtype="F32")
        for name, one in trained.items()
    )
    state = json.loads(state_bytes(progress(step), shape))
    state |= {"metric": "eval/loss", "metric_value": 1.0 / step}
    state = json.dumps(change(state)).encode()
    body = part_header(layout) + bytes(layout.size_bytes)
    part = Part(name=part_name(0, token=TOKEN), size_bytes=len(body), crc32=zlib.crc32(body), layout=layout)
    target = folder / step_name(step)
    target.mkdir(parents=True)
    (target / part.name).write_bytes(body)
    (target / state_name(token=TOKEN)).write_bytes(state)
    (target / MANIFEST).write_bytes(manifest_bytes(step, parts=[part], state=state, token=TOKEN))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The weights that the adapters are for."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIG)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_adapter_checkpoint__whole__is_exported(tmp_path: Path, base: Path) -> None:
    write_lora(tmp_path / "run", base=base, step=1, change=lambda state: state)
    use(tmp_path / "run", tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "adapters" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("key", "changes", "problem"),
    [
        ("adapters", {"rank": 4}, r"with the shape \[2, 8\], and its config and adapters describe one of \[4, 8\]"),
        ("adapters", {"rank": 10**6}, "rank 1000000"),
        ("adapters", {"modules": ["lm_head"]}, "has no lm_head.lora_A.weight"),
        ("adapters", {"modules": ["(a+)+$"]}, "has no .* to adapt"),
        ("adapters", {"parameters": ["model.norm.weight"]}, "peft|norm"),
        ("config", {"num_hidden_layers": 10**9}, "must be at most 10000"),
        ("config", {"hidden_size": 2**30}, "other shapes"),
        ("base", {"source": "/nowhere"}, "cannot be downloaded"),
    ],
)
def test_adapter_checkpoint__record_that_does_not_fit_its_tensors__is_refused(
    tmp_path: Path, base: Path, key: str, changes: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    write_lora(tmp_path / "run", base=base, step=1, change=lambda state: state | {key: state[key] | changes})
    with pytest.raises(ForgeError, match=problem):
        export(ExportRequest(url=str(tmp_path / "run"), to=str(tmp_path / "merged"), dtype="fp32"))


@pytest.mark.slow
def test_adapter_checkpoint__mutated__ends_in_a_clear_error_or_none(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "cases").mkdir()

    def change(rng: random.Random, state: dict[str, Any]) -> Any:
        part = rng.choice(["adapters", "base", "parameters", "tied", "config", "metric", "metric_value", "step"])
        if part in ("metric", "metric_value", "step") or rng.random() < 0.1:
            return state | {part: copy.copy(rng.choice(NASTY))}
        return state | {part: mutate_json(state[part], rng)}

    def make(folder: Path, rng: random.Random) -> None:
        write_lora(folder / "run", base=base, step=1, change=lambda state: state)
        write_lora(folder / "run", base=base, step=2, change=lambda state: change(rng, state))

    def check(folder: Path) -> None:
        os.environ["FORGE_CACHE"] = str(folder / "cache")
        use(folder / "run", folder)

    write_lora(tmp_path / "first" / "run", base=base, step=1, change=lambda state: state)
    check(tmp_path / "first")  # what is loaded at the first use counts for no case
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    run_cases("adapter checkpoint", make=make, check=check, root=tmp_path / "cases")


def use(run: Path, folder: Path) -> None:
    """What `forge checkpoints list|export`, `--step best` and `model.init_from` do with a checkpoint."""
    list(entries(str(run), with_checksums=True))
    list(entries(str(run), step="best"))
    open_verified(open_storage(str(run)), step="best")
    source = choose_source(str(run))
    refused = 0
    for to, adapters in (("merged", False), ("adapters", True)):
        try:
            export(ExportRequest(url=str(run), to=str(folder / to), dtype="fp32", adapters=adapters))
        except ForgeError:
            refused += 1
    shutil.rmtree(folder / "cache", ignore_errors=True)
    if refused == 0:
        return
    open_weights(source)
