"""The size and the special ids of a job's vocabulary, before and after the corpus is prepared."""

from __future__ import annotations

import json
from dataclasses import dataclass

from forge.config.data import TokenizerSpec
from forge.data.added_tokens import with_added_tokens
from forge.data.tokenizer import load_tokenizer
from forge.data.tokenizer_files import ROLES, special_roles
from forge.plan.inputs import CorpusInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a model must know of its tokenizer."""

    size: int
    eot_id: int
    pad_id: int | None
    """Of the token that fills up a text, if the tokenizer names one."""


def vocabulary_of(corpus: CorpusInfo) -> Vocabulary:
    """Return that of a prepared corpus."""
    return Vocabulary(size=corpus.vocab_size, eot_id=corpus.eot_id, pad_id=corpus.pad_id)


def announced_vocabulary(spec: TokenizerSpec) -> Vocabulary:
    """Return what is known before the corpus is prepared.

    Tokenizers that forge trains use id 0 for the end of text, and the next ones for further special tokens.

    Raises: DataError if a tokenizer cannot be loaded.
    """
    if spec.from_pretrained is None:
        pad = ROLES["pad_token"]
        pad_id = 1 + spec.special_tokens.index(pad) if pad in spec.special_tokens else None
        return Vocabulary(size=spec.vocab_size, eot_id=0, pad_id=pad_id)
    tokenizer = with_added_tokens(load_tokenizer(spec.from_pretrained), spec.add_tokens)
    roles = special_roles(content=tokenizer.content, config=tokenizer.config, files=tokenizer.files)
    ids = {token["content"]: token["id"] for token in json.loads(tokenizer.content)["added_tokens"]}
    return Vocabulary(
        size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, pad_id=ids.get(roles.get("pad_token", ""))
    )
