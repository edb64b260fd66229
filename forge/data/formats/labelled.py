"""Texts with labels or numbers: what a classifier learns.

A text, or a pair of texts, is encoded by the template of its tokenizer, as transformers does when the model is used
afterwards. What is said about it is the target of its first token if the template adds one there, as BERT's
`[CLS]`, else of its last one; labels of words are targets of the first token of each word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from forge.data.corpus import text_of
from forge.data.formats.base import Example, FormatContext
from forge.data.label_bits import BITS
from forge.data.labels import LabelNumbers, names_of, number_of, value_of
from forge.data.pairs import is_blank
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.data.sources.files import json_name
from forge.data.tokenizer import parse_tokenizer
from forge.errors import DataError

_CUT = "texts cut at data.seq_len"
_LOST, _NO_TOKEN = "labels of words lost by the cut", "labels of words without a token"
_MAX_CHARS_PER_TOKEN = 256
"""What a text has beyond so many characters for each token of a row is not tokenized."""


class LabelledFormat:
    """One example for a record. The end of a text longer than `seq_len` is cut; of a pair, of the longer one."""

    def __init__(self, context: FormatContext) -> None:
        """Raises: DataError if `seq_len` has no place for a token between those of the template."""
        self._context, self._settings = context, context.labels
        self._numbers = LabelNumbers(self._settings.names)
        self._tokenizer = parse_tokenizer(context.tokenizer)
        num_added = self._tokenizer.num_special_tokens_to_add(self._settings.has_pairs)
        if context.seq_len <= num_added + self._settings.has_pairs:
            raise DataError(f"the template of the tokenizer adds {num_added} tokens; raise data.seq_len")
        self._tokenizer.enable_truncation(context.seq_len, strategy="longest_first")
        self._max_chars = context.seq_len * _MAX_CHARS_PER_TOKEN

    def examples(self, record: Record) -> Iterator[Example]:
        if self._settings.kind == "token":
            yield self._of_words(record)
            return
        text, pair = self._text(record, key=self._context.text_key), self._pair(record)
        encoded = self._encoded(text, pair, record=record)
        targets = np.full(len(encoded.ids), IGNORED, dtype=np.int64)
        at = 0 if encoded.special_tokens_mask[0] else len(targets) - 1
        further: dict[str, NDArray[Any]] = {}
        if self._settings.kind == "regression":
            targets[at] = 0
            further["values"] = np.zeros(len(targets), dtype=np.float32)
            further["values"][at] = number_of(record, self._settings)
        else:
            numbers = sorted(set(self._numbers_of(record)))
            targets[at] = len(numbers) if self._settings.kind == "multi" else numbers[0]
            if self._settings.kind == "multi":
                further["label_bits"] = np.zeros((len(targets), self._num_words), dtype=np.int64)
                for number in numbers:
                    further["label_bits"][at, number // BITS] |= 1 << (number % BITS)
        yield self._example(encoded, targets=targets, further=further, weight=1.0)

    def counts(self) -> Mapping[str, int]:
        return self._context.noted.counts

    @property
    def _num_words(self) -> int:
        return -(-len(self._settings.names) // BITS)

    def _of_words(self, record: Record) -> Example:
        words, numbers = self._words(record), self._numbers_of(record)
        if len(words) != len(numbers):
            raise DataError(
                f"{record.location}: {len(words)} words, but {len(numbers)} labels in {self._settings.key!r}"
            )
        encoded = self._encoded(" ".join(words), None, record=record)
        starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
        offsets = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
        tokens = np.flatnonzero((offsets[:, 1] > offsets[:, 0]) & (np.array(encoded.special_tokens_mask) == 0))
        # By its last character: that of a byte-level BPE begins with the blank before the word.
        of_token = np.searchsorted(starts, offsets[tokens, 1] - 1, side="right") - 1
        found, first = np.unique(of_token, return_index=True)
        targets = np.full(len(encoded.ids), IGNORED, dtype=np.int64)
        targets[tokens[first]] = np.array(numbers, dtype=np.int64)[found]
        last = int(found.max(initial=-1)) if self._is_cut(encoded) else len(words)
        labelled = np.flatnonzero(np.array(numbers) != IGNORED)
        missing = np.setdiff1d(labelled, found)
        self._context.noted.add(_LOST, record, count=int((missing > last).sum()))
        self._context.noted.add(_NO_TOKEN, record, count=int((missing <= last).sum()))
        weight = float((targets != IGNORED).sum())
        return self._example(encoded, targets=targets, further={}, weight=weight)

    def _words(self, record: Record) -> list[str]:
        key = self._settings.words_key
        if key not in record.fields:
            return self._text(record, key=self._context.text_key).split()
        words = value_of(record, key=key, called="data.labels.words_key")
        if not isinstance(words, list) or not words:
            found = "an empty list" if words == [] else json_name(words)
            raise DataError(f"{record.location}: {key!r} must be a list of words, it is {found}")
        for number, word in enumerate(words):
            if not isinstance(word, str) or not word.strip():
                found = "empty" if isinstance(word, str) else json_name(word)
                raise DataError(f"{record.location}: '{key}[{number}]' must be a word, it is {found}")
            text_of(Record(name=record.name, location=record.location, fields={key: word}), text_key=key)
        return words

    def _text(self, record: Record, *, key: str) -> str:
        text = text_of(record, text_key=key)
        if is_blank(text):
            raise DataError(f"{record.location}: {key!r} is empty")
        return text

    def _pair(self, record: Record) -> str | None:
        key = self._settings.pair_key
        return None if record.fields.get(key) is None else self._text(record, key=key)

    def _numbers_of(self, record: Record) -> list[int]:
        """The numbers of a record's labels, -100 where a word has none. Raises: DataError."""
        try:
            names = names_of(record, self._settings)
            return [IGNORED if name is None else self._numbers[name] for name in names]
        except ValueError as error:
            raise DataError(f"{record.location}: {self._settings.key!r}: {error}") from None

    def _encoded(self, text: str, pair: str | None, *, record: Record) -> Encoding:
        """Encode a text by the template. Raises: DataError if nothing is left of it."""
        encoded = self._tokenizer.encode(text[: self._max_chars], pair and pair[: self._max_chars])
        if not any(mask == 0 for mask in encoded.special_tokens_mask):
            raise DataError(f"{record.location}: the tokenizer finds no token in the text")
        is_long = max(len(text), len(pair or "")) > self._max_chars
        self._context.noted.add(_CUT, record, count=is_long or self._is_cut(encoded))
        return encoded

    def _is_cut(self, encoded: Encoding) -> bool:
        return bool(encoded.overflowing)

    def _example(
        self, encoded: Encoding, *, targets: NDArray[np.int64], further: dict[str, NDArray[Any]], weight: float
    ) -> Example:
        arrays = {"tokens": np.array(encoded.ids, dtype=np.int64), "targets": targets, **further}
        if self._settings.has_pairs:
            arrays["part"] = np.array(encoded.type_ids, dtype=np.int64) + 1
        return Example(arrays=arrays, weight=weight)
