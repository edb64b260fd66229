"""One example as text: neighbouring tokens that are alike, with what is predicted of them.

What a target means depends on the objective, and is recognised by the data:

- the next token (language models, the decoder of seq2seq): the text itself carries loss;
- the token at the same position (masked language models): likewise, or what is behind the mask is the `target`;
- a label or a number (`format: labelled`): the `target` is its name, or what it is; else the number of the label.

Every text is bounded: an example may have millions of tokens, and a token thousands of characters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from forge.data.label_bits import bits_of
from forge.data.rows import IGNORED
from forge.plan.data_view import Span, SpanKind
from forge.redact import redacted, secret_ranges

_Alignment = Literal["next", "same", "other"]

_SPARE_TOKENS = 256
"""Tokens that are decoded beyond those shown, so that a secret is recognised whole before the text is cut."""
_MAX_SPANS = 64
_MAX_TARGET_CHARS = 200
_SECRET = "***"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanReader:
    """Turns the arrays of an example into spans.

    Args:
        predicts_tokens: whether targets are token ids; None if only the data can tell.
        max_chars: of a span; its beginning and its end are kept.
        part_names: what the values of the array `part` are called; their numbers if they have no name.
        label_names: what targets that are labels are called, empty for numbers; None if they are no labels.
    """

    tokenizer: Tokenizer
    special_ids: Set[int]
    predicts_tokens: bool | None
    max_chars: int
    part_names: Mapping[int, str] = field(default_factory=dict)
    label_names: Sequence[str] | None = None

    def spans(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[Span, ...]:
        """The spans of one example. Shapes: arrays: `tokens` and `targets` int[n], and maybe `part`, int[n]."""
        tokens = np.asarray(arrays["tokens"], dtype=np.int64)
        targets = np.asarray(arrays["targets"], dtype=np.int64)
        part = _part_of(arrays)
        labels = None if self.label_names is None else texts_of_labels(arrays, names=self.label_names)
        alignment: _Alignment = "other"
        if labels is None:
            alignment = _alignment(tokens, targets, part=part, predicts_tokens=self.predicts_tokens)
        if alignment == "next":
            tokens, has_loss, part = _shifted(tokens, targets, part=part)
        else:
            has_loss = targets != IGNORED
        pieces: list[Span] = []
        borders = self._borders(tokens, has_loss, part=part, is_each_apart=labels is not None)
        for start, stop in _kept(list(pairwise(borders))):
            if stop < start:
                pieces.append(Span(text=f"… {start - stop:,} more parts …", has_loss=False, kind="omitted"))
                continue
            kind: SpanKind = "special" if int(tokens[start]) in self.special_ids else "text"
            has_target = alignment == "other" and has_loss[start]
            named = None if labels is None else labels[start:stop]
            like = Span(
                text="",
                has_loss=bool(has_loss[start]),
                kind=kind,
                target=self._target(targets[start:stop], labels=named) if has_target else "",
                part=None if part is None else self.part_names.get(int(part[start]), str(part[start])),
            )
            pieces += self._decoded(tokens, start=start, stop=stop, like=like)
        return tuple(self._cut(list(_without_secrets(pieces))))

    def _borders(
        self,
        tokens: NDArray[np.int64],
        has_loss: NDArray[np.bool_],
        *,
        part: NDArray[Any] | None,
        is_each_apart: bool,
    ) -> list[int]:
        """Where the loss begins or ends, special tokens begin or end, and parts change."""
        is_special = np.isin(tokens, np.fromiter(self.special_ids, dtype=np.int64))
        changes = (has_loss[1:] != has_loss[:-1]) | (is_special[1:] != is_special[:-1])
        if part is not None:
            changes |= part[1:] != part[:-1]
        if is_each_apart:
            changes |= has_loss[1:]
        return [0, *(np.flatnonzero(changes) + 1).tolist(), len(tokens)]

    def _decoded(self, tokens: NDArray[np.int64], *, start: int, stop: int, like: Span) -> Iterator[Span]:
        """The span [start, stop); of a long one the two ends, with more text than is shown, and a mark between."""
        most = self.max_chars + _SPARE_TOKENS
        if stop - start <= 2 * most:
            yield replace(like, text=self._text(tokens, start=start, stop=stop))
            return
        omitted = f"… {stop - start:,} tokens in all …"
        yield replace(like, text=self._text(tokens, start=start, stop=start + most), target="")
        yield replace(like, text=omitted, kind="omitted", target="")
        yield replace(like, text=self._text(tokens, start=stop - most, stop=stop))

    def _cut(self, pieces: Sequence[Span]) -> Iterator[Span]:
        """Cut the texts to what is shown: beside a mark at its side, elsewhere in the middle."""
        half = self.max_chars // 2
        kinds = ["", *(piece.kind for piece in pieces), ""]
        for number, piece in enumerate(pieces):
            is_head, is_tail = kinds[number + 2] == "omitted", kinds[number] == "omitted"
            if piece.kind == "omitted" or len(piece.text) <= half:
                yield piece
            elif is_head != is_tail:
                yield replace(piece, text=piece.text[:half] if is_head else piece.text[-half:])
            elif len(piece.text) <= self.max_chars:
                yield piece
            else:
                omitted = f"… {len(piece.text):,} characters in all …"
                yield replace(piece, text=piece.text[:half], target="")
                yield replace(piece, text=omitted, kind="omitted", target="")
                yield replace(piece, text=piece.text[-half:])

    def _text(self, tokens: NDArray[np.int64], *, start: int, stop: int) -> str:
        """Decode tokens as they read after the one before them, which decides about a blank between words."""
        before = self.tokenizer.decode(tokens[max(0, start - 1) : start].tolist(), skip_special_tokens=False)
        whole = self.tokenizer.decode(tokens[max(0, start - 1) : stop].tolist(), skip_special_tokens=False)
        if start and whole.startswith(before):
            return whole[len(before) :]
        return self.tokenizer.decode(tokens[start:stop].tolist(), skip_special_tokens=False)

    def _target(self, targets: NDArray[np.int64], *, labels: Sequence[str] | None) -> str:
        if labels is not None:
            text = redacted(", ".join(labels), os.environ)
        elif self.predicts_tokens:
            text = self.tokenizer.decode(targets[:_MAX_TARGET_CHARS].tolist(), skip_special_tokens=False)
            text = redacted(text, os.environ)
        else:
            text = ", ".join(map(str, targets[:_MAX_TARGET_CHARS].tolist()))
        return text if len(text) <= _MAX_TARGET_CHARS else text[: _MAX_TARGET_CHARS - 1] + "…"


def texts_of_labels(arrays: Mapping[str, NDArray[Any]], *, names: Sequence[str]) -> list[str]:
    """What the array `targets` of a labelled text says at every position; see `forge.data.formats.labelled`."""
    targets = arrays["targets"].tolist()
    if "values" in arrays:
        texts = [f"{value:g}" for value in arrays["values"].tolist()]
    elif "label_bits" in arrays:
        chosen = bits_of(arrays["label_bits"], count=len(names))
        texts = [", ".join(names[i] for i in np.flatnonzero(row).tolist()) or "no label" for row in chosen]
    else:
        texts = [names[target] if 0 <= target < len(names) else str(target) for target in targets]
    return ["" if target == IGNORED else text for target, text in zip(targets, texts, strict=True)]


def _kept(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges of tokens that are shown; where some are left out, (their number, 0) in their place."""
    num_left_out = len(ranges) - _MAX_SPANS
    if num_left_out <= 0:
        return ranges
    half = _MAX_SPANS // 2
    return [*ranges[:half], (num_left_out, 0), *ranges[-half:]]


def _without_secrets(spans: list[Span]) -> Iterator[Span]:
    """Remove this process's secrets also where they extend over several spans."""
    secrets = secret_ranges("".join(span.text for span in spans), os.environ)
    start = 0
    for span in spans:
        stop, text, at = start + len(span.text), "", start
        for first, last in secrets:
            if first < stop and last > start:
                text += span.text[at - start : max(0, first - start)] + _SECRET
                at = max(at, min(last, stop))
        yield replace(span, text=text + span.text[at - start :]) if text else span
        start = stop


def _part_of(arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """The array `part`, if it numbers the parts of an example."""
    part = arrays.get("part")
    is_number = part is not None and part.ndim == 1 and part.dtype.kind in "iu" and int(part.min()) >= 0
    return part if is_number else None


def _alignment(
    tokens: NDArray[np.int64],
    targets: NDArray[np.int64],
    *,
    part: NDArray[Any] | None,
    predicts_tokens: bool | None,
) -> _Alignment:
    """What the targets of an example are: the next token, the same, or something else."""
    if predicts_tokens is False:
        return "other"
    is_target = targets != IGNORED
    is_followed = is_target[:-1] if part is None else is_target[:-1] & (part[1:] == part[:-1])
    if is_followed.any() and (tokens[1:] == targets[:-1])[is_followed].all():
        return "next"
    is_undecided = not is_followed.any() and predicts_tokens  # only last positions predict
    is_same = (tokens == targets)[is_target].all()
    if is_same and not (is_undecided and part is None):
        return "same"
    return "next" if is_undecided else "other"


def _shifted(
    tokens: NDArray[np.int64], targets: NDArray[np.int64], *, part: NDArray[Any] | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[Any] | None]:
    """The text that next tokens are predicted of: every part with the token that its last position predicts.

    Returns: its tokens, which of them carry loss, and the part of each.
    """
    is_last = np.ones(len(tokens), dtype=bool)
    is_last[:-1] = False if part is None else part[1:] != part[:-1]
    has_extra = is_last & (targets != IGNORED)
    at = np.flatnonzero(has_extra) + 1
    has_loss = np.zeros(len(tokens), dtype=bool)
    has_loss[1:] = (targets[:-1] != IGNORED) & ~is_last[:-1]
    return (
        np.insert(tokens, at, targets[has_extra]),
        np.insert(has_loss, at, True),
        None if part is None else np.insert(part, at, part[has_extra]),
    )
