"""Folders of tokenizers that others made to hang, to fill the memory, or to end in a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from forge.data.tokenizer import MAX_VOCABULARY, load_tokenizer
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
