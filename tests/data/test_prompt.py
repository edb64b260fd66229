"""A prompt from the held-out text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from forge.config.data import DataSpec
from forge.data.prepare import prepare
from forge.data.prompt import first_words, held_out_prompt, sample_prompt
from forge.plan.inputs import CorpusInfo

LONG = "one two three four five six seven eight nine ten"
QUESTIONS = [f"User: what is {number} plus {number}? Assistant: {2 * number}" for number in range(200)]


def prepared(tmp_path: Path, *, packing: str, held_out: float = 0.1) -> tuple[CorpusInfo, Tokenizer]:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in QUESTIONS))
    body = {"files": (str(path),), "tokenizer": {"vocab_size": 400}, "seq_len": 32}
    facts = prepare(DataSpec(**body, packing=packing, held_out=held_out), cache_dir=tmp_path / "cache")
    return facts, Tokenizer.from_file(str(next(Path(facts.folder).rglob("tokenizer.json"))))


@pytest.mark.parametrize("packing", ["concatenate", "examples", "none"])
def test_held_out_prompt__corpus__begins_as_one_of_its_held_out_texts(tmp_path: Path, packing: str) -> None:
    facts, tokenizer = prepared(tmp_path, packing=packing)
    prompt = held_out_prompt(facts, tokenizer=tokenizer)
    assert prompt.startswith("User: what is ")
    assert [text for text in QUESTIONS if text.startswith(prompt)]


def test_held_out_prompt__nothing_held_out_or_no_corpus__empty(tmp_path: Path) -> None:
    facts, tokenizer = prepared(tmp_path, packing="concatenate", held_out=0.0)
    assert held_out_prompt(facts, tokenizer=tokenizer) == ""
    shutil.rmtree(facts.folder)
    assert held_out_prompt(facts, tokenizer=tokenizer) == ""


def test_sample_prompt__source_with_a_prompt_of_its_own__has_that(tmp_path: Path) -> None:
    facts, _ = prepared(tmp_path, packing="concatenate")
    tokenizer = next(Path(facts.folder).rglob("tokenizer.json")).parent
    assert sample_prompt(facts, DataSpec(source="python-stdlib"), tokenizer=tokenizer) == "def "
    own = sample_prompt(facts, DataSpec(files=("chats.jsonl",)), tokenizer=tokenizer)
    assert own.startswith("User: what is ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n\n  def f(x):\n    return x\n", "def f(x):"),
        (
            "one two three four five six seven eight nine ten eleven",
            "one two three four five six seven eight nine ten",
        ),
        (60 * "x", 48 * "x"),
        ("\x1b[2Jhello", ""),
        ("", ""),
    ],
)
def test_first_words__text__one_printable_line(text: str, words: str) -> None:
    assert first_words(text) == words
