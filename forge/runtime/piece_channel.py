"""Pieces of generated texts, from the replicas of a machine to its server's process over a Unix socket.

A streamed answer of Ray costs both sides an object and several messages for each piece. Here one frame carries what
all calls of a replica got in one step of its engine. Ray Serve still places, calls, cancels and replaces replicas.
A replica on another machine cannot open the socket, and returns its pieces through Ray.

The socket is in a folder that only its owner can enter, since frames are pickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge.serve.calls import TextDelta, merge_deltas

Item = Sequence[TextDelta] | Exception | None
"""Pieces of a call; or what it failed with; or None, its end."""
_SIZE_BYTES = 4
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


class PieceReceiver:
    """The server's end: listens, and puts the pieces of each call into its inbox."""

    def __init__(self) -> None:
        self._inboxes: dict[int, Inbox] = {}
        self._calls = itertools.count()
        self._closing = contextlib.ExitStack()
        self._listening: asyncio.Future[str] | None = None

    async def listen(self) -> str:
        """Return the path of the socket, which is opened by the first call; empty if the system refuses it."""
        if self._listening is None:
            self._listening = asyncio.ensure_future(self._listen())
        return await asyncio.shield(self._listening)

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
        ends = (
            asyncio.IncompleteReadError,
            ConnectionError,
            asyncio.CancelledError,
        )  # the last with the event loop
        with contextlib.suppress(*ends), contextlib.closing(writer):
            while True:
                size = int.from_bytes(await reader.readexactly(_SIZE_BYTES), "big")
                for call, item in pickle.loads(await reader.readexactly(size)):
                    if (inbox := self._inboxes.get(call)) is not None:
                        inbox.put(item)


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
        body = pickle.dumps(self._pending, pickle.HIGHEST_PROTOCOL)
        self._pending = []
        if self.is_open:
            self._writer.write(len(body).to_bytes(_SIZE_BYTES, "big") + body)


class PieceSenders:
    """The connections of a replica, by the path of the socket."""

    def __init__(self) -> None:
        self._senders: dict[str, asyncio.Future[PieceSender | None]] = {}

    async def to(self, path: str) -> PieceSender | None:
        """Return the connection to a server, opened by the first call; None if its socket cannot be opened."""
        found = self._senders.get(path)
        if found is None or (found.done() and ((sender := found.result()) is None or not sender.is_open)):
            found = self._senders[path] = asyncio.ensure_future(_connect(path))
        return await asyncio.shield(found)


async def _connect(path: str) -> PieceSender | None:
    if not path:
        return None
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return None
    return PieceSender(writer)
