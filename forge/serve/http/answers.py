"""The JSON of completions and chat completions, whole or as a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from forge.serve.calls import TextDelta, TokenScore
from forge.serve.http.tool_calls import BegunCallParser, ToolCallParser


@dataclass(slots=True, kw_only=True)
class AnswerChoice:
    """One of the texts of an answer, as far as it is generated."""

    index: int
    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int = 0
    parser: ToolCallParser | BegunCallParser | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, delta: TextDelta) -> str:
        """Add a piece. Returns: the content that it adds."""
        content = delta.text if self.parser is None else self.parser.feed(delta.text)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            if self.parser is not None:
                rest, self.calls = self.parser.finish()
                content += rest
                if self.calls and not (delta.finish_reason == "length" and self.parser.is_cut):
                    self.finish_reason = "tool_calls"
        self.text += content
        self.scores += delta.scores
        self.num_tokens += delta.num_tokens
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """What all chunks of an answer, or the whole one, have in common."""

    kind: Literal["completion", "chat"]
    id: str
    model: str
    digest: str
    wants_scores: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, choices: Sequence[AnswerChoice], *, usage: dict[str, int], echoes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The answer to a request without `stream`.

        Args:
            echoes: the text to put before each choice; empty for none.
        """
        if self.kind == "chat":
            shown = [self._chat_choice(choice) for choice in choices]
            return self._envelope("chat.completion", shown) | {"usage": usage}
        shown = [
            self._text_choice(
                choice, text=(echoes[choice.index] if echoes else "") + choice.text, scores=choice.scores
            )
            for choice in choices
        ]
        return self._envelope("text_completion", shown) | {"usage": usage}

    def chunk(
        self, choice: AnswerChoice, *, content: str, scores: Sequence[TokenScore], is_first: bool
    ) -> dict[str, Any]:
        """A piece of a stream."""
        if self.kind == "completion":
            return self._envelope("text_completion", [self._text_choice(choice, text=content, scores=scores)])
        delta: dict[str, Any] = {"role": "assistant", "content": content} if is_first else {}
        if content:
            delta["content"] = content
        if choice.finish_reason is not None and choice.calls:
            delta["tool_calls"] = [{"index": number} | call for number, call in enumerate(choice.calls)]
        shown = {
            "index": choice.index,
            "delta": delta,
            "logprobs": _chat_scores(scores) if self.wants_scores else None,
            "finish_reason": choice.finish_reason,
        }
        return self._envelope("chat.completion.chunk", [shown])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk where `stream_options.include_usage` is set."""
        name = "text_completion" if self.kind == "completion" else "chat.completion.chunk"
        return self._envelope(name, []) | {"usage": usage}

    def _envelope(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.digest[:16]}",
            "choices": choices,
        }

    def _text_choice(self, choice: AnswerChoice, *, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": _text_scores(scores) if self.wants_scores else None,
            "finish_reason": choice.finish_reason,
        }

    def _chat_choice(self, choice: AnswerChoice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": _chat_scores(choice.scores) if self.wants_scores else None,
            "finish_reason": choice.finish_reason,
        }


def _text_scores(scores: Sequence[TokenScore]) -> dict[str, Any]:
    offsets, at = [], 0
    for score in scores:
        offsets.append(at)
        at += len(score.token)
    return {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [dict(score.top) for score in scores],
        "text_offset": offsets,
    }


def _chat_scores(scores: Sequence[TokenScore]) -> dict[str, Any]:
    content = [
        _chat_score(score.token, score.logprob) | {"top_logprobs": [_chat_score(*pair) for pair in score.top]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _chat_score(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}
