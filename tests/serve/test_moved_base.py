"""A run that began from a pretrained folder, after the folder has moved: everything it needs is in the run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from forge.checkpoint.reader import open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.config.model import ModelSpec
from forge.errors import ForgeError
from forge.inference.answer import Answerer
from forge.inference.answer_request import AnswerConfig
from forge.inference.checkpoint_model import load_model
from forge.model.families.base import DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.plan.plan import Plan
from forge.runs.create import fill_run_folder
from forge.serve.export import ExportRequest, export
from tests.support.jobs import SEQ_LEN, VOCAB, synthetic_corpus, tiny_plan
from tests.support.ranks import run_ranks

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "eos_token_id": [0, 5],
}  # fmt: skip
GENERATION = {"eos_token_id": [0, 5, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_base(folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))


def run_from(base: Path, folder: Path, corpus: Any, **model: object) -> Plan:
    """Train two steps from a base whose folder is then moved away. Returns: the plan of the run in `folder`."""
    spec = ModelSpec.model_validate({"from_pretrained": str(base), **model})
    info = TransformersFamily().inspect(spec, DataShape(vocab_size=VOCAB, seq_len=SEQ_LEN, eot_id=0))
    plan = tiny_plan(
        corpus,
        model=spec.model_dump(exclude_unset=True),
        training__total_steps=2,
        training__schedule={"warmup": 1},
        training__zero={"stage": 2},
    )
    plan = replace(plan, model=info)
    fill_run_folder(folder, plan)
    run_ranks(plan, folder / "checkpoints", world_size=2)
    base.rename(base.with_name("elsewhere"))
    return plan


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = synthetic_corpus(tmp_path_factory.mktemp("corpus"))
    folder = Path(made.folder) / "tokenizer"
    folder.mkdir()
    words = Tokenizer(
        WordLevel({"<eos>": 0} | {f"w{number}": number for number in range(1, VOCAB)}, unk_token="w1")
    )
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["<eos>"])
    words.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Any) -> tuple[Path, Plan]:
    """A run with two layers more than its base."""
    root = tmp_path_factory.mktemp("run")
    save_base(root / "base")
    return root / "run", run_from(root / "base", root / "run", corpus, num_hidden_layers=4)


def test_generate__base_folder_has_moved__generates_and_ends_at_any_end(run: tuple[Path, Plan]) -> None:
    folder, _ = run
    answerer = Answerer(AnswerConfig(source=str(folder), sampling={"max_tokens": 200, "n": 8, "temperature": 2.0}))
    assert {5, 7} <= set(answerer.loaded.end_ids)
    [answer] = answerer(["w9"])
    assert "stop" in {made["finish_reason"] for made in answer["texts"]}
    assert not any({"w5", "w7"} & set(made["text"].split()) for made in answer["texts"])


def test_export__base_folder_has_moved__has_weights_template_and_generation_settings(
    run: tuple[Path, Plan], tmp_path: Path
) -> None:
    folder, plan = run
    to = tmp_path / "out"
    url = str(folder / "checkpoints")
    export(ExportRequest(url=url, to=str(to), dtype="fp32", tokenizer=str(folder / "tokenizer")))
    exported = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)
    trained = load_model(plan, open_checkpoint(open_storage(url), "step-00000002"))
    named = dict(trained.named_parameters())
    assert exported.config.num_hidden_layers == 4
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter.to(named[name].dtype), named[name]), name
    settings = GenerationConfig.from_pretrained(to)
    assert {key: getattr(settings, key) for key in GENERATION} == GENERATION
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert tokenizer.chat_template == TEMPLATE
    assert (to / "special_tokens_map.json").exists()


def test_train__layers_beyond_the_base__begin_from_the_seed_at_any_world_size(
    run: tuple[Path, Plan], tmp_path: Path, corpus: Any
) -> None:
    folder, _ = run
    shutil.copytree(folder.parent / "elsewhere", tmp_path / "base")
    again = run_from(tmp_path / "base", tmp_path / "run", corpus, num_hidden_layers=4)
    one, two = (
        load_model(again, open_checkpoint(open_storage(str(root / "checkpoints")), "step-00000002"))
        for root in (folder, tmp_path / "run")
    )
    others = dict(two.named_parameters())
    assert all(torch.equal(parameter, others[name]) for name, parameter in one.named_parameters())


def test_generate__frozen_weights_whose_folder_has_moved__says_where_it_is_missing(
    tmp_path: Path, corpus: Any
) -> None:
    save_base(tmp_path / "base")
    run_from(tmp_path / "base", tmp_path / "run", corpus, freeze="model.embed_tokens")
    with pytest.raises(ForgeError, match=str(tmp_path / "base")):
        Answerer(AnswerConfig(source=str(tmp_path / "run")))
