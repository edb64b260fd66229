"""What a caller gives to an engine (`forge.serve.engine`, `forge.serve.vllm.engine`) and gets from it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from forge.errors import ArgumentError, ForgeError
from forge.inference.sampling import SamplingParams
from forge.units import counted

FinishReason = Literal["stop", "length", "cancelled"]


class EngineError(ForgeError):
    """The engine failed or is closed; requests that were running are lost."""


class QueueFullError(ForgeError):
    """More requests wait than the engine accepts; `retry_after_s` says when one will probably be accepted."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How much the engine runs at once."""

    max_rows: int = 64
    """Texts that are written at once."""
    max_waiting: int = 256
    """Texts that wait; further requests are refused."""
    cache_tokens: int = 64 * 1024
    """Texts at once times the tokens of the longest: the memory of keys and values."""
    prefix_tokens: int = 16 * 1024
    """Tokens of earlier prompts whose keys and values are kept for prompts that begin alike."""
    step_tokens: int = 512
    """Tokens of prompts that are computed before other texts get their next token."""
    may_draft: bool = True
    """Let a text that runs alone guess its next tokens; what it becomes is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """A prompt, as tokens, and how to continue it."""

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    adapter: str | None = None
    """Name of the adapters to use; None: the model without any."""
    is_repeatable: bool = True
    """Whether the text must not depend on what else runs; False if no seed was asked for. Greedy texts never do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One token of one of a request's texts."""

    index: int
    """Which of the `n` texts."""
    token_id: int
    text: str
    """Text that is certain since the last event; may be empty."""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    """Set in the last event of a text."""
    stopped_by: str | None = None
    """The stop string that ended the text, which is not part of it."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were reused from an earlier one."""
    completion_tokens: int = 0
    """With this token, and with the end token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The state of an engine, and what it has done since it started."""

    is_healthy: bool
    error: str | None
    is_packed: bool
    """Whether the model computes all texts in one batch; False: one after another, `reason` says why."""
    reason: str | None
    running: int
    waiting: int
    cache_tokens: int
    used_tokens: int
    prefix_tokens: int
    tokens_per_s: float
    """Written in the last 10 s."""
    time_to_first_token_s: tuple[float, ...]
    """Of the last 1,000 texts."""
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    num_finished: int
    num_cancelled: int
    num_preemptions: int
    num_drafted: int = 0
    """Tokens that were guessed."""
    num_accepted: int = 0
    """Guesses that were right, each of which saved a step."""


def require_answerable(
    request: EngineRequest, *, vocabulary: int, max_length: int, adapters: Collection[str]
) -> SamplingParams:
    """Return the request's sampling parameters.

    Raises: ArgumentError if the prompt is empty, too long or has unknown tokens, or the request asks for adapters
        that the model does not have, or for beam search.
    """
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        raise ArgumentError("the prompt has no tokens")
    if len(prompt) >= max_length:
        raise ArgumentError(
            f"the prompt has {counted(len(prompt), 'token')}; with the answer's first it may have {max_length}"
        )
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise ArgumentError(f"the prompt has tokens outside the vocabulary of {vocabulary}")
    if request.adapter is not None and request.adapter not in adapters:
        names = ", ".join(sorted(adapters)) or "none"
        raise ArgumentError(f"no adapters are named {request.adapter}; those of this model are {names}")
    if sampling.num_beams != 1:
        raise ArgumentError("beam search is not served; use forge generate")
    return sampling
