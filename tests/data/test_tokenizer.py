from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from forge.config.data import DataSpec
from forge.data import tokenizer as module
from forge.data.corpus import iter_documents, iter_sample
from forge.data.tokenizer import (
    EOT_TOKEN,
    Encoder,
    TextTokenizer,
    encode_batches,
    load_tokenizer,
    special_token_names,
    train_tokenizer,
)
from forge.data.tokenizer_files import prompt_tokenizer, vocabulary_problem
from forge.errors import DataError

STDLIB = DataSpec(source="python-stdlib")


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_tokenizer(iter_sample(STDLIB, max_chars=2_000_000), vocab_size=2000)


@pytest.fixture(scope="module")
def encoder(trained: TextTokenizer) -> Encoder:
    return Encoder(trained)


@pytest.fixture(scope="module")
def backend(trained: TextTokenizer) -> Tokenizer:
    """The library's own encoding, which ours must equal."""
    tokenizer = Tokenizer.from_str(trained.content)
    tokenizer.encode_special_tokens = True
    return tokenizer


def ids_of(encoder: Encoder, *texts: str) -> list[list[int]]:
    dtype = "<u2"
    return [np.frombuffer(found, dtype=dtype).tolist() for found in encoder.encode(texts)]


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> str:
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def byte_level(*tokens: str, **settings: Any) -> Tokenizer:
    """A byte-level BPE without merges, and some tokens with ids after the bytes."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], **settings))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


# ---- training


def test_a_trained_tokenizer_has_the_size_asked_for_and_end_of_text_first(trained: TextTokenizer) -> None:
    assert (trained.vocab_size, trained.eot_id, trained.eot_token, trained.dtype) == (2000, 0, EOT_TOKEN, "<u2")


def test_the_same_text_trains_the_same_tokenizer(trained: TextTokenizer) -> None:
    assert trained == train_tokenizer(iter_sample(STDLIB, max_chars=2_000_000), vocab_size=2000)


def test_a_small_corpus_gives_a_small_vocabulary_that_still_spells_everything() -> None:
    tokenizer = train_tokenizer(["abc"], vocab_size=5000)
    assert tokenizer.vocab_size == 257
    assert len(ids_of(Encoder(tokenizer), "日本 \x00 ñ")[0]) == len("日本 \x00 ñ".encode())


def test_the_smallest_vocabulary_of_the_job_file_is_possible() -> None:
    assert train_tokenizer(["aa aa aa"], vocab_size=257).vocab_size == 257


def test_transformers_loads_what_is_saved(trained: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained.content)
    (tmp_path / "tokenizer_config.json").write_text(trained.config)
    program = (
        "import sys, transformers\n"
        "t = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "text = 'def f(x):\\n    return x + 1  # π'\n"
        "assert t.decode(t(text)['input_ids']) == text\n"
        "print(t.eos_token, t.eos_token_id, len(t), t(text)['input_ids'])\n"
    )
    pytest.importorskip("transformers")
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    ids = ids_of(Encoder(trained), "def f(x):\n    return x + 1  # π")[0]
    assert done.stdout.split("\n")[0] == f"{EOT_TOKEN} 0 2000 {ids}"


# ---- encoding equals the library's


def test_the_standard_library_is_encoded_as_the_library_does(encoder: Encoder, backend: Tokenizer) -> None:
    texts = [document.text for document in iter_documents(STDLIB)][::5]
    assert ids_of(encoder, *texts) == [found.ids for found in backend.encode_batch_fast(texts)]


AWKWARD = "ab zZ'sStremdvl019._<|>\n\r\t\x0b\x0c \x1c\x1f\x85\xa0\u1680\u180e\u2009\u200b\u2028\u3000\ufeff\0"
AWKWARD += "é\u0301ßДя中あ한١²Ⅷ½一𝔸😀👩‍💻\u0378\ua7cb\u1c80\ud7ff\ue000\U00010ffff"
TEXT = st.one_of(st.text(), st.text(st.sampled_from(AWKWARD)), st.text(st.sampled_from(" \n'aé😀1.")))


@given(text=TEXT)
def test_any_text_is_encoded_as_the_library_does(encoder: Encoder, backend: Tokenizer, text: str) -> None:
    assert ids_of(encoder, text) == [backend.encode(text).ids]


def test_random_awkward_text_is_encoded_as_the_library_does(encoder: Encoder, backend: Tokenizer) -> None:
    chance = random.Random(0)
    for _ in range(10):
        texts = ["".join(chance.choices(AWKWARD, k=chance.randint(0, 40))) for _ in range(1000)]
        assert ids_of(encoder, *texts) == [found.ids for found in backend.encode_batch_fast(texts)]


@pytest.mark.slow
def test_every_character_is_encoded_as_the_library_does(encoder: Encoder, backend: Tokenizer) -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    # Every character of the plane where scripts live, a sample of the rest, in a neighbourhood of each kind.
    characters = characters[:0x10000] + characters[0x10000::13]
    for pattern in ("a{0}1", "  {0} '{0}x {0}{0}.\n"):
        for start in range(0, len(characters), 64):
            text = "\n".join(map(pattern.format, characters[start : start + 64]))
            assert ids_of(encoder, text) == [backend.encode(text).ids]


def test_memory_of_words_is_bounded_and_changes_nothing(
    trained: TextTokenizer, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WORDS", 10)
    encoder = Encoder(trained)
    text = " ".join(f"word{i % 37}" for i in range(300)) + " " + "x" * 500
    assert ids_of(encoder, text) == [backend.encode(text).ids]
    assert encoder.words is not None
    assert len(encoder.words) <= 10
    assert " " + "x" * 500 not in encoder.words


@given(count=st.integers(0, 2000), tail=st.sampled_from(["", "a", "😀", "\n", "\u1c80"]))
def test_a_long_run_of_spaces_takes_no_quadratic_time(
    encoder: Encoder, backend: Tokenizer, count: int, tail: str
) -> None:
    text = "x" + " " * count + tail
    assert ids_of(encoder, text) == [backend.encode(text).ids]


# ---- the end of text cannot be spelled


def test_the_name_of_the_end_of_text_token_in_a_text_is_ordinary_characters(encoder: Encoder) -> None:
    for text in (EOT_TOKEN, f"a{EOT_TOKEN}b", f" {EOT_TOKEN}{EOT_TOKEN}\n"):
        assert 0 not in ids_of(encoder, text)[0]


def test_an_end_of_text_token_that_is_not_marked_special_cannot_be_spelled_either(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("</s>", special=False)])
    loaded = load_tokenizer(save(tokenizer, tmp_path, eos_token="</s>"))
    ids = ids_of(Encoder(loaded), "one</s>two")[0]
    assert loaded.eot_id not in ids
    assert len(ids) == len("one</s>two")


def test_a_name_that_the_model_itself_knows_is_torn_apart(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0)] + [(letter, -5.0) for letter in "</s>ab"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    loaded = load_tokenizer(save(tokenizer, tmp_path))
    assert loaded.eot_id == 1
    ids = ids_of(Encoder(loaded), "a</s>b</s>")[0]
    assert 1 not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "a</s>b</s>"


def test_a_tokenizer_for_which_any_text_ends_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded = load_tokenizer(save(tokenizer, tmp_path))
    with pytest.raises(DataError, match="turns ordinary text into its end-of-text token '</s>'"):
        Encoder(loaded).encode(["a b"])


# ---- special tokens in the text


def chat_tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer(save(byte_level(EOT_TOKEN, "<|user|>", "<|end|>"), folder))


TURN = "<|user|>hi<|end|>"


def test_special_tokens__text__are_ordinary_characters(tmp_path: Path) -> None:
    loaded = chat_tokenizer(tmp_path)
    assert len(ids_of(Encoder(loaded), TURN)[0]) == len(TURN)


def test_special_tokens__tokens__are_those_tokens_and_end_of_text_too(tmp_path: Path) -> None:
    loaded = replace(chat_tokenizer(tmp_path), special_tokens="parse")
    expected = Tokenizer.from_str(loaded.content).encode(TURN + EOT_TOKEN, add_special_tokens=False).ids
    assert ids_of(Encoder(loaded), TURN + EOT_TOKEN) == [expected]
    assert len(expected) == 5 and expected[-1] == loaded.eot_id


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
def test_prompt_tokenizer__either_rule__encodes_a_prompt_as_the_corpus(
    tmp_path: Path, special_tokens: Literal["text", "parse"]
) -> None:
    loaded = replace(chat_tokenizer(tmp_path), special_tokens=special_tokens)
    prompt = prompt_tokenizer(tmp_path, eot_id=loaded.eot_id, special_tokens=special_tokens)
    text = TURN + " and some <|endoftext|> words"
    assert prompt.encode(text, add_special_tokens=False).ids == ids_of(Encoder(loaded), text)[0]


def test_special_token_names__loaded_and_trained__are_those_of_the_tokenizer(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path)
    assert special_token_names(str(tmp_path)) == (EOT_TOKEN, "<|user|>", "<|end|>")
    assert special_token_names(None) == (EOT_TOKEN,)


# ---- other tokenizers


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": normalizers.NFKC()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])},
    ],
    ids=["normalizer", "prefix space", "no pattern", "sequence"],
)
def test_a_tokenizer_that_is_not_plain_byte_level_encodes_whole_texts(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    tokenizer = byte_level(EOT_TOKEN)
    for name, value in change.items():
        setattr(tokenizer, name, value)
    encoder = Encoder(load_tokenizer(save(tokenizer, tmp_path)))
    assert encoder.words is None
    texts = ["x = 10 ﬁ", "", "two  words"]
    assert ids_of(encoder, *texts) == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_added_tokens_that_match_in_text_are_still_matched(tmp_path: Path) -> None:
    tokenizer = byte_level(EOT_TOKEN)
    tokenizer.add_tokens(["<tool>"])
    encoder = Encoder(load_tokenizer(save(tokenizer, tmp_path)))
    assert encoder.words is None
    assert tokenizer.token_to_id("<tool>") in ids_of(encoder, "a<tool>b")[0]


def test_truncation_padding_and_dropout_of_a_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = byte_level(EOT_TOKEN, dropout=0.5)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    encoder = Encoder(load_tokenizer(save(tokenizer, tmp_path)))
    assert len(ids_of(encoder, "ten  chars")[0]) == 10


def test_the_vocabulary_size_covers_the_largest_id(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, EOT_TOKEN: 70_000}, unk_token="a"))
    loaded = load_tokenizer(save(tokenizer, tmp_path))
    assert (loaded.vocab_size, loaded.dtype) == (70_001, "<u4")


# ---- loading


def test_a_file_and_its_folder_load_alike(tmp_path: Path) -> None:
    folder = save(byte_level("<eos>", "</s>"), tmp_path, eos_token="<eos>")
    assert load_tokenizer(folder) == load_tokenizer(f"{folder}/tokenizer.json")


@pytest.mark.parametrize(
    ("files", "eot_token"),
    [
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, "<end>"),
        ({"tokenizer_config.json": {"eos_token": {"content": "<end>", "special": True}}}, "<end>"),
        ({"special_tokens_map.json": {"eos_token": "<end>"}}, "<end>"),
        (
            {"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": "<end>"}},
            "<end>",
        ),
        ({}, "</s>"),
    ],
)
def test_the_end_of_text_is_what_the_folder_says_else_a_common_name(
    tmp_path: Path, files: dict[str, Any], eot_token: str
) -> None:
    save(byte_level("</s>", "<end>"), tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eot_token == eot_token
    assert eot_token in json.dumps(json.loads(loaded.config)["eos_token"])


def test_a_tokenizer_without_an_end_of_text_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Put a tokenizer_config\.json beside tokenizer\.json"):
        load_tokenizer(save(byte_level(), tmp_path))


def test_an_end_of_text_that_is_not_in_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eos_token '<gone>' is not in the vocabulary"):
        load_tokenizer(save(byte_level("</s>"), tmp_path, eos_token="<gone>"))


def test_a_missing_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist\. .* hf download"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.json", "cl100k.tiktoken"])
def test_load__a_folder_with_another_format__says_how_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x0a\x09\x0a")
    with pytest.raises(DataError, match=rf"{name} is a tokenizer of another format.*save_pretrained"):
        load_tokenizer(str(tmp_path))


def test_load__a_pointer_of_git_lfs__is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(
        DataError, match=r"tokenizer\.json is not a tokenizer: tokenizer\.json is a git-lfs pointer"
    ):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"])
def test_load__a_pointer_of_git_lfs_beside_it__is_named(tmp_path: Path, name: str) -> None:
    folder = save_tokenizer(tmp_path / "base", train_tokenizer(["a b"] * 9, vocab_size=260))
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(DataError, match=rf"{name} cannot be read: {name} is a git-lfs pointer"):
        load_tokenizer(str(folder))


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer: "):
        load_tokenizer(str(tmp_path))


# ---- helpers


@pytest.fixture
def _early_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELP_FROM_CHARS", 0)


def batches_of(count: int) -> Iterator[list[str]]:
    for i in range(count):
        yield [f"batch {i} text {j} " * 50 + EOT_TOKEN for j in range(3)]


@pytest.mark.usefixtures("_early_help")
def test_helpers_return_the_same_batches_in_the_same_order(trained: TextTokenizer) -> None:
    alone = list(encode_batches(batches_of(150), tokenizer=trained, num_processes=1))
    assert alone == [Encoder(trained).encode(batch) for batch in batches_of(150)]
    assert list(encode_batches(batches_of(150), tokenizer=trained, num_processes=2)) == alone
    assert not helpers()


@pytest.mark.usefixtures("_early_help")
def test_a_helper_that_dies_is_an_error_and_not_a_hang(trained: TextTokenizer) -> None:
    encoded = encode_batches(batches_of(10**6), tokenizer=trained, num_processes=2)
    next(encoded)
    next(encoded)
    os.kill(helpers()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a process that encodes text died"):
        for _ in encoded:
            pass
    assert not helpers()


@pytest.mark.usefixtures("_early_help")
def test_helpers__consumer_stops_early__end(trained: TextTokenizer) -> None:
    encoded = encode_batches(batches_of(10**6), tokenizer=trained, num_processes=2)
    next(encoded)
    next(encoded)
    assert helpers()
    encoded.close()
    assert not helpers()


def test_helpers_do_not_outlive_a_killed_parent(trained: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained.content)
    program = (
        "import sys\n"
        "from forge.data import tokenizer as t\n"
        "t._HELP_FROM_CHARS = 0\n"
        "batches = (['some words'] * 1000 for _ in iter(int, 1))\n"
        "loaded = t.load_tokenizer(sys.argv[1])\n"
        "for n, _ in enumerate(t.encode_batches(batches, tokenizer=loaded, num_processes=2)):\n"
        "    n == 50 and print('ready', flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        orphans = psutil.Process(parent.pid).children()
        assert orphans
        parent.kill()
    deadline = time.monotonic() + 10
    while any(orphan.is_running() and orphan.status() != "zombie" for orphan in orphans):
        assert time.monotonic() < deadline, "a helper outlived its parent"
        time.sleep(0.05)


def helpers() -> list[psutil.Process]:
    """The processes that encode; other tests may have left multiprocessing's resource tracker."""
    living = [child for child in psutil.Process().children() if child.status() != "zombie"]
    return [child for child in living if "forge.data.tokenizer" in " ".join(child.cmdline())]


def save_tokenizer(folder: Path, tokenizer: TextTokenizer, **files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.content)
    (folder / "tokenizer_config.json").write_text(tokenizer.config)
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_jinja", ".jinja").replace("_map", "_map.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_load_tokenizer__chat_template_and_special_tokens_beside_it__are_kept(
    trained: TextTokenizer, tmp_path: Path
) -> None:
    template, tokens = "{% for m in messages %}{{ m }}{% endfor %}", '{"eos_token": "<|endoftext|>"}'
    folder = save_tokenizer(tmp_path / "base", trained, chat_template_jinja=template, special_tokens_map=tokens)
    assert load_tokenizer(str(folder)).files == {"chat_template.jinja": template, "special_tokens_map.json": tokens}


def test_load_tokenizer__further_templates__are_those_that_transformers_reads(
    trained: TextTokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = save_tokenizer(
        tmp_path / "base", trained, chat_template_jinja="main", additional_chat_templates__tools_jinja="tools"
    )
    loaded = load_tokenizer(str(folder))
    kept = save_tokenizer(tmp_path / "kept", loaded)
    expected = {"default": "main", "tools": "tools"}
    assert AutoTokenizer.from_pretrained(folder).chat_template == expected
    assert AutoTokenizer.from_pretrained(kept).chat_template == expected


def test_load_tokenizer__damaged_file_beside_it__is_one_clear_error(trained: TextTokenizer, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "base", trained, special_tokens_map="{")
    with pytest.raises(DataError, match=r"special_tokens_map\.json cannot be read"):
        load_tokenizer(str(folder))


def test_vocabulary_problem__same_or_longer_vocabulary__is_none(trained: TextTokenizer) -> None:
    longer = Tokenizer.from_str(trained.content)
    longer.add_special_tokens([AddedToken("<|user|>", special=True)])
    assert vocabulary_problem(trained.content, given=trained.content) is None
    assert vocabulary_problem(trained.content, given=longer.to_str()) is None


def test_vocabulary_problem__tokens_with_other_ids__are_counted(trained: TextTokenizer) -> None:
    body = json.loads(trained.content)
    vocabulary = body["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    problem = vocabulary_problem(trained.content, given=json.dumps(body))
    assert problem is not None
    assert problem.startswith("2 of the 2,000 tokens of the pretrained model's own tokenizer have another id")
