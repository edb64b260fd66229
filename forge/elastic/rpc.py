"""Authenticated connections between the machines of a run: lines of JSON, and rows of bytes after them.

Both sides prove that they know the run's secret before anything else is read: each answers the other's
nonce with its HMAC, so a stranger learns nothing and a recorded answer is worth nothing. Nothing is
unpickled. What is said is not encrypted; like the tensors that NCCL and gloo send, it stays within the
cluster's own network.

    connection  = proofs, then messages
    message     = length (4 bytes), JSON; raw bytes may follow, as many as both sides know from it
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

_NONCE_BYTES = 32
_LENGTH = struct.Struct("<I")
_MOST_MESSAGE_BYTES = 64 * 2**20
_PATIENCE_S = 5.0
# Short messages are read many at a time.
_READ_BYTES = 64 * 2**10
_BUFFER_BYTES = 4 * 2**20
# After so many bytes others get their turn: a network may be faster than what is done with its bytes.
_TURN_BYTES = 4 * 2**20

Endpoint = tuple[str, int]
"""Address and port."""
Message = dict[str, Any]


class AuthenticationError(ConnectionError):
    """Whoever is at the other end does not know the run's secret."""


class Channel:
    """One authenticated connection, for coroutines; use `connect` or `Listener`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        _tune(sock)
        self.socket = sock
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._waiting: set[asyncio.Event] = set()
        self._turn_bytes = 0
        """Moved since others had their turn."""
        self._read = bytearray()
        """Received, and not asked for yet."""

    async def send(self, message: Message, *, raw: bytes = b"") -> None:
        """Send a message, and raw bytes after it. Raises: OSError."""
        async with self._sending:
            text = json.dumps(message).encode()
            await self._send_all(_LENGTH.pack(len(text)) + text + raw)

    async def send_file(self, file: int, *, offset: int, count: int) -> None:
        """Send a part of a file; `sendfile` does not copy it here. Raises: OSError; EOFError if it is too short."""
        async with self._sending:
            await self._send_file(file, offset, count)

    async def receive(self) -> Message:
        """Raises: OSError, EOFError when the other end has closed; ValueError for what is no message."""
        message: Message = json.loads(await self._exactly(_length(await self._exactly(_LENGTH.size))))
        return message

    async def receive_into(self, view: memoryview) -> None:
        """The raw bytes after a message. Raises: OSError, EOFError."""
        early = min(len(view), len(self._read))
        view[:early] = self._read[:early]
        del self._read[:early]
        view = view[early:]
        while view:
            view = view[await self._receive_some(view[:_TURN_BYTES]) :]

    def close(self) -> None:
        """Close at once; whoever waits on it gets an error."""
        if self.socket.fileno() < 0:
            return
        self._loop.remove_reader(self.socket)
        self._loop.remove_writer(self.socket)
        self.socket.close()
        for ready in self._waiting:  # they find it closed
            ready.set()

    async def _exactly(self, count: int) -> bytes:
        while len(self._read) < count:
            some = bytearray(max(_READ_BYTES, count - len(self._read)))
            self._read += memoryview(some)[: await self._receive_some(memoryview(some))]
        found = bytes(memoryview(self._read)[:count])
        del self._read[:count]
        return found

    async def _receive_some(self, view: memoryview) -> int:
        """At least one byte, and no more than there is room for."""
        while True:
            try:
                received = self.socket.recv_into(view)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
                continue
            if not received:
                raise EOFError("the connection was closed")
            await self._take_turns(received)
            return received

    async def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)

    async def _send_file(self, file: int, offset: int, count: int) -> None:
        while count:
            try:
                sent = os.sendfile(self.socket.fileno(), file, offset, min(count, _TURN_BYTES))
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
                continue
            if not sent:
                raise EOFError("the file is shorter than was announced")
            offset, count = offset + sent, count - sent
            await self._take_turns(sent)

    async def _take_turns(self, moved_bytes: int) -> None:
        self._turn_bytes += moved_bytes
        if self._turn_bytes >= _TURN_BYTES:
            self._turn_bytes = 0
            await asyncio.sleep(0)

    async def _ready(self, add: Callable[..., None], remove: Callable[[socket.socket], bool]) -> None:
        """Until the socket can be read or written, or is closed."""
        ready = asyncio.Event()
        self._waiting.add(ready)
        add(self.socket, ready.set)
        try:
            await ready.wait()
        finally:
            self._waiting.discard(ready)
            if self.socket.fileno() >= 0:
                remove(self.socket)


class Listener:
    """Takes connections of those who know the secret, and hands each to `serve`."""

    def __init__(self, *, host: str, secret: bytes, serve: Callable[[Channel], Awaitable[None]]) -> None:
        """Raises: OSError if the address is not this machine's."""
        self._secret, self._serve = secret, serve
        self._socket = socket.create_server((host, 0), backlog=1024)
        self._socket.setblocking(False)
        self.endpoint: Endpoint = (host, self._socket.getsockname()[1])
        self._tasks: set[asyncio.Task[None]] = set()
        self._keep(self._accept())

    def close(self) -> None:
        """Take no more, and end those that are open."""
        for task in list(self._tasks):
            task.cancel()
        self._socket.close()

    def _keep(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._socket)
            except OSError:
                await asyncio.sleep(0.1)  # out of descriptors, or the peer has gone already
                continue
            self._keep(self._welcome(sock))

    async def _welcome(self, sock: socket.socket) -> None:
        channel = Channel(sock)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await _prove(channel, self._secret, is_server=True)
            await self._serve(channel)
        except (OSError, EOFError, ValueError, TimeoutError):
            return  # a stranger, or a peer that has gone: its owner has been told by `serve`
        finally:
            channel.close()


async def connect(endpoint: Endpoint, *, secret: bytes, timeout_s: float = _PATIENCE_S) -> Channel:
    """Raises: OSError (TimeoutError and AuthenticationError are of them), EOFError."""
    sock = socket.socket()
    sock.setblocking(False)
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(sock, endpoint)
            channel = Channel(sock)
            await _prove(channel, secret, is_server=False)
            return channel
    except BaseException:
        sock.close()
        raise


class Reader:
    """One authenticated connection for a process without an event loop."""

    def __init__(self, endpoint: Endpoint, *, secret: bytes, timeout_s: float) -> None:
        """Raises: OSError, EOFError."""
        self._socket = socket.create_connection(endpoint, timeout=timeout_s)
        try:
            _tune(self._socket)
            self._prove(secret)
        except BaseException:
            self._socket.close()
            raise

    def ask(self, message: Message) -> Message:
        """Raises: OSError, EOFError; ValueError for what is no message."""
        text = json.dumps(message).encode()
        self._socket.sendall(_LENGTH.pack(len(text)) + text)
        answer: Message = json.loads(self._exactly(_length(self._exactly(_LENGTH.size))))
        return answer

    def receive_into(self, view: memoryview) -> None:
        """The raw bytes after an answer. Raises: OSError, EOFError."""
        while view:
            received = self._socket.recv_into(view)
            if not received:
                raise EOFError("the connection was closed")
            view = view[received:]

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _prove(self, secret: bytes) -> None:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._socket.sendall(nonce)
        self._socket.sendall(_answer(secret, self._exactly(_NONCE_BYTES), is_server=False))
        if not hmac.compare_digest(self._exactly(_NONCE_BYTES), _answer(secret, nonce, is_server=True)):
            raise AuthenticationError("the other end does not know this run's secret")

    def _exactly(self, count: int) -> bytes:
        buffer = bytearray(count)
        self.receive_into(memoryview(buffer))
        return bytes(buffer)


def pack(value: Any) -> str:
    """JSON, compressed, as a text: for what is long and goes to many."""
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode())).decode()


def unpack(text: str) -> Any:
    """What was packed."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


async def _prove(channel: Channel, secret: bytes, *, is_server: bool) -> None:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    await channel._send_all(nonce)
    theirs = await channel._exactly(_NONCE_BYTES)
    if is_server:  # a stranger is shown nothing that it could use
        claim = await channel._exactly(_NONCE_BYTES)
        if not hmac.compare_digest(claim, _answer(secret, nonce, is_server=False)):
            raise AuthenticationError("a connection without this run's secret")
        await channel._send_all(_answer(secret, theirs, is_server=True))
        return
    await channel._send_all(_answer(secret, theirs, is_server=False))
    if not hmac.compare_digest(await channel._exactly(_NONCE_BYTES), _answer(secret, nonce, is_server=True)):
        raise AuthenticationError("the other end does not know this run's secret")


def _answer(secret: bytes, nonce: bytes, *, is_server: bool) -> bytes:
    role = b"server" if is_server else b"client"  # so that an answer cannot be sent back to whom it came from
    return hmac.new(secret, role + nonce, hashlib.sha256).digest()


def _length(text: bytes) -> int:
    length: int = _LENGTH.unpack(text)[0]
    if length > _MOST_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return length


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
