"""Generate texts for many prompts at once, such that a text depends on its prompt alone.

    for made in generate(loaded, ["def main(", "class A"], SamplingParams(max_tokens=64)):
        print(made.index, made.text)

Texts are computed together in packed batches, as by `forge serve` (`forge.inference.schedule`,
`forge.inference.model_step`): a finished text leaves its row to the next prompt, and what prompts begin with is
computed once.

fp32: batched arithmetic rounds differently in batches of other shapes. Where the choice of a token was closer than
that, the finished text is compared with the logits of that sequence alone in fp64 (`forge.inference.exact`): from
the first token that differs on it is generated again. So greedy text is the same at every batch size, order and
number of workers, on every machine.

bf16: more than half of the choices are that close. But a packed batch gives a token the same bits whatever else is
in it, where the device's kernels do (`PackedModel.is_repeatable` measures it), and then the text is the same at
every batch size, order and number of workers on machines of one kind. Where they do not, texts are compared as in
fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from forge.inference.loaded import LoadedModel
from forge.inference.model_step import PackedModel
from forge.inference.packed_rows import ALIGN, UnsupportedAttention, aligned
from forge.inference.prefixes import Prefixes
from forge.inference.running import RunningSequence
from forge.inference.sampling import Generation, SamplingParams
from forge.inference.schedule import BatchLimits, Schedule
from forge.inference.sequences import Chooser, GrowingText, Watch
from forge.inference.transformers_loop import can_pack, generate_in_loop

_MAX_ROWS = {"cpu": 32, "cuda": 256}
_STEP_TOKENS = {"cpu": 1024, "cuda": 16384}
_BATCH_TOKENS = {"cpu": 2**14, "cuda": 2**18}


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str | Sequence[int]],
    sampling: SamplingParams,
    *,
    batch_tokens: int | None = None,
    watch: Watch | None = None,
) -> Iterator[Generation]:
    """Yield `sampling.n` texts for each prompt, as they are finished: `index` is the number of the prompt.

    Args:
        loaded: a causal language model or an encoder-decoder.
        prompts: texts, or their token ids as of `loaded.encode` and `loaded.encode_chat`.
        batch_tokens: tokens whose keys and values are in memory at once, about; None: as many as the device takes.
        watch: called after every token; a text that it does not want any more ends with what it has, or
            is left out.

    Raises: ArgumentError if the model writes no text.
    """
    loaded.require_text()
    chooser = Chooser(loaded, sampling, watch=watch)
    texts = [
        chooser.text(
            index=index, number=number, prompt=loaded.encode(prompt) if isinstance(prompt, str) else prompt
        )
        for index, prompt in enumerate(prompts)
        for number in range(1 if sampling.num_beams > 1 else sampling.n)
    ]
    packed = _packed(loaded) if sampling.num_beams == 1 else None
    if packed is None:
        yield from generate_in_loop(loaded, texts, sampling, chooser=chooser)
    elif texts:
        yield from _Batch(loaded, texts, chooser=chooser, model=packed, batch_tokens=batch_tokens).run()


def _packed(loaded: LoadedModel) -> PackedModel | None:
    """The model in packed batches; None if it cannot be computed so."""
    if not can_pack(loaded):
        return None
    try:
        return PackedModel(loaded.model)
    except UnsupportedAttention:
        return None


class _Batch:
    """Generates many texts in the rows of one packed model."""

    def __init__(
        self,
        loaded: LoadedModel,
        texts: list[GrowingText],
        *,
        chooser: Chooser,
        model: PackedModel,
        batch_tokens: int | None,
    ) -> None:
        self._loaded, self._model, self._chooser = loaded, model, chooser
        self._verifies = loaded.model.dtype == torch.float32 or not model.is_repeatable()
        kind = loaded.device.type
        longest = aligned(max(len(text.prompt) + text.max_tokens for text in texts) + 1)
        tokens = batch_tokens or _BATCH_TOKENS.get(kind, 2**14)
        limits = BatchLimits(
            max_rows=max(1, min(tokens // longest, len(texts), _MAX_ROWS.get(kind, 32))),
            cache_tokens=max(tokens, longest),
            step_tokens=_STEP_TOKENS.get(kind, 1024),
        )
        self._schedule = Schedule(limits=limits, rows=model.rows, prefixes=Prefixes(max_tokens=2 * longest))
        self._texts: dict[RunningSequence, GrowingText] = {}
        ordered = sorted(texts, key=lambda text: (-len(text.prompt), text.prompt, text.number))
        self._first: RunningSequence | None = None
        for text in ordered:
            self._add(text)
            if self._first is None and _num_shared(ordered) >= ALIGN:
                self._first = next(iter(self._texts))

    @torch.inference_mode()
    def run(self) -> Iterator[Generation]:
        while (step := self._schedule.plan()) is not None:
            logits = self._model.logits(step)
            self._schedule.computed(step)
            decoding = self._schedule.decoding
            due = [(row, one) for row, one in enumerate(decoding) if one.is_complete]
            if due:
                rows = [row for row, _ in due]
                yield from self._grow(logits if len(rows) == len(logits) else logits[rows], [one for _, one in due])

    def _add(self, text: GrowingText) -> None:
        sequence = RunningSequence(
            request_id="",
            index=text.index,
            prompt=[*text.prompt, *text.ids],
            sampling=self._chooser.sampling,
            adapter=None,
            is_repeatable=True,
            tokenizer=self._loaded.tokenizer,
            leader=self._first,  # what all prompts begin with is computed with the first, then reused
        )
        self._texts[sequence] = text
        self._schedule.add(sequence)

    def _grow(self, logits: Tensor, sequences: Sequence[RunningSequence]) -> Iterator[Generation]:
        """Add a token to each text. Finished ones leave their row; one that is wrong waits to go on."""
        texts = [self._texts[sequence] for sequence in sequences]
        for sequence, text, token in zip(sequences, texts, self._chooser.choose(logits, texts), strict=True):
            text.ids.append(token)
            sequence.tokens.append(token)
            ending = self._chooser.ending(text)
            if ending is None:
                continue
            self._schedule.remove(sequence)
            del self._texts[sequence]
            if self._chooser.needs_check(text, verifies=self._verifies) and self._chooser.correct(text):
                ending = self._chooser.ending(text)
            if ending is None:
                self._add(text)
            else:
                yield self._chooser.generation(text, ending)


def _num_shared(texts: Sequence[GrowingText]) -> int:
    """How many tokens all prompts begin with."""
    lowest, highest = (pick(text.prompt for text in texts) for pick in (min, max))
    pairs = zip(lowest, highest, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(lowest), len(highest)))
