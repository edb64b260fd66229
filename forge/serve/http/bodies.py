"""The bodies of requests, as OpenAI's API has them, and forge's own two.

Types are strict and unknown fields are refused. A field of OpenAI's API that would change the answer and that forge
does not do is refused too, unless it has its neutral value; one that changes nothing is accepted.

Source: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from forge.errors import printable
from forge.foreign import parse_json
from forge.serve.http.errors import ApiError

MAX_CHOICES = 64
"""Texts that one request may ask for."""
_MAX_TOKENS = 1 << 24
_MAX_STOPS = 16
_MAX_LOGPROBS = 20
_MAX_CANDIDATES = 1000
_MAX_SEED = 2**63 - 1

_Item = TypeVar("_Item")
_MOST_NAMED = 5
_MAX_FIELDS = 64
"""Of one object: each unknown one would be an error of its own, which costs many times the memory of its text."""

Text = Annotated[str, Field(max_length=1 << 26)]
Items = Annotated[list[_Item], Field(fail_fast=True)]
"""A list that is refused at its first wrong item: a body has room for a million, with several errors each."""
TokenIds = Annotated[Items[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _require_few_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > _MAX_FIELDS:
            raise ValueError(f"it has {len(given)} fields, more than any object of this API")
        return given


class _Body(_Strict):
    model: str
    user: str | None = None


class StreamOptions(_Strict):
    """What a stream has besides its text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Sampled(_Body):
    """How the text is chosen."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_MAX_SEED, le=_MAX_SEED)] | None = None
    stop: Text | Annotated[Items[Annotated[str, Field(min_length=1)]], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # As vLLM's server has them, for samplers that OpenAI's API does not name.
    top_k: Annotated[int, Field(ge=-1, le=_MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    # Without effect on the answer.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Refused unless neutral.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, given))

    def require_supported(self) -> None:
        """Raises: ApiError for the first field that would be ignored."""
        for name, neutral in self._refused().items():
            if getattr(self, name) not in (None, *neutral):
                raise ApiError(f"{name} is not supported", code="unsupported_parameter", param=name)
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options requires stream: true", code="invalid_value", param="stream_options")

    def _refused(self) -> dict[str, tuple[Any, ...]]:
        return {"presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},)}


class CompletionBody(_Sampled):
    """`/v1/completions`."""

    prompt: (
        Text
        | TokenIds
        | Annotated[Items[Text], Field(min_length=1)]
        | Annotated[Items[TokenIds], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def _refused(self) -> dict[str, tuple[Any, ...]]:
        return super()._refused() | {"suffix": ("",), "best_of": (self.n or 1,)}

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """One prompt for each entry."""
        given = self.prompt
        if isinstance(given, str):
            return (given,)
        if isinstance(given[0], int):
            return (tuple(given),)
        return tuple(each if isinstance(each, str) else tuple(each) for each in given)


class TextPart(_Strict):
    """A part of a message. Pictures and sounds are refused by its type."""

    type: Literal["text"]
    text: Text


class FunctionCall(_Strict):
    """What the model asked a tool to do."""

    name: str
    arguments: Text


class ToolCall(_Strict):
    """A call of a tool in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Items[TextPart] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _require_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content")
        return self


class FunctionTool(_Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _require_plain(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse what cannot be sent to a replica, or written into a prompt: deep nesting, surrogates, 1e999."""
        try:
            parse_json(json.dumps(given, allow_nan=False))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return given


class OfferedTool(_Strict):
    """An entry of `tools`."""

    type: Literal["function"]
    function: FunctionTool


class ChosenFunction(_Strict):
    """The function of a `ChosenTool`."""

    name: str


class ChosenTool(_Strict):
    """A function that the model has to call."""

    type: Literal["function"]
    function: ChosenFunction


class ChatBody(_Sampled):
    """`/v1/chat/completions`."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    tools: Annotated[Items[OfferedTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    modalities: Items[str] | None = None
    reasoning_effort: str | None = None

    def _refused(self) -> dict[str, tuple[Any, ...]]:
        return super()._refused() | {
            "response_format": ({"type": "text"},),
            "modalities": (["text"],),
            "reasoning_effort": (),
        }

    def require_supported(self) -> None:
        super().require_supported()
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            problem = (
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one"
            )
            raise ApiError(problem, code="invalid_value", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs requires logprobs: true", code="invalid_value", param="top_logprobs")

    def called_function(self) -> str | None:
        """The function that the answer has to call, by `tool_choice`; None: none, or as the model decides.

        Raises: ApiError if it is not among the tools, or `required` leaves the choice between several.
        """
        if self.tool_choice in (None, "none", "auto"):
            return None
        names = [tool.function.name for tool in self.tools or ()]
        if not names:
            raise ApiError("tool_choice requires tools", code="invalid_value", param="tool_choice")
        listed = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
        if isinstance(self.tool_choice, ChosenTool):
            name = self.tool_choice.function.name
            if name not in names:
                problem = f"tool_choice names {printable(name, limit=64)}, which is not in tools: {listed}"
                raise ApiError(problem, code="invalid_value", param="tool_choice")
            return name
        if len(set(names)) > 1:
            problem = (
                f"tool_choice required is supported with one tool, and tools has {len(names)} ({listed}): forge "
                "begins a call with the function's name, which the model would have to choose; send "
                f'{{"type": "function", "function": {{"name": "{names[0]}"}}}}, or auto'
            )
            raise ApiError(problem, code="unsupported_parameter", param="tool_choice")
        return names[0]


class EmbeddingBody(_Body):
    """`/v1/embeddings`."""

    input: Text | TokenIds | Annotated[Items[Text], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """One text for each entry. Raises: ApiError for token ids."""
        given = [self.input] if isinstance(self.input, str) else self.input
        texts = tuple(each for each in given if isinstance(each, str))
        if len(texts) < len(given):
            raise ApiError("input must be text; token ids are not supported", code="invalid_value", param="input")
        return texts


class ClassifyBody(_Body):
    """`/v1/classify`: texts, or pairs of texts, of which each gets its labels with their probabilities."""

    input: (
        Text
        | Annotated[
            Items[Text | Annotated[Items[Text], Field(min_length=2, max_length=2)]],
            Field(min_length=1, max_length=2048),
        ]
    )


class FillMaskBody(_Body):
    """`/v1/fill-mask`: texts with the mask token of the model, of which each mask gets its likeliest tokens."""

    input: Text | Annotated[Items[Text], Field(min_length=1, max_length=2048)]
    top_k: Annotated[int, Field(ge=1, le=_MAX_CANDIDATES)] | None = None


class TranslateBody(_Body):
    """`/v1/translate`: sources, of which each gets the text that an encoder-decoder writes for it."""

    input: Text | Annotated[Items[Text], Field(min_length=1, max_length=2048)]
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=64)] | None = None
