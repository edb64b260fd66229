"""The supervisor's end of an agent's connection, for thousands of agents that send short messages.

Messages are passed on as they arrive, and sent at once as far as the socket takes them; what it does not take is
sent when it can. There is no task for a message and no future to wait for one: about half the CPU time of
`Channel.send` and `Channel.receive`, which connections that carry snapshots use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from forge.elastic.rpc import Channel, Message

_READ_BYTES = 16 * 2**10


class AgentChannel:
    """One agent's authenticated connection. It takes over the `Channel`, which must not be used directly then."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._socket = channel, channel.socket
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._unsent = bytearray()
        """What the socket has not taken yet."""

    async def receive_all(self, handle: Callable[[Message], None]) -> None:
        """Pass each message to `handle` until the connection ends.

        Raises: OSError (also AuthenticationError); EOFError when an end has closed it; ValueError if the bytes are
            not a message; what `handle` raises.
        """
        try:
            self._take(b"", handle)  # what came with the registration
            if not self._ended.done():
                self._loop.add_reader(self._socket, self._read, handle)
            await self._ended
        finally:
            self.close()

    def send(self, message: Message) -> None:
        """Send a message after those before it. If the connection is broken, only `receive_all` raises."""
        if self._ended.done():
            return
        data = self._channel.encode(message)
        if not self._unsent:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                pass
            except OSError:  # what the agent has sent before is still read
                return
            if data:
                self._loop.add_writer(self._socket, self._send_rest)
        self._unsent += data

    def close(self) -> None:
        """Close at once; `receive_all` raises EOFError."""
        self._end(EOFError("the connection was closed"))
        self._channel.close()

    def _read(self, handle: Callable[[Message], None]) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(error)
            return
        if data:
            self._take(data, handle)
        else:
            self._end(EOFError("the connection was closed"))

    def _take(self, data: bytes, handle: Callable[[Message], None]) -> None:
        try:
            for message in self._channel.decode(data):
                if self._ended.done():
                    return
                handle(message)
        except Exception as error:  # of an invalid message: it ends this agent's connection only
            self._end(error)

    def _send_rest(self) -> None:
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _end(self, error: Exception) -> None:
        if self._ended.done():
            return
        self._ended.set_exception(error)
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
