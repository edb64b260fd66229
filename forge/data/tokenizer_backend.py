"""Open a tokenizer of the library tokenizers, whose file may have been made elsewhere to do harm.

The library is written in Rust: what it cannot do ends in a bare Exception or in a panic, which Python sees as a
BaseException. Both become a DataError here. A file that would make it use memory without bound is refused.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

from forge.errors import DataError, ForgeError
from forge.foreign import parse_object
from forge.process import one_line

_MAX_VALUES = 8_000_000
"""Of a `tokenizer.json`; one with a million tokens and as many merges has about five million."""
_MAX_ADDED_CHARS = 4 * 2**20
"""Of all added tokens together: the automaton that finds them takes about 80 bytes for each."""
_MAX_GROWTH = 64
"""How many times longer a normalizer can make a text; the longest replacement of NFKC has 18 characters."""
_MAX_WORD = 2000
_ENDLESS_WORD = re.compile(rf"(?<!\w)\w{{{_MAX_WORD}}}|(?<![^\w\s])[^\w\s]{{{_MAX_WORD}}}|(?<!\s)\s{{{_MAX_WORD}}}")
_MAX_AROUND = 1000
"""Tokens that a template puts around a text."""


def open_backend(content: str | bytes) -> Tokenizer:
    """Build the library's tokenizer from the content of a `tokenizer.json`.

    Raises: DataError if it is none, or would use memory without bound.
    """
    try:
        _check(parse_object(content, max_values=_MAX_VALUES))
    except (TypeError, AttributeError, LookupError, ValueError, RecursionError) as error:
        raise DataError(one_line(error)) from None
    with tokenizer_errors():
        return Tokenizer.from_str(content if isinstance(content, str) else content.decode())


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Raises: DataError for whatever the library raises in the block; errors of forge are raised as they are."""
    try:
        yield
    except ForgeError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise DataError(f"the tokenizer fails: {one_line(error)}") from None


def without_endless_words(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts that have a word of thousands of characters into pieces.

    The time to train on a word grows with the square of its length: hours for one of 3 MB. Other texts stay whole.
    """
    for text in texts:
        if _ENDLESS_WORD.search(text):
            yield from (text[start : start + _MAX_WORD] for start in range(0, len(text), _MAX_WORD))
        else:
            yield text


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of a library in Rust; its class is no Exception, and has no public name."""
    return type(error).__name__ == "PanicException"


def _check(body: Mapping[str, Any]) -> None:
    """Raises: ValueError for what no tokenizer has; TypeError, AttributeError, LookupError for another form."""
    size = sum(len(token["content"]) for token in body.get("added_tokens") or ())
    if size > _MAX_ADDED_CHARS:
        raise ValueError(f"its added tokens have {size:,} characters; forge reads at most {_MAX_ADDED_CHARS:,}")
    growth = math.prod(_growth(step) for step in _steps(body.get("normalizer"), "normalizers"))
    if growth > _MAX_GROWTH:
        raise ValueError(f"its normalizer can make a text {growth:,.0f} times longer; at most {_MAX_GROWTH} times")
    for step in _steps(body.get("post_processor"), "processors"):
        num_around = sum(len(step.get(key) or ()) for key in ("single", "pair"))
        tokens = step["special_tokens"].values() if num_around else ()
        num_around *= max((len(token["ids"]) for token in tokens), default=1)
        if num_around > _MAX_AROUND:
            raise ValueError(f"its template puts {num_around:,} tokens around a text; at most {_MAX_AROUND:,}")


def _steps(value: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """Every step of a normalizer or post-processor, which may be a sequence of others."""
    if value is None:
        return
    if key in value:
        for step in value[key]:
            yield from _steps(step, key)
    else:
        yield value


def _growth(normalizer: Mapping[str, Any]) -> float:
    """The length of the longest replacement of a character."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String") or ""
        return max(1.0, (len(normalizer["content"]) + (not pattern)) / max(1, len(pattern)))
    if normalizer["type"] == "Precompiled":
        table = base64.b64decode(normalizer["precompiled_charsmap"] or "")
        size = int.from_bytes(table[:4], "little")  # of the trie, for which the library reserves memory
        if size > len(table):
            raise ValueError(f"its table of characters claims {size:,} bytes and has {len(table):,}")
        return max(1.0, max(map(len, table[4 + size :].split(b"\0"))) / 4)  # a character has up to four bytes
    return 1.0
