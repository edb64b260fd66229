"""Classifiers on pretrained weights: which weights may be new, and which labels fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from forge.config.model import ModelSpec
from forge.errors import ModelError
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.plan.inputs import ModelInfo

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97,
    "max_position_embeddings": 32, "pad_token_id": 1,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97, "pad_token_id": None},
    "llama": {"pad_token_id": None},
}
SEQUENCES = DataShape(
    vocab_size=97, seq_len=16, eot_id=0, auto_class="AutoModelForSequenceClassification", num_labels=3,
    label_names=("bad", "good", "odd"), problem_type="single_label_classification",
)  # fmt: skip
TOKENS = DataShape(
    vocab_size=97, seq_len=16, eot_id=0, auto_class="AutoModelForTokenClassification", num_labels=3,
    label_names=("bad", "good", "odd"),
)  # fmt: skip
OPTIONS = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=5)


def save(folder: Path, architecture: str, *, auto: Any, **keys: Any) -> Any:
    torch.manual_seed(0)
    sizes = SMALL["gpt2"] if architecture == "gpt2" else SIZES | SMALL.get(architecture, {})
    model = auto.from_config(AutoConfig.for_model(architecture, **(sizes | keys)))
    model.save_pretrained(folder)
    return model


def inspect(folder: Path, data: DataShape = SEQUENCES, **keys: Any) -> ModelInfo:
    spec = ModelSpec.model_validate({"from_pretrained": str(folder), **keys})
    return TransformersFamily().inspect(spec, data)


@pytest.mark.parametrize(
    ("architecture", "auto", "new"),
    [
        ("bert", AutoModel, {"classifier"}),
        ("bert", AutoModelForMaskedLM, {"classifier", "bert.pooler.dense"}),
        ("roberta", AutoModelForMaskedLM, {"classifier.dense", "classifier.out_proj"}),
        ("distilbert", AutoModelForMaskedLM, {"pre_classifier", "classifier"}),
        ("electra", AutoModel, {"classifier.dense", "classifier.out_proj"}),
        ("deberta-v2", AutoModelForMaskedLM, {"pooler.dense", "classifier"}),
        ("modernbert", AutoModelForMaskedLM, {"classifier"}),
        ("llama", AutoModelForCausalLM, {"score"}),
        ("gpt2", AutoModelForCausalLM, {"score"}),
    ],
)
def test_inspect__model_without_a_classifier__has_a_new_head_from_the_seed(
    tmp_path: Path, architecture: str, auto: Any, new: set[str]
) -> None:
    save(tmp_path, architecture, auto=auto)
    spec = ModelSpec(from_pretrained=str(tmp_path))
    weights = TransformersFamily().open_pretrained(spec, SEQUENCES)
    assert {name.rpartition(".")[0] for name in weights.absent} == new
    info = inspect(tmp_path)
    assert any("a new head, drawn from the seed" in note for note in info.notes)
    assert any("not used" in note for note in info.notes) is (auto is not AutoModel and architecture != "gpt2")
    first, again = (TransformersFamily().build(spec, SEQUENCES, options=OPTIONS) for _ in range(2))
    heads = [dict(model.named_parameters()) for model in (first, again)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in weights.absent)
    matrix = next(heads[0][name] for name in weights.absent if name.endswith("weight"))
    assert 0.001 < float(matrix.detach().std()) < 0.3
    assert first.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    assert info.num_parameters == sum(parameter.numel() for parameter in first.parameters())


def test_inspect__token_classifier__has_a_new_head(tmp_path: Path) -> None:
    save(tmp_path, "bert", auto=AutoModelForMaskedLM)
    spec = ModelSpec(from_pretrained=str(tmp_path))
    weights = TransformersFamily().open_pretrained(spec, TOKENS)
    assert set(weights.absent) == {"classifier.weight", "classifier.bias"}


def test_inspect__classifier_of_a_sequence__its_head_counts_once_for_all_tokens(tmp_path: Path) -> None:
    save(tmp_path, "bert", auto=AutoModel)
    found = inspect(tmp_path)
    inner = 2 * (4 * 32 * 32 + 2 * 32 * 64)  # of a token; pooler and classifier are for the 16 tokens together
    assert found.num_matmul_parameters == inner + round(32 * 32 / 16) + round(3 * 32 / 16)
    assert found.num_outputs == 3


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("encoder.layer.1.output.dense.bias", r"lacks bert\.encoder\.layer\.1\.output\.dense\.bias"),
        ("embeddings.word_embeddings.weight", r"lacks bert\.embeddings\.word_embeddings\.weight"),
    ],
)
def test_inspect__other_weight_missing__is_an_error(tmp_path: Path, missing: str, problem: str) -> None:
    save(tmp_path, "bert", auto=AutoModel)
    drop(tmp_path, missing)
    with pytest.raises(ModelError, match=problem):
        inspect(tmp_path)


def test_inspect__part_of_a_new_layer_in_the_files__is_an_error(tmp_path: Path) -> None:
    save(tmp_path, "bert", auto=AutoModel)
    drop(tmp_path, "pooler.dense.bias")
    with pytest.raises(ModelError, match=r"has bert\.pooler\.dense\.weight, but lacks bert\.pooler\.dense\.bias"):
        inspect(tmp_path)


def test_inspect__folder_without_a_pooling_layer__has_a_new_one(tmp_path: Path) -> None:
    save(tmp_path, "bert", auto=AutoModel)
    drop(tmp_path, "pooler.dense.bias", "pooler.dense.weight")
    assert any("bert.pooler.dense.weight" in note for note in inspect(tmp_path).notes)


def test_inspect__classifier_with_the_same_labels__is_kept(tmp_path: Path) -> None:
    save(tmp_path, "bert", auto=AutoModelForSequenceClassification, id2label={0: "bad", 1: "good", 2: "odd"})
    assert any("is kept" in note for note in inspect(tmp_path).notes)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ({0: "good", 1: "bad", 2: "odd"}, r"good, bad, odd, and the data have in another order: bad, good, odd"),
        ({0: "a", 1: "b", 2: "c"}, r"a, b, c, and the data have other ones"),
        ({0: "a", 1: "b"}, r"tells 2 labels apart \(a, b\), the data have 3 \(bad, good, odd\)"),
    ],
)
def test_inspect__classifier_with_other_labels__is_refused(
    tmp_path: Path, labels: dict[int, str], problem: str
) -> None:
    save(tmp_path, "bert", auto=AutoModelForSequenceClassification, id2label=labels)
    with pytest.raises(ModelError, match=problem) as caught:
        inspect(tmp_path)
    assert caught.value.key == "from_pretrained"


def test_inspect__labels_in_the_model_section__are_refused(tmp_path: Path) -> None:
    save(tmp_path, "bert", auto=AutoModel)
    with pytest.raises(ModelError, match="follows from the labels of the data") as caught:
        inspect(tmp_path, num_labels=4)
    assert caught.value.key == "num_labels"


def test_inspect__lora__trains_the_new_head_whole(tmp_path: Path) -> None:
    save(tmp_path, "bert", auto=AutoModelForMaskedLM)
    found = inspect(tmp_path, lora={"rank": 2, "targets": ["query", "value"]})
    assert found.num_trainable_parameters == 2 * 2 * (2 * 32 * 2) + 32 * 32 + 32 + 3 * 32 + 3
    assert any("trained whole: bert.pooler.dense.weight" in note for note in found.notes)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_build__from_scratch__has_the_labels(auto: Any) -> None:
    data = SEQUENCES if auto is AutoModelForSequenceClassification else TOKENS
    spec = ModelSpec.model_validate({"architecture": "bert", **{k: SIZES[k] for k in list(SIZES)[:4]}})
    model = TransformersFamily().build(spec, data, options=OPTIONS)
    assert model.config.label2id == {"bad": 0, "good": 1, "odd": 2}
    assert model.config.pad_token_id == 0
    assert model.classifier.out_features == 3
    assert TransformersFamily().inspect(spec, data).class_name.startswith("BertFor")


def drop(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
