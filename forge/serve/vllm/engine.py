"""Write texts with vLLM: the engine of `forge serve --engine vllm`.

A request's tokens go to the completions route of vLLM's server, and tokens come back; text, stop strings and the
end of a text are forge's own, so that the HTTP layer above is the same as with forge's engine. What differs: a
seeded text may depend on what else runs, because vLLM rounds differently in batches of other sizes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from forge.errors import ArgumentError, ForgeError
from forge.inference.loaded import LoadedModel
from forge.inference.running import RunningSequence
from forge.process import one_line
from forge.serve.request import (
    EngineError,
    EngineRequest,
    EngineStats,
    TokenEvent,
    require_answerable,
)
from forge.serve.stream import EventStream
from forge.serve.vllm.process import ADAPTER, MODEL, VllmProcess

_URL = "http://vllm/v1/completions"
"""The host is a name only: the connection is a Unix socket."""
_MAX_LINE_BYTES = 8 * 2**20
_RATE_S = 10.0
_RECENT = 1000
_TOKEN = "token_id:"


@dataclass(slots=True, kw_only=True)
class _VllmCounts:
    running: dict[str, list[RunningSequence]] = field(default_factory=dict)
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    finished: int = 0
    cancelled: int = 0
    first_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    written: deque[float] = field(default_factory=deque)


class VllmEngine:
    """The client of one vLLM server.

    Args:
        process: the server; it is ended by `close`.
        cache_tokens: how many tokens' keys and values fit; for statistics.
        adapters: names of the adapters that it serves.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        process: VllmProcess,
        max_length: int,
        cache_tokens: int,
        adapters: Collection[str] = (),
    ) -> None:
        self.max_length = max_length
        self._process, self._cache_tokens, self._adapters = process, cache_tokens, frozenset(adapters)
        self._tokenizer: Any = getattr(loaded.tokenizer, "backend_tokenizer", loaded.tokenizer)
        self._ends = loaded.end_ids
        self._totals = _VllmCounts()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def submit(self, request: EngineRequest) -> EventStream:
        """Send a request, and return its events; closing the iterator cancels it.

        Raises: ArgumentError if the prompt is empty, too long or has unknown tokens; EngineError.
        """
        sampling = require_answerable(
            request,
            vocabulary=self._tokenizer.get_vocab_size(with_added_tokens=True),
            max_length=self.max_length,
            adapters=self._adapters,
        )
        if (error := self._process.error()) is not None:
            raise EngineError(error)
        sequences = [
            RunningSequence(
                request_id=request.request_id,
                index=index,
                prompt=request.prompt,
                sampling=sampling,
                adapter=request.adapter,
                is_repeatable=request.is_repeatable,
                tokenizer=self._tokenizer,
                leader=None,
            )
            for index in range(sampling.n)
        ]
        stream = EventStream(request, cancel=self._cancel)
        task = asyncio.ensure_future(self._run(stream, sequences))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))
        return stream

    def stats(self) -> EngineStats:
        """Count what this client has sent; a text that has no token yet counts as waiting."""
        totals, error = self._totals, self._process.error()
        now = time.monotonic()
        while totals.written and totals.written[0] < now - _RATE_S:
            totals.written.popleft()
        texts = [text for texts in tuple(totals.running.values()) for text in texts]
        waiting = sum(not text.num_written for text in texts)
        return EngineStats(
            is_healthy=error is None,
            error=error,
            is_packed=True,
            reason=None,
            running=len(texts) - waiting,
            waiting=waiting,
            cache_tokens=self._cache_tokens,
            used_tokens=min(self._cache_tokens, sum(len(text.tokens) for text in texts if text.num_written)),
            prefix_tokens=0,
            tokens_per_s=len(totals.written) / _RATE_S,
            time_to_first_token_s=tuple(totals.first_s),
            num_prompt_tokens=totals.prompt,
            num_cached_tokens=totals.cached,
            num_completion_tokens=totals.completion,
            num_finished=totals.finished,
            num_cancelled=totals.cancelled,
            num_preemptions=0,
        )

    def close(self) -> None:
        """End vLLM's server."""
        self._process.close()

    def _cancel(self, request_id: str) -> None:
        """Called in the loop of the request."""
        if (task := self._tasks.get(request_id)) is not None:
            task.cancel()

    async def _run(self, stream: EventStream, sequences: list[RunningSequence]) -> None:
        """Put the events of a request into its stream."""
        totals, request = self._totals, stream.request
        unfinished = set(range(len(sequences)))
        totals.running[request.request_id] = sequences
        try:
            async with aclosing(self._choices(self._body(request))) as choices:
                async for choice in choices:
                    if choice["index"] in unfinished:  # else a stop string ended it, of which vLLM does not know
                        self._deliver(choice, sequences[choice["index"]], stream=stream, unfinished=unfinished)
                    if not unfinished:
                        return
            raise EngineError(self._process.error() or "vLLM ended an answer before its text was complete")
        except ForgeError as error:
            stream.put(error)
        finally:
            totals.cancelled += len(unfinished)
            del totals.running[request.request_id]

    def _deliver(
        self, choice: Mapping[str, Any], sequence: RunningSequence, *, stream: EventStream, unfinished: set[int]
    ) -> None:
        totals = self._totals
        for event in self._tokens(choice, sequence):
            if event.completion_tokens == 1:
                totals.prompt += event.prompt_tokens
                totals.first_s.append(time.monotonic() - stream.began)
            stream.put(event)
            if event.finish_reason is not None:
                unfinished.discard(event.index)
                totals.finished += 1
                return

    async def _choices(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The choices of a stream of vLLM. Closing it closes the connection, which ends the generation."""
        connector = aiohttp.UnixConnector(path=self._process.address)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=None)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector, timeout=timeout, read_bufsize=_MAX_LINE_BYTES, trust_env=False
                ) as session,
                session.post(_URL, json=body) as response,
            ):
                if response.status != 200:
                    raise _refused(response.status, await response.text())
                async for line in response.content:
                    data = line.removeprefix(b"data:").strip()
                    if not line.startswith(b"data:") or data == b"[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise EngineError(f"vLLM: {event['error'].get('message', event['error'])}")
                    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
                    self._totals.cached += details.get("cached_tokens") or 0
                    for choice in event["choices"]:
                        yield choice
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            raise EngineError(self._process.error() or f"vLLM does not answer: {one_line(error)}") from error

    def _body(self, request: EngineRequest) -> dict[str, Any]:
        """The request in vLLM's form: what ends a text is given by number, and stop strings stay here."""
        sampling = request.sampling
        ends = [*sampling.stop_ids, *(() if sampling.ignore_end else self._ends)]
        body: dict[str, Any] = {
            "model": MODEL if request.adapter is None else f"{ADAPTER}{request.adapter}",
            "request_id": request.request_id,
            "prompt": list(request.prompt),
            "add_special_tokens": False,
            "max_tokens": min(sampling.max_tokens, self.max_length - len(request.prompt)),
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": list(dict.fromkeys(ends)),
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.is_repeatable and sampling.temperature > 0:
            body["seed"] = sampling.seed
        if sampling.logprobs is not None:
            body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        return body

    def _tokens(self, choice: Mapping[str, Any], sequence: RunningSequence) -> Iterator[TokenEvent]:
        """An event for each token of a piece of vLLM's answer."""
        scores = choice.get("logprobs") or {}
        for place, token_id in enumerate(choice.get("token_ids") or ()):
            text, reason = sequence.append(token_id, ends=self._ends, max_length=self.max_length)
            self._totals.completion += 1
            self._totals.written.append(time.monotonic())
            yield TokenEvent(
                index=sequence.index,
                token_id=token_id,
                text=text,
                logprob=scores["token_logprobs"][place] if scores else None,
                top_logprobs=_top(scores, place, count=sequence.sampling.logprobs or 0),
                finish_reason=reason,
                stopped_by=sequence.text.stopped_by,
                prompt_tokens=sequence.num_prompt,
                completion_tokens=sequence.num_written,
            )


def _top(scores: Mapping[str, Any], place: int, *, count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens; vLLM adds the chosen one to them if it is not among them."""
    found = (scores.get("top_logprobs") or [{}] * (place + 1))[place] or {}
    pairs = [(int(name.removeprefix(_TOKEN)), float(value)) for name, value in found.items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:count])


def _refused(status: int, text: str) -> Exception:
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = text[:300]
    if 400 <= status < 500:
        return ArgumentError(f"vLLM refuses the request: {' '.join(message.split())[:300]}")
    return EngineError(f"vLLM answers {status}: {' '.join(message.split())[:300]}")
