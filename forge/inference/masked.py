"""Log-probabilities of tokens at masked positions, and the likeliest tokens for the masks of a text.

fill_masks(loaded, [masked_ids(loaded, "Paris is the [MASK] of France.")])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forge.data.tokenizer_files import role_id
from forge.errors import ArgumentError
from forge.inference.exact import require_numbers
from forge.inference.loaded import LoadedModel
from forge.inference.rows import bucket_length, fixed_batches
from forge.inference.sequences import Watch
from forge.units import counted

MAX_CANDIDATES = 1000
DEFAULT_CANDIDATES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedRow:
    """The tokens of a text, with the mask token at some positions."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFill:
    """A token for a mask."""

    token: str
    token_id: int
    probability: float


def mask_id_of(loaded: LoadedModel) -> int:
    """Raises: ArgumentError if the model is no masked language model, or its tokenizer has no mask token."""
    if loaded.kind != "masked-lm":
        raise ArgumentError(f"{loaded.name} is a {loaded.kind} model, and not a masked language model")
    own = loaded.text_tokenizer
    found = role_id("mask_token", content=own.content, config=own.config, files=own.files)
    if found is None:
        raise ArgumentError(f"the tokenizer of {loaded.name} has no mask token")
    return found


def masked_ids(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids of a text, in which names of special tokens are these tokens, as in transformers' fill-mask.

    Raises: ArgumentError as `mask_id_of`; ValueError if the text has no mask, or too many tokens.
    """
    parses = loaded.tokenizer.encode_special_tokens
    loaded.tokenizer.encode_special_tokens = False
    try:
        ids = list(loaded.tokenizer.encode(text).ids)
    finally:
        loaded.tokenizer.encode_special_tokens = parses
    require_masks(loaded, ids)
    return ids


def require_masks(loaded: LoadedModel, ids: Sequence[int]) -> None:
    """Raises: ArgumentError as `mask_id_of`; ValueError if the tokens have no mask, or are too many."""
    mask_id = mask_id_of(loaded)
    if mask_id not in ids:
        mask = loaded.tokenizer.id_to_token(mask_id)
        raise ValueError(
            f"the text has no {mask}; write it where {loaded.name} is to say which token belongs there"
        )
    if loaded.max_positions is not None and len(ids) > loaded.max_positions:
        raise ValueError(f"the text has {counted(len(ids), 'token')}, and the model reads {loaded.max_positions:,}")


def fill_masks(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], *, num_candidates: int = DEFAULT_CANDIDATES
) -> list[list[list[MaskFill]]]:
    """Return the likeliest tokens for each mask of each text, the likeliest first.

    Args:
        texts: token ids, as of `masked_ids`.

    Raises: ArgumentError as `mask_id_of`, or for a number out of range; ValueError as `masked_ids`.
    """
    found = dict(fill_each(loaded, texts, num_candidates=num_candidates))
    return [found[number] for number in range(len(texts))]


def fill_each(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], *, num_candidates: int, watch: Watch | None = None
) -> Iterator[tuple[int, list[list[MaskFill]]]]:
    """Yield the number of each text and what `fill_masks` says about it, as they are computed.

    Args:
        watch: called before a text is computed; one that it does not want is left out.
    """
    if not 1 <= num_candidates <= MAX_CANDIDATES:
        raise ArgumentError(f"top_k is {num_candidates}; for a mask it must be from 1 to {MAX_CANDIDATES}")
    mask_id = mask_id_of(loaded)
    rows = []
    for ids in texts:
        require_masks(loaded, ids)
        masks = tuple(at for at, token in enumerate(ids) if token == mask_id)
        rows.append(MaskedRow(ids=tuple(ids), positions=masks))
    for number, log_probs in masked_log_probs(loaded, rows, watch=watch):
        best = log_probs.double().exp().topk(min(num_candidates, log_probs.shape[1]))
        yield (
            number,
            [
                [
                    MaskFill(token=_name(loaded, token), token_id=token, probability=share)
                    for token, share in zip(tokens, shares, strict=True)
                ]
                for tokens, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ],
        )


@torch.inference_mode()
def masked_log_probs(
    loaded: LoadedModel, rows: Sequence[MaskedRow], *, watch: Watch | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of each row with the log-probabilities at its positions, float32[k, V] on the CPU.

    Rows are computed in batches of fixed shapes.
    """

    def shape(row: MaskedRow) -> tuple[int, ...]:
        return (bucket_length(len(row.ids), limit=loaded.max_positions),)

    for (width,), numbers in fixed_batches(rows, key=shape, device=loaded.device):
        wanted = [n for n in dict.fromkeys(numbers) if watch is None or watch(n, len(rows[n].ids))]
        if not wanted:
            continue
        tokens = torch.full((len(numbers), width), loaded.pad_id)
        attention = torch.zeros_like(tokens)
        for at, number in enumerate(numbers):
            ids = rows[number].ids
            tokens[at, : len(ids)] = torch.tensor(ids)
            attention[at, : len(ids)] = 1
        batch = {"input_ids": tokens.to(loaded.device), "attention_mask": attention.to(loaded.device)}
        logits = loaded.model(**batch).logits
        for number in wanted:
            log_probs = (
                logits[numbers.index(number), list(rows[number].positions)].float().log_softmax(dim=-1).cpu()
            )
            require_numbers(loaded, log_probs)
            yield number, log_probs


def _name(loaded: LoadedModel, token: int) -> str:
    """The text of a token; of a part of a character, or of a special token, its name in the vocabulary."""
    text: str = loaded.tokenizer.decode([token], skip_special_tokens=True).strip()
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else str(loaded.tokenizer.id_to_token(token))
