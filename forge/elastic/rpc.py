"""Authenticated connections between the nodes of a run: JSON messages, each optionally followed by raw bytes.

Both ends prove the run's secret before they read anything else, and authenticate every message:
`forge.elastic.handshake`. Nothing is unpickled. Messages are not encrypted; like the tensors that NCCL and gloo
send, they stay within the cluster's own network.

    connection  = handshake, then messages
    message     = length (4 bytes), tag (16 bytes), JSON; then raw bytes, as many as the JSON implies

Raw bytes have no tag: a keyed digest would more than double the CPU time per GiB. The messages around them are
authenticated, with the number of bytes and, for a replica, their checksum. A machine that can change bytes within
the cluster's network can change the tensors of NCCL and gloo too, which know no authentication.

A listener keeps few connections that have not proved the secret, and closes the oldest of them first, so that
connections of other programs cannot use up its file descriptors or keep peers out.

`Channel` moves bytes between the socket and shared memory without copies (`recv_into`, `sendfile`): 1.4 to 1.8
GiB/s at 0.5 CPU seconds per GiB, measured over loopback on two cores. asyncio's streams copy each byte twice more:
0.6 to 1.4 GiB/s at 0.7 to 1.3 CPU seconds per GiB.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from forge.elastic.background import BackgroundTasks
from forge.elastic.handshake import (
    NONCE_BYTES,
    PROOF_BYTES,
    TAG_BYTES,
    AuthenticationError,
    Handshake,
    MessageKey,
    make_nonce,
)
from forge.elastic.messages import from_json, to_json

_HEADER = struct.Struct(f"<I{TAG_BYTES}s")
_MAX_MESSAGE_BYTES = 64 * 2**20
_CONNECT_TIMEOUT_S = 5.0
# A peer sends its nonce and proof within milliseconds.
_PROOF_TIMEOUT_S = 1.0
_MAX_UNPROVED = 64
# The oldest is not closed before, so that many peers that connect at once do not push each other out.
_MIN_UNPROVED_S = 0.05
_POLL_S = 0.005
# How often a client connects if the server closes the connection during the handshake: a listener that is flooded
# with connections does so, and one with another secret.
_MAX_TRIES = 3
_PAUSE_S = 0.05
_CLOSED_BY_PEER = (EOFError, ConnectionResetError, BrokenPipeError)
# Read size: several short messages are read at a time.
_READ_BYTES = 64 * 2**10
_BUFFER_BYTES = 4 * 2**20
# Other tasks run after this many bytes, because a fast network would otherwise block the event loop.
_MAX_BUSY_BYTES = 4 * 2**20

Endpoint = tuple[str, int]
"""Address and port."""
Message = dict[str, Any]


class Channel:
    """An authenticated connection for asyncio; created by `connect` and `Listener`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        _tune(sock)
        self.socket = sock
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._waiting: set[asyncio.Event] = set()
        self._busy_bytes = 0
        """Transferred since other tasks ran."""
        self._read = bytearray()
        """Received and not consumed yet."""
        self._keys: Handshake | None = None

    async def authenticate(self, secret: bytes, *, is_server: bool) -> None:
        """Prove the secret to the other end, and require its proof.

        Raises: OSError (also AuthenticationError), EOFError.
        """
        own_nonce = make_nonce()
        await self._send_all(own_nonce)
        their_nonce = await self._read_exactly(NONCE_BYTES)
        keys = Handshake.of(
            self.socket, secret=secret, own_nonce=own_nonce, their_nonce=their_nonce, is_server=is_server
        )
        if is_server:  # verify the client first, and show an unknown peer nothing
            keys.verify(await self._read_exactly(PROOF_BYTES))
            await self._send_all(keys.own_proof)
        else:
            await self._send_all(keys.own_proof)
            keys.verify(await self._read_exactly(PROOF_BYTES))
        self._keys = keys

    async def send(self, message: Message) -> None:
        """Send a message. Raises: OSError."""
        async with self._sending:
            await self._send_all(_encode(message, key=_require(self._keys).sending))

    async def send_file(self, file: int, *, offset: int, count: int) -> None:
        """Send a range of a file with `sendfile`. Raises: OSError; EOFError if the file is too short."""
        async with self._sending:
            await self._send_file(file, offset, count)

    async def receive(self) -> Message:
        """Receive the next message.

        Raises: OSError (also AuthenticationError); EOFError when the other end has closed; ValueError if the
            bytes are not a message.
        """
        header = await self._read_exactly(_HEADER.size)
        text = await self._read_exactly(_length(header))
        return _decode(header, text, key=_require(self._keys).receiving)

    def encode(self, message: Message) -> bytes:
        """Return the next message to send, for a caller that sends it itself and sends nothing else before."""
        return _encode(message, key=_require(self._keys).sending)

    def decode(self, data: bytes = b"") -> Iterator[Message]:
        """Take complete messages, for a caller that reads the socket. Raises: AuthenticationError, ValueError."""
        if self._read:
            self._read += data
            if len(self._read) < _end_of_message(self._read):
                return
            data = bytes(self._read)
            self._read.clear()
        while len(data) >= (end := _end_of_message(data)):
            header, text, data = data[: _HEADER.size], data[_HEADER.size : end], data[end:]
            yield _decode(header, text, key=_require(self._keys).receiving)
        self._read += data

    async def receive_into(self, view: memoryview) -> None:
        """Fill a buffer with the raw bytes after a message. Raises: OSError, EOFError."""
        early = min(len(view), len(self._read))
        view[:early] = self._read[:early]
        del self._read[:early]
        view = view[early:]
        while view:
            view = view[await self._receive_some(view[:_MAX_BUSY_BYTES]) :]

    def close(self) -> None:
        """Close at once; pending calls raise OSError."""
        if self.socket.fileno() < 0:
            return
        self._loop.remove_reader(self.socket)
        self._loop.remove_writer(self.socket)
        self.socket.close()
        for ready in self._waiting:
            ready.set()

    async def _read_exactly(self, count: int) -> bytes:
        while len(self._read) < count:
            some = bytearray(max(_READ_BYTES, count - len(self._read)))
            self._read += memoryview(some)[: await self._receive_some(memoryview(some))]
        found = bytes(memoryview(self._read)[:count])
        del self._read[:count]
        return found

    async def _receive_some(self, view: memoryview) -> int:
        """Receive at least one byte, at most the size of the view."""
        while True:
            try:
                received = self.socket.recv_into(view)
            except BlockingIOError:
                await self._wait_ready(self._loop.add_reader, self._loop.remove_reader)
                continue
            if not received:
                raise EOFError("the connection was closed")
            await self._run_other_tasks(received)
            return received

    async def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                await self._wait_ready(self._loop.add_writer, self._loop.remove_writer)

    async def _send_file(self, file: int, offset: int, count: int) -> None:
        while count:
            try:
                sent = os.sendfile(self.socket.fileno(), file, offset, min(count, _MAX_BUSY_BYTES))
            except BlockingIOError:
                await self._wait_ready(self._loop.add_writer, self._loop.remove_writer)
                continue
            if not sent:
                raise EOFError("the file is shorter than the announced range")
            offset, count = offset + sent, count - sent
            await self._run_other_tasks(sent)

    async def _run_other_tasks(self, moved_bytes: int) -> None:
        self._busy_bytes += moved_bytes
        if self._busy_bytes >= _MAX_BUSY_BYTES:
            self._busy_bytes = 0
            await asyncio.sleep(0)

    async def _wait_ready(self, add: Callable[..., None], remove: Callable[[socket.socket], bool]) -> None:
        """Wait until the socket can be read or written, or is closed."""
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
    """Accepts connections of peers that know the secret, and passes each to `serve`."""

    def __init__(self, *, host: str, secret: bytes, serve: Callable[[Channel], Awaitable[None]]) -> None:
        """Raises: OSError if the address is not this machine's."""
        self._secret, self._serve = secret, serve
        self._socket = socket.create_server((host, 0), backlog=1024)
        self._socket.setblocking(False)
        self.endpoint: Endpoint = (host, self._socket.getsockname()[1])
        self._unproved: dict[Channel, float] = {}
        """Connections that have not proved the secret yet, the oldest first, and when each was accepted."""
        self._tasks = BackgroundTasks()
        self._tasks.start(self._accept())

    def close(self) -> None:
        """Accept no more connections and close those that are open."""
        self._tasks.cancel()
        self._socket.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._socket)
            except OSError:
                await asyncio.sleep(0.1)  # out of file descriptors, or the peer has already disconnected
                continue
            channel = Channel(sock)
            self._unproved[channel] = loop.time()
            self._tasks.start(self._handle(channel))
            await asyncio.sleep(0)  # accepting many must not keep the others from proving themselves
            await self._limit_unproved()

    async def _limit_unproved(self) -> None:
        """Wait until another connection can be accepted; close the oldest unproved ones if that takes too long."""
        while len(self._unproved) >= _MAX_UNPROVED:
            oldest, since = next(iter(self._unproved.items()))
            if asyncio.get_running_loop().time() - since < _MIN_UNPROVED_S:
                await asyncio.sleep(_POLL_S)
                continue
            del self._unproved[oldest]
            oldest.close()

    async def _handle(self, channel: Channel) -> None:
        try:
            async with asyncio.timeout(_PROOF_TIMEOUT_S):
                await channel.authenticate(self._secret, is_server=True)
            self._unproved.pop(channel, None)
            await self._serve(channel)
        except (OSError, EOFError, ValueError, TimeoutError):
            return  # no valid handshake, or the peer has disconnected, which `serve` has handled
        finally:
            self._unproved.pop(channel, None)
            channel.close()


async def connect(endpoint: Endpoint, *, secret: bytes, timeout_s: float = _CONNECT_TIMEOUT_S) -> Channel:
    """Connect to a `Listener`. Raises: OSError (also TimeoutError and AuthenticationError)."""
    tries = 1
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                return await _connect_once(endpoint, secret)
            except _CLOSED_BY_PEER:
                if tries == _MAX_TRIES:
                    raise _refusal(endpoint) from None
            tries += 1
            await asyncio.sleep(_PAUSE_S)


class SyncChannel:
    """An authenticated connection for a process without an event loop."""

    def __init__(self, endpoint: Endpoint, *, secret: bytes, timeout_s: float) -> None:
        """Connect to a `Listener`. Raises: OSError (also TimeoutError and AuthenticationError)."""
        tries = 1
        while True:
            try:
                self._socket = socket.create_connection(endpoint, timeout=timeout_s)
                self._keys = self._authenticate(secret)
                return
            except _CLOSED_BY_PEER:
                if tries == _MAX_TRIES:
                    raise _refusal(endpoint) from None
            tries += 1
            time.sleep(_PAUSE_S)

    def request(self, message: Message) -> Message:
        """Send a message and receive the answer. Raises: OSError, EOFError, ValueError."""
        self._socket.sendall(_encode(message, key=self._keys.sending))
        header = self._read_exactly(_HEADER.size)
        return _decode(header, self._read_exactly(_length(header)), key=self._keys.receiving)

    def receive_into(self, view: memoryview) -> None:
        """Fill a buffer with the raw bytes after an answer. Raises: OSError, EOFError."""
        while view:
            received = self._socket.recv_into(view)
            if not received:
                raise EOFError("the connection was closed")
            view = view[received:]

    def close(self) -> None:
        self._socket.close()

    def _authenticate(self, secret: bytes) -> Handshake:
        try:
            _tune(self._socket)
            own_nonce = make_nonce()
            self._socket.sendall(own_nonce)
            their_nonce = self._read_exactly(NONCE_BYTES)
            keys = Handshake.of(
                self._socket, secret=secret, own_nonce=own_nonce, their_nonce=their_nonce, is_server=False
            )
            self._socket.sendall(keys.own_proof)
            keys.verify(self._read_exactly(PROOF_BYTES))
            return keys
        except BaseException:
            self._socket.close()
            raise

    def _read_exactly(self, count: int) -> bytes:
        buffer = bytearray(count)
        self.receive_into(memoryview(buffer))
        return bytes(buffer)


async def _connect_once(endpoint: Endpoint, secret: bytes) -> Channel:
    sock = socket.socket()
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, endpoint)
        channel = Channel(sock)
        await channel.authenticate(secret, is_server=False)
        return channel
    except BaseException:
        sock.close()
        raise


def _encode(message: Message, *, key: MessageKey) -> bytes:
    text = to_json(message)
    return _HEADER.pack(len(text), key.tag(text)) + text


def _decode(header: bytes, text: bytes, *, key: MessageKey) -> Message:
    """Return a received message. Raises: AuthenticationError; ValueError if it is not a JSON object."""
    key.verify(_HEADER.unpack(header)[1], text=text)
    return from_json(text)


def _end_of_message(data: bytes | bytearray) -> int:
    """Where the first message ends; of less than a header, where the header ends."""
    return _HEADER.size + (_length(bytes(data[: _HEADER.size])) if len(data) >= _HEADER.size else 0)


def _length(header: bytes) -> int:
    length: int = _HEADER.unpack(header)[0]
    if length > _MAX_MESSAGE_BYTES:
        raise ValueError(f"the message of {length} bytes is longer than {_MAX_MESSAGE_BYTES} bytes")
    return length


def _require(keys: Handshake | None) -> Handshake:
    if keys is None:
        raise AuthenticationError("the connection is not authenticated")
    return keys


def _refusal(endpoint: Endpoint) -> AuthenticationError:
    return AuthenticationError(
        f"{endpoint[0]}:{endpoint[1]} closed the connection during the handshake: its process is ending, it "
        "belongs to another run, or the connection was redirected by address translation or a proxy"
    )


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
