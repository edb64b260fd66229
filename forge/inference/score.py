"""Log-likelihoods of texts, as `lm-eval` defines them, by a causal language model or an encoder-decoder.

    log_likelihoods(loaded, [("Q: 1 + 1 =", " 2"), ("Q: 1 + 1 =", " 3")])
    text_log_likelihoods(loaded, ["a whole text"])        for perplexity and bits per byte

Continuations of one context share its computation: they stand in one row, and a mask hides them from each other.
What many contexts begin with (examples of a few-shot prompt) is computed once, if the caller names it. Logits are
computed where they are needed only. See `forge.inference.rows` for why a score depends on its own example alone.

Source: https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/models/huggingface.py,
`_encode_pair` and `get_rolling_token_windows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from forge.errors import ArgumentError
from forge.inference.exact import require_numbers
from forge.inference.loaded import LoadedModel
from forge.inference.rows import bucket_length, fixed_batches
from forge.inference.transformers_loop import can_pack
from forge.model.position_wise import head_logits

_DEFAULT_WINDOW = 1024
_MAX_PACKED = 1024
"""Tokens of continuations that share a context's row."""

_HEAD_ROWS = 256
"""Positions whose logits are computed at once: a vocabulary of 256,000 takes 256 MB for them."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLikelihood:
    """The score of a continuation."""

    total: float
    """Sum of the log-probabilities of its tokens, in nats."""
    is_greedy: bool
    """Whether greedy decoding of the context would write it."""
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLogLikelihood:
    """The score of a whole text: perplexity is exp(-total / num_tokens)."""

    total: float
    num_tokens: int
    num_bytes: int
    """In UTF-8; bits per byte are -total / num_bytes / ln 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One context and its continuations."""

    context: Ids
    """Without what is shared; the source of an encoder-decoder."""
    continuations: tuple[Ids, ...]
    members: tuple[int, ...]
    """Numbers of the pairs."""

    @property
    def tokens(self) -> list[int]:
        """What the model reads: a continuation's last token is not read, only predicted."""
        return [*self.context, *(token for ids in self.continuations for token in ids[:-1])]

    @property
    def num_predicted(self) -> int:
        return sum(map(len, self.continuations))


def log_likelihoods(
    loaded: LoadedModel, pairs: Sequence[tuple[str | Sequence[int], str]], *, shared: str = ""
) -> list[LogLikelihood]:
    """Score each continuation after its context.

    Args:
        pairs: (context, continuation); an empty context is the token that begins a text. Token ids are a context
            too, as of `loaded.encode_chat`.
        shared: a text that contexts begin with, whose computation they share. It changes scores by rounding only,
            and must be the same for all parts of one data set.

    Raises: ArgumentError if the model gives no likelihoods, or a continuation has no token.
    """
    loaded.require_text()
    encoded = [_encode_pair(loaded, context, continuation) for context, continuation in pairs]
    for (_, ids), (_, text) in zip(encoded, pairs, strict=True):
        if not ids:
            raise ArgumentError(f"the tokenizer makes no token of the continuation {text[:80]!r}")
    return _score(loaded, encoded, prefix=_shared_ids(loaded, shared))


def text_log_likelihoods(
    loaded: LoadedModel, texts: Sequence[str], *, window: int | None = None
) -> list[TextLogLikelihood]:
    """Score whole texts in windows of at most `window` tokens, each token once.

    Args:
        window: None: the positions of the model, or 1024 if they are not known.
    """
    loaded.require_text()
    limit = window or loaded.max_positions or _DEFAULT_WINDOW
    pairs: list[tuple[Ids, Ids]] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        found = _windows(
            loaded.tokenizer.encode(text, add_special_tokens=False).ids, limit=limit, first=_first(loaded)
        )
        pairs += found
        owners += [number] * len(found)
    totals, counts = [0.0] * len(texts), [0] * len(texts)
    for owner, score in zip(owners, _score(loaded, pairs, prefix=()), strict=True):
        totals[owner] += score.total
        counts[owner] += score.num_tokens
    return [
        TextLogLikelihood(total=total, num_tokens=count, num_bytes=len(text.encode()))
        for text, total, count in zip(texts, totals, counts, strict=True)
    ]


def _first(loaded: LoadedModel) -> Ids:
    """What predicts the first token of a text."""
    return loaded.before or loaded.end_ids[:1]


def _encode_pair(loaded: LoadedModel, context: str | Sequence[int], continuation: str) -> tuple[Ids, Ids]:
    if loaded.kind == "seq2seq" or not isinstance(context, str):
        ids = loaded.encode(context) if isinstance(context, str) else context
        return tuple(ids), tuple(loaded.tokenizer.encode(continuation, add_special_tokens=False).ids)
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    whole = loaded.encode(context + continuation)
    if not context:
        own = whole[len(loaded.before) :]
        return _first(loaded), tuple(own)
    count = len(loaded.encode(context))
    return tuple(whole[:count]), tuple(whole[count:])


def _shared_ids(loaded: LoadedModel, shared: str) -> Ids:
    """The tokens of a shared text but its last, which may be joined to what follows."""
    if not shared or loaded.kind != "causal-lm" or not can_pack(loaded):
        return ()
    return tuple(loaded.encode(shared)[:-1])


def _windows(ids: Sequence[int], *, limit: int, first: Ids) -> list[tuple[Ids, Ids]]:
    """Divide a text into windows; the last one has as much context as fits."""
    if not ids:
        return []
    size = min(len(ids), limit)
    found = [(first[-1:], tuple(ids[:size]))]
    done = size
    while done < len(ids):
        count = min(len(ids) - done, limit)
        end = done + count
        found.append((tuple(ids[end - limit - 1 : done]), tuple(ids[done:end])))
        done = end
    return found


def _score(loaded: LoadedModel, pairs: Sequence[tuple[Ids, Ids]], *, prefix: Ids) -> list[LogLikelihood]:
    rows = _pack(loaded, [_fitting(loaded, *pair) for pair in pairs], prefix=prefix)
    results: list[LogLikelihood | None] = [None] * len(pairs)
    with torch.inference_mode():
        cache = _prefix_cache(loaded, prefix) if any(row[1] for row in rows) else None
        for is_shared in (True, False):
            chosen = [row for row, shares in rows if shares == is_shared]
            _score_rows(loaded, chosen, cache=cache if is_shared else None, results=results)
    return [result for result in results if result is not None]


def _fitting(loaded: LoadedModel, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
    """Cut the beginning of what the model has no positions for."""
    limit = loaded.max_positions
    if limit is None or loaded.kind == "seq2seq":
        return context, continuation[:limit]
    continuation = continuation[-limit:]
    return context[max(0, len(context) + len(continuation) - limit - 1) :], continuation


def _pack(loaded: LoadedModel, pairs: Sequence[tuple[Ids, Ids]], *, prefix: Ids) -> list[tuple[_Row, bool]]:
    """Put continuations of one context into one row. Returns: rows, and whether each begins with the prefix."""
    may_pack = can_pack(loaded)
    open_rows: dict[Ids, list[int]] = {}
    groups: list[list[int]] = []
    for number in sorted(range(len(pairs)), key=pairs.__getitem__):  # a row must not depend on the caller's order
        context, continuation = pairs[number]
        group = open_rows.get(context) if may_pack else None
        size = 0 if group is None else len(context) + sum(len(pairs[one][1]) for one in group) + len(continuation)
        limit = min(loaded.max_positions or _MAX_PACKED, len(context) + _MAX_PACKED, _window_of(loaded))
        if group is None or size > limit:
            group = open_rows[context] = []
            groups.append(group)
        group.append(number)
    rows = []
    for group in groups:
        context = pairs[group[0]][0]
        longest = len(context) + sum(len(pairs[one][1]) for one in group)
        shares = bool(prefix) and context[: len(prefix)] == prefix and len(context) > len(prefix)
        shares = shares and longest <= _window_of(loaded)
        row = _Row(
            context=context[len(prefix) :] if shares else context,
            continuations=tuple(pairs[one][1] for one in group),
            members=tuple(group),
        )
        rows.append((row, shares))
    return rows


def _window_of(loaded: LoadedModel) -> int:
    """Tokens that every layer sees at least."""
    config = getattr(loaded.model, "config", None)
    window = None if config is None else getattr(config.get_text_config(), "sliding_window", None)
    return window if isinstance(window, int) else 1 << 62


def _prefix_cache(loaded: LoadedModel, prefix: Ids) -> DynamicCache:
    cache = DynamicCache()
    tokens = torch.tensor([prefix], device=loaded.device)
    loaded.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _score_rows(
    loaded: LoadedModel, rows: Sequence[_Row], *, cache: DynamicCache | None, results: list[LogLikelihood | None]
) -> None:
    def shape(row: _Row) -> tuple[int, ...]:
        width = bucket_length(len(row.tokens), limit=loaded.max_positions)
        if loaded.kind == "seq2seq":
            return bucket_length(len(row.context)), bucket_length(row.num_predicted)
        return width, 1 << (row.num_predicted - 1).bit_length(), int(len(row.continuations) > 1)

    for size, numbers in fixed_batches(rows, key=shape, device=loaded.device):
        batch = [rows[number] for number in numbers]
        if loaded.kind == "seq2seq":
            found = _target_logits(loaded, batch, sizes=size)
        else:
            found = _logits(loaded, batch, width=size[0], predicted=size[1], is_packed=bool(size[2]), cache=cache)
        for row, logits in zip(batch, found, strict=True):
            require_numbers(loaded, _read(row, logits, results))


def _read(row: _Row, logits: Tensor, results: list[LogLikelihood | None]) -> Tensor:
    """Return the log-probability of each token, and put the sums of continuations into `results`.

    Shapes: logits: float32[at least num_predicted, V], in the order of the continuations' tokens.
    """
    targets = torch.tensor([token for ids in row.continuations for token in ids], device=logits.device)
    shares = logits[: len(targets)].log_softmax(dim=-1)
    found = shares.gather(1, targets[:, None])[:, 0]
    picked = found.tolist()
    is_likeliest = (shares.argmax(dim=-1) == targets).tolist()
    at = 0
    for member, ids in zip(row.members, row.continuations, strict=True):
        part = slice(at, at + len(ids))
        results[member] = LogLikelihood(
            total=sum(picked[part]), is_greedy=all(is_likeliest[part]), num_tokens=len(ids)
        )
        at += len(ids)
    return found


def _logits(
    loaded: LoadedModel,
    batch: Sequence[_Row],
    *,
    width: int,
    predicted: int,
    is_packed: bool,
    cache: DynamicCache | None,
) -> Tensor:
    """Logits that predict the tokens of the continuations. Shapes: float32[len(batch), predicted, V]."""
    tokens = torch.full((len(batch), width), loaded.pad_id)
    where = torch.zeros(len(batch), predicted, dtype=torch.long)
    for number, row in enumerate(batch):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        found = _predicting(row)
        where[number, : len(found)] = torch.tensor(found)
    device = loaded.device
    flat = (where + torch.arange(len(batch))[:, None] * width).flatten().to(device)
    inputs: dict[str, Any] = {"input_ids": tokens.to(device)}
    if not can_pack(loaded):
        is_own = not loaded.is_transformers
        whole = loaded.model(tokens.to(device)) if is_own else loaded.model(**inputs, use_cache=False).logits
        chosen: Tensor = whole.flatten(0, 1)[flat].float()
        return chosen.view(len(batch), predicted, -1)
    if is_packed or cache is not None:
        shared = 0 if cache is None else cache.get_seq_length()
        inputs |= _packing(loaded, batch, width=width, shared=shared)
    if cache is not None:
        inputs["past_key_values"] = _repeated(cache, count=len(batch))
    hidden = loaded.model.base_model(**inputs, use_cache=cache is not None).last_hidden_state.flatten(0, 1)[flat]
    return torch.cat([head_logits(loaded.model, part) for part in hidden.split(_HEAD_ROWS)]).view(
        len(batch), predicted, -1
    )


def _predicting(row: _Row) -> list[int]:
    """The positions in a row whose logits predict the tokens of its continuations, in order."""
    found, at = [], len(row.context)
    for ids in row.continuations:
        found += [len(row.context) - 1, *range(at, at + len(ids) - 1)]
        at += len(ids) - 1
    return found


def _packing(loaded: LoadedModel, batch: Sequence[_Row], *, width: int, shared: int) -> dict[str, Tensor]:
    """Positions, and a mask by which a continuation sees its context and itself.

    Shapes: position_ids: int64[n, width]; attention_mask: [n, 1, width, shared + width], 0 or -inf.
    """
    positions = torch.arange(width).repeat(len(batch), 1)
    sees = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(batch), 1, 1)
    for number, row in enumerate(batch):
        at = first = len(row.context)
        for ids in row.continuations:
            stop = at + len(ids) - 1
            positions[number, at:stop] = torch.arange(first, first + len(ids) - 1)
            sees[number, at:stop, first:at] = False
            at = stop
    positions = positions.clamp(max=_last_position(loaded) - shared) + shared
    sees = torch.cat([torch.ones(len(batch), width, shared, dtype=torch.bool), sees], dim=2)
    lowest = torch.finfo(loaded.model.dtype).min
    mask = torch.zeros(sees.shape, dtype=loaded.model.dtype).masked_fill(~sees, lowest)
    return {"position_ids": positions.to(loaded.device), "attention_mask": mask[:, None].to(loaded.device)}


def _last_position(loaded: LoadedModel) -> int:
    """The largest position of a model."""
    return (loaded.max_positions or (1 << 31)) - 1


def _repeated(cache: DynamicCache, *, count: int) -> DynamicCache:
    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        keys, values = (one.expand(count, -1, -1, -1) for one in (layer.keys, layer.values))
        copy.update(keys, values, number)
    return copy


def _target_logits(loaded: LoadedModel, batch: Sequence[_Row], *, sizes: tuple[int, ...]) -> Tensor:
    """Logits of the targets of an encoder-decoder. Shapes: float32[len(batch), sizes[1], V]."""
    source = torch.full((len(batch), sizes[0]), loaded.pad_id)
    mask = torch.zeros(len(batch), sizes[0], dtype=torch.long)
    skipped = len(loaded.start_ids) - 1
    width = sizes[1] + skipped
    written = torch.full((len(batch), width), loaded.pad_id)
    for number, row in enumerate(batch):
        source[number, : len(row.context)] = torch.tensor(row.context)
        mask[number, : len(row.context)] = 1
        target = [*loaded.start_ids, *row.continuations[0][:-1]]
        written[number, : len(target)] = torch.tensor(target)
    device = loaded.device
    found = loaded.model(
        input_ids=source.to(device),
        attention_mask=mask.to(device),
        decoder_input_ids=written.to(device),
        use_cache=False,
    )
    logits: Tensor = found.logits[:, skipped:].float()
    return logits
