"""Generate texts for many prompts at once, such that a text depends on its prompt alone.

    for made in generate(loaded, ["def main(", "class A"], SamplingParams(max_tokens=64)):
        print(made.index, made.text)

Batched arithmetic rounds differently in batches of other shapes, so two likely tokens can change places. Where the
choice of a token was closer than that, the finished text is compared with the logits of that sequence alone in fp64
(`forge.inference.exact`): from the first token that differs on it is generated again. So greedy text is the same at
every batch size, order and number of workers. In fp32 few choices are that close, in bf16 more than half are, so
fp32 is the default.

Speed: prompts are sorted by length; what all begin with is computed once; finished texts leave their slot to the
next prompt (`forge.inference.slots`); only the last position of a prompt has logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from forge.inference.loaded import LoadedModel
from forge.inference.sampling import Generation, SamplingParams
from forge.inference.sequences import Chooser, GrowingText
from forge.inference.slots import SlotCache, layers_of
from forge.inference.transformers_loop import can_use_slots, generate_in_loop

_MIN_SHARED = 32
"""Tokens that all prompts begin with, from which on they are computed once."""
_MAX_SLOTS = {"cpu": 32, "cuda": 256}
_PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}
_BATCH_TOKENS = {"cpu": 2**14, "cuda": 2**18}


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str | Sequence[int]],
    sampling: SamplingParams,
    *,
    batch_tokens: int | None = None,
) -> Iterator[Generation]:
    """Yield `sampling.n` texts for each prompt, as they are finished: `index` is the number of the prompt.

    Args:
        loaded: a causal language model or an encoder-decoder.
        prompts: texts, or their token ids as of `loaded.encode` and `loaded.encode_chat`.
        batch_tokens: tokens whose keys and values are in memory at once, about; None: as many as the device takes.

    Raises: ArgumentError if the model writes no text.
    """
    loaded.require_text()
    chooser = Chooser(loaded, sampling)
    texts = [
        chooser.text(
            index=index, number=number, prompt=loaded.encode(prompt) if isinstance(prompt, str) else prompt
        )
        for index, prompt in enumerate(prompts)
        for number in range(1 if sampling.num_beams > 1 else sampling.n)
    ]
    if sampling.num_beams > 1 or not can_use_slots(loaded):
        yield from generate_in_loop(loaded, texts, sampling, chooser=chooser)
    elif texts:
        yield from _Batch(loaded, texts, chooser=chooser, batch_tokens=batch_tokens).run()


class _Batch:
    """Generates many texts in slots of one cache."""

    def __init__(
        self, loaded: LoadedModel, texts: list[GrowingText], *, chooser: Chooser, batch_tokens: int | None
    ) -> None:
        self._loaded, self._model, self._chooser = loaded, loaded.model, chooser
        self._waiting = sorted(texts, key=lambda text: (len(text.prompt), text.prompt, text.number))
        """The longest last, which is taken first."""
        kind = loaded.device.type
        longest = max(len(text.prompt) + text.max_tokens for text in texts)
        room = (batch_tokens or _BATCH_TOKENS.get(kind, 2**14)) // longest
        self._num_slots = max(1, min(room, len(texts), _MAX_SLOTS.get(kind, 32)))
        self._prefill_tokens = _PREFILL_TOKENS.get(kind, 1024)
        self._has_window = getattr(self._model.config.get_text_config(), "sliding_window", None) is not None
        self._texts: list[GrowingText | None] = [None] * self._num_slots
        self._cache = SlotCache(num_slots=self._num_slots)
        self._prefix, self._prefix_layers = self._shared_prefix()

    @torch.inference_mode()
    def run(self) -> Iterator[Generation]:
        while self._waiting or any(self._texts):
            yield from self._refill()
            active = [slot for slot, text in enumerate(self._texts) if text is not None]
            if not active:
                continue
            if not self._waiting and len(active) <= len(self._texts) // 2:
                self._cache.keep(active)
                self._texts = [self._texts[slot] for slot in active]
                active = list(range(len(active)))
            logits = self._step()
            yield from self._grow(logits[active], active)

    def _shared_prefix(self) -> tuple[tuple[int, ...], list[tuple[Tensor, Tensor]]]:
        """Compute what all prompts begin with; at least one token of each prompt is left."""
        first, last = self._waiting[0].prompt, max(text.prompt for text in self._waiting)
        lowest = min(text.prompt for text in self._waiting)
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(lowest, last, strict=False))
        length = min(sum(1 for _ in equal), len(first) - 1)
        if length < _MIN_SHARED or len(self._waiting) < 2:
            return (), []
        cache = DynamicCache()
        tokens = torch.tensor([lowest[:length]], device=self._loaded.device)
        with torch.inference_mode():
            self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return lowest[:length], layers_of(cache)

    def _refill(self) -> Iterator[Generation]:
        """Give free slots to waiting texts, after their prompts were computed together."""
        while self._waiting and (free := [slot for slot, text in enumerate(self._texts) if text is None]):
            group = self._next_group(len(free))
            logits, layers = self._prefill(group)
            for row, (slot, text) in enumerate(zip(free, group, strict=False)):
                size = len(text.prompt) + len(text.ids) - len(self._prefix)
                own = [(keys[row, :, -size:], values[row, :, -size:]) for keys, values in layers]
                pairs = zip(self._prefix_layers, own, strict=True) if self._prefix else ((None, one) for one in own)
                parts = [
                    ([] if shared is None else [(shared[0][0], shared[1][0])]) + [one] for shared, one in pairs
                ]
                self._cache.put(slot, parts)
                self._texts[slot] = text
            yield from self._grow(logits, free[: len(group)])

    def _next_group(self, most: int) -> list[GrowingText]:
        """Take waiting texts, the longest first, whose prompts are computed together."""
        group: list[GrowingText] = []
        while self._waiting and len(group) < most:
            size = self._size(group[0] if group else self._waiting[-1])
            if group and (len(group) + 1) * size > self._prefill_tokens:
                break
            if group and self._has_window and self._size(self._waiting[-1]) != size:
                break  # the window counts the columns of padding
            group.append(self._waiting.pop())
        return group

    def _size(self, text: GrowingText) -> int:
        return len(text.prompt) + len(text.ids) - len(self._prefix)

    def _prefill(self, group: Sequence[GrowingText]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Compute prompts, padded at the left. Returns: logits [n, V], and keys and values without the prefix."""
        shared, width = len(self._prefix), max(map(self._size, group))
        tokens = torch.full((len(group), width), self._loaded.pad_id)
        mask = torch.zeros(len(group), width, dtype=torch.long)
        for row, text in enumerate(group):
            own = [*text.prompt[shared:], *text.ids]
            tokens[row, width - len(own) :] = torch.tensor(own)
            mask[row, width - len(own) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0) + shared
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._prefix_layers):
            cache.update(keys.expand(len(group), -1, -1, -1), values.expand(len(group), -1, -1, -1), number)
        whole = torch.cat([torch.ones(len(group), shared, dtype=torch.long), mask], dim=1)
        logits = self._forward(tokens, mask=whole, positions=positions, cache=cache)
        return logits, [(keys[:, :, shared:], values[:, :, shared:]) for keys, values in layers_of(cache)]

    def _step(self) -> Tensor:
        """Compute the next logits of every slot. Shapes: [num_slots, V]."""
        self._cache.make_room()
        last = [text.ids[-1] if text is not None else self._loaded.pad_id for text in self._texts]
        logits = self._forward(
            torch.tensor(last)[:, None],
            mask=self._cache.mask(),
            positions=self._cache.positions(),
            cache=self._cache,
        )
        self._cache.step()
        return logits

    def _forward(self, tokens: Tensor, *, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        device = self._loaded.device
        found = self._model(
            input_ids=tokens.to(device),
            attention_mask=None if mask.all() and len(mask) == 1 else mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = found.logits[:, -1]
        return logits

    def _grow(self, logits: Tensor, slots: Sequence[int]) -> Iterator[Generation]:
        """Add a token to the text of each slot. Finished ones leave it; one that is wrong waits to go on."""
        texts = [text for text in (self._texts[slot] for slot in slots) if text is not None]
        for slot, text, token in zip(slots, texts, self._chooser.choose(logits, texts), strict=True):
            text.ids.append(token)
            ending = self._chooser.ending(text)
            if ending is None:
                continue
            self._texts[slot] = None
            self._cache.free(slot)
            if self._chooser.needs_check(text) and self._chooser.correct(text):
                ending = self._chooser.ending(text)
            if ending is None:
                self._waiting.append(text)
            else:
                yield self._chooser.generation(text, ending)
