"""Texts that belong together: a query, a text that should be found by it, and maybe some that should not.

An example has the tokens of all of them, one text after the other; `part` is 1 in the query, 2 in the positive, and
3, 4, ... in the negatives. Each text has the special tokens that the tokenizer puts around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import gt

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from forge.data.corpus import text_of
from forge.data.formats.base import Example, FormatContext
from forge.data.pairs import is_blank
from forge.data.sources.base import Record
from forge.data.sources.files import json_name
from forge.errors import DataError

QUERY, POSITIVE = 1, 2
"""Values of `part`; larger ones are negatives."""

_CUT, _BEYOND = "texts cut at seq_len", "negatives beyond max_negatives"
_UNREAD = "records whose negatives have another field than data.embedding.negative, and are not used"
_MAX_CHARS_PER_TOKEN = 256
"""Of a text longer than this for each token of an example, only its beginning is tokenised."""


class EmbeddingFormat:
    """One example for a record. Texts that do not fit into `seq_len` together are cut, the longest first."""

    def __init__(self, context: FormatContext) -> None:
        self._seq_len, self._spec, self._noted = context.seq_len, context.embedding, context.noted
        self._tokenizer = Tokenizer.from_str(context.tokenizer.content)
        self._tokenizer.encode_special_tokens = context.tokenizer.special_tokens == "text"
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._num_around = len(self._tokenizer.encode("").ids)

    def examples(self, record: Record) -> Iterator[Example]:
        spec = self._spec
        query = spec.query_prefix + _text(record, key=spec.query)
        negatives = _texts(record, key=spec.negative)
        passages = [_text(record, key=spec.positive), *negatives[: spec.max_negatives]]
        texts = [query, *(spec.passage_prefix + passage for passage in passages)]
        parts = self._encoded(texts, record=record)
        unread = spec.negative not in record.fields and any(key.lower().startswith("neg") for key in record.fields)
        self._noted.add(_UNREAD, record, count=unread)
        self._noted.add(_BEYOND, record, count=len(negatives[spec.max_negatives :]))
        tokens = np.concatenate(parts)
        numbers = np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])
        yield Example(arrays={"tokens": tokens, "targets": tokens.copy(), "part": numbers}, weight=1.0)

    def counts(self) -> Mapping[str, int]:
        return self._noted.counts

    def _encoded(self, texts: Sequence[str], *, record: Record) -> list[NDArray[np.int64]]:
        """Token ids of each text, cut to fit together. Raises: DataError if one has no token, or no room."""
        texts = [text[: self._seq_len * _MAX_CHARS_PER_TOKEN] for text in texts]
        whole = [self._tokenizer.encode(text).ids for text in texts]
        for text, ids in zip(texts, whole, strict=True):
            if len(ids) <= self._num_around:
                raise DataError(f"{record.location}: the tokenizer makes no token of the text {text[:40]!r}")
        limits = _limits([len(ids) for ids in whole], room=self._seq_len)
        if min(limits) <= self._num_around:
            raise DataError(
                f"{record.location}: its {len(texts)} texts do not fit into data.seq_len: {self._seq_len}, even if "
                "each is cut to one token"
            )
        self._noted.add(_CUT, record, count=sum(map(gt, map(len, whole), limits)))
        return [
            np.array(ids if len(ids) <= limit else self._cut(text, limit=limit), dtype=np.int64)
            for text, ids, limit in zip(texts, whole, limits, strict=True)
        ]

    def _cut(self, text: str, *, limit: int) -> list[int]:
        """Token ids of the beginning of a text, with the special tokens around it."""
        self._tokenizer.enable_truncation(limit)
        try:
            return list(self._tokenizer.encode(text).ids)
        finally:
            self._tokenizer.no_truncation()


def _limits(lengths: Sequence[int], *, room: int) -> list[int]:
    """The most tokens of each text, so that all fit: the longest are cut to one common length."""
    limits = [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    for done, number in enumerate(order):
        limits[number] = min(lengths[number], room // (len(lengths) - done))
        room -= limits[number]
    return limits


def _text(record: Record, *, key: str) -> str:
    """A text that is not empty. Raises: DataError if it is, or there is none."""
    if key not in record.fields:
        keys = ", ".join(map(repr, record.fields)) or "none"
        raise DataError(f"{record.location}: no key {key!r} (data.embedding); the keys are: {keys}")
    text = text_of(record, text_key=key)
    if is_blank(text):
        raise DataError(f"{record.location}: {key!r} is empty")
    return text


def _texts(record: Record, *, key: str) -> list[str]:
    """A text or a list of texts, that need not be there. Raises: DataError for anything else, or an empty text."""
    found = record.fields.get(key)
    if found is None:
        return []
    if isinstance(found, str):
        return [_text(record, key=key)]
    if not isinstance(found, list):
        raise DataError(f"{record.location}: {key!r} must be a string or a list of them, it is {json_name(found)}")
    for number, one in enumerate(found):
        if not isinstance(one, str):
            raise DataError(f"{record.location}: {key}[{number}] must be a string, it is {json_name(one)}")
        if is_blank(one):
            raise DataError(f"{record.location}: {key}[{number}] is empty")
        if not one.isascii():
            _require_unicode(one, name=f"{key}[{number}]", record=record)
    return list(found)


def _require_unicode(text: str, *, name: str, record: Record) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"half a surrogate pair at character {error.start}"
        raise DataError(f"{record.location}: {name} is not valid Unicode: {problem}") from None
