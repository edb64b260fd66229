"""Write texts for many requests at once: the engine behind `forge serve`.

A thread runs the model step by step (`schedule`, `model_step`, `choose`); requests join and leave between steps.
`submit` is called from asyncio and streams a request's tokens. If the thread fails, every request fails with its
error and the engine stays unhealthy, so that its replica is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from forge.errors import ArgumentError, DivergedError, ForgeError
from forge.inference.adapters import AdapterWeights, ServedAdapters
from forge.inference.loaded import LoadedModel
from forge.inference.model_step import PackedModel, SeparateModel, StepModel
from forge.inference.packed_rows import ALIGN, UnsupportedAttention
from forge.inference.prefixes import Prefixes
from forge.inference.running import RunningSequence
from forge.inference.schedule import BatchLimits, PlannedStep, Schedule
from forge.process import one_line
from forge.serve.choose import Choice, choose
from forge.serve.packed_linear import pack_linears
from forge.serve.request import (
    EngineError,
    EngineOptions,
    EngineRequest,
    EngineStats,
    FinishReason,
    QueueFullError,
    TokenEvent,
    require_answerable,
)
from forge.serve.stream import EventStream
from forge.units import counted

_log = logging.getLogger("forge.serve")
_RATE_S = 10.0
_RECENT = 1000
_Events = list[tuple[EventStream | None, TokenEvent | ForgeError]]


@dataclass(slots=True, kw_only=True)
class _Counts:
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    finished: int = 0
    cancelled: int = 0
    drafted: int = 0
    accepted: int = 0
    first_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    written: deque[tuple[float, int]] = field(default_factory=deque)


class ServingEngine:
    """Runs one model for many requests.

    Args:
        loaded: a causal language model; its attention implementation is replaced by one of the same results.
        adapters: by the names that requests choose them by.

    Raises: ArgumentError if adapters do not belong to the model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        options: EngineOptions | None = None,
        adapters: Mapping[str, AdapterWeights] | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        self._tokenizer: Any = getattr(loaded.tokenizer, "backend_tokenizer", loaded.tokenizer)
        self._ends = frozenset(loaded.end_ids)
        self._adapters = ServedAdapters(loaded.model, adapters or {}, digest=loaded.digest)
        self._model, self._reason = _step_model(loaded.model, self._adapters)
        cache_tokens = self.options.cache_tokens // ALIGN * ALIGN
        self.max_length = min(loaded.max_positions or cache_tokens, cache_tokens)
        limits = BatchLimits(
            max_rows=self.options.max_rows, cache_tokens=cache_tokens, step_tokens=self.options.step_tokens
        )
        is_packed = isinstance(self._model, PackedModel)
        self._can_draft = isinstance(self._model, PackedModel) and self._model.can_draft and self.options.may_draft
        self._prefixes = Prefixes(max_tokens=self.options.prefix_tokens if is_packed else 0)
        self._schedule = Schedule(limits=limits, rows=self._model.rows, prefixes=self._prefixes)
        self._inbox: SimpleQueue[list[RunningSequence] | str | None] = SimpleQueue()
        self._streams: dict[str, EventStream] = {}
        self._lock = threading.Lock()
        self._counts = _Counts()
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="forge-engine", daemon=True)
        self._thread.start()
        # A thread that is inside torch when the interpreter ends would abort the process.
        self._finalizer = weakref.finalize(self, _stop, self._inbox, self._thread)

    def submit(self, request: EngineRequest) -> EventStream:
        """Queue a request, and return its events; closing the iterator, or `cancel`, ends it.

        Raises: ArgumentError if the prompt is empty, too long or has unknown tokens; QueueFullError; EngineError.
        """
        sampling = require_answerable(
            request,
            vocabulary=self._tokenizer.get_vocab_size(with_added_tokens=True),
            max_length=self.max_length,
            adapters=self._adapters.names,
        )
        stream = EventStream(request, cancel=self.cancel)
        sequences: list[RunningSequence] = []
        for index in range(sampling.n):
            leader = sequences[0] if sequences else None
            sequence = RunningSequence(
                request_id=request.request_id,
                index=index,
                prompt=request.prompt,
                sampling=sampling,
                adapter=request.adapter,
                is_repeatable=request.is_repeatable or sampling.temperature == 0,
                tokenizer=self._tokenizer,
                leader=leader,
            )
            sequences.append(sequence)
        with self._lock:
            if self._error is not None:
                raise EngineError(self._error)
            if request.request_id in self._streams:
                raise ArgumentError(f"a request with the id {request.request_id} is running")
            waiting = self._num_waiting()
            if waiting and waiting + sampling.n > self.options.max_waiting:
                raise QueueFullError(
                    f"the queue is full ({waiting} of {self.options.max_waiting}); try again later",
                    retry_after_s=self._retry_after_s(),
                )
            self._streams[request.request_id] = stream
            self._inbox.put(sequences)
        return stream

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; what is not running is ignored."""
        self._inbox.put(request_id)

    def stats(self) -> EngineStats:
        counts, now = self._counts, time.monotonic()
        written = sum(number for at, number in tuple(counts.written) if at > now - _RATE_S)
        return EngineStats(
            is_healthy=self._error is None,
            error=self._error,
            is_packed=self._reason is None,
            reason=self._reason,
            running=self._schedule.num_running,
            waiting=self._num_waiting(),
            cache_tokens=self.options.cache_tokens,
            used_tokens=self._schedule.num_tokens,
            prefix_tokens=self._prefixes.num_tokens,
            tokens_per_s=written / _RATE_S,
            time_to_first_token_s=tuple(counts.first_s),
            num_prompt_tokens=counts.prompt,
            num_cached_tokens=counts.cached,
            num_completion_tokens=counts.completion,
            num_finished=counts.finished,
            num_cancelled=counts.cancelled,
            num_preemptions=self._schedule.num_preemptions,
            num_drafted=counts.drafted,
            num_accepted=counts.accepted,
        )

    def close(self) -> None:
        """Stop the thread; requests that are running fail."""
        self._finalizer()

    def _num_waiting(self) -> int:
        return len(self._schedule.waiting) + self._inbox.qsize()

    def _retry_after_s(self) -> float:
        recent = sorted(self._counts.first_s)
        return min(60.0, max(1.0, recent[len(recent) // 2] if recent else 1.0))

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._receive():
                    self._step()
            error = "the engine is closed"
        except Exception as failure:
            error = f"the engine failed: {type(failure).__name__}: {one_line(failure)}"
        with self._lock:
            self._error = error
            streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            _deliver([(stream, EngineError(error))])

    def _receive(self) -> bool:
        """Take in what was submitted; wait for it if nothing runs. Returns False when the engine is closed."""
        is_idle = not self._schedule.num_running and not self._schedule.waiting
        try:
            while True:
                message = self._inbox.get(block=is_idle)
                is_idle = False
                if message is None:
                    return False
                if isinstance(message, str):
                    self._cancel(message)
                else:
                    for sequence in message:
                        self._schedule.add(sequence)
        except Empty:
            return True

    def _cancel(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        events: _Events = []
        for sequence in [one for one in self._schedule if one.request_id == request_id]:
            self._schedule.remove(sequence)
            self._counts.cancelled += 1
            last = sequence.tokens[-1]
            event = self._event(sequence, Choice(token_id=last), text=sequence.text.finish(), reason="cancelled")
            events.append((stream, event))
        with self._lock:
            self._streams.pop(request_id, None)
        _deliver(events)

    def _step(self) -> None:
        step = self._schedule.plan()
        if step is None:
            return
        step = replace(step, draft=self._draft(step))
        logits = self._model.logits(step)
        self._schedule.computed(step)
        due = [(row, one) for row, one in enumerate(self._schedule.decoding) if one.is_complete]
        if not due:
            return
        if step.draft:
            events = self._check(step, logits)
        else:
            kept = logits if len(due) == len(logits) else logits[[row for row, _ in due]]
            events = self._write(kept, [one for _, one in due])
        self._count(events)
        _deliver(events)

    def _draft(self, step: PlannedStep) -> tuple[int, ...]:
        """Guess the next tokens of a text that runs alone, as far as it may go."""
        if len(step.decoding) != 1 or step.prompts or not self._can_draft:
            return ()
        [one] = step.decoding
        if one.num_computed + 1 < len(one.tokens):
            return ()
        room = min(one.sampling.max_tokens - one.num_written, self.max_length - len(one.tokens)) - 1
        return one.drafts.guess(one.tokens, limit=min(room, -len(one.tokens) % ALIGN))

    def _check(self, step: PlannedStep, logits: Tensor) -> _Events:
        """Write the next token, and one more after each guess that is right."""
        [sequence] = step.decoding
        events: _Events = []
        right = 0
        for place, guess in enumerate((*step.draft, -1)):
            events += self._write(logits[place : place + 1], [sequence])
            if sequence not in self._schedule or sequence.tokens[-1] != guess:
                break
            sequence.num_computed += 1
            right += 1
        sequence.drafts.checked(len(step.draft), right=right)
        self._counts.drafted += len(step.draft)
        self._counts.accepted += right
        return events

    def _write(self, logits: Tensor, sequences: Sequence[RunningSequence]) -> _Events:
        """Append a token to each text."""
        chosen = list(zip(sequences, choose(logits, sequences), strict=True))
        events: _Events = [
            (self._streams.get(one.request_id), self._append(one, choice))
            for one, choice in chosen
            if choice.token_id >= 0
        ]
        events += [self._refuse(one) for one, choice in chosen if choice.token_id < 0]
        return events

    def _refuse(self, sequence: RunningSequence) -> tuple[EventStream | None, DivergedError]:
        """End the request of a text for which no token can be chosen."""
        for one in [one for one in self._schedule if one.request_id == sequence.request_id]:
            self._schedule.remove(one)
        with self._lock:
            stream = self._streams.pop(sequence.request_id, None)
        after = counted(len(sequence.tokens), "token")
        text = f"the model's logits after {after} are not numbers: its training has diverged"
        return stream, DivergedError(text)

    def _append(self, sequence: RunningSequence, choice: Choice) -> TokenEvent:
        """Add a token to a text, and take the text out if it ends."""
        self._counts.completion += 1
        text, reason = sequence.append(choice.token_id, ends=self._ends, max_length=self.max_length)
        if reason is not None:
            self._schedule.remove(sequence)
            self._counts.finished += 1
            if not any(one.request_id == sequence.request_id for one in self._schedule):
                with self._lock:
                    self._streams.pop(sequence.request_id, None)
        return self._event(sequence, choice, text=text, reason=reason)

    def _event(
        self, sequence: RunningSequence, choice: Choice, *, text: str, reason: FinishReason | None
    ) -> TokenEvent:
        return TokenEvent(
            index=sequence.index,
            token_id=choice.token_id,
            text=text,
            logprob=choice.logprob,
            top_logprobs=choice.top,
            finish_reason=reason,
            stopped_by=sequence.text.stopped_by,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=sequence.num_cached,
            completion_tokens=sequence.num_written,
        )

    def _count(self, events: _Events) -> None:
        now, counts = time.monotonic(), self._counts
        tokens = [(stream, event) for stream, event in events if isinstance(event, TokenEvent)]
        counts.written.append((now, len(tokens)))
        while counts.written[0][0] < now - _RATE_S:
            counts.written.popleft()
        for stream, event in tokens:
            if event.completion_tokens == 1:
                counts.prompt += event.prompt_tokens
                counts.cached += event.cached_tokens
                if stream is not None:
                    counts.first_s.append(now - stream.began)


def _stop(inbox: SimpleQueue[Any], thread: threading.Thread) -> None:
    inbox.put(None)
    thread.join()


def _step_model(model: Any, adapters: ServedAdapters) -> tuple[StepModel, str | None]:
    """Choose how a model is run, and the reason if its texts are not computed in one batch."""
    if not isinstance(model, PreTrainedModel):
        return SeparateModel(model, adapters=adapters), "it is not a model of transformers"
    try:
        packed = PackedModel(model, adapters=adapters)
    except UnsupportedAttention as error:
        return SeparateModel(model, adapters=adapters), str(error)
    problem = packed.tune(pack_linears(model))
    if problem is not None:
        _log.info("steps run as modules of transformers: %s", problem)
    return packed, None


def _deliver(events: _Events) -> None:
    """Hand events to the event loops of their streams, with one call per loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EventStream, TokenEvent | ForgeError]]] = {}
    for stream, event in events:
        if stream is not None:
            by_loop.setdefault(stream.loop, []).append((stream, event))
    for loop, found in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: its streams have no reader
            loop.call_soon_threadsafe(_put, found)


def _put(events: Sequence[tuple[EventStream, TokenEvent | ForgeError]]) -> None:
    for stream, event in events:
        stream.put(event)
