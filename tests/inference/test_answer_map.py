"""A file of prompts that workers of Ray answer has the answers of a single process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree, ignore_patterns

import psutil
import pytest
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

from forge.inference.answer import Answerer
from forge.inference.answer_request import AnswerConfig
from forge.runtime.answer_files import shard_folder
from forge.runtime.torch_subprocess import answer_file, answer_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_answer_file__two_workers__has_the_answers_of_one_process(llama_folder: Path, tmp_path: Path) -> None:
    sampling = {"temperature": 0.0, "max_tokens": 4}
    prompts = [f"the river {number}" for number in range(300)]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(map(json.dumps, prompts)))
    config = {"source": str(llama_folder), "sampling": sampling}
    tmp_path.chmod(0o755)
    found = answer_file(config, source=source, output=output, num_workers=2)
    assert found["num_answers"] == 300
    expected = Answerer(AnswerConfig(source=str(llama_folder), sampling=sampling))(prompts)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == [{"index": index, **answer} for index, answer in enumerate(expected)]
    assert tmp_path.stat().st_mode & 0o777 == 0o755, "the user's folder keeps its mode"
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "prompts.jsonl"}


def test_answer_file__client_is_killed__its_process_ends_and_the_same_command_goes_on(
    llama_folder: Path, tmp_path: Path
) -> None:
    prompts = [f"the river {number}" for number in range(400)]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(map(json.dumps, prompts)))
    words = ["generate", str(llama_folder), "--input", str(source), "--output", str(output)]
    command = [sys.executable, "-m", "forge.cli.app", *words, "--temperature", "0", "--max-tokens", "8"]
    with subprocess.Popen(command, cwd=tmp_path) as client:
        while not list(shard_folder(output).glob("*.jsonl")):
            assert client.poll() is None
            time.sleep(0.02)
        [child] = psutil.Process(client.pid).children()
        client.kill()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() and not output.exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "400 answers (" in done.stderr and "of them from before" in done.stderr
    config = AnswerConfig(source=str(llama_folder), sampling={"temperature": 0.0, "max_tokens": 8})
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == [{"index": index, **answer} for index, answer in enumerate(Answerer(config)(prompts))]


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
