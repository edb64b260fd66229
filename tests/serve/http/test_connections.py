"""The bound on open connections, by real sockets."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import httpx
import pytest

from forge.serve.http.connection import client_of
from tests.support.command import wait_for
from tests.support.serving import RunningServer, info_of, running

REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Idle:
    """A backend for requests that never reach one."""

    info = info_of()

    async def stats(self) -> dict[str, dict[str, int]]:
        return {}


@pytest.fixture
def opened() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def connect(server: RunningServer, opened: contextlib.ExitStack, *, source: str = "127.0.0.1") -> socket.socket:
    address = ("127.0.0.1", server.port)
    return opened.enter_context(socket.create_connection(address, timeout=20, source_address=(source, 0)))


def read_to_end(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(10_000), b""))


def is_answered(client: socket.socket) -> bool:
    client.sendall(REQUEST)
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        answer += client.recv(10_000)
    return answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sends", [b"", REQUEST, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 900\r\n\r\n"])
def test_connections__of_one_client__more_are_refused_until_one_ends(
    opened: contextlib.ExitStack, sends: bytes
) -> None:
    with running(Idle(), max_connections_per_client=3) as server:
        first, _, third = (connect(server, opened) for _ in range(3))  # without a request, as of slow clients
        wait_for(lambda: server.serving.connections.num_open == 3)
        fourth = connect(server, opened)
        fourth.sendall(sends)
        head, _, body = read_to_end(fourth).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503") and b"Retry-After: 5" in head and b"too_many_connections" in body
        assert is_answered(first) and is_answered(connect(server, opened, source="127.0.0.2"))
        third.close()
        wait_for(lambda: server.serving.connections.num_open == 3)
        assert is_answered(connect(server, opened))


def test_connections__in_all__counted_over_clients_and_requests(opened: contextlib.ExitStack) -> None:
    with running(Idle(), max_connections=2) as server:
        first = connect(server, opened)
        second = connect(server, opened, source="127.0.0.2")
        assert is_answered(first) and is_answered(second)
        assert b"no more than 2" in read_to_end(connect(server, opened, source="127.0.0.3"))
        first.close()
        wait_for(lambda: server.serving.connections.num_open == 1)
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
        assert 'forge_connections_refused_total{limit="all"} 1.0' in metrics and "forge_connections 2.0" in metrics


def test_connections__300_at_once__are_all_closed_and_the_next_one_is_answered(
    opened: contextlib.ExitStack,
) -> None:
    with running(Idle(), max_connections=4) as server:
        held = [connect(server, opened) for _ in range(4)]
        wait_for(lambda: server.serving.connections.num_open == 4)
        answers = []
        for client in [connect(server, opened) for _ in range(300)]:
            with contextlib.suppress(ConnectionResetError):
                answers.append(read_to_end(client)[:12])
        assert set(answers) <= {b"HTTP/1.1 503", b""} and answers.count(b"HTTP/1.1 503") >= 64
        assert is_answered(held[0])
        opened.close()
        wait_for(lambda: not server.serving.connections.num_open and not server.serving.connections.num_refused)
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8::1:2", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_client__address__networks_of_ipv6_are_one(address: str, client: str) -> None:
    assert client_of((address, 1)) == client
