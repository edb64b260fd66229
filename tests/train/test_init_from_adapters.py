"""Starting from a run with adapters (merged, or going on with them), and from one of a class of the user's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from forge.checkpoint.source import open_source
from forge.code_archive import PackedCode, unpack_code
from forge.config.load import load_job
from forge.config.model import ModelSpec
from forge.errors import JobFileError, ModelError
from forge.model.families.base import DataShape
from forge.model.families.registry import family_of
from forge.plan.inputs import CodeInfo, CorpusInfo
from forge.plan.plan import Plan, plan_to_json
from forge.runtime.resolve_init import init_info, with_init
from forge.serve.export import ExportRequest, export
from forge.user_code import use_code
from tests.model.test_user_class import MIXER
from tests.support.jobs import SEQ_LEN, VOCAB, tiny_plan
from tests.support.ranks import Recording, on_ranks, run_ranks, train_one_rank

DATA = DataShape(vocab_size=VOCAB, seq_len=SEQ_LEN, eot_id=0)
LORA = {"rank": 4, "alpha": 16, "targets": ["q_proj", "mlp"], "modules_to_save": "lm_head", "dora": True}
STEP = "step-00000003"


def plan_of(corpus: CorpusInfo, model: dict[str, Any], **changes: Any) -> Plan:
    settings = {"training__precision": "fp32", "training__total_steps": 3, "training__optimizer": {"lr": 0.02}}
    plan = tiny_plan(corpus, model=model, **settings, **changes)
    init = init_info(plan.job.model.from_pretrained)
    return replace(plan, init=init, adapters_init=init_info(plan.job.model.adapters_from))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, max_position_embeddings=SEQ_LEN, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def first(base: Path, corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters on two ranks; beside its checkpoints they are exported, merged, in fp32."""
    folder = tmp_path_factory.mktemp("first") / "run" / "checkpoints"
    run_ranks(plan_of(corpus, {"from_pretrained": str(base), "lora": LORA}), folder, world_size=2)
    export(ExportRequest(url=str(folder), to=str(folder.parent / "merged"), dtype="fp32"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world_size"), [(3, 2), (0, 1)])
def test_train__from_a_run_with_adapters__has_the_losses_of_its_merged_export(
    corpus: CorpusInfo, first: Path, tmp_path: Path, stage: int, world_size: int
) -> None:
    zero = {"training__zero": {"stage": stage}}
    models = [{"from_pretrained": str(source)} for source in (first / STEP, first.parent / "merged")]
    ours, theirs = (
        run_ranks(plan_of(corpus, model, **zero), tmp_path / str(i), world_size=world_size)
        for i, model in enumerate(models)
    )
    assert ours.losses == theirs.losses


def test_inspect__checkpoint_with_adapters__says_that_they_are_merged(first: Path) -> None:
    spec = ModelSpec.model_validate({"from_pretrained": str(first / STEP), "lora": {"rank": 2}})
    notes = family_of(spec).inspect(spec, DATA).notes
    assert f"{first / STEP} holds adapters, which are added to 8 of its weights (merged in fp32)" in notes


def continued(first: Path, **lora: Any) -> dict[str, Any]:
    """The section `model` of a job that goes on with the adapters of the run."""
    job = {
        "name": "continued",
        "model": {"lora": {"init_from": str(first / STEP), **lora}},
        "data": {"source": "python-stdlib", "seq_len": SEQ_LEN},
        "training": {"total_steps": 3},
    }
    path = first.parent / "job.yaml"
    path.write_text(json.dumps(job))
    return with_init(load_job(path)).job.model.model_dump(mode="json", exclude_unset=True)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world_size"), [(3, 2), (2, 3)])
def test_train__going_on_with_adapters__begins_where_they_were_and_refers_to_their_base(
    corpus: CorpusInfo, base: Path, first: Path, tmp_path: Path, stage: int, world_size: int
) -> None:
    model = continued(first)
    assert model["from_pretrained"] == str(base)
    assert {key: model["lora"][key] for key in ("rank", "alpha", "dora")} == {"rank": 4, "alpha": 16, "dora": True}
    assert model["lora"]["targets"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    plan = plan_of(corpus, model, training__zero={"stage": stage})
    own = run_ranks(plan, tmp_path / "own", world_size=world_size)
    merged = plan_of(corpus, {"from_pretrained": str(first.parent / "merged")})
    whole = run_ranks(merged, tmp_path / "whole", world_size=1, stop_after=1)
    assert own.losses[0] == pytest.approx(whole.losses[0], rel=1e-5)
    shape = open_source(str(tmp_path / "own" / STEP)).shape
    assert shape.base is not None
    assert shape.base.source == str(base)
    run_ranks(plan, tmp_path / "parts", world_size=1, stop_after=1)
    rest = run_ranks(plan, tmp_path / "parts", world_size=1)
    assert rest.losses == pytest.approx(own.losses[1:], rel=1e-4)


@pytest.mark.slow
def test_train__going_on_with_an_exported_adapter_folder__has_the_losses_of_going_on_with_the_run(
    corpus: CorpusInfo, first: Path, tmp_path: Path
) -> None:
    export(ExportRequest(url=str(first), to=str(tmp_path / "peft"), dtype="fp32", adapters=True))
    models = [continued(first), continued(first, init_from=str(tmp_path / "peft"))]
    ours, theirs = (
        run_ranks(plan_of(corpus, model), tmp_path / str(i), world_size=2) for i, model in enumerate(models)
    )
    assert ours.losses == theirs.losses


@pytest.mark.parametrize(
    ("lora", "key", "problem"),
    [
        ({"targets": ["q_proj"]}, "lora.targets", r"has adapters on model\.layers\.0\.mlp\.down_proj"),
        ({"modules_to_save": []}, "lora.modules_to_save", r"has trained whole lm_head\.weight"),
    ],
)
def test_inspect__adapters_of_other_layers__are_named(
    first: Path, lora: dict[str, Any], key: str, problem: str
) -> None:
    spec = ModelSpec.model_validate(continued(first, **lora))
    with pytest.raises(ModelError, match=problem) as caught:
        family_of(spec).inspect(spec, DATA)
    assert caught.value.key == key


def test_inspect__adapters_of_other_weights__are_refused(first: Path, base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path)
    spec = ModelSpec.model_validate(continued(first) | {"from_pretrained": str(tmp_path)})
    with pytest.raises(ModelError, match="the adapters are of other weights") as caught:
        family_of(spec).inspect(spec, DATA)
    assert caught.value.key == "lora.init_from"


def test_with_init__other_rank_than_the_run__is_refused(first: Path) -> None:
    with pytest.raises(JobFileError, match=r"model\.lora\.rank.*have 4"):
        continued(first, rank=8)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    packed = PackedCode(files={"my_models.py": MIXER.encode()})
    unpack_code(packed)
    use_code(packed.digest)
    yield packed.digest
    use_code(None)


def train_class(rank: int, digest: str, cache: str, *arguments: Any) -> Recording:
    os.environ["FORGE_CACHE"] = cache
    use_code(digest)
    return train_one_rank(rank, *arguments)


def test_train__from_a_run_of_a_class__has_its_weights(corpus: CorpusInfo, code: str, tmp_path: Path) -> None:
    mixer = {"class": "my_models:TinyMixer"}

    def run(model: dict[str, Any], folder: Path, *, world_size: int) -> Recording:
        plan = plan_of(corpus, model, code=".")
        packed = CodeInfo(digest=code, num_files=1, size_bytes=1)
        plan = replace(plan, code=packed, model=replace(plan.model, has_linear_head=False))
        arguments = (code, os.environ["FORGE_CACHE"], plan_to_json(plan), str(folder), world_size, None)
        found: Recording = on_ranks(train_class, *arguments, world_size=world_size)[0]
        return found

    run(mixer, tmp_path / "first", world_size=2)
    source = tmp_path / "first" / STEP
    export(ExportRequest(url=str(tmp_path / "first"), to=str(tmp_path / "exported"), dtype="fp32"))
    ours = run({**mixer, "from_pretrained": str(source), "freeze": ["embedding"]}, tmp_path / "own", world_size=1)
    same = {**mixer, "from_pretrained": str(tmp_path / "exported"), "freeze": ["embedding"]}
    assert ours.losses == run(same, tmp_path / "same", world_size=1).losses
    export(ExportRequest(url=str(tmp_path / "own"), to=str(tmp_path / "frozen"), dtype="fp32"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "frozen"))
    assert torch.equal(before["embedding.weight"], after["embedding.weight"])
    assert not torch.equal(before["mix.weight"], after["mix.weight"])

    wider = ModelSpec.model_validate({**mixer, "from_pretrained": str(source), "width": 16})
    with pytest.raises(ModelError, match=r"embedding\.weight is 128×8 there and 128×16 in the model"):
        family_of(wider).inspect(wider, DATA)
    unnamed = ModelSpec.model_validate({"from_pretrained": str(source)})
    with pytest.raises(ModelError, match=r"is of a class of your own: name it in model\.class"):
        family_of(unnamed).inspect(unnamed, DATA)
