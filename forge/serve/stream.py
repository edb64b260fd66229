"""What every engine has, and the events of one request in the event loop that submitted it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Protocol

from forge.errors import ForgeError
from forge.serve.request import EngineRequest, EngineStats, TokenEvent


class EventStream(AsyncIterator[TokenEvent]):
    """What an engine `put`s into it, as an iterator or by `take`; an error is raised, and is the last item.

    Args:
        cancel: called with the request's id if the iterator is closed before all texts have ended.
    """

    def __init__(self, request: EngineRequest, *, cancel: Callable[[str], None]) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.began = time.monotonic()
        self._cancel = cancel
        self._new: list[TokenEvent] = []
        self._taken: deque[TokenEvent] = deque()
        self._error: ForgeError | None = None
        self._num_open = request.sampling.n
        self._last_s = float("-inf")
        self._has_new, self._has_ended = asyncio.Event(), asyncio.Event()

    def put(self, event: TokenEvent | ForgeError) -> None:
        """Add an event; called in the stream's event loop."""
        if isinstance(event, ForgeError):
            self._error, self._num_open = event, 0
        else:
            self._new.append(event)
            self._num_open -= event.finish_reason is not None
        if not self._num_open:
            self._has_ended.set()
        self._has_new.set()

    async def take(self, *, flush_s: float = 0.0) -> Sequence[TokenEvent]:
        """Wait for events and return all; none at the end of the request.

        Args:
            flush_s: shortest time between two returns, except at the end.

        Raises: what `put` was given.
        """
        await self._has_new.wait()
        wait_s = self._last_s + flush_s - self.loop.time()
        if wait_s > 0 and not self._has_ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._has_ended.wait()
        self._last_s = self.loop.time()
        events, self._new = self._new, []
        if not self._has_ended.is_set():
            self._has_new.clear()
        if not events and self._error is not None:
            raise self._error
        return events

    async def __anext__(self) -> TokenEvent:
        if not self._taken:
            self._taken.extend(await self.take())
        if not self._taken:
            raise StopAsyncIteration
        return self._taken.popleft()

    async def aclose(self) -> None:
        """Cancel the request, unless it is finished."""
        if self._num_open:
            self._num_open = 0
            self._cancel(self.request.request_id)


class TextEngine(Protocol):
    """Writes texts for many requests at once; `submit` is called from asyncio."""

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its text together."""

    def submit(self, request: EngineRequest) -> EventStream:
        """Queue a request. Raises: ArgumentError, QueueFullError, EngineError."""

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Stop; requests that are running fail."""
