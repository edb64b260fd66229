"""Special tokens that a job adds to a loaded tokenizer: `data.tokenizer.add_tokens`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from tokenizers import AddedToken, Tokenizer

from forge.config.data import TokenizerSpec
from forge.data.tokenizer import TextTokenizer, load_tokenizer
from forge.errors import DataError


def open_tokenizer(spec: TokenizerSpec) -> TextTokenizer | None:
    """Load the tokenizer of a job with the tokens that the job adds; None if it is to be trained.

    Raises: DataError as `load_tokenizer`, or if a token cannot be added.
    """
    if spec.from_pretrained is None:
        return None
    return with_added_tokens(load_tokenizer(spec.from_pretrained), spec.add_tokens)


def with_added_tokens(tokenizer: TextTokenizer, names: Sequence[str]) -> TextTokenizer:
    """Return a tokenizer with further special tokens, whose ids follow the largest one; known ones keep their id.

    Raises: DataError if a new token would get an id that another one has.
    """
    backend = Tokenizer.from_str(tokenizer.content)
    before = backend.get_vocab(with_added_tokens=True)
    new = [name for name in names if name not in before]
    if not names:
        return tokenizer
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    vocabulary = backend.get_vocab(with_added_tokens=True)
    expected = {name: tokenizer.vocab_size + number for number, name in enumerate(new)}
    if any(vocabulary.get(name) != number for name, number in expected.items()):
        raise DataError(
            "data.tokenizer.add_tokens: the ids of this tokenizer have gaps, so the new tokens would not follow "
            f"the largest id, {tokenizer.vocab_size - 1}; add them with transformers and save the tokenizer"
        )
    content = json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=2)
    return replace(tokenizer, content=content, vocab_size=tokenizer.vocab_size + len(new))
