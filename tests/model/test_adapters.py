"""Adapters when the plan is made: which layers get one, what is refused, and what they cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from forge.checkpoint.adapter_config import adapter_config_from_record
from forge.config.lora import LoraSpec
from forge.config.model import ModelSpec
from forge.errors import ModelError
from forge.model import adapters, quantise
from forge.model.adapter_targets import require_dropout_by_sample
from forge.model.families.base import DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.plan.flops import flops_per_token
from forge.plan.inputs import ModelInfo
from forge.plan.plan import make_plan
from tests.serve.test_export import MODELS
from tests.serve.test_export_adapters import save_base
from tests.support.jobs import CPU, SEQ_LEN, UNPREPARED, VOCAB, tiny_facts, tiny_job

DATA = DataShape(vocab_size=VOCAB, seq_len=SEQ_LEN, eot_id=0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bases")
    for name in MODELS:
        save_base(folder / name, MODELS[name])
    return folder


def inspect(base: Path, **lora: Any) -> ModelInfo:
    spec = ModelSpec.model_validate({"from_pretrained": str(base), "lora": {"rank": 4} | lora})
    return TransformersFamily().inspect(spec, DATA)


@pytest.mark.parametrize("architecture", ["llama", "llama, tied", "gpt2"])
def test_inspect__all_linear__counts_as_many_parameters_as_peft(bases: Path, architecture: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases / architecture)
    trained, every = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).get_nb_trainable_parameters()
    found = inspect(bases / architecture)
    assert (found.num_trainable_parameters, found.num_parameters) == (trained, every)
    assert found.num_base_parameters == every - trained


def test_inspect__lora__says_where_the_adapters_are(bases: Path) -> None:
    notes = inspect(bases / "llama", targets=["q_proj", "layers.1.mlp"], alpha=16, modules_to_save="norm").notes
    assert (
        "LoRA adapters of rank 4 and alpha 16 on 2 q_proj, 1 gate_proj, 1 up_proj, 1 down_proj; trained whole: "
        "model.norm.weight" in notes
    )
    notes = inspect(bases / "mixtral").notes
    assert any("all-linear leaves out the experts" in note and "gate_up_proj" in note for note in notes)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        ("q_proj", 2),
        ("self_attn", 8),
        ("model.layers.[0].*", 7),
        (["k_proj", "*_proj"], 14),
        (["all-linear", "lm_head"], 15),
    ],
)
def test_inspect__targets__select_by_name_pattern_and_parent(bases: Path, targets: Any, count: int) -> None:
    adapted = inspect(bases / "llama", targets=targets).num_trainable_parameters
    model = AutoModelForCausalLM.from_pretrained(bases / "llama")
    sizes = [sum(m.weight.shape) for _, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(sizes) == 15
    if count in (14, 15):
        assert adapted == 4 * sum(sizes[:count])
    assert adapted % 4 == 0 and adapted > 0


@pytest.mark.parametrize(
    ("architecture", "lora", "key", "problem"),
    [
        ("llama", {"targets": "q_porj"}, "lora.targets", r"'q_porj' matches no layer \(did you mean 'q_proj'\?\)"),
        (
            "llama",
            {"targets": ["c_attn", "q_proj", "c_proj"]},
            "lora.targets",
            r"2 of 3 entries \(c_attn, c_proj\): 'c_attn' matches no layer.*k_proj",
        ),
        ("llama", {"targets": ["q_proj", "qkv"]}, "lora.targets", r"'qkv' matches no layer.*gate_proj, k_proj"),
        ("llama", {"targets": "embed_tokens"}, "lora.targets", "is of the class Embedding.*modules_to_save"),
        ("llama", {"targets": "model.norm"}, "lora.targets", "is of the class LlamaRMSNorm"),
        ("llama, tied", {"targets": "lm_head"}, "lora.targets", "lm_head shares its weight with the embedding"),
        ("llama", {"targets": "lm_head", "modules_to_save": "lm_head"}, "lora.targets", "lm_head is trained whole"),
        ("llama", {"modules_to_save": "lm_haed"}, "lora.modules_to_save", "'lm_haed' matches no module.*lm_head"),
        ("llama, tied", {"modules_to_save": "lm_head"}, "lora.modules_to_save", "lm_head.weight is tied"),
        ("mixtral", {"targets": "experts", "dropout": 0.1}, "lora.dropout", "experts in one tensor"),
        ("mixtral", {"targets": "down_proj", "dora": True}, "lora.dora", "experts in one tensor"),
    ],
)
def test_inspect__unusable_entry__is_refused_with_the_reason(
    bases: Path, architecture: str, lora: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        inspect(bases / architecture, **lora)
    assert caught.value.key == key


def test_dropout__attention_that_joins_rows__is_refused() -> None:
    with pytest.raises(ModelError, match="flash_attention_2 joins the rows of a batch") as caught:
        require_dropout_by_sample(LoraSpec(dropout=0.1), attention="flash_attention_2")
    assert caught.value.key == "lora.dropout"
    require_dropout_by_sample(LoraSpec(dropout=0.1), attention="sdpa")
    require_dropout_by_sample(LoraSpec(), attention="flash_attention_2")


def test_inspect__pattern_over_other_layers__says_which_stay_as_they_are(bases: Path) -> None:
    notes = inspect(bases / "llama", targets="model.layers.0").notes
    assert any("model.layers.0 also matches 2 module(s)" in note and "LlamaRMSNorm" in note for note in notes)


def test_inspect__without_peft__names_the_command(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install peft==") as caught:
        inspect(bases / "llama")
    assert caught.value.key == "lora"


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"architecture": "llama", "lora": {}}, "adapts frozen pretrained weights"),
        ({"class": "mine:Model", "lora": {}}, "adapts frozen pretrained weights"),
        ({"from_pretrained": "x", "lora": {}, "freeze": "lm_head"}, "no use beside lora"),
        ({"from_pretrained": "x", "lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"from_pretrained": "x", "lora": {"rank": 10**9}}, "less than or equal to 4096"),
        ({"from_pretrained": "x", "lora": {"dropout": 1.0}}, "less than 1"),
        ({"from_pretrained": "x", "lora": {"alpha": 0}}, "greater than 0"),
        ({"from_pretrained": "x", "lora": {"r": 8}}, "Extra inputs are not permitted"),
        ({"from_pretrained": "x", "lora": {"dora": True, "quantize": "nf4"}}, "leave one of the two out"),
    ],
)
def test_model_section__lora_that_cannot_be__is_refused(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ModelSpec.model_validate(section)


def test_inspect__qlora__counts_what_is_kept_in_4_bits(bases: Path) -> None:
    info = inspect(bases / "llama", targets="q_proj", quantize="nf4", modules_to_save="layers.1.mlp")
    layer = 4 * 32 * 32 + 3 * 32 * 64
    assert info.num_quantised_parameters == 2 * layer - 3 * 32 * 64  # no embedding, no head, not what is trained
    assert info.num_parameters == inspect(bases / "llama", targets="q_proj").num_parameters
    assert any("frozen linear layers in 4 bits" in note for note in info.notes)
    sizes = [
        make_plan(tiny_job(), model=tiny_facts(num_quantised_parameters=count), corpus=UNPREPARED, hardware=CPU)
        .for_world_size(1)
        .memory.weights_bytes
        for count in (0, info.num_quantised_parameters)
    ]
    assert sizes[0] - sizes[1] == pytest.approx((2 - 0.516) * info.num_quantised_parameters, rel=0.01)


def test_inspect__qlora_without_bitsandbytes__names_the_command(
    bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install bitsandbytes==") as caught:
        inspect(bases / "llama", quantize="nf4")
    assert caught.value.key == "lora.quantize"


def test_job__qlora_under_zero_3__is_refused() -> None:
    with pytest.raises(ValidationError, match="ZeRO 3 divides the weights among workers"):
        tiny_job(model={"from_pretrained": "x", "lora": {"quantize": "nf4"}}, training__zero={"stage": 3})


def test_flops__frozen_weights__are_counted_without_their_gradient(bases: Path) -> None:
    info = inspect(bases / "llama")
    spec = ModelSpec.model_validate({"from_pretrained": str(bases / "llama"), "lora": {"rank": 4}})
    model = AutoModelForCausalLM.from_pretrained(bases / "llama", attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    tokens = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    assert spec.lora is not None
    # The first layer's inputs need no gradient, which the formula counts all the same.
    assert flops_per_token(info, seq_len=SEQ_LEN) * SEQ_LEN == pytest.approx(counter.get_total_flops(), rel=0.08)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rank": 10**9}, "rank 1000000000"),
        ({"rank": "8"}, "rank: expected"),
        ({"code": "import os"}, "code"),
        ({"modules": ["model.layers.0.input_layernorm"]}, "peft cannot adapt the model"),
        ({"modules": ["model"]}, r"no model\.weight to adapt"),
        ({"modules": ["../../etc"]}, "no ../../etc to adapt"),
        ({"modules": [], "parameters": ["lm_head.bias"]}, r"no lm_head\.bias to adapt"),
        ({"modules": [], "parameters": ["foo.bar.weight"]}, r"no foo\.bar to adapt"),
    ],
)
def test_adapters_of_a_checkpoint__that_no_forge_wrote__are_refused(
    bases: Path, changes: dict[str, Any], problem: str
) -> None:
    record: dict[str, Any] = {
        "rank": 4, "alpha": 4.0, "dropout": 0.0, "use_dora": False, "use_rslora": False, "modules": [],
        "parameters": [],
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(bases / "llama")
    with pytest.raises(ModelError, match=problem):
        adapters.add_adapters(model, adapter_config_from_record(record | changes))


@pytest.mark.slow
def test_training_modules__without_lora__do_not_import_peft() -> None:
    found = "bool({'peft', 'bitsandbytes'} & set(sys.modules))"
    code = f"import sys, forge.train.worker, forge.serve.export; sys.exit({found})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
