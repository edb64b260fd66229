"""Work on single texts, done for all requests that have come meanwhile at once, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from forge.serve.calls import TextDelta, merge_deltas

_FLUSH_S = 0.25
"""How often a request hears of its tokens while its texts are computed."""


@dataclass(slots=True, kw_only=True, eq=False)
class _BatchedRequest:
    key: Hashable
    texts: Sequence[Any]
    queue: asyncio.Queue[Sequence[TextDelta] | Exception | None] = field(default_factory=asyncio.Queue)
    is_wanted: bool = True
    """False once its caller has gone; set in the event loop, read in the thread."""


class TextBatch:
    """The texts of some requests, which a thread works on."""

    def __init__(
        self, requests: Sequence[_BatchedRequest], *, loop: asyncio.AbstractEventLoop, counts: bool = True
    ) -> None:
        """Args:
        counts: whether tokens are reported; not where the texts are computed again.
        """
        self._loop, self._counts = loop, counts
        self._owners = [(request, number) for request in requests for number in range(len(request.texts))]
        self.texts = [text for request in requests for text in request.texts]
        self._new: dict[_BatchedRequest, list[TextDelta]] = {}
        self._flushed_at = time.monotonic()

    def is_wanted(self, number: int) -> bool:
        """Whether the caller of a text still waits for it."""
        return self._owners[number][0].is_wanted

    def put(self, delta: TextDelta) -> None:
        """Send a piece of a text, whose number in this batch is the piece's index, to its request."""
        request, number = self._owners[delta.index]
        delta = replace(delta, index=number)
        if not self._counts:
            delta = replace(delta, prompt_tokens=0, num_tokens=0)
        self._new.setdefault(request, []).append(delta)
        if time.monotonic() - self._flushed_at >= _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Send what is left."""
        self._flushed_at = time.monotonic()
        for request, deltas in self._new.items():
            self._loop.call_soon_threadsafe(request.queue.put_nowait, merge_deltas(deltas))
        self._new = {}


class Batcher:
    """Gathers the texts of requests while the model is busy with earlier ones.

    Args:
        work: what is done with texts that share a key: puts pieces, of each wanted text a last one.
        max_texts: of one batch; later ones wait for the next.
    """

    def __init__(self, work: Callable[[Any, TextBatch], None], *, max_texts: int) -> None:
        self._work, self._max_texts = work, max_texts
        self._waiting: list[_BatchedRequest] = []
        self._running: asyncio.Task[None] | None = None

    async def do(self, texts: Sequence[Any], *, key: Hashable = None) -> AsyncGenerator[Sequence[TextDelta], None]:
        """Yield pieces of the results. Closing it ends the work on these texts, before or after its begin.

        Others may come between the parts of a request that has more texts than a batch.
        """
        for start in range(0, len(texts), self._max_texts):
            part = self._part(texts[start : start + self._max_texts], key=key)
            async with contextlib.aclosing(part) as batches:
                async for deltas in batches:
                    yield [replace(delta, index=delta.index + start) for delta in deltas]

    async def _part(self, texts: Sequence[Any], *, key: Hashable) -> AsyncGenerator[Sequence[TextDelta], None]:
        request = _BatchedRequest(key=key, texts=texts)
        self._waiting.append(request)
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._run())
        try:
            while (item := await request.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            request.is_wanted = False

    async def _run(self) -> None:
        while requests := self._take():
            await self._answer(requests)

    async def _answer(self, requests: Sequence[_BatchedRequest], *, counts: bool = True) -> None:
        """Answer the requests of a batch; one that fails is found by working on each alone."""
        loop = asyncio.get_running_loop()
        batch, error = TextBatch(requests, loop=loop, counts=counts), None
        try:
            await asyncio.to_thread(self._work, requests[0].key, batch)
        except Exception as failure:
            error = failure
        batch.flush()
        if error is not None and len(requests) > 1:
            for one in requests:
                await self._answer([one], counts=False)
            return
        for request in requests:  # behind the pieces, which have come by way of the event loop
            loop.call_soon(request.queue.put_nowait, error)

    def _take(self) -> list[_BatchedRequest]:
        """The next requests of one key; at least one."""
        self._waiting = [one for one in self._waiting if one.is_wanted]
        taken: list[_BatchedRequest] = []
        for one in self._waiting:
            size = sum(len(each.texts) for each in taken)
            if not taken or (one.key == taken[0].key and size + len(one.texts) <= self._max_texts):
                taken.append(one)
        self._waiting = [one for one in self._waiting if one not in taken]
        return taken
