"""Checkpoints with adapters: merged, as a folder of peft, and for generation, all with the same logits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from forge.config.model import ModelSpec
from forge.errors import CheckpointError
from forge.inference.checkpoint_model import load_model
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from forge.runtime.resolve_init import init_info
from forge.serve.export import ExportRequest, export
from tests.serve.test_export import LLAMA, MODELS
from tests.support.jobs import SEQ_LEN, VOCAB, synthetic_corpus, tiny_plan
from tests.support.ranks import run_ranks
from tests.train.test_frozen import newest

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, dora, modules to save": ("llama", {"targets": "mlp", "dora": True, "modules_to_save": "lm_head"}),
    "llama, tied": ("llama, tied", {"rslora": True}),
    "gpt2": ("gpt2", {"targets": ["c_attn", "mlp.c_proj"]}),
    "gpt2, dora": ("gpt2", {"dora": True}),
    "mixtral": ("mixtral", {"targets": ["q_proj", "experts"]}),
}
FAST = ("llama, dora, modules to save", "gpt2", "mixtral")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    return synthetic_corpus(tmp_path_factory.mktemp("corpus"))


def save_base(folder: Path, model: dict[str, Any]) -> None:
    """Save a model with the weights of a seed."""
    options = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=7)
    data = DataShape(vocab_size=VOCAB, seq_len=SEQ_LEN, eot_id=0)
    built: Any = TransformersFamily().build(ModelSpec.model_validate(model), data, options=options)
    built.save_pretrained(folder)


def plan_of(base: Path, corpus: CorpusInfo, lora: dict[str, Any], **changes: Any) -> Plan:
    return tiny_plan(
        corpus,
        model={"from_pretrained": str(base), "lora": {"rank": 4, "alpha": 16} | lora},
        training__precision="fp32",
        training__total_steps=3,
        training__optimizer={"lr": 0.05},
        **changes,
    )


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    tokens = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN) % VOCAB
    found: Tensor = model.eval()(tokens).logits
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_export__adapters__have_the_logits_of_the_run_in_peft_and_merged(
    corpus: CorpusInfo, tmp_path: Path, case: str
) -> None:
    architecture, lora = CASES[case]
    save_base(tmp_path / "base", MODELS[architecture])
    plan = plan_of(tmp_path / "base", corpus, lora, training__zero={"stage": 2})
    run_ranks(plan, tmp_path / "run", world_size=2)
    trained = logits_of(load_model(plan, newest(tmp_path / "run")))
    before = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    assert (trained - before).abs().max() > 0.01

    export(ExportRequest(url=str(tmp_path / "run"), to=str(tmp_path / "merged"), dtype="fp32"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), trained, rtol=0, atol=2e-5)

    export(ExportRequest(url=str(tmp_path / "run"), to=str(tmp_path / "peft"), dtype="fp32", adapters=True))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    torch.testing.assert_close(logits_of(loaded), trained, rtol=0, atol=1e-6)
    theirs = loaded.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-6)


def test_export__adapters__names_base_and_layers_in_its_config(corpus: CorpusInfo, tmp_path: Path) -> None:
    save_base(tmp_path / "base", LLAMA)
    run_ranks(plan_of(tmp_path / "base", corpus, {}), tmp_path / "run", world_size=1, stop_after=1)
    export(ExportRequest(url=str(tmp_path / "run"), to=str(tmp_path / "peft"), adapters=True))
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == names
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "base"))
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    shutil.rmtree(tmp_path / "base")
    export(ExportRequest(url=str(tmp_path / "run"), to=str(tmp_path / "again"), adapters=True))


def test_export__adapters_of_a_run_without_any__is_refused(corpus: CorpusInfo, tmp_path: Path) -> None:
    run_ranks(tiny_plan(corpus), tmp_path, world_size=1, stop_after=1)
    with pytest.raises(CheckpointError, match=r"holds no adapters: the job has no model\.lora"):
        export(ExportRequest(url=str(tmp_path), to=str(tmp_path / "out"), adapters=True))


@pytest.mark.slow
def test_train__adapters_of_another_run__begin_from_its_checkpoint_and_are_merged_into_it(
    corpus: CorpusInfo, tmp_path: Path
) -> None:
    run_ranks(tiny_plan(corpus, training__precision="fp32"), tmp_path / "first", world_size=1, stop_after=2)
    source = tmp_path / "first" / "step-00000002"
    plan = plan_of(source, corpus, {})
    plan = replace(plan, init=init_info(plan.job.model.from_pretrained))
    ours = run_ranks(plan, tmp_path / "run", world_size=2)
    export(ExportRequest(url=str(tmp_path / "first"), to=str(tmp_path / "base"), dtype="fp32"))
    same = run_ranks(plan_of(tmp_path / "base", corpus, {}), tmp_path / "same", world_size=2)
    assert ours.losses == same.losses

    for name in ("run", "same"):
        export(ExportRequest(url=str(tmp_path / name), to=str(tmp_path / f"{name}-merged"), dtype="fp32"))
    found = [load_file(tmp_path / f"{name}-merged" / "model.safetensors") for name in ("run", "same")]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=0)


def test_inspect__classifier_with_adapters__trains_its_new_head_whole(tmp_path: Path) -> None:
    save_base(tmp_path, LLAMA)
    spec = ModelSpec.model_validate({"from_pretrained": str(tmp_path), "lora": {"rank": 4}})
    shape = DataShape(
        vocab_size=VOCAB,
        seq_len=SEQ_LEN,
        eot_id=0,
        auto_class="AutoModelForSequenceClassification",
        num_labels=3,
        pad_id=0,
    )
    info = TransformersFamily().inspect(spec, shape)
    assert any("trained whole: score.weight" in note for note in info.notes)
    sizes = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert info.num_trainable_parameters == sizes + 3 * 32
