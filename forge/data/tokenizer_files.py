"""The files beside a tokenizer.json: settings, chat templates, special tokens; and a comparison of vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, processors

from forge.data.tokenizer_backend import open_backend
from forge.errors import DataError
from forge.foreign import lfs_problem, parse_object, read_file
from forge.fs import leads_to_file, leads_to_folder
from forge.process import one_line

TEMPLATE = "chat_template.jinja"
_FURTHER = (TEMPLATE, "chat_template.json", "special_tokens_map.json", "added_tokens.json")
"""Files beside tokenizer.json and tokenizer_config.json that transformers reads."""

_MAX_FURTHER_BYTES = 4 * 2**20
MAX_JSON_BYTES = 256 * 2**20


EOT_TOKEN = "<|endoftext|>"
"""End of text of a trained tokenizer, with id 0; the name GPT-2 gave it."""

_COMMON_EOT_TOKENS = (EOT_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "[SEP]")
"""Tried in this order if the tokenizer's folder names none: GPT-2, Llama 3, Llama 2 and T5, Gemma,
DeepSeek, BERT."""

CLS_TOKEN, SEP_TOKEN = "[CLS]", "[SEP]"

ROLES = {"mask_token": "[MASK]", "pad_token": "[PAD]", "cls_token": CLS_TOKEN, "sep_token": SEP_TOKEN}
"""What the special tokens of a trained tokenizer are for, by the keys of transformers' tokenizer_config.json."""


_OTHER_SUFFIXES = {".model", ".tiktoken"}
_OTHER_NAMES = {"vocab.json", "vocab.txt", "merges.txt", "tekken.json"}
"""Files of tokenizers that are not read: SentencePiece, tiktoken, and the older files of GPT-2 and BERT."""


def other_format(given: Path) -> Path | None:
    """Return the file of a tokenizer in another format; None if there is none, or a tokenizer.json beside it."""
    if not leads_to_folder(given):
        return given if given.suffix in _OTHER_SUFFIXES and leads_to_file(given) else None
    if (given / "tokenizer.json").exists():
        return None
    names = sorted(path for path in given.iterdir() if path.suffix in _OTHER_SUFFIXES or path.name in _OTHER_NAMES)
    return names[0] if names else None


def vocabulary_problem(own: str, *, given: str) -> str | None:
    """Say how many tokens of a model's own tokenizer have another id in the given one; None if none has."""
    before, now = (Tokenizer.from_str(one).get_vocab(with_added_tokens=True) for one in (own, given))
    moved = [token for token, number in before.items() if now.get(token) != number]
    if not moved:
        return None
    first = min(moved, key=before.__getitem__)
    there = f"id {now[first]}" if first in now else "no id"
    return (
        f"{len(moved):,} of the {len(before):,} tokens of the pretrained model's own tokenizer have another id or "
        f"none in this one ({first!r}: id {before[first]} there, {there} here)"
    )


def special_ids(folder: Path) -> dict[str, int]:
    """Return the ids of a tokenizer's special tokens, by their names in the vocabulary.

    Raises: DataError if its `tokenizer.json` cannot be read.
    """
    path = folder / "tokenizer.json"
    try:
        added = read_json(path).get("added_tokens", [])
        return {str(token["content"]): int(token["id"]) for token in added if token.get("special")}
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        raise DataError(f"{path}: its added tokens cannot be read: {one_line(error)}") from None


def special_names(content: str) -> set[str]:
    """Return the names of the special tokens of a tokenizer. Args: content: of its `tokenizer.json`."""
    return {str(token["content"]) for token in json.loads(content)["added_tokens"] if token["special"]}


def role_token(folder: Path, role: str) -> str | None:
    """Return the token of a role such as `mask_token`; None if no file names one. Raises: DataError."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        given = read_json(folder / name).get(role)
        token = given.get("content") if isinstance(given, dict) else given
        if isinstance(token, str):
            return token
    return None


def special_roles(*, content: str, config: str, files: Mapping[str, str]) -> dict[str, str]:
    """Return the tokens that a tokenizer's files name for a role, such as `mask_token`, and that are special.

    Args:
        content, config, files: as in `TextTokenizer`.
    """
    special, found = special_names(content), {}
    for text in (files.get("special_tokens_map.json", "{}"), config):
        for role, given in json.loads(text).items():
            token = given.get("content") if isinstance(given, dict) else given
            if role.endswith("_token") and isinstance(token, str) and token in special:
                found[role] = token
    return found


def role_id(role: str, *, content: str, config: str, files: Mapping[str, str]) -> int | None:
    """Return the id of the token of a role such as `pad_token`; None if no file names one that is special.

    Args:
        content, config, files: as in `TextTokenizer`.
    """
    name = special_roles(content=content, config=config, files=files).get(role)
    added = json.loads(content)["added_tokens"]
    return next((int(token["id"]) for token in added if token["content"] == name), None)


def bert_template(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    """The template of BERT for a text and for a pair of texts. Source: arXiv 1810.04805, figure 2."""
    return processors.TemplateProcessing(
        single=f"{CLS_TOKEN} $A {SEP_TOKEN}",
        pair=f"{CLS_TOKEN} $A {SEP_TOKEN} $B:1 {SEP_TOKEN}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (CLS_TOKEN, SEP_TOKEN)],
    )


def set_special_tokens(tokenizer: Tokenizer, *, eot_token: str, special_tokens: str) -> None:
    """Choose what the names of special tokens in a text become; the end-of-text token is always one of them."""
    if eot_token:
        tokenizer.add_special_tokens([AddedToken(eot_token, special=True, normalized=False)])
    tokenizer.encode_special_tokens = special_tokens == "text"


def prompt_tokenizer(folder: Path, *, eot_id: int, special_tokens: Literal["text", "parse"]) -> Tokenizer:
    """Load the tokenizer of a run for its prompts, which follow the rule of `data.special_tokens`.

    Raises: DataError if its file cannot be used.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = open_backend(read_file(path, max_bytes=MAX_JSON_BYTES))
    except (OSError, ValueError, DataError) as error:
        raise DataError(f"{path} is not a tokenizer: {one_line(error)}") from None
    set_special_tokens(tokenizer, eot_token=tokenizer.id_to_token(eot_id) or "", special_tokens=special_tokens)
    return tokenizer


def find_eot_token(tokenizer: Tokenizer, *, config: dict[str, Any], folder: Path) -> str:
    """Return the token that ends a text: the one that a folder's files name, else a common one.

    Raises: DataError if there is none.
    """
    for settings in (config, read_json(folder / "special_tokens_map.json")):
        named = settings.get("eos_token")
        token = named.get("content") if isinstance(named, dict) else named
        if isinstance(token, str):
            if tokenizer.token_to_id(token) is None:
                raise DataError(f"{folder}: eos_token {token!r} is not in the vocabulary of tokenizer.json")
            return token
    for token in _COMMON_EOT_TOKENS:
        if tokenizer.token_to_id(token) is not None:
            return token
    raise DataError(
        f"{folder}: nothing says which token ends a text. Put a tokenizer_config.json beside tokenizer.json,"
        ' like {"eos_token": "<|endoftext|>"}'
    )


def further_files(folder: Path) -> dict[str, str]:
    """Read what transformers reads beside a tokenizer.json, where it exists. Raises: DataError."""
    found = {}
    for name in _FURTHER:
        path = folder / name
        if not path.is_file():
            continue
        found[name] = _read_small(path)
        if name.endswith(".json"):
            read_json(path)  # refused here rather than by the loader of the exported folder
    return found


def further_templates(folder: Path) -> list[dict[str, str]]:
    """Read chat templates with other names than `default`, in the form of tokenizer_config.json."""
    paths = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return [{"name": path.stem, "template": _read_small(path)} for path in paths]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings; empty if there is none. Raises: DataError."""
    try:
        size = path.stat().st_size
        if not path.is_file() or size > MAX_JSON_BYTES:  # reading a pipe would wait for ever
            raise ValueError(f"it has {size} bytes" if path.is_file() else "it is not a file")
        _require_content(path)
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _read_small(path: Path) -> str:
    """Raises: DataError if a file is not text, or larger than any template."""
    try:
        if path.stat().st_size > _MAX_FURTHER_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        _require_content(path)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _require_content(path: Path) -> None:
    """Raises: ValueError if a file is a git-lfs pointer."""
    if (problem := lfs_problem(path)) is not None:
        raise ValueError(problem)
