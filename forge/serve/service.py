"""A model that answers the calls of the HTTP server: text by the engine, vectors and labels by single passes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, replace
from typing import Any

from forge.data.chat_template import CallFormError
from forge.errors import ArgumentError, DivergedError
from forge.inference.adapters import load_adapters
from forge.inference.encode import classify_each, embed_each
from forge.inference.generate import generate
from forge.inference.loaded import LoadedModel, load
from forge.inference.masked import fill_each, masked_ids
from forge.inference.sampling import MIN_TEMPERATURE, SamplingParams
from forge.process import one_line
from forge.serve.batcher import Batcher, TextBatch
from forge.serve.calls import (
    GenerateCall,
    ServedModel,
    TextDelta,
    TextOptions,
    TextsCall,
    TokenScore,
)
from forge.serve.chat_prompts import ChatPrompts, LongChatError
from forge.serve.engine import ServingEngine
from forge.serve.http.errors import ApiError
from forge.serve.http.settings import MAX_GENERATED, MAX_SINGLE, ServerSettings
from forge.serve.request import (
    EngineError,
    EngineOptions,
    EngineRequest,
    QueueFullError,
    TokenEvent,
)
from forge.serve.start_check import StartCheck
from forge.serve.stream import EventStream, TextEngine
from forge.serve.vllm.start import VllmPlace, VllmStart, require_servable
from forge.units import counted

_LOWEST_LOGPROB = -9999.0
"""Instead of minus infinity, which JSON does not have; OpenAI's API does the same."""
_SHORT_CHARS = 4096
"""Longer prompts are encoded in a thread: a megabyte takes a second."""
_MAX_WAITING = 1 << 20
"""The server bounds what waits."""


class ModelService:
    """One loaded model.

    Args:
        engine: of a causal language model; None for other kinds.
    """

    def __init__(self, loaded: LoadedModel, *, settings: ServerSettings, engine: TextEngine | None) -> None:
        self._loaded, self._engine = loaded, engine
        self._batcher = Batcher(self._work, max_texts=settings.max_running or MAX_SINGLE)
        template = loaded.chat_template if loaded.kind == "causal-lm" else None
        longest = loaded.max_positions if engine is None else engine.max_length
        self._chats = None
        if template is not None:
            self._chats = ChatPrompts(loaded.text_tokenizer, template=template, max_tokens=longest)
        self.info = ServedModel(
            name=settings.model_name,
            kind=loaded.kind,
            max_positions=longest,
            digest=loaded.digest,
            labels=loaded.labels,
            has_chat_template=template is not None,
            adapters=tuple(settings.named_adapters()),
            takes_tools=template is not None and "tools" in template.source,
        )

    @classmethod
    def start(cls, settings: ServerSettings, *, vllm: VllmPlace | None = None) -> ModelService:
        """Load the model that a server serves.

        Args:
            vllm: where vLLM is installed; without it forge's engine is used.

        Raises: what `load` raises; ClusterError if vLLM cannot be started; RunError if the check fails.
        """
        loaded = load(settings.source, step=settings.step, ema=settings.ema, dtype=None)
        if settings.adapters and loaded.kind != "causal-lm":
            raise ArgumentError(
                f"{loaded.name} is a {loaded.kind} model, and adapters are served over causal-lm ones"
            )
        if settings.engine == "vllm":
            require_servable(loaded)
        elif vllm is not None and not (loaded.kind == "causal-lm" and loaded.is_transformers):
            vllm = None  # --engine auto
        if loaded.kind != "causal-lm":
            return cls(loaded, settings=settings, engine=None)
        check = StartCheck.prepare(loaded, source=settings.source) if settings.verify_start else None
        options = EngineOptions(max_rows=settings.max_running or MAX_GENERATED, max_waiting=_MAX_WAITING)
        adapters = {name: load_adapters(source) for name, source in settings.named_adapters().items()}
        engine: TextEngine
        if vllm is None:
            engine = ServingEngine(loaded, options=options, adapters=adapters)
        else:
            start = VllmStart.prepare(loaded, settings, weights=adapters, options=options)
            loaded = replace(loaded, model=None)  # its memory is vLLM's now
            engine = start.run(loaded, vllm)
        service = cls(loaded, settings=settings, engine=engine)
        if vllm is not None:
            service.info = replace(service.info, engine=f"vllm {vllm.install.version}")
        if check is not None:
            try:
                found = check.run(engine)
            except BaseException:
                service.close()
                raise
            service.info = replace(service.info, start_check=found)
        return service

    def require_healthy(self) -> None:
        """Raises: EngineError if the engine has failed."""
        if self._engine is not None and (error := self._engine.stats().error) is not None:
            raise EngineError(error)

    async def warm_up(self) -> None:
        """Start the process that renders chats, which the first chat would wait for."""
        if self._chats is not None:
            await asyncio.to_thread(self._chats.start)

    def stats(self) -> dict[str, Any]:
        """How busy the engine is."""
        if self._engine is None:
            return {}
        found = self._engine.stats()
        return {
            "running": found.running,
            "waiting": found.waiting,
            "tokens_per_s": found.tokens_per_s,
            "cache_use": found.used_tokens / found.cache_tokens,
            "cached_tokens": found.num_cached_tokens,
        }

    def close(self) -> None:
        """End the engine and the process that renders chats."""
        if self._chats is not None:
            self._chats.close()
        if self._engine is not None:
            self._engine.close()

    async def generate(self, call: GenerateCall | TextsCall) -> AsyncGenerator[Sequence[TextDelta], None]:
        """Do what a call asks for. Raises: ApiError if it cannot be done; EngineError."""
        work = self._single(call) if isinstance(call, TextsCall) else self._generate(call)
        async with contextlib.aclosing(work) as batches:
            async for batch in batches:
                yield batch

    async def _generate(self, call: GenerateCall) -> AsyncGenerator[Sequence[TextDelta], None]:
        assert self._engine is not None, "the routes generate with causal language models only"
        prompt = await self._prompt(call)
        stream = self._submit(call, prompt=prompt)
        pieces = _Pieces(self._loaded, prompt_tokens=len(prompt), wants_scores=call.options.logprobs is not None)
        try:
            while events := await stream.take(flush_s=call.flush_s):
                yield pieces.of(events)
        except ArgumentError as error:  # vLLM refuses it
            raise ApiError(str(error), code="invalid_value") from error
        except DivergedError as error:
            raise _diverged(error) from error
        finally:
            await stream.aclose()

    def _submit(self, call: GenerateCall, *, prompt: Sequence[int]) -> EventStream:
        assert self._engine is not None
        options, room = call.options, self._engine.max_length - len(prompt)
        if room < 1:
            raise self._too_long(call, len(prompt))
        try:
            return self._engine.submit(
                EngineRequest(
                    request_id=f"{call.request_id}-{secrets.token_hex(4)}",
                    prompt=prompt,
                    sampling=_sampling(options, room=room),
                    adapter=None if call.model == self.info.name else call.model,
                    is_repeatable=options.seed is not None,
                )
            )
        except QueueFullError as error:
            raise ApiError(str(error), status=429, code="queue_full", retry_after_s=error.retry_after_s) from error
        except ArgumentError as error:
            raise ApiError(str(error), code="invalid_value") from error

    def _too_long(self, call: GenerateCall, num_tokens: int) -> ApiError:
        return ApiError(
            f"the prompt has {counted(num_tokens, 'token')}, and the model reads {self.info.max_positions}",
            code="context_length_exceeded",
            param="messages" if call.messages else "prompt",
        )

    async def _single(self, call: TextsCall) -> AsyncGenerator[Sequence[TextDelta], None]:
        key = (call.verb, call.options, call.num_candidates)
        try:
            is_fill = call.verb == "fill"
            texts = [masked_ids(self._loaded, str(text)) for text in call.texts] if is_fill else call.texts
            async with contextlib.aclosing(self._batcher.do(texts, key=key)) as batches:
                async for batch in batches:
                    yield batch
        except (ArgumentError, ValueError) as error:
            raise ApiError(one_line(error), code="invalid_value", param="input") from error
        except DivergedError as error:
            raise _diverged(error) from error

    def _work(self, key: tuple[str, TextOptions | None, int], batch: TextBatch) -> None:
        """Called in a thread, one batch at a time."""
        verb, options, num_candidates = key
        if options is not None:
            return self._translate(batch, options)

        def watch(number: int, num_tokens: int) -> bool:
            if is_wanted := batch.is_wanted(number):
                batch.put(TextDelta(index=number, prompt_tokens=num_tokens))
            return is_wanted

        if verb == "embed":
            for number, vector in embed_each(self._loaded, batch.texts, watch=watch):
                batch.put(TextDelta(index=number, value=tuple(map(float, vector)), finish_reason="stop"))
            return None
        if verb == "fill":
            for number, masks in fill_each(self._loaded, batch.texts, num_candidates=num_candidates, watch=watch):
                filled = {"masks": [list(map(asdict, mask)) for mask in masks]}
                batch.put(TextDelta(index=number, value=filled, finish_reason="stop"))
            return None
        for number, found in classify_each(self._loaded, batch.texts, watch=watch):
            value = {"label": found.label, "labels": found.labels, "scores": found.probabilities}
            batch.put(TextDelta(index=number, value=value | {"value": found.value}, finish_reason="stop"))
        return None

    def _translate(self, batch: TextBatch, options: TextOptions) -> None:
        sources = [self._loaded.encode(text) for text in batch.texts]
        counts: dict[int, int] = {}

        def watch(number: int, num_tokens: int) -> bool:
            if not batch.is_wanted(number):
                return False
            num_read = 0 if number in counts else len(sources[number])
            num_new = max(0, num_tokens - counts.get(number, 0))
            counts[number] = counts.get(number, 0) + num_new
            if num_read or num_new:
                batch.put(TextDelta(index=number, prompt_tokens=num_read, num_tokens=num_new))
            return True

        room = self._loaded.max_positions or options.max_tokens or 1
        sampling = _sampling(options, room=max(1, room - 1))
        for made in generate(self._loaded, sources, sampling, watch=watch):
            if batch.is_wanted(made.index):
                batch.put(TextDelta(index=made.index, text=made.text, finish_reason=made.finish_reason))

    async def _prompt(self, call: GenerateCall) -> Sequence[int]:
        if call.messages:
            assert self._chats is not None, "the route requires a template"
            try:
                return await self._chats.encode(call.messages, tools=call.tools, call=call.function)
            except LongChatError as error:
                raise self._too_long(call, error.num_tokens) from error
            except CallFormError as error:
                raise ApiError(
                    f"a call cannot be made certain: {error}; send tool_choice auto, and ask for it in a message",
                    code="unsupported_parameter",
                    param="tool_choice",
                ) from error
            except ValueError as error:
                raise ApiError(str(error), code="invalid_messages", param="messages") from error
        if isinstance(call.prompt, str):
            encode = self._loaded.encode
            is_short = len(call.prompt) <= _SHORT_CHARS
            ids = encode(call.prompt) if is_short else await asyncio.to_thread(encode, call.prompt)
            return ids or list(self._loaded.end_ids[:1])
        return call.prompt or ()


class _Pieces:
    """Turns the events of a request into pieces for its client."""

    def __init__(self, loaded: LoadedModel, *, prompt_tokens: int, wants_scores: bool) -> None:
        self._tokenizer = loaded.tokenizer
        self._prompt_tokens, self._wants_scores = prompt_tokens, wants_scores
        self._counts: dict[int, int] = {}

    def of(self, events: Sequence[TokenEvent]) -> list[TextDelta]:
        """One piece for each text that the events are of."""
        grouped: dict[int, list[TokenEvent]] = {}
        for event in events:
            grouped.setdefault(event.index, []).append(event)
        pieces = [self._piece(index, group) for index, group in grouped.items()]
        if self._prompt_tokens and pieces:
            pieces[0] = replace(pieces[0], prompt_tokens=self._prompt_tokens)
            self._prompt_tokens = 0
        return pieces

    def _piece(self, index: int, events: Sequence[TokenEvent]) -> TextDelta:
        last, before = events[-1], self._counts.get(index, 0)
        self._counts[index] = last.completion_tokens
        if last.finish_reason == "cancelled":
            raise ApiError("the generation was cancelled", status=503, code="cancelled", retry_after_s=1.0)
        return TextDelta(
            index=index,
            text="".join(event.text for event in events),
            num_tokens=last.completion_tokens - before,
            scores=tuple(map(self._score, events)) if self._wants_scores else (),
            finish_reason=last.finish_reason,
        )

    def _score(self, event: TokenEvent) -> TokenScore:
        top = tuple((self._text(token), _finite(logprob)) for token, logprob in event.top_logprobs)
        logprob = event.logprob if event.logprob is not None else _LOWEST_LOGPROB
        return TokenScore(token=self._text(event.token_id), logprob=_finite(logprob), top=top)

    def _text(self, token_id: int) -> str:
        """The text of a token; of a part of a character its name in the vocabulary, as no two may be equal."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text if "\N{REPLACEMENT CHARACTER}" not in text else str(self._tokenizer.id_to_token(token_id))


def _sampling(options: TextOptions, *, room: int) -> SamplingParams:
    seed = secrets.randbits(62) if options.seed is None else options.seed % 2**62
    return SamplingParams(
        max_tokens=room if options.max_tokens is None else min(options.max_tokens, room),
        temperature=options.temperature if options.temperature >= MIN_TEMPERATURE else 0.0,
        top_p=options.top_p,
        top_k=max(0, options.top_k),
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=seed,
        stop=options.stop,
        num_beams=options.num_beams,
        n=options.n,
        logprobs=options.logprobs,
    )


def _diverged(error: DivergedError) -> ApiError:
    return ApiError(str(error), status=500, code="not_numbers")


def _finite(logprob: float) -> float:
    return max(_LOWEST_LOGPROB, logprob)
