"""A file of prompts that workers of Ray answer has the answers of a single process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.inference.answer import AnswerConfig, Answerer
from forge.runtime.torch_subprocess import answer_file

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
