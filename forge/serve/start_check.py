"""Compare served log-probabilities with the model's own before a server takes requests.

The model's own are those of one plain forward pass over held-out text. The engine gets beginnings of the same text,
several at a time, and says how likely it finds the next tokens. A wrong position, mask, cache or adapter shows as a
difference far above rounding.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forge.data.prepare import open_rows
from forge.errors import ForgeError, RunError
from forge.inference.loaded import LoadedModel
from forge.inference.sampling import SamplingParams
from forge.runs.reader import read_plan
from forge.serve.request import EngineRequest
from forge.serve.stream import TextEngine

_NUM_TEXTS = 4
_MAX_TOKENS = 64
_NUM_PLACES = 8
"""Beginnings of each text."""
_NUM_TOP = 5
_TOLERANCES = {torch.float32: 0.02, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest difference of a log-probability, by the type in which the model computes."""
_TEXT = (
    "The committee met on Tuesday to discuss the budget of the coming year. After two hours it had agreed on the "
    "first three of nine points, and the chair proposed to continue on Thursday, when the figures would be known."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartCheck:
    """Texts, and the log-probabilities that the model itself gives after their beginnings."""

    source: str
    """Of the texts: `held-out text`, or what stood in for it."""
    prompts: tuple[tuple[int, ...], ...]
    expected: Tensor
    """Shapes: float32[len(prompts), V]."""
    tolerance: float

    @classmethod
    def prepare(cls, loaded: LoadedModel, *, source: str) -> StartCheck:
        """Compute the model's own log-probabilities; before the engine, which changes how the model attends."""
        texts = _held_out(Path(source))
        name = "held-out text" if texts else "a built-in text (no held-out text of a run is here)"
        texts = texts or [loaded.encode(_TEXT)[:_MAX_TOKENS]]
        limit = loaded.max_positions or _MAX_TOKENS
        prompts, expected = [], []
        for ids in (text[: limit - 1] for text in texts):
            with torch.no_grad():
                output: Any = loaded.model(torch.tensor([ids], device=loaded.device))
            logits = getattr(output, "logits", output)[0].float().cpu()
            places = sorted({int(place) for place in np.linspace(1, len(ids), _NUM_PLACES)})
            prompts += [tuple(ids[:place]) for place in places]
            expected += [logits[place - 1].log_softmax(dim=-1) for place in places]
        dtype = next(loaded.model.parameters()).dtype
        return cls(
            source=name,
            prompts=tuple(prompts),
            expected=torch.stack(expected),
            tolerance=_TOLERANCES.get(dtype, max(_TOLERANCES.values())),
        )

    def run(self, engine: TextEngine) -> str:
        """Ask the engine. Returns: what was found, in one line. Raises: RunError if it differs."""
        with ThreadPoolExecutor(1) as thread:  # the caller may be in an event loop
            served = thread.submit(asyncio.run, self._served(engine)).result()
        worst = 0.0
        for row, scores in zip(self.expected, served, strict=True):
            worst = max(worst, *(abs(logprob - float(row[token])) for token, logprob in scores))
        what = f"{len(served)} served log-probabilities of {self.source}"
        text = f"{what} differ from the model's by at most {worst:.2g}"
        if not worst <= self.tolerance:
            raise RunError(
                f"{text}, and rounding explains {self.tolerance:g}: the server would not serve the trained model. "
                "Please report this; --no-check serves it nevertheless"
            )
        return text

    async def _served(self, engine: TextEngine) -> list[Sequence[tuple[int, float]]]:
        sampling = SamplingParams(max_tokens=1, logprobs=_NUM_TOP)

        async def top(number: int, prompt: Sequence[int]) -> Sequence[tuple[int, float]]:
            stream = engine.submit(EngineRequest(request_id=f"check-{number}", prompt=prompt, sampling=sampling))
            events = [event async for event in stream]
            found: Sequence[tuple[int, float]] = events[0].top_logprobs
            return found

        return list(await asyncio.gather(*(top(number, prompt) for number, prompt in enumerate(self.prompts))))


def _held_out(folder: Path) -> list[list[int]]:
    """Beginnings of held-out rows; empty if the folder is no run, or its corpus is not on this machine."""
    if not (folder / "plan.json").is_file():
        return []
    with contextlib.suppress(ForgeError, OSError, KeyError, IndexError):
        plan = read_plan(folder)
        _, held_out = open_rows(plan.corpus)
        rows = held_out.read(np.arange(min(_NUM_TEXTS, held_out.num_rows)))
        limit = min(_MAX_TOKENS, plan.job.data.seq_len)
        return [
            [int(token) for token in row[: _first_length(rows, number, limit)]]
            for number, row in enumerate(rows["tokens"])
        ]
    return []


def _first_length(rows: Any, number: int, limit: int) -> int:
    """Tokens of the first example of a row, whose positions restart at the next."""
    if "position_ids" not in rows:
        return limit
    restarts = np.flatnonzero(rows["position_ids"][number] == 0)[1:]
    return int(min([limit, *restarts]))
