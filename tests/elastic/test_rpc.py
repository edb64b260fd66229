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
from pathlib import Path
from typing import Any

import pytest

from forge.elastic import rpc as rpc_module
from forge.elastic.handshake import NONCE_BYTES, AuthenticationError
from forge.elastic.messages import pack, unpack
from forge.elastic.rpc import (
    Channel,
    Endpoint,
    Listener,
    Message,
    SyncChannel,
    connect,
)
from tests.support.handshakes import ignore_addresses

SECRET = bytes(32)
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
    async def connect_without_secret() -> None:
        served: list[Channel] = []

        async def serve(channel: Channel) -> None:
            served.append(channel)

        async with listening(serve) as listener, stranger(listener.endpoint) as (reader, writer):
            writer.write(secrets.token_bytes(NONCE_BYTES) + secrets.token_bytes(NONCE_BYTES))
            assert len(await reader.read()) == NONCE_BYTES  # the listener's nonce, then EOF
            with pytest.raises((OSError, EOFError)):
                await connect(listener.endpoint, secret=b"another")
        assert served == []

    asyncio.run(connect_without_secret())


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


@pytest.fixture
def without_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_addresses(monkeypatch)


@pytest.mark.usefixtures("without_addresses")
def test_listener__replayed_client__connection_closed() -> None:
    async def replay() -> None:
        async with listening() as listener:
            client, _ = await recorded(listener)
            async with stranger(listener.endpoint) as (reader, writer):
                writer.write(client)
                assert len(await reader.read()) == NONCE_BYTES

    asyncio.run(replay())


@pytest.mark.usefixtures("without_addresses")
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


def test_listener__handshake_relayed_by_another_address__nothing_served() -> None:
    """A process at a former supervisor's address passes on the handshake, and then speaks itself."""

    async def relay() -> None:
        served: list[Message] = []

        async def serve(channel: Channel) -> None:
            served.append(await channel.receive())

        async with listening(serve) as listener:

            async def converse(reader: Any, writer: Any) -> None:
                async with stranger(listener.endpoint) as (far_reader, far_writer):
                    far_writer.write(await reader.readexactly(NONCE_BYTES))
                    writer.write(await far_reader.readexactly(NONCE_BYTES))
                    far_writer.write(await reader.readexactly(NONCE_BYTES))
                    text = json.dumps({"report": "register", "node": "attacker"}).encode()
                    far_writer.write(struct.pack("<I", len(text)) + text)
                    writer.write(await far_reader.readexactly(NONCE_BYTES))

            async with impostor(converse) as endpoint:
                with pytest.raises(AuthenticationError, match="address translation or a proxy"):
                    await connect(endpoint, secret=SECRET)
                with pytest.raises(AuthenticationError, match="address translation or a proxy"):
                    await asyncio.to_thread(SyncChannel, endpoint, secret=SECRET, timeout_s=5)
            assert await serves_nothing(served)

    asyncio.run(relay())


async def serves_nothing(served: list[Message]) -> bool:
    await asyncio.sleep(0.05)
    return served == []


async def changed_on_the_way(change: Callable[[bytes], bytes], count: int) -> list[Message]:
    """What a listener receives of `count` messages whose bytes are changed on the way, after a valid handshake."""
    served: list[Message] = []
    is_over = asyncio.Event()

    async def serve(channel: Channel) -> None:
        try:
            while True:
                served.append(await channel.receive())
        finally:
            is_over.set()

    async with listening(serve) as listener, connected(listener.endpoint) as channel:
        sent: list[bytes] = []

        async def keep(data: bytes) -> None:
            sent.append(data)

        send, channel._send_all = channel._send_all, keep  # type: ignore[method-assign]
        for number in range(count):
            await channel.send({"n": number})
        assert len({len(data) for data in sent}) == 1
        await send(change(b"".join(sent)))
        channel.socket.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(is_over.wait(), 5)
    return served


FRAME_BYTES = 4 + 16 + len(json.dumps({"n": 0}))


@pytest.mark.parametrize(
    ("change", "num_served"),
    [
        pytest.param(lambda data: data, 3, id="unchanged"),
        pytest.param(lambda data: data.replace(b'"n": 1', b'"n": 7'), 1, id="changed"),
        pytest.param(lambda data: data[:FRAME_BYTES] * 2 + data[FRAME_BYTES:], 1, id="repeated"),
        pytest.param(lambda data: data[FRAME_BYTES:], 0, id="left-out"),
        pytest.param(lambda data: data[FRAME_BYTES : 2 * FRAME_BYTES] + data[:FRAME_BYTES], 0, id="reordered"),
        pytest.param(lambda data: data[:FRAME_BYTES] + bytes(20) + data[FRAME_BYTES:], 1, id="inserted"),
        pytest.param(lambda data: data[:4] + bytes(16) + data[20:], 0, id="without-tag"),
    ],
)
def test_channel__messages_changed_on_the_way__not_served(
    change: Callable[[bytes], bytes], num_served: int
) -> None:
    assert asyncio.run(changed_on_the_way(change, 3)) == [{"n": number} for number in range(num_served)]


def test_channel__own_message_sent_back__authentication_error() -> None:
    async def reflect_messages(channel: Channel) -> None:
        while True:
            channel.socket.send(await asyncio.get_running_loop().sock_recv(channel.socket, 2**16))

    async def ask() -> None:
        async with listening(reflect_messages) as listener, connected(listener.endpoint) as channel:
            await channel.send({"n": 1})
            with pytest.raises(AuthenticationError):
                await channel.receive()

    asyncio.run(ask())


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_listener__900_silent_connections__peers_are_served_and_few_descriptors_used() -> None:
    async def flood() -> None:
        async with listening() as listener:
            before = num_descriptors()
            silent = [socket.create_connection(listener.endpoint) for _ in range(900)]
            try:
                assert await serves_others(listener)
                used = num_descriptors() - before - len(silent)
                assert used <= rpc_module._MAX_UNPROVED + 8
                assert await asyncio.gather(*(serves_others(listener) for _ in range(20))) == [True] * 20
            finally:
                for sock in silent:
                    sock.close()

    asyncio.run(flood())


def test_listener__connections_without_secret__never_close_proved_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_module, "_MAX_UNPROVED", 4)

    async def flood() -> None:
        async with listening() as listener, connected(listener.endpoint) as channel:
            silent = [socket.create_connection(listener.endpoint) for _ in range(50)]
            await asyncio.sleep(0.05)
            await channel.send({"n": 1})
            assert await channel.receive() == {"n": 1}
            for sock in silent:
                sock.close()

    asyncio.run(flood())


def test_connect__connection_closed_during_handshake__tries_again() -> None:
    async def ask() -> None:
        async with listening() as listener:
            closed = 0

            async def converse(reader: Any, writer: Any) -> None:
                nonlocal closed
                closed += 1

            async with impostor(converse) as endpoint:
                for client in (
                    connect(endpoint, secret=SECRET),
                    asyncio.to_thread(SyncChannel, endpoint, secret=SECRET, timeout_s=5),
                ):
                    with pytest.raises(AuthenticationError, match="closed the connection during the handshake"):
                        await client
            assert closed == 2 * rpc_module._MAX_TRIES
            assert await serves_others(listener)

    asyncio.run(ask())


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" * 9, bytes(2**20), b"x"])
def test_listener__garbage__other_clients_are_served(garbage: bytes) -> None:
    async def throw() -> None:
        async with listening() as listener, stranger(listener.endpoint) as (_, writer):
            writer.write(garbage)
            assert await serves_others(listener)

    asyncio.run(throw())


def test_listener__silent_client__times_out_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_module, "_PROOF_TIMEOUT_S", 0.3)

    async def send_nothing() -> None:
        async with listening() as listener, stranger(listener.endpoint) as (reader, _):
            assert await serves_others(listener)
            assert len(await asyncio.wait_for(reader.read(), 5)) == NONCE_BYTES

    asyncio.run(send_nothing())


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
    await channel.send(message)
    with file_of(bytes(data)) as fd:
        await channel.send_file(fd, offset=0, count=len(data))


def test_channel__messages_raw_bytes_and_files__round_trip() -> None:
    async def exchange() -> None:
        data = secrets.token_bytes(LONG_BYTES)
        message: Message = {"text": "ä\n", "list": [1, None, 2.5], "bytes": LONG_BYTES}
        with file_of(b"before" + data + b"after") as fd:
            async with listening(return_bytes) as listener, connected(listener.endpoint) as channel:
                await channel.send(message)
                await channel.send_file(fd, offset=len(b"before"), count=len(data))
                assert await channel.receive() == message
                returned = bytearray(message["bytes"])
                await channel.receive_into(memoryview(returned))
        assert bytes(returned) == data

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
            await channel.send({"count": 100_000})
            with file_of(b"abcde" * 20_000) as fd:
                await channel.send_file(fd, offset=0, count=100_000)
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
            sending = asyncio.ensure_future(channel.send({"text": "x" * 60 * 2**20}))
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
                channel.socket.send(struct.pack("<I16s", 2**31, b""))
                with pytest.raises((OSError, EOFError)):
                    await channel.receive()
            assert await serves_others(listener)

    asyncio.run(exaggerate())


def test_sync_channel__message_too_long__error() -> None:
    async def serve(channel: Channel) -> None:
        await channel.receive()
        channel.socket.send(struct.pack("<I16s", 2**31, b""))
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
    async def open_many() -> None:
        async with listening() as listener:
            assert await asyncio.gather(*(serves_others(listener) for _ in range(300))) == [True] * 300

    asyncio.run(open_many())


def test_listener__close__connections_end() -> None:
    async def close() -> None:
        async with listening() as listener, connected(listener.endpoint) as channel:
            listener.close()
            with pytest.raises((OSError, EOFError)):
                await asyncio.wait_for(channel.receive(), 5)
            with pytest.raises(OSError):
                await connect(listener.endpoint, secret=SECRET)

    asyncio.run(close())
