"""Completions and chat completions: from a body to calls of the model, from its pieces to an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from forge.foreign import parse_json
from forge.serve.calls import GenerateCall, TextDelta, TextOptions
from forge.serve.http.answers import AnswerChoice, AnswerForm
from forge.serve.http.bodies import MAX_CHOICES, ChatBody, ChatMessage, CompletionBody
from forge.serve.http.errors import ApiError
from forge.serve.http.generation import Usage
from forge.serve.http.guard import ClientGoneError
from forge.serve.http.serving import Serving
from forge.serve.http.tool_calls import CALL_END, BegunCallParser, ToolCallParser

_T = TypeVar("_T")
_STREAM_FLUSH_S = 0.04
"""Tokens of this time share an event of a stream: 25 events per second are read as fluent."""
_WHOLE_FLUSH_S = 1.0


async def answer_completion(body: CompletionBody, request: Request, *, serving: Serving) -> Response:
    """Answer `/v1/completions`. Raises: ApiError, ClientGoneError."""
    body.require_supported()
    prompts = body.prompts
    n = body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(f"{len(prompts) * n} texts are asked for, and {MAX_CHOICES} are allowed", param="prompt")
    if body.echo and (body.logprobs is not None or any(not isinstance(each, str) for each in prompts)):
        raise ApiError("echo is supported for prompts of text without logprobs", param="echo")
    options = _options(body, max_tokens=body.max_tokens or 16, logprobs=body.logprobs)
    call = GenerateCall(request_id=request.state.entry["id"], model=body.model, options=options)
    echoes = [str(prompt) for prompt in prompts for _ in range(n)] if body.echo else []
    form = _form("completion", "cmpl", body, serving=serving, wants_scores=body.logprobs is not None)
    answer = _Answer(
        body, request, serving=serving, form=form, echoes=echoes, new_choice=lambda i: AnswerChoice(index=i)
    )
    return await answer.respond([_call_with(call, prompt=prompt, number=i) for i, prompt in enumerate(prompts)])


async def answer_chat(body: ChatBody, request: Request, *, serving: Serving) -> Response:
    """Answer `/v1/chat/completions`. Raises: ApiError, ClientGoneError."""
    body.require_supported()
    info = serving.backend.info
    if not info.has_chat_template:
        raise ApiError(
            f"{body.model} has no chat template; use /v1/completions", code="no_chat_template", param="model"
        )
    tools = body.tools if body.tools and body.tool_choice != "none" else None
    if tools and not info.takes_tools:
        raise ApiError(f"the chat template of {body.model} takes no tools", code="no_tools", param="tools")
    function = body.called_function()
    options = _options(
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    if function is not None:
        options = replace(options, stop=(*options.stop, CALL_END))
    call = GenerateCall(
        request_id=request.state.entry["id"],
        model=body.model,
        options=options,
        messages=tuple(_message(each) for each in body.messages),
        tools=tuple(each.model_dump(exclude_none=True) for each in tools or ()),
        function=function,
    )
    names = frozenset(each.function.name for each in tools or ())
    form = _form("chat", "chatcmpl", body, serving=serving, wants_scores=bool(body.logprobs))

    def new_choice(index: int) -> AnswerChoice:
        if function is not None:
            return AnswerChoice(index=index, parser=BegunCallParser(function))
        return AnswerChoice(index=index, parser=ToolCallParser(names) if tools else None)

    answer = _Answer(body, request, serving=serving, form=form, echoes=[], new_choice=new_choice)
    return await answer.respond([call])


class _Answer:
    """The answer to one request."""

    def __init__(
        self,
        body: CompletionBody | ChatBody,
        request: Request,
        *,
        serving: Serving,
        form: AnswerForm,
        echoes: Sequence[str],
        new_choice: Callable[[int], AnswerChoice],
    ) -> None:
        self._body, self._request, self._serving, self._form = body, request, serving, form
        self._echoes, self._new_choice = echoes, new_choice
        self._usage = Usage()

    async def respond(self, calls: Sequence[GenerateCall]) -> Response:
        is_stream = bool(self._body.stream)
        calls = [replace(call, flush_s=_STREAM_FLUSH_S if is_stream else _WHOLE_FLUSH_S) for call in calls]
        key = self._serving.key_of(self._request)
        pieces = self._serving.generator.stream(
            self._serving.backend,
            calls,
            key=key,
            usage=self._usage,
            entry=self._request.state.entry,
            may_restart=not is_stream,
        )
        num_choices = sum(call.options.n for call in calls)
        headers = self._serving.limiter.headers(key)
        if not is_stream:
            whole = await unless_gone(self._request, self._whole(pieces, num_choices=num_choices))
            return JSONResponse(whole, headers=headers)
        try:
            first = await unless_gone(self._request, anext(pieces))
        except BaseException:
            await pieces.aclose()
            raise
        events = self._events(first, pieces, num_choices=num_choices)
        return _EventStream(events, media_type="text/event-stream", headers=headers | {"Cache-Control": "no-cache"})

    async def _whole(self, pieces: AsyncGenerator[TextDelta, None], *, num_choices: int) -> dict[str, Any]:
        choices = [self._new_choice(index) for index in range(num_choices)]
        n = self._body.n or 1
        async with contextlib.aclosing(pieces):
            async for delta in pieces:
                if delta.restarts:
                    for index in range(delta.index, delta.index + n):
                        choices[index] = self._new_choice(index)
                else:
                    choices[delta.index].add(delta)
        usage = Usage(
            prompt_tokens=self._usage.prompt_tokens, completion_tokens=sum(choice.num_tokens for choice in choices)
        )
        return self._form.whole(choices, usage=usage.as_json(), echoes=self._echoes)

    async def _events(
        self, first: TextDelta, pieces: AsyncGenerator[TextDelta, None], *, num_choices: int
    ) -> AsyncGenerator[bytes, None]:
        """The events of a stream; an error after its beginning is an event too."""
        choices = [self._new_choice(index) for index in range(num_choices)]
        begun: set[int] = set()
        options = self._body.stream_options
        wants_usage = options is not None and options.include_usage

        def event(delta: TextDelta) -> bytes:
            choice, is_first = choices[delta.index], delta.index not in begun
            content = choice.add(delta)
            if is_first and self._echoes:
                content = self._echoes[delta.index] + content
            if not (content or is_first or delta.scores or choice.finish_reason):
                return b""  # held back: it may become a call of a tool
            begun.add(delta.index)
            chunk = self._form.chunk(choice, content=content, scores=delta.scores, is_first=is_first)
            return _event(chunk | ({"usage": None} if wants_usage else {}))

        async with contextlib.aclosing(pieces):
            yield event(first)
            try:
                async for delta in pieces:
                    if written := event(delta):
                        yield written
            except ApiError as error:
                self._request.state.entry["error"] = error.code
                yield _event(error.body())
                return
            if wants_usage:
                yield _event(self._form.usage_chunk(self._usage.as_json()))
            yield b"data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """A stream that ends its generation whenever it ends itself, also in the middle of sending."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """Wait for work, and cancel it when the client closes its connection. Raises: ClientGoneError."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError("the client closed the connection")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _call_with(call: GenerateCall, *, prompt: str | tuple[int, ...], number: int) -> GenerateCall:
    """The call for one of the prompts of a request."""
    return replace(call, prompt=prompt, request_id=f"{call.request_id}-{number}" if number else call.request_id)


def _options(body: CompletionBody | ChatBody, *, max_tokens: int | None, logprobs: int | None) -> TextOptions:
    """How the text is chosen; what is not given has OpenAI's default."""
    given = {
        name: getattr(body, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "n")
        if getattr(body, name) is not None
    }
    return TextOptions(max_tokens=max_tokens, stop=body.stops, logprobs=logprobs, **given)


def _message(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates take it: text alone, and the arguments of calls as objects."""
    shown = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        shown["content"] = "".join(part.text for part in message.content)
    shown.setdefault("content", "")
    if message.role == "developer":
        shown["role"] = "system"
    for call in shown.get("tool_calls", ()):
        with contextlib.suppress(ValueError):  # else they stay text
            call["function"]["arguments"] = parse_json(call["function"]["arguments"])
    return shown


def _form(
    kind: Any, prefix: str, body: CompletionBody | ChatBody, *, serving: Serving, wants_scores: bool
) -> AnswerForm:
    return AnswerForm(
        kind=kind,
        id=f"{prefix}-{secrets.token_hex(12)}",
        model=body.model,
        digest=serving.backend.info.digest,
        wants_scores=wants_scores,
    )


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
