"""Going on with adapters that peft has written: their values, and every folder that does not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from forge.checkpoint.peft_folder import read_peft_folder
from forge.config.load import load_job
from forge.config.model import ModelSpec
from forge.errors import ArgumentError, CheckpointError, JobFileError, ModelError
from forge.inference.loaded import load
from forge.model.adapter_names import unwrapped_name
from forge.model.adapter_weights import AdaptedWeights
from forge.model.adapters import adapter_layers
from forge.model.checkpoint_files import open_trained
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.runs.find_model import find_model
from forge.runtime.resolve_init import init_info, with_init
from tests.support.jobs import SEQ_LEN, VOCAB

DATA = DataShape(vocab_size=VOCAB, seq_len=SEQ_LEN, eot_id=0)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTRAL = {**SIZES, "intermediate_size": 32, "num_local_experts": 4, "num_key_value_heads": 1}
Q_PROJ = "model.layers.0.self_attn.q_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_base(folder: Path, architecture: str, **sizes: Any) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=VOCAB, max_position_embeddings=SEQ_LEN, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def save_adapters(base: Path, folder: Path, **settings: Any) -> Any:
    """Save adapters with values other than those they begin with. Returns: the model of peft."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, "llama", **SIZES)
    return folder


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(base, folder, r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], lora_dropout=0.1)
    return folder


@pytest.fixture
def adapters(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapters"))


def job_of(folder: Path, **model: Any) -> dict[str, Any]:
    """The section `model` of a job that goes on with the adapters of a folder."""
    lora = {"init_from": str(folder), **model.pop("lora", {})}
    job = {
        "name": "continued",
        "model": {**model, "lora": lora},
        "data": {"source": "python-stdlib", "seq_len": SEQ_LEN},
        "training": {"total_steps": 3},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return with_init(load_job(path)).job.model.model_dump(mode="json", exclude_unset=True)


def inspect(model: dict[str, Any]) -> tuple[str, ...]:
    return tuple(TransformersFamily().inspect(ModelSpec.model_validate(model), DATA).notes)


def change_config(folder: Path, **changes: Any) -> None:
    body = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(body | changes))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "mlp.up_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        ("llama", {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}),
        ("gpt2", {"target_modules": ["c_attn"]}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    ],
)  # fmt: skip
def test_init_from__folder_of_peft__has_its_logits(
    base: Path, tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    source = base
    if architecture != "llama":
        source = tmp_path / "base"
        small = {"n_embd": 32, "n_layer": 2, "n_head": 2}
        save_base(source, architecture, **(MIXTRAL if architecture == "mixtral" else small))
    theirs = save_adapters(source, tmp_path / "adapters", r=4, lora_alpha=16, **settings)
    spec = ModelSpec.model_validate(job_of(tmp_path / "adapters"))
    assert spec.from_pretrained == str(source) and spec.lora is not None and spec.lora.rank == 4
    assert any("begun from those of" in note for note in inspect(spec.model_dump(exclude_unset=True)))
    options = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=1)
    family = TransformersFamily()
    model: Any = family.build(spec, DATA, options=options)
    named = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
    weights = AdaptedWeights(
        family.open_pretrained(spec, DATA),
        adapter_layers(model),
        shapes={name: tuple(parameter.shape) for name, parameter in named.items()},
        types={name: parameter.dtype for name, parameter in named.items()},
        seed=1,
        earlier=open_trained(spec.adapters_from or ""),
    )
    for name, parameter in named.items():
        weights.read_into(name, parameter.data.view(-1))
    tokens = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN) % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert trained == sum(parameter.requires_grad for parameter in theirs.parameters())


@pytest.mark.parametrize("key", ["from_pretrained", "init_from", "teacher"])
def test_with_init__adapters_in_place_of_a_model__names_their_base_and_the_key(
    base: Path, adapters: Path, key: str
) -> None:
    job: dict[str, Any] = {"name": "wrong", "data": {"source": "python-stdlib"}, "training": {"total_steps": 3}}
    job["model"] = {"from_pretrained": str(base)} if key == "teacher" else {key: str(adapters)}
    if key == "teacher":
        job["training"] |= {"objective": "distillation", "distillation": {"teacher": str(adapters)}}
    path = adapters / "job.yaml"
    path.write_text(json.dumps(job))
    named = re.escape(f"{adapters} holds adapters of {base} ({CONFIG}), and no whole model")
    remedy = "merge_and_unload" if key == "teacher" else r"model\.lora\.init_from"
    with pytest.raises(JobFileError, match=rf"{key}: {named}; .*{remedy}"):
        with_init(load_job(path))


def test_load__adapters_in_place_of_a_model__names_their_base(base: Path, adapters: Path, tmp_path: Path) -> None:
    named = re.escape(f"{adapters} holds adapters of {base}")
    with pytest.raises(ArgumentError, match=rf"{named}.*--adapter NAME={re.escape(str(adapters))}"):
        find_model(adapters, root=tmp_path)
    # Of such a folder transformers loads the base, and adds the adapters.
    shutil.copy(base / "config.json", adapters)
    shutil.copy(base / "model.safetensors", adapters)
    with pytest.raises(ModelError, match=rf"{named}.*merge_and_unload"):
        load(str(adapters))
    for content in ("{", "[1]", '{"base_model_name_or_path": 3}'):
        (adapters / CONFIG).write_text(content)
        with pytest.raises(ModelError, match="holds adapters, and names no base"):
            load(str(adapters))


def test_with_init__folder_of_peft__gives_the_keys_and_the_base(base: Path, adapters: Path) -> None:
    model = job_of(adapters)
    assert model["from_pretrained"] == str(base)
    lora = model["lora"]
    assert lora["init_from"] == str(adapters)
    assert (lora["rank"], lora["alpha"], lora["dropout"], lora["dora"]) == (4, 16, 0.1, False)
    assert lora["targets"] == ["q_proj", "up_proj"] and not lora["modules_to_save"]
    with pytest.raises(JobFileError, match=r"model\.lora\.rank.*have 4"):
        job_of(adapters, lora={"rank": 8})
    change_config(adapters, base_model_name_or_path=None)
    with pytest.raises(JobFileError, match=r"give them in model\.from_pretrained"):
        job_of(adapters)
    notes = inspect(job_of(adapters, from_pretrained=str(base)))
    assert any("names no weights that its adapters are added to: not checked" in note for note in notes)


def test_init_info__folder_of_peft__has_the_digest_of_its_files(adapters: Path) -> None:
    first = init_info(str(adapters))
    assert first is not None and first.step is None
    change_config(adapters, lora_alpha=8)
    second = init_info(str(adapters))
    assert second is not None and second.digest != first.digest


def test_inspect__tensors_that_do_not_fit__are_named(base: Path, adapters: Path) -> None:
    tensors = load_file(adapters / WEIGHTS)
    prefix = f"base_model.model.{Q_PROJ}"
    broken = {name: tensor for name, tensor in tensors.items() if name != f"{prefix}.lora_B.weight"}
    broken["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    broken[f"{prefix}.lora_A.weight"] = torch.zeros(4, 31)
    save_file(broken, adapters / WEIGHTS)
    with pytest.raises(ModelError) as caught:
        inspect(job_of(adapters))
    assert caught.value.key == "lora.init_from"
    assert f"3 of its tensors do not fit: {Q_PROJ}.lora_B.weight is missing" in str(caught.value)
    assert "model.layers.7.self_attn.q_proj.lora_A.weight has no counterpart" in str(caught.value)
    assert f"{Q_PROJ}.lora_A.weight is 4×31 there and 4×32 in the model" in str(caught.value)


def test_inspect__rank_of_the_config_that_is_not_that_of_the_tensors__is_named(adapters: Path) -> None:
    change_config(adapters, r=8)
    with pytest.raises(ModelError, match=r"8 of its tensors do not fit: .*lora_A\.weight is 4×32 there and 8×32"):
        inspect(job_of(adapters))


def test_inspect__folder_that_was_trained_on_other_weights__is_refused(
    base: Path, adapters: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    inspect(job_of(adapters, from_pretrained=str(other)))  # a copy has the same content
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the adapters are of other weights") as caught:
        inspect(job_of(adapters, from_pretrained=str(other)))
    assert caught.value.key == "lora.init_from"
    change_config(adapters, base_model_name_or_path="an-org/a-model")
    notes = inspect(job_of(adapters, from_pretrained=str(base)))
    assert any("was trained on an-org/a-model: not checked" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the weights below the adapters"),
        ({"r": "8"}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number above 0"),
        ({"lora_dropout": 1}, "lora_dropout must be from 0 to 1"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a name"),
    ],
)
def test_read__config_of_other_adapters__is_refused(adapters: Path, changes: dict[str, Any], problem: str) -> None:
    change_config(adapters, **changes)
    with pytest.raises(CheckpointError, match=problem):
        read_peft_folder(str(adapters))


def test_read__files_that_are_no_safe_tensors__are_refused(adapters: Path) -> None:
    content = (adapters / WEIGHTS).read_bytes()
    (adapters / WEIGHTS).write_bytes(content[:-8])
    with pytest.raises(Exception, match="is cut short"):
        inspect(job_of(adapters))
    (adapters / WEIGHTS).write_bytes(content[:20])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_peft_folder(str(adapters))
    save_file({"model.weight": torch.zeros(2)}, adapters / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds no adapters: model\.weight"):
        read_peft_folder(str(adapters))
    (adapters / WEIGHTS).rename(adapters / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="loading a pickle executes code"):
        read_peft_folder(str(adapters))
    (adapters / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read: expected a JSON object"):
        read_peft_folder(str(adapters))
