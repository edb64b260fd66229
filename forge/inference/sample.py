"""The sample at the end of a run: what the model answers to the beginning of its first held-out sequence.

A causal language model continues the text; a chat model, also one trained on preferences, answers the conversation;
an encoder-decoder writes the target; a classifier gives the label, a reward model the reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.data.prompt import held_out_turn, sample_prompt
from forge.errors import ArgumentError
from forge.inference.answer import AnswerConfig, Answerer
from forge.plan.plan import Plan

_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and its answer, as they are shown one behind the other."""

    step: int
    prompt: str
    text: str


def sample(plan: Plan, *, run_folder: Path) -> Sample:
    """Have a run's newest checkpoint answer a prompt of its own data.

    Raises: ArgumentError if the model answers nothing that could be shown; CheckpointError, DataError.
    """
    objective = plan.job.training.objective
    if objective in ("contrastive", "masked-lm"):
        what = "gives vectors" if objective == "contrastive" else "fills gaps"
        raise ArgumentError(f"a model of training.objective: {objective} writes no text: it {what}")
    config = AnswerConfig(source=str(run_folder), sampling={"max_tokens": _MAX_TOKENS, "seed": 1})
    answerer = Answerer(config)
    step = answerer.loaded.step or 0
    turn = held_out_turn(plan.corpus, tokenizer=answerer.loaded.tokenizer)
    if turn is not None and plan.job.data.format in ("chat", "preference") and objective != "reward":
        [answer] = answerer([{"ids": list(turn.ids)}])
        return Sample(step=step, prompt=f"{turn.shown} → ", text=answer["text"])
    prompt = sample_prompt(plan.corpus, plan.job.data, tokenizer=run_folder / "tokenizer")
    [answer] = answerer([prompt])
    if answerer.loaded.kind == "causal-lm":
        return Sample(step=step, prompt=prompt, text=answer["text"])
    return Sample(step=step, prompt=f"{prompt} → ", text=_shown(answer))


def _shown(answer: dict[str, Any]) -> str:
    if "text" in answer:
        return str(answer["text"])
    if "value" in answer:
        return f"{answer['value']:.4g}"
    if answer.get("label") is not None:
        return f"{answer['label']} ({answer['probabilities'][answer['label']]:.0%})"
    return " ".join(answer["labels"]) or "no label"
