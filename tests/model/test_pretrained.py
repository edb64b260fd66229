"""Weights of a saved folder: names, ranges, types, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from forge.config.model import ModelSpec
from forge.errors import ModelError, PlanError
from forge.fs import digest_file
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.model.pretrained import PretrainedWeights
from forge.model.weight_files import open_weight_files

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97,
}  # fmt: skip
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4}
DATA = DataShape(vocab_size=97, seq_len=16, eot_id=0)


def saved_model(
    folder: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    max_bytes: str = "5GB",
    **keys: object,
) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97} if architecture == "gpt2" else SIZES
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(sizes | keys)), dtype=dtype)
    model.save_pretrained(folder, max_shard_size=max_bytes)
    return model


def opened(folder: Path) -> PretrainedWeights:
    return TransformersFamily().open_pretrained(ModelSpec(from_pretrained=str(folder)), DATA)


def differing(weights: PretrainedWeights, model: Any) -> list[str]:
    """Parameters of which a range in the middle is not what the model holds."""
    found = []
    for name, parameter in model.named_parameters():
        out = torch.empty(parameter.numel() - 3, dtype=torch.float32)
        weights.read_into(name, out, start=2)
        if not torch.equal(out, parameter.detach().reshape(-1)[2:-1].float()):
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("mixtral", EXPERTS),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ],
)
@pytest.mark.parametrize("max_bytes", ["5GB", "20KB"])
def test_read_into__any_architecture_and_number_of_files__equals_the_saved_model(
    tmp_path: Path, architecture: str, keys: dict[str, object], max_bytes: str
) -> None:
    model = saved_model(tmp_path, architecture, max_bytes=max_bytes, **keys)
    assert (tmp_path / "model.safetensors").exists() is (max_bytes == "5GB")
    weights = opened(tmp_path)
    assert differing(weights, model) == []
    assert weights.unused == ()


def test_read_into__bf16_file__is_widened_exactly(tmp_path: Path) -> None:
    model = saved_model(tmp_path, dtype=torch.bfloat16)
    assert differing(opened(tmp_path), model) == []


def test_open__file_of_the_base_model_alone__finds_names_without_their_prefix(tmp_path: Path) -> None:
    model = saved_model(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    assert "wte.weight" in old
    save_file(old, file, metadata={"format": "pt"})
    assert differing(opened(tmp_path), model) == []


def test_open__head_missing_and_not_tied__is_named(tmp_path: Path) -> None:
    saved_model(tmp_path)
    without(tmp_path / "model.safetensors", "lm_head.weight", "model.norm.weight")
    with pytest.raises(ModelError, match=r"lacks .*lm_head\.weight") as caught:
        opened(tmp_path)
    assert "model.norm.weight" in caught.value.problem
    assert caught.value.key == "from_pretrained"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("architecture", "keys", "stored", "named"),
    [
        ("llama", {}, "model.layers.0.mlp.up_proj.weight", r"model\.layers\.0\.mlp\.up_proj\.weight"),
        ("mixtral", EXPERTS, "model.layers.0.block_sparse_moe.experts.1.w1.weight", r"experts"),
    ],
)
def test_open__weight_of_a_quantised_type__is_named(
    tmp_path: Path, dtype: torch.dtype, architecture: str, keys: dict[str, object], stored: str, named: str
) -> None:
    saved_model(tmp_path, architecture, **keys)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[stored] = tensors[stored].to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"not plain floating point: .*{named}.*\({str(dtype)[6:]}\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"are quantised \(gptq\).*save them dequantised",
        ),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, r"code in its own folder \(`auto_map`\)"),
        ({"hidden_size": "32"}, r"cannot be used: .*hidden_size"),
        ({"_attn_implementation": "someone/kernel"}, r"someone/kernel is code of the Hub"),
        ({"attn_implementation": "someone/kernel"}, r"someone/kernel is code of the Hub"),
    ],
)
def test_inspect__config_that_cannot_be_used__is_refused_without_a_prompt(
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks for an answer"))
    saved_model(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ModelError, match=message):
        TransformersFamily().inspect(ModelSpec(from_pretrained=str(tmp_path)), DATA)
    assert capfd.readouterr().out == ""


def test_open__tied_weight_stored_under_its_second_name__is_found(tmp_path: Path) -> None:
    model = saved_model(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert differing(opened(tmp_path), model) == []


def test_open__tensor_without_a_place__is_reported(tmp_path: Path) -> None:
    saved_model(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"score.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert opened(tmp_path).unused == ("score.weight",)


def test_open__other_shape__names_both(tmp_path: Path) -> None:
    saved_model(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 98}))
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is 97×32 there and 98×32 in the model"):
        opened(tmp_path)


def test_inspect__folder_with_missing_weights__is_refused_before_anything_starts(tmp_path: Path) -> None:
    saved_model(tmp_path)
    without(tmp_path / "model.safetensors", "model.norm.weight")
    with pytest.raises(ModelError, match=r"lacks model\.norm\.weight"):
        TransformersFamily().inspect(ModelSpec(from_pretrained=str(tmp_path)), DATA)


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed", "weight.absmax", "SCB"])
def test_open__quantised_weights_without_a_word_in_the_config__are_counted_and_named(
    tmp_path: Path, suffix: str
) -> None:
    saved_model(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj"
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.int8)
        tensors[f"{name}.{suffix}"] = torch.zeros(4, dtype=torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"holds 2 tensors of quantised weights .*layers\.0\.mlp\.up_proj\.{suffix}"
    ):
        opened(tmp_path)


@pytest.mark.parametrize(("weights", "config"), [("gpt2", "llama"), ("llama", "gpt2")])
def test_open__weights_of_another_architecture__are_counted_on_both_sides(
    tmp_path: Path, weights: str, config: str
) -> None:
    for name in (weights, config):
        saved_model(tmp_path / name, name)
    (tmp_path / weights / "model.safetensors").replace(tmp_path / config / "model.safetensors")
    with pytest.raises(
        ModelError,
        match=r"of another architecture .* lack \d+ that a .* and \d+ more; they have \d+ that it does not",
    ):
        opened(tmp_path / config)


def test_open__gguf_alone__is_named_with_the_way_out(tmp_path: Path) -> None:
    saved_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.Q4_1.gguf")
    with pytest.raises(PlanError, match=r"GGUF files \(1, such as model\.Q4_1\.gguf\).*gguf_file"):
        opened(tmp_path)


def test_open__several_files_are_damaged__all_are_named_and_counted(tmp_path: Path) -> None:
    saved_model(tmp_path, max_bytes="20KB")
    first, second, *rest = sorted(tmp_path.glob("model-*.safetensors"))
    first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    size = second.stat().st_size
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(PlanError) as caught:
        opened(tmp_path)
    said = str(caught.value)
    assert f"2 of {2 + len(rest)} files of {tmp_path} cannot be used" in said
    assert f"{first.name} is a git-lfs pointer" in said
    assert f"cut short: {size - 4:,} bytes instead of {size:,}, so that 1 of its" in said


def test_open__shards_are_missing__are_counted(tmp_path: Path) -> None:
    saved_model(tmp_path, max_bytes="20KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    for file in files[:2]:
        file.unlink()
    with pytest.raises(
        PlanError, match=rf"lacks 2 of its {len(files)} weight files, .*{files[0].name}, {files[1].name}"
    ):
        opened(tmp_path)


def test_open__pickled_weights__are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(PlanError, match=r"pickle executes code"):
        opened(tmp_path)


@pytest.mark.parametrize("damage", ["short", "empty", "header", "index", "missing"])
def test_open__damaged_files__are_one_clear_line(tmp_path: Path, damage: str) -> None:
    saved_model(tmp_path, max_bytes="20KB" if damage in ("index", "missing") else "5GB")
    index = tmp_path / "model.safetensors.index.json"
    file = next(tmp_path.glob("model*.safetensors"))
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "header":
        file.write_bytes(b"\xff" * 64)
    elif damage == "index":
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../../etc/passwd"}}))
    else:
        file.unlink()
    with pytest.raises(PlanError, match=r"model\.from_pretrained") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def entry(*, shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        "5",
        "null",
        "[" * 100_000,
        json.dumps({"a": 5}),
        json.dumps({"a": entry(shape=[-1, -2])}),
        json.dumps({"a": entry(shape=[2.0])}),
        json.dumps({"a": entry(shape=5)}),
        json.dumps({"a": entry(offsets=[0.0, 8.0])}),
        json.dumps({"a": entry(offsets=[-8, 0])}),
        json.dumps({"a": entry(offsets=None)}),
        json.dumps({"a": entry(), "b": entry(offsets=[4, 12])}),
        json.dumps({"a": entry() | {"dtype": []}}),
    ],
    ids=range(12),
)
def test_open_weight_files__invalid_header__is_one_clear_line(tmp_path: Path, header: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 16)
    with pytest.raises(PlanError, match=r"model\.safetensors is not a whole safetensors file: ") as caught:
        open_weight_files(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", ['{"weight_map": {}}', '{"weight_map": 5}', "null", "[" * 100_000])
def test_open_weight_files__invalid_index__is_one_clear_line(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(PlanError, match=r"index\.json cannot be read: "):
        open_weight_files(str(tmp_path))


def test_digest_file__content_changed__differs_and_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"one")
    first = digest_file(file, cache=cache)
    assert digest_file(file, cache=cache) == first == digest_file(file)
    file.write_bytes(b"three")
    assert digest_file(file, cache=cache) != first


@pytest.mark.parametrize("is_replaced", [True, False])
def test_digest_file__swapped_file_of_equal_size_and_time__is_read_again(tmp_path: Path, is_replaced: bool) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"one")
    before = file.stat()
    first = digest_file(file, cache=cache)
    other = tmp_path / "other" if is_replaced else file
    other.write_bytes(b"two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert digest_file(file, cache=cache) != first


def test_open_weight_files__reads_no_tensor(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    tensors = open_weight_files(str(tmp_path)).tensors
    assert {name: stored.shape for name, stored in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }


def spec_of(folder: Path, **keys: object) -> ModelSpec:
    return ModelSpec.model_validate({"from_pretrained": str(folder), **keys})


def built(spec: ModelSpec, *, seed: int = 1) -> Any:
    options = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=seed)
    return TransformersFamily().build(spec, DATA, options=options)


@pytest.mark.parametrize(
    ("architecture", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("qwen3", "num_hidden_layers")]
)
def test_inspect__more_layers_than_the_folder__are_said_and_drawn_from_the_seed(
    tmp_path: Path, architecture: str, key: str
) -> None:
    saved_model(tmp_path, architecture)
    spec = spec_of(tmp_path, **{key: 4})
    note = TransformersFamily().inspect(spec, DATA).notes[0]
    assert note.startswith(f"not in {tmp_path}, drawn from the seed (the job sets {key}: 4): ")
    absent = TransformersFamily().open_pretrained(spec, DATA).absent
    assert absent
    assert {name.split(".")[2] for name in absent} == {"2", "3"}
    torch.rand(7)
    first, second, other = built(spec), built(spec), built(spec, seed=2)
    one, two, three = (dict(model.named_parameters()) for model in (first, second, other))
    assert all(torch.equal(one[name], two[name]) for name in absent)
    matrix = next(name for name in absent if one[name].ndim > 1)
    assert not torch.equal(one[matrix], three[matrix])
    assert not torch.equal(one[matrix], one[matrix.replace(".2.", ".3.")])
    assert one[matrix].detach().std() == pytest.approx(0.02, rel=0.3)


def test_inspect__fewer_layers_than_the_folder__names_what_is_not_used(tmp_path: Path) -> None:
    saved_model(tmp_path)
    notes = TransformersFamily().inspect(spec_of(tmp_path, num_hidden_layers=1), DATA).notes
    assert len(notes) == 1
    assert notes[0].startswith(
        f"in {tmp_path}, but not in the model, so not used (the job sets num_hidden_layers: 1)"
    )
    assert "model.layers.1." in notes[0]


def test_inspect__same_keys_as_the_folder__has_nothing_to_say(tmp_path: Path) -> None:
    saved_model(tmp_path)
    assert TransformersFamily().inspect(spec_of(tmp_path, num_hidden_layers=2), DATA).notes == ()


@pytest.mark.parametrize(
    "keys",
    [
        {"vocab_size": 600},
        {"hidden_size": 64},
        {"intermediate_size": 32},
        {"num_attention_heads": 4, "head_dim": 32},
    ],
)
def test_inspect__key_that_changes_a_shape__is_named_with_both_shapes(tmp_path: Path, keys: dict[str, int]) -> None:
    saved_model(tmp_path)
    with pytest.raises(
        ModelError, match=r"has \d+ other shapes: .* there and .* in the model.*; the job sets "
    ) as caught:
        TransformersFamily().inspect(spec_of(tmp_path, **keys), DATA)
    assert caught.value.key == next(iter(keys))


def test_inspect__folder_that_lacks_its_own_weights__is_refused_with_more_layers_too(tmp_path: Path) -> None:
    saved_model(tmp_path)
    without(tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        TransformersFamily().inspect(spec_of(tmp_path, num_hidden_layers=3), DATA)


def test_inspect__freeze_of_weights_that_are_not_in_the_folder__is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path)
    with pytest.raises(ModelError, match=r"freezes weights that are not in .*model\.layers\.2\.") as caught:
        TransformersFamily().inspect(spec_of(tmp_path, num_hidden_layers=3, freeze="model.layers.2"), DATA)
    assert caught.value.key == "freeze"


@pytest.mark.parametrize(
    ("architecture", "keys", "suspects"),
    [
        ("llama", {"hidden_size": 33, "rms_norm_eps": 1e-5}, ("hidden_size",)),
        ("llama", {"num_hidden_layers": -1.5}, ("num_hidden_layers",)),
        ("llama", {"num_attention_heads": 3}, ("num_attention_heads",)),
        ("qwen3", {"layer_types": ["full_attention"]}, ("layer_types",)),
    ],
)
def test_inspect__value_that_the_config_refuses__blames_its_key(
    tmp_path: Path, architecture: str, keys: dict[str, object], suspects: tuple[str, ...]
) -> None:
    saved_model(tmp_path, architecture)
    with pytest.raises(ModelError) as caught:
        TransformersFamily().inspect(spec_of(tmp_path, **keys), DATA)
    assert (caught.value.key, caught.value.suspects) == (suspects[0], suspects)
    assert "\n" not in caught.value.problem


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
)
def test_inspect__git_lfs_pointer__is_said(tmp_path: Path, name: str) -> None:
    saved_model(tmp_path, max_bytes="20KB" if "index" in name else "5GB")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(PlanError, match=rf"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`"):
        TransformersFamily().inspect(spec_of(tmp_path), DATA)


def test_inspect__tied_weight_that_the_files_have_twice__must_be_the_same(tmp_path: Path) -> None:
    saved_model(tmp_path)
    with pytest.raises(ModelError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ in ") as caught:
        TransformersFamily().inspect(spec_of(tmp_path, tie_word_embeddings=True), DATA)
    assert caught.value.key == "tie_word_embeddings"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    TransformersFamily().inspect(spec_of(tmp_path, tie_word_embeddings=True), DATA)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**9}, {"vocab_size": 10**18}, {"text_config": {"n_layer": 10**9}}]
)
def test_inspect__folder_whose_config_has_sizes_without_end__is_refused(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    saved_model(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ModelError, match="must be at most"):
        TransformersFamily().inspect(spec_of(tmp_path), DATA)


def test_inspect__unknown_keys__are_all_named(tmp_path: Path) -> None:
    saved_model(tmp_path)
    with pytest.raises(ModelError) as caught:
        TransformersFamily().inspect(spec_of(tmp_path, hiden_size=1, rms_nrm_eps=2), DATA)
    assert (caught.value.key, caught.value.more_keys) == ("hiden_size", ("rms_nrm_eps",))


def test_inspect__folder__keeps_its_generation_config(tmp_path: Path) -> None:
    saved_model(tmp_path)
    body = {"eos_token_id": [0, 5], "temperature": 0.7, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(body))
    assert TransformersFamily().inspect(spec_of(tmp_path), DATA).generation == body


def without(file: Path, *names: str) -> None:
    kept = {name: tensor for name, tensor in load_file(file).items() if name not in names}
    save_file(kept, file, metadata={"format": "pt"})
