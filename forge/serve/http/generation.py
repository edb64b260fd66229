"""Generation for one request: admission, limits, cancellation, repetition after a lost replica, accounting."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forge.serve.calls import GenerateCall, ModelBackend, ReplicaLostError, TextDelta, TextsCall
from forge.serve.http.admission import Admission, Ticket
from forge.serve.http.api_keys import ApiKey
from forge.serve.http.errors import ApiError
from forge.serve.http.rate_limit import RateLimiter
from forge.serve.http.telemetry import Telemetry

_MAX_ATTEMPTS = 3
_LOST_RETRY_S = 2.0
_MAX_QUEUED_PIECES = 64


@dataclass(slots=True, kw_only=True)
class Usage:
    """The tokens of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_json(self) -> dict[str, int]:
        """The `usage` of an answer."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class Generator:
    """Runs the calls of requests on a backend, within the limits of the server and of each key."""

    def __init__(self, *, admission: Admission, limiter: RateLimiter, telemetry: Telemetry) -> None:
        self._admission, self._limiter, self._telemetry = admission, limiter, telemetry

    async def stream(
        self,
        backend: ModelBackend,
        calls: Sequence[GenerateCall | TextsCall],
        *,
        key: ApiKey,
        usage: Usage,
        entry: dict[str, Any],
        may_restart: bool = False,
    ) -> AsyncGenerator[TextDelta, None]:
        """Generate for all calls at once; text `i` of call `c` has the index `c * n + i`.

        Args:
            key: whose limits hold.
            usage: counted here while the pieces come.
            entry: of the access log; counts are added.
            may_restart: repeat a call whose replica is lost after its first piece; see `TextDelta.restarts`.

        Raises: ApiError.
        """
        self._limiter.admit(key)
        ticket = self._admission.enter()
        limit_s = key.limits.seconds_per_request
        deadline = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
        unfinished = set(range(sum(call.num_texts for call in calls)))
        pieces = _all(backend, calls, may_restart=may_restart)
        try:
            while unfinished:
                async with asyncio.timeout_at(deadline):
                    delta = await anext(pieces)
                self._count(delta, ticket=ticket, key=key, usage=usage, entry=entry)
                if delta.finish_reason is not None:
                    unfinished.discard(delta.index)
                if delta.restarts:
                    unfinished |= set(range(delta.index, delta.index + calls[0].num_texts))
                yield delta
        except TimeoutError:
            self._telemetry.cut("time")
            is_text = calls[0].verb == "generate"
            if not (ticket.is_started and is_text):
                problem = f"the request waited for the {limit_s:g} s that its key allows"
                if not is_text:
                    problem = f"the answer takes more than the {limit_s:g} s that its key allows; send less at once"
                raise ApiError(
                    problem,
                    status=503,
                    code="time_limit",
                    retry_after_s=_LOST_RETRY_S if is_text else None,
                ) from None
            for index in sorted(unfinished):
                yield TextDelta(index=index, finish_reason="length")
        except ReplicaLostError as error:
            self._telemetry.cut("replica")
            raise _lost(error) from error
        except (asyncio.CancelledError, GeneratorExit):
            self._telemetry.cut("client")
            raise
        finally:
            self._limiter.charge(key, num_tokens=usage.prompt_tokens + usage.completion_tokens)
            self._telemetry.finished(route=calls[0].verb, seconds=self._admission.clock() - ticket.began)
            entry |= usage.as_json()
            ticket.close()
            await pieces.aclose()

    def _count(self, delta: TextDelta, *, ticket: Ticket, key: ApiKey, usage: Usage, entry: dict[str, Any]) -> None:
        if not ticket.is_started:
            ticket.start()
        if delta.num_tokens and "first_token_s" not in entry:
            seconds = self._admission.clock() - ticket.began
            self._telemetry.first_token(seconds)
            entry["first_token_s"] = round(seconds, 4)
        if delta.prompt_tokens:
            usage.prompt_tokens += delta.prompt_tokens
            self._telemetry.prompted(delta.prompt_tokens, key=key.name)
        if delta.num_tokens:
            usage.completion_tokens += delta.num_tokens
            self._telemetry.generated(delta.num_tokens, key=key.name)


async def _all(
    backend: ModelBackend, calls: Sequence[GenerateCall | TextsCall], *, may_restart: bool
) -> AsyncGenerator[TextDelta, None]:
    """The pieces of all calls, as they come."""
    if len(calls) == 1:
        async with contextlib.aclosing(_pieces(backend, calls[0], may_restart=may_restart)) as pieces:
            async for delta in pieces:
                yield delta
        return
    queue: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue(maxsize=_MAX_QUEUED_PIECES)

    async def run(call: GenerateCall | TextsCall, base: int) -> None:
        try:
            async with contextlib.aclosing(_pieces(backend, call, may_restart=may_restart)) as pieces:
                async for delta in pieces:
                    await queue.put(replace(delta, index=base + delta.index))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    n = calls[0].num_texts
    tasks = [asyncio.ensure_future(run(call, number * n)) for number, call in enumerate(calls)]
    try:
        num_ended = 0
        while num_ended < len(tasks):
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_ended += 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pieces(
    backend: ModelBackend, call: GenerateCall | TextsCall, *, may_restart: bool
) -> AsyncGenerator[TextDelta, None]:
    """The pieces of a call; it is sent to another replica if its own is lost before its first piece."""
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        has_begun = False
        try:
            async with contextlib.aclosing(backend.generate(call)) as batches:
                async for batch in batches:
                    for delta in batch:
                        has_begun = True
                        yield delta
            return
        except ReplicaLostError:
            if attempt == _MAX_ATTEMPTS or (has_begun and not may_restart):
                raise
            if has_begun:
                yield TextDelta(index=0, restarts=True)


def _lost(error: ReplicaLostError) -> ApiError:
    return ApiError(
        f"the replica that generated the answer was lost: {error}; send the request again",
        status=503,
        code="replica_lost",
        retry_after_s=_LOST_RETRY_S,
    )
