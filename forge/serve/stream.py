"""What every engine has, and the events of one request in the event loop that submitted it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from forge.errors import ForgeError
from forge.serve.request import EngineRequest, EngineStats, TokenEvent


class EventStream(AsyncIterator[TokenEvent]):
    """An iterator over what its engine puts into `queue`; an error there is raised, and is the last item.

    Args:
        cancel: called with the request's id if the iterator is closed before all texts have ended.
    """

    def __init__(self, request: EngineRequest, *, cancel: Callable[[str], None]) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.began = time.monotonic()
        self.queue: asyncio.Queue[TokenEvent | ForgeError] = asyncio.Queue()
        self._cancel = cancel
        self._open = request.sampling.n

    async def __anext__(self) -> TokenEvent:
        if not self._open:
            raise StopAsyncIteration
        event = await self.queue.get()
        if isinstance(event, ForgeError):
            self._open = 0
            raise event
        self._open -= event.finish_reason is not None
        return event

    async def aclose(self) -> None:
        """Cancel the request, unless it is finished."""
        if self._open:
            self._open = 0
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
