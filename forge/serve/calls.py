"""What the HTTP server asks of a model and what it gets back: plain data without torch, sent to replicas."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that a server serves."""

    name: str
    kind: str
    """`causal-lm`, `seq2seq`, `classification`, `embedding`, `masked-lm` or `reward`."""
    max_positions: int | None
    digest: str
    """Of the weights; `system_fingerprint` of the answers."""
    labels: tuple[str, ...] = ()
    has_chat_template: bool = False
    takes_tools: bool = False
    adapters: tuple[str, ...] = ()
    """Further names that can be asked for."""
    engine: str = "forge"
    """`forge`, or `vllm` and its version."""
    start_check: str = ""
    """What the comparison of log-probabilities at the start has found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How texts are generated: the fields of `forge.inference.sampling.SamplingParams`, which needs torch."""

    max_tokens: int | None = None
    """None: as many as fit behind the prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """None: another text each time."""
    stop: tuple[str, ...] = ()
    num_beams: int = 1
    n: int = 1
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One prompt, of which `options.n` texts are generated: either `prompt` or `messages`."""

    request_id: str
    model: str
    options: TextOptions
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    function: str | None = None
    """Which of the tools the text has to call: it begins with the arguments of the call."""
    flush_s: float = 0.0
    """Shortest time between two pieces, except at the end."""

    @property
    def verb(self) -> str:
        return "generate"

    @property
    def num_texts(self) -> int:
        return self.options.n


@dataclass(frozen=True, slots=True, kw_only=True)
class TextsCall:
    """Texts, or pairs of texts, for each of which the model gives one result."""

    verb: Literal["embed", "classify", "fill", "translate"]
    texts: tuple[str | tuple[str, str], ...]
    options: TextOptions | None = None
    """Of a translation."""
    num_candidates: int = 0
    """Of each mask."""

    @property
    def num_texts(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """A generated token, its log-probability, and the likeliest tokens at its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """A piece of one of the texts of a call."""

    index: int
    """Of the text, from 0."""
    text: str = ""
    num_tokens: int = 0
    scores: tuple[TokenScore, ...] = ()
    finish_reason: str | None = None
    """`stop` or `length`, in the last piece of a text."""
    value: Any = None
    """In the last piece of an embedded text: its vector; of a classified one or of masks: its entry."""
    prompt_tokens: int = 0
    """Read since the last piece; of a `GenerateCall` in its first piece."""
    restarts: bool = False
    """All texts of the call begin again with the next piece, because their replica was lost."""


def merge_deltas(deltas: Sequence[TextDelta]) -> Sequence[TextDelta]:
    """Join the pieces of each text, in the order in which the texts first occur."""
    if len(deltas) < 2:
        return deltas
    grouped: dict[int, list[TextDelta]] = {}
    for delta in deltas:
        grouped.setdefault(delta.index, []).append(delta)
    return [_joined(group) if len(group) > 1 else group[0] for group in grouped.values()]


def _joined(deltas: Sequence[TextDelta]) -> TextDelta:
    return replace(
        deltas[-1],
        text="".join(each.text for each in deltas),
        num_tokens=sum(each.num_tokens for each in deltas),
        scores=tuple(score for each in deltas for score in each.scores),
        prompt_tokens=sum(each.prompt_tokens for each in deltas),
    )


class ReplicaLostError(Exception):
    """The replica that worked on a call is gone."""


class ModelBackend(Protocol):
    """A model, in this process or in replicas. Every method may raise `ApiError` and `ReplicaLostError`."""

    @property
    def info(self) -> ServedModel: ...

    def generate(self, call: GenerateCall | TextsCall) -> AsyncGenerator[Sequence[TextDelta], None]:
        """Generate, embed, classify or translate; closing the generator cancels the work."""

    async def stats(self) -> Mapping[str, Mapping[str, Any]]:
        """The state of every replica, by its id."""
