"""What classifiers, reward models and embedding models say about texts.

classify(loaded, ["good", "bad"])       a label with probabilities, or a number, for each text
embed(loaded, ["a text"])               a vector for each text
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from forge.errors import ArgumentError
from forge.inference.exact import require_numbers
from forge.inference.loaded import LoadedModel
from forge.inference.rows import bucket_length, fixed_batches, widen_products
from forge.inference.sequences import Watch
from forge.objective.classification import classifier_logits
from forge.objective.contrastive import pool

Text = str | tuple[str, str] | list[int]
"""A text, a pair of texts, or token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """The tokens of one text, with the special ones around it."""

    ids: list[int]
    type_ids: list[int]
    spans: list[tuple[int, int]]
    """[start, stop) in characters of each token; empty for a special one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """What a classifier says about a text."""

    label: str | None
    """The likeliest label; None for a number, several labels, or labels of words."""
    labels: tuple[str, ...]
    """Of several labels those with a probability above one half; of words one for each."""
    probabilities: dict[str, float]
    """Of each label; empty for a number and for labels of words."""
    value: float | None
    """Of a regression or a reward model."""


def classify(loaded: LoadedModel, texts: Sequence[Text]) -> list[Classified]:
    """Classify texts by a classifier of texts or of words, or score them by a regression or a reward model.

    Raises: ArgumentError if the model is of another kind.
    """
    return [found for _, found in sorted(classify_each(loaded, texts), key=lambda one: one[0])]


def embed(loaded: LoadedModel, texts: Sequence[str]) -> list[NDArray[np.float32]]:
    """Return the embedding of each text. Raises: ArgumentError if the model gives none."""
    return [found for _, found in sorted(embed_each(loaded, texts), key=lambda one: one[0])]


def classify_each(
    loaded: LoadedModel, texts: Sequence[Text], *, watch: Watch | None = None
) -> Iterator[tuple[int, Classified]]:
    """Yield the number of each text and what `classify` says about it, as they are computed.

    Args:
        watch: called before a text is computed; one that it does not want is left out.

    Raises: ArgumentError if the model is of another kind.
    """
    if loaded.kind not in ("classification", "token-classification", "reward"):
        raise ArgumentError(f"{loaded.name} is a {loaded.kind} model, and only a classifier gives labels")
    encoded = _encoded(loaded, texts)
    is_words = loaded.kind == "token-classification"
    for number, logits in _outputs(loaded, encoded, watch=watch):
        one = encoded[number]
        yield number, _words(loaded, texts[number], one, logits) if is_words else _classified(loaded, logits)


def embed_each(
    loaded: LoadedModel, texts: Sequence[str], *, watch: Watch | None = None
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the number of each text and its embedding; see `classify_each`."""
    if loaded.kind != "embedding":
        raise ArgumentError(
            f"{loaded.name} is a {loaded.kind} model, and only one that was trained with training.objective: "
            "contrastive, or a folder of sentence-transformers, gives embeddings"
        )
    for number, vector in _outputs(loaded, _encoded(loaded, texts), watch=watch):
        yield number, vector.numpy()


def _encoded(loaded: LoadedModel, texts: Sequence[Text]) -> list[_Encoded]:
    """Token ids in the template of the tokenizer; the end of a too long text is cut, of a pair the longer."""
    limits = [limit for limit in (loaded.max_source, loaded.max_positions) if limit is not None]
    if limits:
        loaded.tokenizer.enable_truncation(min(limits), strategy="longest_first")
    try:
        return [_encoded_one(loaded, text, limit=min(limits, default=None)) for text in texts]
    finally:
        loaded.tokenizer.no_truncation()


def _encoded_one(loaded: LoadedModel, text: Text, *, limit: int | None) -> _Encoded:
    if isinstance(text, list):
        ids = text[:limit]
        return _Encoded(ids=ids, type_ids=[0] * len(ids), spans=[(0, 0)] * len(ids))
    [found] = loaded.tokenizer.encode_batch([text])  # `encode` would stop all other threads
    spans = [
        (0, 0) if special else span for span, special in zip(found.offsets, found.special_tokens_mask, strict=True)
    ]
    return _Encoded(ids=found.ids, type_ids=found.type_ids, spans=spans)


@torch.inference_mode()
def _outputs(
    loaded: LoadedModel, encoded: Sequence[_Encoded], *, watch: Watch | None
) -> Iterator[tuple[int, Tensor]]:
    """The number of each text and its logits or embedding, float32 on the CPU."""

    def shape(one: _Encoded) -> tuple[int, ...]:
        return bucket_length(len(one.ids), limit=loaded.max_positions), int(any(one.type_ids))

    widen_products(loaded.model)
    for (width, has_types), numbers in fixed_batches(encoded, key=shape, device=loaded.device):
        wanted = [n for n in dict.fromkeys(numbers) if watch is None or watch(n, len(encoded[n].ids))]
        if not wanted:
            continue
        arrays: dict[str, Tensor] = {
            name: torch.full((len(numbers), width), fill)
            for name, fill in (("tokens", loaded.pad_id), ("attention_mask", 0), ("token_types", 0))
        }
        for row, number in enumerate(numbers):
            ids, types = encoded[number].ids, encoded[number].type_ids
            arrays["tokens"][row, : len(ids)] = torch.tensor(ids)
            arrays["attention_mask"][row, : len(ids)] = 1
            arrays["token_types"][row, : len(ids)] = torch.tensor(types)
        if not has_types:
            del arrays["token_types"]
        batch = {name: array.to(loaded.device) for name, array in arrays.items()}
        outputs = dict(zip(numbers, _computed(loaded, batch), strict=True))
        for number in wanted:
            require_numbers(loaded, outputs[number])
            yield number, outputs[number].float().cpu()


def _computed(loaded: LoadedModel, batch: dict[str, Tensor]) -> Tensor:
    if loaded.kind != "embedding":
        return classifier_logits(loaded.model, batch)
    mask = batch["attention_mask"]
    hidden = loaded.model(input_ids=batch["tokens"], attention_mask=mask).last_hidden_state
    pooled = pool(hidden, mask=mask, pooling=loaded.pooling)
    return F.normalize(pooled, dim=1) if loaded.is_normalised else pooled


def _classified(loaded: LoadedModel, logits: Tensor) -> Classified:
    if not loaded.labels:
        return Classified(label=None, labels=(), probabilities={}, value=float(logits[0]))
    is_multi = loaded.problem_type == "multi_label_classification"
    shares: Any = logits.double().sigmoid() if is_multi else logits.double().softmax(dim=-1)
    named = dict(zip(loaded.labels, shares.tolist(), strict=True))
    likely = tuple(name for name, share in named.items() if share > 0.5)
    best = loaded.labels[int(logits.argmax())]
    return Classified(
        label=None if is_multi else best,
        labels=likely if is_multi else (best,),
        probabilities=named,
        value=None,
    )


def _words(loaded: LoadedModel, text: Text, encoded: _Encoded, logits: Tensor) -> Classified:
    """The label of each word, which is that of its first token; of words that were cut there is none."""
    whole = text if isinstance(text, str) else str(text[0])
    starts = np.cumsum([0, *(len(word) + 1 for word in whole.split(" ")[:-1])])
    chosen: dict[int, str] = {}
    for position, (begin, end) in enumerate(encoded.spans):
        if end > begin:
            word = int(np.searchsorted(starts, end - 1, side="right")) - 1
            chosen.setdefault(word, loaded.labels[int(logits[position].argmax())])
    return Classified(label=None, labels=tuple(chosen.values()), probabilities={}, value=None)
