"""A file of prompts that workers of Ray answer has the answers of a single process."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

from forge.inference.answer import AnswerConfig, Answerer
from forge.runtime.torch_subprocess import answer_file, answer_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_answer_file__two_workers__has_the_answers_of_one_process(llama_folder: Path, tmp_path: Path) -> None:
    sampling = {"temperature": 0.0, "max_tokens": 4}
    prompts = [f"the river {number}" for number in range(300)]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(map(json.dumps, prompts)))
    config = {"source": str(llama_folder), "sampling": sampling}
    found = answer_file(config, source=source, output=output, num_workers=2)
    assert found["num_answers"] == 300
    expected = Answerer(AnswerConfig(source=str(llama_folder), sampling=sampling))(prompts)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == [{"index": index, **answer} for index, answer in enumerate(expected)]


def test_answer__model_without_fp64__says_once_that_fp32_decides(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "experts"
    copytree(llama_folder, folder, ignore=ignore_patterns("*.safetensors"))
    config = MixtralConfig(
        vocab_size=AutoConfig.from_pretrained(llama_folder).vocab_size, hidden_size=32, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    asked = {"source": str(folder), "sampling": {"temperature": 0.0, "max_tokens": 2, "logprobs": 0}}
    source, messages = tmp_path / "prompts.jsonl", list[str]()
    source.write_text("\n".join(json.dumps(f"the river {number}") for number in range(600)))
    answer_file(asked, source=source, output=tmp_path / "out.jsonl", num_workers=2, on_message=messages.append)
    assert sum("experts cannot be computed in fp64" in message for message in messages) == 1, messages
    messages.clear()
    answer_prompts(asked, ["the river", "the sea"], on_message=messages.append)
    assert len(messages) == 1 and "experts cannot be computed in fp64" in messages[0]
