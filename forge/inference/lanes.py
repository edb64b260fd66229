"""Divide a step into two lanes, which two threads compute at the same time.

A step of a small model on a CPU is hardly faster with two threads for each kernel: kernels of a few tokens run on
one, and so does Python. Two lanes with one thread each keep both busy: their rows are different ones, and a trace
(`forge.inference.traced_step`) runs without the interpreter's lock. With SmolLM2-135M on two cores of an Intel Xeon
the second lane gives 17 % more tokens with 8 texts, and 25 to 42 % with 32 (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from forge.inference.schedule import PlannedStep

_DECODING_COST = 8
"""Of the next token of a sequence, in tokens of a prompt; measured with 135 million parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A part of a step, whose decoding sequences have the rows from `first` on."""

    step: PlannedStep
    first: int = 0


def divide(step: PlannedStep, *, pad: int) -> list[Lane]:
    """Divide a step so that both lanes take about as long; one lane if there is too little.

    The sequences that decode come first, then the prompts, in their order; in a step with prompts all that decode
    are in the first lane, since a step of them alone is traced.

    Args:
        pad: tokens are computed in multiples of so many.
    """
    whole = [Lane(step=step)]
    if step.draft:
        return whole
    if step.prompts:
        return _with_prompts(step) or whole
    half = -(-len(step.decoding) // (2 * pad)) * pad
    if len(step.decoding) <= half:
        return whole
    halves = {0: step.decoding[:half], half: step.decoding[half:]}
    return [Lane(step=replace(step, decoding=part), first=first) for first, part in halves.items()]


def _with_prompts(step: PlannedStep) -> list[Lane]:
    costs = [piece.stop - piece.start for _, piece in step.prompts]
    decoding = _DECODING_COST * len(step.decoding)
    num = min(range(len(costs)), key=lambda num: max(decoding + sum(costs[:num]), sum(costs[num:])))
    if not (step.decoding or num):
        return []
    moved = len(step.decoding) + sum(costs[:num])
    others = tuple((one, replace(piece, offset=piece.offset - moved)) for one, piece in step.prompts[num:])
    parts = replace(step, prompts=step.prompts[:num]), replace(step, decoding=(), prompts=others)
    return [Lane(step=part) for part in parts]
