"""Mutated handshakes, messages and frames against a real listener and a real client: no traceback, nothing served
that was not sent by a peer with the secret, and other peers are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.checkpoint.intervals import Interval, pack
from forge.checkpoint.snapshot_buffer import create_snapshot_buffer
from forge.elastic import rpc
from forge.elastic.handshake import NONCE_BYTES, PROOF_BYTES
from forge.elastic.replicas.store import ReplicaStore
from forge.elastic.rpc import Channel, Listener, Message, connect
from tests.support.fuzz import mutate_bytes, mutate_json, run_cases

SECRET = bytes(range(32))
STEP = 5
DESCRIPTION = json.dumps({"layout": [["master", "weight", 0, 1024, "F32"]], "about": {}})
NAME = {"generation": 1, "rank": 0, "step": STEP}
MESSAGES: list[Message] = [
    {"request": "describe", **NAME},
    {"request": "read", **NAME, "ranges": [[0, 16], [4080, 16]]},
    {
        "request": "replicate",
        **{"generation": 2, "rank": 1, "world_size": 2, "step": 6},
        **{"state": {"progress": {}}, "checksum": 17, "description": DESCRIPTION},
    },
]


def make(folder: Path, rng: random.Random) -> None:
    case: dict[str, Any]
    match rng.randrange(4):
        case 0:
            own = rng.randbytes(NONCE_BYTES + PROOF_BYTES)
            case = {"to": "server", "handshake": mutate_bytes(own * rng.choice([1, 1, 3]), rng).hex()}
        case 1:
            case = {"to": "client", "handshake": mutate_bytes(rng.randbytes(NONCE_BYTES + PROOF_BYTES), rng).hex()}
        case 2:
            chosen = rng.choices(MESSAGES, k=rng.randint(1, 3))
            case = {"to": "store", "messages": [mutate_json(message, rng) for message in chosen]}
        case _:
            case = {"to": "frames", "num_messages": rng.randint(1, 4), "seed": rng.random()}
    (folder / "case.json").write_text(json.dumps(case))


def check(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    problems: list[str] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context)))
        match case["to"]:
            case "server":
                await send_to_server(bytes.fromhex(case["handshake"]))
            case "client":
                await answer_a_client(bytes.fromhex(case["handshake"]))
            case "store":
                await send_to_store(case["messages"])
            case _:
                await change_frames(case["num_messages"], random.Random(case["seed"]))
        gc.collect()  # reports exceptions of tasks that nothing has awaited

    asyncio.run(run())
    assert problems == []


@contextlib.asynccontextmanager
async def raw_connection(listener: Listener) -> Any:
    reader, writer = await asyncio.open_connection(*listener.endpoint)
    try:
        yield reader, writer
    finally:
        writer.close()


async def send_to_server(handshake: bytes) -> None:
    served: list[Message] = []

    async def serve(channel: Channel) -> None:
        served.append(await channel.receive())
        await channel.send(served[-1])

    listener = Listener(host="127.0.0.1", secret=SECRET, serve=serve)
    with contextlib.closing(listener):
        async with raw_connection(listener) as (reader, writer):
            writer.write(handshake)
            if writer.can_write_eof():
                writer.write_eof()
            with contextlib.suppress(OSError):
                shown = await reader.read()
                assert len(shown) <= NONCE_BYTES, "an unknown peer was shown a proof"
            assert served == []
            channel = await connect(listener.endpoint, secret=SECRET)
            await channel.send({"n": 1})
            assert await channel.receive() == {"n": 1}
            channel.close()


async def answer_a_client(handshake: bytes) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)

    async def answer() -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(server)
            with contextlib.suppress(OSError), connection:
                await loop.sock_sendall(connection, handshake)
                connection.shutdown(socket.SHUT_WR)
                while await loop.sock_recv(connection, 4096):
                    pass

    answering = asyncio.ensure_future(answer())
    try:
        channel = await connect(server.getsockname(), secret=SECRET, timeout_s=2.0)
    except (OSError, EOFError):
        return
    finally:
        answering.cancel()
        server.close()
    channel.close()
    raise AssertionError("an unknown server was accepted")


async def send_to_store(messages: list[Message]) -> None:
    store = ReplicaStore(secret=SECRET)
    snapshot = create_snapshot_buffer(
        pack([Interval(kind="master", name="weight", start=0, stop=1024, dtype="F32")])
    )
    snapshot.begin(0).release()
    snapshot.commit(0, step=STEP, state={})
    store.register_buffer(snapshot.fd, generation=1, rank=0, world_size=1)
    listener = Listener(host="127.0.0.1", secret=SECRET, serve=store.serve)
    try:
        channel = await connect(listener.endpoint, secret=SECRET)
        with contextlib.suppress(OSError):
            for message in messages:
                await channel._send_all(_frame(channel, message))
            channel.socket.shutdown(socket.SHUT_WR)
            while await asyncio.get_running_loop().sock_recv(channel.socket, 2**20):
                pass
        channel.close()
        other = await connect(listener.endpoint, secret=SECRET)
        await other.send({"request": "describe", **NAME})
        assert "layout" in await other.receive()
        other.close()
    finally:
        listener.close()
        await asyncio.sleep(0)
        store.close()


def _frame(channel: Channel, message: Any) -> bytes:
    """Return a message as a peer with the secret sends it, also one that is no object."""
    assert channel._keys is not None
    return rpc._encode(message, key=channel._keys.sending)


async def change_frames(num_messages: int, rng: random.Random) -> None:
    """Change the bytes of valid frames: what is served must be the beginning of what was sent."""
    served: list[Message] = []
    is_over = asyncio.Event()

    async def serve(channel: Channel) -> None:
        try:
            while True:
                served.append(await channel.receive())
        finally:
            is_over.set()

    listener = Listener(host="127.0.0.1", secret=SECRET, serve=serve)
    with contextlib.closing(listener):
        channel = await connect(listener.endpoint, secret=SECRET)
        sent: list[Message] = [
            {"n": number, "text": "x" * rng.choice([0, 9, 999])} for number in range(num_messages)
        ]
        frames = b"".join(_frame(channel, message) for message in sent)
        with contextlib.suppress(OSError):
            await channel._send_all(mutate_bytes(frames, rng))
            channel.socket.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(is_over.wait(), 4)
        channel.close()
    assert served == sent[: len(served)]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients try again at once, and the garbage collector looks at the objects of a case only."""
    monkeypatch.setattr(rpc, "_PAUSE_S", 0.0)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("fast")
def test_channel__mutated__clear_errors_only(tmp_path: Path) -> None:
    result = run_cases(
        "channel", make=make, check=check, root=tmp_path, allowed=frozenset({"socket.connect", "socket.bind"})
    )
    assert result.num_cases > 0
