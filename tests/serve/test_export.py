"""A real checkpoint as a Hugging Face folder: from_pretrained gives the weights that were trained, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from forge.checkpoint.reader import Checkpoint, open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.errors import ArgumentError, CheckpointError
from forge.inference.checkpoint_model import load_model
from forge.inference.weights import CheckpointWeights
from forge.plan.inputs import CorpusInfo
from forge.runtime.torch_subprocess import export_weights
from forge.serve.export import ExportRequest, _copy_tokenizer, export
from tests.support.jobs import synthetic_corpus, tiny_plan
from tests.support.ranks import run_ranks

LLAMA = {
    "architecture": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "gpt2": {"architecture": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    "mixtral": {
        "architecture": "mixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    return synthetic_corpus(tmp_path_factory.mktemp("corpus"))


def trained(corpus: CorpusInfo, folder: Path, model: str = "llama", *, stage: int = 2) -> str:
    """The URL of the checkpoints of a model that was trained for two steps on two ranks."""
    plan = tiny_plan(
        corpus,
        model=MODELS[model],
        training__total_steps=2,
        training__schedule={"warmup": 1},
        training__zero={"stage": stage},
        training__ema={"decay": 0.5},
    )
    run_ranks(plan, folder, world_size=2)
    return str(folder)


@pytest.fixture(scope="module")
def llama(corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(corpus, tmp_path_factory.mktemp("llama"))


def checkpoint_of(url: str) -> Checkpoint:
    return open_checkpoint(open_storage(url), "step-00000002")


def require_equal(folder: Path, checkpoint: Checkpoint, *, dtype: torch.dtype, ema: bool = False) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    parameters = dict(model.named_parameters())
    assert set(parameters) == {n for n, p in checkpoint.shape.parameters.items() if p.kind != "buffer"}
    held = dict(CheckpointWeights(checkpoint, ema=ema).tensors())
    for name, parameter in parameters.items():
        assert torch.equal(parameter, held[name].to(dtype)), name


@pytest.mark.parametrize("model", [name for name in MODELS if name != "llama"])
def test_export__every_architecture__loads_from_its_folder_and_from_its_checkpoint(
    corpus: CorpusInfo, tmp_path: Path, model: str
) -> None:
    url = trained(corpus, tmp_path / "run", model, stage=3 if model == "gpt2" else 1)
    export(ExportRequest(url=url, to=str(tmp_path / "out"), dtype="fp32"))
    require_equal(tmp_path / "out", checkpoint_of(url), dtype=torch.float32)
    loaded = load_model(tiny_plan(corpus, model=MODELS[model]), checkpoint_of(url))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=next(loaded.parameters()).dtype)
    parameters = dict(loaded.named_parameters())
    assert set(parameters) == {name for name, _ in exported.named_parameters()}
    assert all(torch.equal(parameters[name], parameter) for name, parameter in exported.named_parameters())


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("ema", [False, True])
def test_export__weights_or_averages__either_precision(
    llama: str, tmp_path: Path, dtype: str, torch_dtype: torch.dtype, ema: bool
) -> None:
    made = export(ExportRequest(url=llama, to=str(tmp_path / "out"), dtype=dtype, ema=ema))
    require_equal(tmp_path / "out", checkpoint_of(llama), dtype=torch_dtype, ema=ema)
    assert made.step == 2
    assert made.size_bytes == made.num_parameters * (2 if dtype == "bf16" else 4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_export__max_shard_bytes__files_hold_everything_once(llama: str, tmp_path: Path) -> None:
    made = export(ExportRequest(url=llama, to=str(tmp_path / "out"), dtype="fp32", max_shard_bytes=20_000))
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) == made.num_files > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]  # noqa: SIM118 (no mapping)
            assert sum(sizes) <= 20_000 or len(sizes) == 1
            held |= dict.fromkeys(opened.keys(), file.name)
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == made.size_bytes
    require_equal(tmp_path / "out", checkpoint_of(llama), dtype=torch.float32)


def test_export__tokenizer__is_copied(llama: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    export(ExportRequest(url=llama, to=str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer")))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_export__folder_not_empty__is_untouched(llama: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ArgumentError, match="not empty"):
        export(ExportRequest(url=llama, to=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_export__unwritable_folder__raises_and_leaves_nothing(llama: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"file/out cannot be written: Not a directory"):
        export(ExportRequest(url=llama, to=str(tmp_path / "file" / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 7}, "step-00000007: manifest.json is missing"),
        ({"url": "nowhere"}, "holds no checkpoint that verifies"),
    ],
)
def test_export__missing_checkpoint__raises(
    llama: str, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    request = {"url": llama, "to": str(tmp_path / "out")} | changes
    with pytest.raises(CheckpointError, match=message):
        export(ExportRequest(**request))


def test_export__no_averages__raises(corpus: CorpusInfo, tmp_path: Path) -> None:
    plan = tiny_plan(corpus, training__total_steps=1, training__schedule={"warmup": 0})
    run_ranks(plan, tmp_path / "run", world_size=1)
    with pytest.raises(CheckpointError, match="no ema weights"):
        export(ExportRequest(url=str(tmp_path / "run"), to=str(tmp_path / "out"), ema=True))


def test_copy_tokenizer__hostile_folder__copies_no_code_and_replaces_no_model_file(tmp_path: Path) -> None:
    source, to = tmp_path / "tokenizer", tmp_path / "export"
    source.mkdir()
    to.mkdir()
    (to / "config.json").write_text("{}")
    (to / "generation_config.json").write_text("{}")
    for name in ("tokenizer.json", "config.json", "generation_config.json", "modeling.py", "model.safetensors"):
        (source / name).write_text("from the run")
    (source / "code").mkdir()
    _copy_tokenizer(source, to)
    held = {path.name: path.read_text() for path in to.iterdir()}
    assert held == {"config.json": "{}", "tokenizer.json": "from the run", "generation_config.json": "from the run"}
    (source / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="it is a link"):
        _copy_tokenizer(source, to)


@pytest.mark.slow
def test_export_weights__in_its_own_process__reports_the_bytes_it_writes(llama: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    answer = export_weights(url=llama, to=str(tmp_path / "out"), on_progress=lambda *pair: seen.append(pair))
    assert seen[-1] == (answer["size_bytes"], answer["size_bytes"])
    assert seen == sorted(seen)
    with pytest.raises(ArgumentError, match="not empty"):
        export_weights(url=llama, to=str(tmp_path / "out"))


def test_export__progress__ends_with_all_bytes(llama: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    request = ExportRequest(url=llama, to=str(tmp_path / "out"), max_shard_bytes=20_000)
    exported = export(request, on_progress=lambda *pair: seen.append(pair))
    done = [one for one, _ in seen]
    assert done == sorted(done)
    assert len(done) > exported.num_files > 1
    assert seen[-1] == (exported.size_bytes, exported.size_bytes)
