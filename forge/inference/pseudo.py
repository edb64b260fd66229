"""Pseudo-log-likelihoods of texts by a masked language model.

    pseudo_log_likelihoods(loaded, ["a text"])

Each token is masked in turn, and scored by its probability there. Their sum is no probability of the text, but
ranks texts and models of one tokenizer as one would.

Source: Salazar et al., "Masked Language Model Scoring" (2020), https://arxiv.org/abs/1910.14659
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from forge.data.tokenizer_files import role_id
from forge.errors import ArgumentError
from forge.inference.loaded import LoadedModel
from forge.inference.rows import bucket_length, fixed_batches
from forge.inference.score import TextLogLikelihood


@dataclass(frozen=True, slots=True, kw_only=True)
class _Masked:
    """A text with one masked token."""

    text: int
    ids: tuple[int, ...]
    position: int


def pseudo_log_likelihoods(loaded: LoadedModel, texts: Sequence[str]) -> list[TextLogLikelihood]:
    """Score texts; a text beyond the positions of the model is scored in parts that do not see each other.

    Raises: ArgumentError if the model is no masked language model, or its tokenizer has no mask token.
    """
    if loaded.kind != "masked-lm":
        raise ArgumentError(f"{loaded.name} is a {loaded.kind} model, and not a masked language model")
    rows = [row for number, text in enumerate(texts) for row in _rows(loaded, text, number=number)]
    totals, counts = [0.0] * len(texts), [0] * len(texts)
    for row, score in zip(rows, _scores(loaded, rows), strict=True):
        totals[row.text] += score
        counts[row.text] += 1
    return [
        TextLogLikelihood(total=total, num_tokens=count, num_bytes=len(text.encode()))
        for text, total, count in zip(texts, totals, counts, strict=True)
    ]


def _rows(loaded: LoadedModel, text: str, *, number: int) -> list[_Masked]:
    """One row for each token of a text, the special tokens of the tokenizer's template excepted."""
    if loaded.max_positions is not None:
        loaded.tokenizer.enable_truncation(loaded.max_positions)
    try:
        encoding = loaded.tokenizer.encode(text)
    finally:
        loaded.tokenizer.no_truncation()
    return [
        _Masked(text=number, ids=tuple(part.ids), position=position)
        for part in (encoding, *encoding.overflowing)
        for position, is_special in enumerate(part.special_tokens_mask)
        if not is_special
    ]


@torch.inference_mode()
def _scores(loaded: LoadedModel, rows: Sequence[_Masked]) -> list[float]:
    """The log-probability of the masked token of each row."""
    own = loaded.text_tokenizer
    mask_id = role_id("mask_token", content=own.content, config=own.config, files=own.files)
    if mask_id is None:
        raise ArgumentError(f"the tokenizer of {loaded.name} has no mask token")
    found = [0.0] * len(rows)

    def shape(row: _Masked) -> tuple[int, ...]:
        return (bucket_length(len(row.ids), limit=loaded.max_positions),)

    for (width,), numbers in fixed_batches(rows, key=shape, device=loaded.device):
        tokens = torch.full((len(numbers), width), loaded.pad_id)
        attention = torch.zeros_like(tokens)
        for at, number in enumerate(numbers):
            row = rows[number]
            tokens[at, : len(row.ids)] = torch.tensor(row.ids)
            tokens[at, row.position] = mask_id
            attention[at, : len(row.ids)] = 1
        batch = {"input_ids": tokens.to(loaded.device), "attention_mask": attention.to(loaded.device)}
        positions = torch.tensor([rows[number].position for number in numbers], device=loaded.device)
        logits = loaded.model(**batch).logits[torch.arange(len(numbers), device=loaded.device), positions]
        log_probabilities = logits.float().log_softmax(dim=-1).cpu()
        for at, number in enumerate(numbers):
            found[number] = float(log_probabilities[at, rows[number].ids[rows[number].position]])
    return found
