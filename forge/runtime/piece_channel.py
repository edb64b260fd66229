"""Calls and pieces of generated texts, between a server's process and its replicas on the same machine.

A streamed answer of Ray costs both sides an object and several messages for each piece. Here one frame carries what
all calls of a replica got in one step of its engine, over a Unix socket that the replica opens at its first call. A
server of one replica sends further calls by the same connection. Ray Serve places and replaces replicas, chooses
between several, and calls those on other machines, which cannot open the socket and return pieces through Ray.

The socket is in a folder that only its owner can enter, since frames are pickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from forge.process import one_line
from forge.serve.calls import GenerateCall, ReplicaLostError, TextDelta, TextsCall, merge_deltas

Call = GenerateCall | TextsCall
Item = Sequence[TextDelta] | Exception | None
"""Pieces of a call; or what it failed with; or None, its end."""
_SIZE_BYTES = 4
_AVOID_S = 10.0
"""How long a replica that failed gets calls through Ray alone: twice the period after which Ray replaces it."""
_ENDS = (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError)
"""Of a connection; the last with its event loop."""
_log = logging.getLogger("forge.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnAddress:
    """Where the pieces of a call are sent."""

    path: str
    call: int


class Inbox:
    """The pieces that one call has returned and its caller has not read."""

    def __init__(self) -> None:
        self._pieces: list[TextDelta] = []
        self._last: Exception | None = None
        self.is_over = False
        self._has_items = asyncio.Event()

    def put(self, item: Item) -> None:
        """Add an item; after the end of the call items are ignored."""
        if self.is_over:
            return
        if item is None or isinstance(item, Exception):
            self.is_over, self._last = True, item
        else:
            self._pieces += item
        self._has_items.set()

    async def take(self) -> Sequence[TextDelta] | None:
        """Wait for pieces and return all, merged; None at the end. Raises: what the call failed with."""
        await self._has_items.wait()
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            if not self.is_over:
                self._has_items.clear()
            return merge_deltas(pieces)
        if self._last is not None:
            raise self._last
        return None


class ReplicaConnection:
    """The server's end of the connection that a replica has opened."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._running: dict[int, Inbox] = {}
        self._avoided_until_s = 0.0

    @property
    def takes_calls(self) -> bool:
        return not self._writer.is_closing() and time.monotonic() >= self._avoided_until_s

    def begin(self, number: int, call: Call, inbox: Inbox) -> Callable[[], None]:
        """Send a call. Returns: what ends it early."""
        self._running[number] = inbox
        self._writer.write(_frame([(number, call)]))
        return lambda: self._cancel(number)

    def received(self, number: int, item: Item) -> None:
        """Note an item that the replica has sent."""
        if item is None or isinstance(item, Exception):
            self._running.pop(number, None)
        if isinstance(item, ReplicaLostError):
            self._avoided_until_s = time.monotonic() + _AVOID_S

    def lose(self) -> None:
        """End the calls that were sent by it."""
        running, self._running = self._running, {}
        for inbox in running.values():
            inbox.put(ReplicaLostError("its process has ended"))

    def _cancel(self, number: int) -> None:
        if self._running.pop(number, None) is not None and not self._writer.is_closing():
            self._writer.write(_frame([(number, None)]))


class PieceReceiver:
    """The server's end: listens, and puts the pieces of each call into its inbox."""

    def __init__(self) -> None:
        self._connection: ReplicaConnection | None = None
        self._inboxes: dict[int, Inbox] = {}
        self._calls = itertools.count()
        self._closing = contextlib.ExitStack()
        self._listening: asyncio.Future[str] | None = None

    async def listen(self) -> str:
        """Return the path of the socket, which is opened by the first call; empty if the system refuses it."""
        if self._listening is None:
            self._listening = asyncio.ensure_future(self._listen())
        return await asyncio.shield(self._listening)

    @property
    def connection(self) -> ReplicaConnection | None:
        """The newest connection of a replica, if calls can be sent by it."""
        found = self._connection
        return found if found is not None and found.takes_calls else None

    @contextlib.contextmanager
    def inbox(self) -> Iterator[tuple[int, Inbox]]:
        """Receive the pieces of a call, whose number and inbox are yielded."""
        call = next(self._calls)
        self._inboxes[call] = inbox = Inbox()
        try:
            yield call, inbox
        finally:
            del self._inboxes[call]

    def close(self) -> None:
        """Close the socket and remove it."""
        self._closing.close()

    async def _listen(self) -> str:
        folder = tempfile.TemporaryDirectory(prefix="forge-", ignore_cleanup_errors=True)
        path = str(Path(self._closing.enter_context(folder)) / "pieces")
        try:
            server = await asyncio.start_unix_server(self._receive, path)
        except OSError as error:  # the path is too long
            _log.warning("the replicas return texts through Ray, as %s cannot be opened: %s", path, error)
            return ""
        self._closing.callback(server.close)
        return path

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connection = connection = ReplicaConnection(writer)
        try:
            with contextlib.suppress(*_ENDS), contextlib.closing(writer):
                while True:
                    for number, item in await _read_frame(reader):
                        connection.received(number, item)
                        if (inbox := self._inboxes.get(number)) is not None:
                            inbox.put(item)
        finally:
            connection.lose()


class PieceSender:
    """A replica's end: a connection to one server, used by all its calls."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._pending: list[tuple[int, Item]] = []

    @property
    def is_open(self) -> bool:
        return not self._writer.is_closing()

    def send(self, call: int, item: Item) -> None:
        """Send an item together with the others of this round of the event loop."""
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending.append((call, item))

    def _flush(self) -> None:
        frame, self._pending = _frame(self._pending), []
        if self.is_open:
            self._writer.write(frame)


class PieceSenders:
    """The connections of a replica, by the path of the socket.

    Args:
        work: does a call that came by a connection.
    """

    def __init__(self, work: Callable[[Call], AsyncGenerator[Item, None]]) -> None:
        self._work = work
        self._answering: set[asyncio.Task[None]] = set()
        self._senders: dict[str, asyncio.Future[PieceSender | None]] = {}

    async def to(self, path: str) -> PieceSender | None:
        """Return the connection to a server, opened by the first call; None if its socket cannot be opened."""
        found = self._senders.get(path)
        if found is None or (found.done() and ((sender := found.result()) is None or not sender.is_open)):
            found = self._senders[path] = asyncio.ensure_future(self._connect(path))
        return await asyncio.shield(found)

    async def _connect(self, path: str) -> PieceSender | None:
        if not path:
            return None
        try:
            reader, writer = await asyncio.open_unix_connection(path)
        except OSError:
            return None
        sender = PieceSender(writer)
        answering = asyncio.ensure_future(self._answer_all(reader, writer, sender))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)
        return sender

    async def _answer_all(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sender: PieceSender
    ) -> None:
        """Do the calls that come by a connection, until it ends."""
        running: dict[int, asyncio.Task[None]] = {}
        try:
            with contextlib.suppress(*_ENDS), contextlib.closing(writer):
                while True:
                    for number, call in await _read_frame(reader):
                        if call is not None:
                            running[number] = task = asyncio.ensure_future(self._answer(number, call, sender))
                            task.add_done_callback(partial(_forget, running, number))
                        elif number in running:
                            running[number].cancel()
        finally:
            for task in running.values():
                task.cancel()

    async def _answer(self, number: int, call: Call, sender: PieceSender) -> None:
        try:
            async with contextlib.aclosing(self._work(call)) as items:
                async for item in items:
                    sender.send(number, item)
        except Exception as error:  # a fault of the code; its own class may not be known to the server
            _log.exception("a call failed")
            sender.send(number, RuntimeError(f"{type(error).__name__}: {one_line(error)}"))


def _forget(running: dict[int, asyncio.Task[None]], number: int, task: asyncio.Task[None]) -> None:
    running.pop(number, None)


def _frame(content: Any) -> bytes:
    body = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(_SIZE_BYTES, "big") + body


async def _read_frame(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(_SIZE_BYTES), "big")
    return pickle.loads(await reader.readexactly(size))
