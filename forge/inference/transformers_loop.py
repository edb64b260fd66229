"""Generate texts with transformers' own loop: encoder-decoders, beam search, and models without a plain key-value
cache. A module of the user's own computes the whole sequence for every token.

Sources of an encoder-decoder are computed in groups of similar length; everything else one after the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from forge.inference.loaded import LoadedModel
from forge.inference.sampling import Generation, SamplingParams
from forge.inference.sequences import Chooser, Ending, GrowingText
from forge.model.isolation import isolation_problem

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_NEEDED = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
_GROUP = 32


def can_pack(loaded: LoadedModel) -> bool:
    """Whether sequences of a model can be computed together that a mask or rows keep apart."""
    if not loaded.is_transformers or loaded.kind != "causal-lm" or isolation_problem(loaded.model) is not None:
        return False
    types = set(getattr(loaded.model.config.get_text_config(), "layer_types", None) or _PLAIN_LAYERS)
    return types <= _PLAIN_LAYERS and set(inspect.signature(loaded.model.forward).parameters) >= _NEEDED


@torch.inference_mode()
def generate_in_loop(
    loaded: LoadedModel, texts: Sequence[GrowingText], sampling: SamplingParams, *, chooser: Chooser
) -> Iterator[Generation]:
    """Yield each text as it is finished; of beam search the `n` best of each prompt."""
    if sampling.num_beams > 1:
        for text in texts:
            if chooser.is_wanted(text.index, 0):
                yield from _beams(loaded, text, sampling, chooser=chooser)
        return
    size = _GROUP if loaded.kind == "seq2seq" else 1
    waiting = sorted(texts, key=lambda text: (len(text.source), text.source, text.index, text.number))
    while waiting:
        group = [waiting.pop()]
        while not group[0].ids and waiting and not waiting[-1].ids and len(group) < size:
            group.append(waiting.pop())
        group = [text for text in group if chooser.is_wanted(text.index, len(text.ids))]
        if group:
            _extend(loaded, group, chooser=chooser)
        for text in group:
            if chooser.needs_check(text):
                chooser.correct(text)
            ending = chooser.ending(text)
            if ending is None:
                waiting.append(text)
            else:
                yield chooser.generation(text, ending)


def _extend(loaded: LoadedModel, group: Sequence[GrowingText], *, chooser: Chooser) -> None:
    """Extend texts of equal length until each ends."""
    if not loaded.is_transformers:
        while chooser.ending(group[0]) is None:
            whole = torch.tensor([[*group[0].prompt, *group[0].ids]], device=loaded.device)
            group[0].ids += chooser.choose(loaded.model(whole)[:, -1], group)
        return
    loop = _Loop(group, chooser=chooser)
    room = max(text.max_tokens - len(text.ids) for text in group)
    loaded.model.generate(
        **_inputs(loaded, group),
        generation_config=GenerationConfig(max_new_tokens=room, do_sample=False, **_special(loaded)),
        logits_processor=[_Processor(loop)],
        stopping_criteria=[_Criteria(loop)],
    )


def _special(loaded: LoadedModel) -> dict[str, int]:
    start = {"decoder_start_token_id": loaded.start_ids[0]} if loaded.start_ids else {}
    return {"pad_token_id": loaded.pad_id, **start}


def _inputs(loaded: LoadedModel, group: Sequence[GrowingText]) -> dict[str, Tensor]:
    written = torch.tensor([[*text.prompt, *text.ids] for text in group], device=loaded.device)
    if loaded.kind != "seq2seq":
        return {"input_ids": written, "attention_mask": torch.ones_like(written)}
    width = max(len(text.source) for text in group)
    rows = [[*text.source, *[loaded.pad_id] * (width - len(text.source))] for text in group]
    mask = [[column < len(text.source) for column in range(width)] for text in group]
    return {
        "input_ids": torch.tensor(rows, device=loaded.device),
        "attention_mask": torch.tensor(mask, device=loaded.device).long(),
        "decoder_input_ids": written,
    }


class _Loop:
    """Has transformers' greedy loop choose as `Chooser` does, and stop where it does."""

    def __init__(self, group: Sequence[GrowingText], *, chooser: Chooser) -> None:
        self._group, self._chooser = group, chooser
        self._is_done = [chooser.ending(text) is not None for text in group]

    def only_choice(self, logits: Tensor) -> Tensor:
        """Minus infinity for all tokens but the chosen one. Shapes: [n, V]."""
        rows = [row for row, done in enumerate(self._is_done) if not done]
        texts = [self._group[row] for row in rows]
        tokens = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
        for row, text, token in zip(rows, texts, self._chooser.choose(logits[rows], texts), strict=True):
            text.ids.append(token)
            tokens[row] = token
            self._is_done[row] = self._chooser.ending(text) is not None
        return torch.full_like(logits, -torch.inf).scatter(1, tokens, 0.0)

    def is_done(self, like: Tensor) -> Tensor:
        return torch.tensor(self._is_done, device=like.device)


class _Processor(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._loop.only_choice(scores)


class _Criteria(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return self._loop.is_done(input_ids)


class _UnlessCancelled(StoppingCriteria):  # type: ignore[misc]
    """Ends a beam search whose text is not wanted any more."""

    def __init__(self, text: GrowingText, *, chooser: Chooser) -> None:
        self._text, self._chooser = text, chooser

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        num_tokens = input_ids.shape[1] - len(self._text.prompt)
        is_over = not self._chooser.is_wanted(self._text.index, num_tokens)
        return torch.full((len(input_ids),), is_over, dtype=torch.bool, device=input_ids.device)


def _beams(
    loaded: LoadedModel, text: GrowingText, sampling: SamplingParams, *, chooser: Chooser
) -> Iterator[Generation]:
    """The best sequences of beam search, the best first."""
    loaded.require_transformers("beam search")
    config = GenerationConfig(
        max_new_tokens=text.max_tokens,
        num_beams=sampling.num_beams,
        num_return_sequences=sampling.n,
        length_penalty=sampling.length_penalty,
        repetition_penalty=sampling.repetition_penalty,
        early_stopping=False,
        do_sample=False,
        eos_token_id=sorted(chooser.ends) or None,
        **_special(loaded),
    )
    criteria = [_UnlessCancelled(text, chooser=chooser)]
    found = loaded.model.generate(**_inputs(loaded, [text]), generation_config=config, stopping_criteria=criteria)
    for number, row in enumerate(found):
        ids = row[len(text.prompt) :].tolist()
        end = next((at + 1 for at, token in enumerate(ids) if token in chooser.ends), len(ids))
        written = GrowingText(
            index=text.index,
            number=number,
            prompt=text.prompt,
            source=text.source,
            cut_tokens=text.cut_tokens,
            max_tokens=text.max_tokens,
            seed=text.seed,
            ids=ids[:end],
        )
        ending = chooser.ending(written) or Ending(text=loaded.decode(written.ids), reason="length")
        yield chooser.generation(written, ending)
