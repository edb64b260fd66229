"""Pseudo-log-likelihoods of texts by a masked language model.

    pseudo_log_likelihoods(loaded, ["a text"])

Each token is masked in turn, and scored by its probability there. Their sum is no probability of the text, but
ranks texts and models of one tokenizer as one would.

Source: Salazar et al., "Masked Language Model Scoring" (2020), https://arxiv.org/abs/1910.14659
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from forge.inference.loaded import LoadedModel
from forge.inference.masked import MaskedRow, mask_id_of, masked_log_probs
from forge.inference.score import TextLogLikelihood


def pseudo_log_likelihoods(loaded: LoadedModel, texts: Sequence[str]) -> list[TextLogLikelihood]:
    """Score texts; a text beyond the positions of the model is scored in parts that do not see each other.

    Raises: ArgumentError if the model is no masked language model, or its tokenizer has no mask token.
    """
    mask_id = mask_id_of(loaded)
    parts = [list(_rows(loaded, text, mask_id=mask_id)) for text in texts]
    rows, tokens = zip(*chain.from_iterable(parts), strict=True) if any(parts) else ((), ())
    scores = [0.0] * len(rows)
    for number, log_probs in masked_log_probs(loaded, rows):
        scores[number] = float(log_probs[0, tokens[number]])
    each = iter(scores)
    return [
        TextLogLikelihood(total=sum(islice(each, len(part))), num_tokens=len(part), num_bytes=len(text.encode()))
        for text, part in zip(texts, parts, strict=True)
    ]


def _rows(loaded: LoadedModel, text: str, *, mask_id: int) -> Iterator[tuple[MaskedRow, int]]:
    """Mask each token of a text but the special ones of the tokenizer's template; with the token that was there."""
    if loaded.max_positions is not None:
        loaded.tokenizer.enable_truncation(loaded.max_positions)
    try:
        encoding = loaded.tokenizer.encode(text)
    finally:
        loaded.tokenizer.no_truncation()
    for part in (encoding, *encoding.overflowing):
        for position, is_special in enumerate(part.special_tokens_mask):
            if not is_special:
                ids = (*part.ids[:position], mask_id, *part.ids[position + 1 :])
                yield MaskedRow(ids=ids, positions=(position,)), part.ids[position]
