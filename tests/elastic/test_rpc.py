"""Authenticated connections: both sides need the secret; broken or silent peers do not affect others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from forge.elastic import rpc as rpc_module
from forge.elastic.rpc import (
    AuthenticationError,
    Channel,
    Endpoint,
    Listener,
    Message,
    SyncChannel,
    connect,
    pack,
    unpack,
)

SECRET = bytes(32)
NONCE_BYTES = 32
LONG_BYTES = 9 * 2**20 + 5


@contextlib.asynccontextmanager
async def listening(serve: Callable[[Channel], Any] | None = None) -> AsyncIterator[Listener]:
    """A listener that answers every message with itself."""
    listener = Listener(host="127.0.0.1", secret=SECRET, serve=serve or echo)
    try:
        yield listener
    finally:
        listener.close()


@contextlib.asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncIterator[Channel]:
    channel = await connect(endpoint, secret=SECRET)
    try:
        yield channel
    finally:
        channel.close()


async def echo(channel: Channel) -> None:
    while True:
        await channel.send(await channel.receive())


async def serves_others(listener: Listener) -> bool:
    async with connected(listener.endpoint) as channel:
        await channel.send({"n": 1})
        return await channel.receive() == {"n": 1}


@contextlib.asynccontextmanager
async def stranger(endpoint: Endpoint) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A raw connection without a handshake."""
    reader, writer = await asyncio.open_connection(*endpoint)
    try:
        yield reader, writer
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def impostor(converse: Callable[[Any, Any], Any]) -> AsyncIterator[Endpoint]:
    """A server that does not know the secret."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            await converse(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[:2]


# Authentication


def test_listener__client_without_secret__connection_closed() -> None:
    async def intrude() -> None:
        served: list[Channel] = []

        async def serve(channel: Channel) -> None:
            served.append(channel)

        async with listening(serve) as listener, stranger(listener.endpoint) as (reader, writer):
            writer.write(secrets.token_bytes(NONCE_BYTES) + secrets.token_bytes(NONCE_BYTES))
            assert len(await reader.read()) == NONCE_BYTES  # the listener's nonce, then EOF
            with pytest.raises((OSError, EOFError)):
                await connect(listener.endpoint, secret=b"another")
        assert served == []

    asyncio.run(intrude())


async def answer_at_random(reader: Any, writer: Any) -> None:
    writer.write(secrets.token_bytes(2 * NONCE_BYTES))
    await reader.readexactly(2 * NONCE_BYTES)


async def reflect(reader: Any, writer: Any) -> None:
    """Return the client's own nonce and response."""
    writer.write(await reader.readexactly(NONCE_BYTES))
    writer.write(await reader.readexactly(NONCE_BYTES))


@pytest.mark.parametrize("converse", [answer_at_random, reflect])
def test_connect__server_without_secret__authentication_error(converse: Callable[[Any, Any], Any]) -> None:
    async def ask() -> None:
        async with impostor(converse) as endpoint:
            with pytest.raises(AuthenticationError):
                await connect(endpoint, secret=SECRET)
            with pytest.raises(AuthenticationError):
                await asyncio.to_thread(SyncChannel, endpoint, secret=SECRET, timeout_s=5)

    asyncio.run(ask())


async def recorded(listener: Listener) -> tuple[bytes, bytes]:
    """The bytes that a valid client and the listener exchange, recorded by a proxy."""
    received: list[bytes] = [b"", b""]

    async def relay(reader: Any, writer: Any) -> None:
        async with stranger(listener.endpoint) as (far_reader, far_writer):
            await asyncio.gather(pass_on(reader, far_writer, 0), pass_on(far_reader, writer, 1))

    async def pass_on(reader: Any, writer: Any, number: int) -> None:
        while text := await reader.read(4096):
            received[number] += text
            writer.write(text)
        writer.close()

    async with impostor(relay) as endpoint, connected(endpoint) as channel:
        await channel.send({"n": 1})
        await channel.receive()
    return received[0], received[1]


def test_listener__replayed_client__connection_closed() -> None:
    async def replay() -> None:
        async with listening() as listener:
            client, _ = await recorded(listener)
            async with stranger(listener.endpoint) as (reader, writer):
                writer.write(client[: 2 * NONCE_BYTES])
                assert len(await reader.read()) == NONCE_BYTES

    asyncio.run(replay())


def test_connect__replayed_server__authentication_error() -> None:
    async def replay() -> None:
        async with listening() as listener:
            _, server = await recorded(listener)

            async def converse(reader: Any, writer: Any) -> None:
                writer.write(server)
                await reader.read()

            async with impostor(converse) as endpoint:
                with pytest.raises(AuthenticationError):
                    await connect(endpoint, secret=SECRET)

    asyncio.run(replay())


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" * 9, bytes(2**20), b"x"])
def test_listener__garbage__other_clients_are_served(garbage: bytes) -> None:
    async def throw() -> None:
        async with listening() as listener, stranger(listener.endpoint) as (_, writer):
            writer.write(garbage)
            assert await serves_others(listener)

    asyncio.run(throw())


def test_listener__silent_client__times_out_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_module, "_HANDSHAKE_TIMEOUT_S", 0.3)

    async def keep_silent() -> None:
        async with listening() as listener, stranger(listener.endpoint) as (reader, _):
            assert await serves_others(listener)
            assert len(await asyncio.wait_for(reader.read(), 5)) == NONCE_BYTES

    asyncio.run(keep_silent())


def test_connect__silent_server__times_out() -> None:
    async def wait(reader: Any, writer: Any) -> None:
        await reader.read()

    async def ask() -> None:
        async with impostor(wait) as endpoint:
            with pytest.raises(TimeoutError):
                await connect(endpoint, secret=SECRET, timeout_s=0.2)
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(SyncChannel, endpoint, secret=SECRET, timeout_s=0.2)

    asyncio.run(ask())


# Messages and bytes


@contextlib.contextmanager
def file_of(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("test")
    os.write(fd, data)
    try:
        yield fd
    finally:
        os.close(fd)


async def return_bytes(channel: Channel) -> None:
    """Answer with the raw bytes of a message."""
    message = await channel.receive()
    data = bytearray(message["bytes"])
    await channel.receive_into(memoryview(data))
    await channel.send(message, raw=bytes(data))


def test_channel__messages_raw_bytes_and_files__round_trip() -> None:
    async def exchange() -> None:
        data, raw = secrets.token_bytes(LONG_BYTES), b"\0raw"
        message: Message = {"text": "ä\n", "list": [1, None, 2.5], "bytes": LONG_BYTES + len(raw)}
        with file_of(b"before" + data + b"after") as fd:
            async with listening(return_bytes) as listener, connected(listener.endpoint) as channel:
                await channel.send(message, raw=raw)
                await channel.send_file(fd, offset=len(b"before"), count=len(data))
                assert await channel.receive() == message
                returned = bytearray(message["bytes"])
                await channel.receive_into(memoryview(returned))
        assert bytes(returned) == raw + data

    asyncio.run(exchange())


def test_channel__messages_arrive_together__separated() -> None:
    async def scenario() -> None:
        received: list[Any] = []
        is_over = asyncio.Event()

        async def serve(channel: Channel) -> None:
            await asyncio.sleep(0.2)  # everything has arrived before the first is read
            for _ in range(2):
                received.append(await channel.receive())
            raw = bytearray(received[1]["count"])
            await channel.receive_into(memoryview(raw))
            received.append(bytes(raw))
            received.append(await channel.receive())
            is_over.set()

        async with listening(serve) as listener, connected(listener.endpoint) as channel:
            await channel.send({"n": 1})
            await channel.send({"count": 100_000}, raw=b"abcde" * 20_000)
            await channel.send({"n": 2})
            await asyncio.wait_for(is_over.wait(), timeout=10)
        assert received == [{"n": 1}, {"count": 100_000}, b"abcde" * 20_000, {"n": 2}]

    asyncio.run(scenario())


def test_pack__endpoints__smaller_and_round_trip() -> None:
    endpoints = [[f"10.0.{number // 256}.{number % 256}", 40000 + number] for number in range(4096)]
    packed = pack(endpoints)
    assert unpack(packed) == endpoints
    assert len(packed) < len(json.dumps(endpoints)) / 2


def test_sync_channel__reads_messages_and_bytes() -> None:
    data = secrets.token_bytes(LONG_BYTES)

    async def serve(channel: Channel) -> None:
        with file_of(data) as fd:
            await channel.send(await channel.receive())
            await channel.send_file(fd, offset=0, count=len(data))

    def read(endpoint: Endpoint) -> tuple[Message, bytes]:
        reader = SyncChannel(endpoint, secret=SECRET, timeout_s=5)
        answer, received = reader.request({"n": 1}), bytearray(len(data))
        reader.receive_into(memoryview(received))
        with pytest.raises((OSError, EOFError)):
            reader.request({"n": 2})
        reader.close()
        return answer, bytes(received)

    async def exchange() -> None:
        async with listening(serve) as listener:
            assert await asyncio.to_thread(read, listener.endpoint) == ({"n": 1}, data)

    asyncio.run(exchange())


def test_channel__concurrent_sends__not_interleaved() -> None:
    async def talk() -> None:
        async with listening() as listener, connected(listener.endpoint) as channel:
            sent = [{"n": n, "text": "x" * 300_000} for n in range(20)]
            sending = asyncio.gather(*(channel.send(message) for message in sent))
            received = [await channel.receive() for _ in sent]
            await sending
            assert sorted(received, key=lambda message: message["n"]) == sent

    asyncio.run(talk())


def test_send_file__file_too_short__error() -> None:
    async def send() -> None:
        with file_of(b"short") as fd:
            async with listening() as listener, connected(listener.endpoint) as channel:
                with pytest.raises(EOFError, match="shorter"):
                    await channel.send_file(fd, offset=0, count=6)

    asyncio.run(send())


def test_receive_into__fast_network__other_tasks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_module, "_MAX_BUSY_BYTES", 1000)
    ours, theirs = socket.socketpair()

    async def receive() -> None:
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        channel = Channel(ours)
        others = asyncio.ensure_future(take_turns())
        await channel.receive_into(memoryview(bytearray(50_000)))
        others.cancel()
        channel.close()
        assert turns >= 50

    monkeypatch.setattr(rpc_module, "_tune", lambda sock: None)  # a Unix socket has no TCP_NODELAY to set
    with contextlib.closing(theirs):
        theirs.sendall(bytes(50_000))  # everything has arrived
        asyncio.run(receive())


# Failing peers


def test_channel__peer_disconnects__receive_and_send_raise() -> None:
    async def vanish() -> None:
        async def serve(channel: Channel) -> None:
            await channel.receive()

        async with listening(serve) as listener, connected(listener.endpoint) as channel:
            waiting = asyncio.ensure_future(channel.receive())
            await channel.send({"n": 1})
            with pytest.raises((OSError, EOFError)):
                await waiting
            with pytest.raises(OSError):
                while True:
                    await channel.send({"n": 2})

    asyncio.run(vanish())


def test_channel__closed_while_waiting__pending_calls_raise() -> None:
    async def close() -> None:
        async def serve(channel: Channel) -> None:
            await asyncio.Event().wait()

        async with listening(serve) as listener, connected(listener.endpoint) as channel:
            receiving = asyncio.ensure_future(channel.receive())
            sending = asyncio.ensure_future(channel.send({}, raw=bytes(64 * 2**20)))
            await asyncio.sleep(0)
            channel.close()
            for waiting in (receiving, sending):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    await asyncio.wait_for(waiting, 5)
            channel.close()

    asyncio.run(close())


def test_listener__message_too_long__connection_closed() -> None:
    async def exaggerate() -> None:
        async with listening() as listener:
            async with connected(listener.endpoint) as channel:
                channel.socket.send(struct.pack("<I", 2**31))
                with pytest.raises((OSError, EOFError)):
                    await channel.receive()
            assert await serves_others(listener)

    asyncio.run(exaggerate())


def test_sync_channel__message_too_long__error() -> None:
    async def serve(channel: Channel) -> None:
        await channel.receive()
        channel.socket.send(struct.pack("<I", 2**31))
        await channel.receive()

    def read(endpoint: Endpoint) -> None:
        reader = SyncChannel(endpoint, secret=SECRET, timeout_s=5)
        with contextlib.closing(reader), pytest.raises(ValueError, match="2147483648 bytes"):
            reader.request({"n": 1})

    async def exaggerate() -> None:
        async with listening(serve) as listener:
            await asyncio.to_thread(read, listener.endpoint)

    asyncio.run(exaggerate())


def test_listener__300_clients_at_once__all_served() -> None:
    async def crowd() -> None:
        async with listening() as listener:
            assert await asyncio.gather(*(serves_others(listener) for _ in range(300))) == [True] * 300

    asyncio.run(crowd())


def test_listener__close__connections_end() -> None:
    async def close() -> None:
        async with listening() as listener, connected(listener.endpoint) as channel:
            listener.close()
            with pytest.raises((OSError, EOFError)):
                await asyncio.wait_for(channel.receive(), 5)
            with pytest.raises(OSError):
                await connect(listener.endpoint, secret=SECRET)

    asyncio.run(close())
