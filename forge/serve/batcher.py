"""Work on single texts, done for all requests that have come meanwhile at once, in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

_Waiting = tuple[Hashable, Sequence[Any], asyncio.Future[Sequence[Any]]]
_MAX_TEXTS = 256
"""Of one batch: later ones wait for the next."""


class Batcher:
    """Gathers the texts of requests while the model is busy with earlier ones.

    Args:
        work: what is done with texts that share a key; returns a result for each text.
    """

    def __init__(self, work: Callable[[Hashable, Sequence[Any]], Sequence[Any]]) -> None:
        self._work = work
        self._waiting: list[_Waiting] = []
        self._running: asyncio.Task[None] | None = None

    async def do(self, texts: Sequence[Any], *, key: Hashable = None) -> Sequence[Any]:
        """Return the result of every text. A request that is cancelled before its turn is not worked on."""
        future: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, texts, future))
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._run())
        return await future

    async def _run(self) -> None:
        while batch := self._take():
            await self._answer(batch)

    async def _answer(self, batch: list[_Waiting]) -> None:
        """Answer the requests of a batch; one that fails is found by working on each alone."""
        key = batch[0][0]
        texts = [text for _, each, _ in batch for text in each]
        try:
            found: Any = await asyncio.to_thread(self._work, key, texts)
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    await self._answer([one])
            elif not batch[0][2].done():
                batch[0][2].set_exception(error)
            return
        start = 0
        for _, each, future in batch:
            if not future.done():
                future.set_result(found[start : start + len(each)])
            start += len(each)

    def _take(self) -> list[_Waiting]:
        """The next requests of one key; at least one."""
        self._waiting = [one for one in self._waiting if not one[2].done()]
        taken: list[_Waiting] = []
        for one in self._waiting:
            size = sum(len(texts) for _, texts, _ in taken)
            if not taken or (one[0] == taken[0][0] and size + len(one[1]) <= _MAX_TEXTS):
                taken.append(one)
        self._waiting = [one for one in self._waiting if one not in taken]
        return taken
