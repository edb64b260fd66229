"""Folders of tokenizers that others made to hang, to fill the memory, or to end in a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from forge.config.data import DataSpec
from forge.data.prepare import prepare
from forge.data.tokenizer import MAX_VOCABULARY, Encoder, load_tokenizer, train_tokenizer
from forge.data.tokenizer_backend import without_endless_words
from forge.data.tokenizer_files import prompt_tokenizer, special_ids
from forge.errors import DataError


def write_tokenizer(folder: Path, *, last_id: int = 2) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["b"] = last_id
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_load_tokenizer__id_beyond_every_vocabulary__is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, last_id=2**32 - 2)  # 17 GB for the ids between
    with pytest.raises(DataError, match=f"the id {2**32 - 2}; forge reads ids below {MAX_VOCABULARY}"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_load_tokenizer__pipe_in_its_folder__is_refused(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="it is not a file"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_load_tokenizer__settings_that_are_a_list__are_refused(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text("[]")
    with pytest.raises(DataError, match=rf"{name} cannot be read: expected a JSON object, found a list of 0"):
        load_tokenizer(str(tmp_path))


VOCABULARY = {**{chr(code): code - 97 for code in range(97, 123)}, "<|endoftext|>": 26}
END = {
    "id": 26, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
    "normalized": False,
}  # fmt: skip
LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}


def write_parts(folder: Path, **parts: Any) -> None:
    """A byte-pair tokenizer of letters, with parts of its file replaced."""
    model = {"type": "BPE", "vocab": VOCABULARY, "merges": []}
    content = {"version": "1.0", "added_tokens": [END], "model": model} | parts
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [LONGER] * 9}}, "1,000,000,000 times longer"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}}, "claims 4,294,967,295"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Cannot parse precompiled"),
        ({"added_tokens": [END | {"content": "x" * 2**23}]}, "its added tokens have 8,388,608 characters"),
        ({"added_tokens": [3]}, "not subscriptable"),
        ({"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                             "single": [{"SpecialToken": {"id": "X", "type_id": 0}}] * 1001}}, "1,001 tokens"),
        ({"model": {"type": "BPE", "vocab": VOCABULARY | {"ab": 27}, "merges": [["a", "b"]],
                    "continuing_subword_prefix": "longer than the token"}}, "out of range"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
         "unmatched parenthesis"),
    ],
)  # fmt: skip
def test_tokenizer__file_that_breaks_the_library__is_refused(
    tmp_path: Path, parts: dict[str, Any], problem: str
) -> None:
    write_parts(tmp_path, **parts)
    with pytest.raises(DataError, match=rf"tokenizer\.json is not a tokenizer: .*{problem}"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match=rf"tokenizer\.json is not a tokenizer: .*{problem}"):
        prompt_tokenizer(tmp_path, eot_id=26, special_tokens="text")


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                            "invert": False}}, "retry-limit-in-match over"),
        ({"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": VOCABULARY}}, "Missing .UNK. token"),
        ({"model": {"type": "Unigram", "unk_id": None, "byte_fallback": False,
                    "vocab": [[name, 0.0] for name in VOCABULARY]}}, "`unk_id` is missing"),
    ],
)  # fmt: skip
def test_encoder__text_that_the_tokenizer_cannot_encode__is_an_error_with_the_reason(
    tmp_path: Path, parts: dict[str, Any], problem: str
) -> None:
    write_parts(tmp_path, **parts)
    tokenizer = load_tokenizer(str(tmp_path))
    for texts in (["a" * 40 + "B"], ["a" * 40 + "B"] * 2):
        with pytest.raises(DataError, match=f"the tokenizer fails: .*{problem}"):
            Encoder(tokenizer).encode(texts)
    (tmp_path / "pairs.jsonl").write_text('{"source": "aaaaB", "target": "b"}\n' * 50)
    spec = {"files": str(tmp_path / "pairs.jsonl"), "format": "pair", "packing": "examples", "seq_len": 16}
    job = DataSpec.model_validate(spec | {"tokenizer": {"from_pretrained": str(tmp_path)}})
    if "Split" not in str(parts):  # whose expression is slow for long texts only
        with pytest.raises(DataError, match=problem):
            prepare(job, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("word", ["a" * 10**6, "-" * 10**6, " " * 10**6, "b c " + "a" * 10**6 + " d"])
def test_train_tokenizer__word_of_a_million_characters__is_cut(word: str) -> None:
    pieces = list(without_endless_words(["plain text", word, "word " * 10**5]))
    assert "".join(pieces) == "plain text" + word + "word " * 10**5
    assert (pieces[0], pieces[-1]) == ("plain text", "word " * 10**5)
    assert max(map(len, pieces[1:-1])) == 2000
    trained = train_tokenizer([word], vocab_size=280)
    assert trained.vocab_size > 257


def test_prompt_tokenizer__pipe_or_link_in_a_run__is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="it is not a regular file"):
        prompt_tokenizer(tmp_path, eot_id=0, special_tokens="text")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="it is a link"):
        prompt_tokenizer(tmp_path, eot_id=0, special_tokens="text")


@pytest.mark.parametrize("added", [3, [3], [{"special": True}], [{"special": True, "content": "a", "id": "x"}]])
def test_special_ids__added_tokens_of_another_kind__are_refused(tmp_path: Path, added: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    with pytest.raises(DataError, match="its added tokens cannot be read"):
        special_ids(tmp_path)
