"""Receivers of alerts: a real loopback server, hostile ones, and real commands."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from forge.runs.alerts.receivers import AlertMessage, Command, ReceiverRefusedError, Webhook
from tests.support.price_server import Answer, serve_prices

MESSAGE = AlertMessage(
    run_id="tiny-1", kind="preempted", text="tiny-1: <!channel> a & b", step=3, time=1.5, count=2
)
_TIMEOUT_S = 0.5


@contextmanager
def raw_server(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does what `talk` does with each connection, and the URL of it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(65536)
                    talk(connection)
                except OSError:  # the client has gone
                    pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/s3cr3tpath"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_webhook__of_a_server__gets_the_text_in_slacks_form() -> None:
    bodies: list[tuple[str, str, bytes]] = []

    def reply(path: str, headers: dict[str, str], body: bytes) -> Answer:
        bodies.append((path, headers["Content-Type"], body))
        return 200, {}, b"ok"

    with serve_prices(reply) as server:
        Webhook(f"{server.url}/hook?x=1").send(MESSAGE)
    ((path, kind, body),) = bodies
    assert (path, kind) == ("/hook?x=1", "application/json")
    assert json.loads(body) == {"text": "tiny-1: &lt;!channel&gt; a &amp; b"}


@pytest.mark.parametrize(
    ("status", "is_final"), [(204, None), (301, True), (307, True), (404, True), (429, False), (503, False)]
)
def test_webhook__by_status__is_sent_refused_or_tried_again(status: int, is_final: bool | None) -> None:
    with serve_prices(lambda *_: (200, {}, b"")) as other:
        answer: Answer = (status, {"Location": other.url} if 300 <= status < 400 else {}, b"")
        with serve_prices(lambda *_: answer) as server:
            hook = Webhook(f"{server.url}/s3cr3tpath")
            if is_final is None:
                hook.send(MESSAGE)
            else:
                with pytest.raises(ReceiverRefusedError if is_final else OSError, match=str(status)) as error:
                    hook.send(MESSAGE)
                assert "s3cr3tpath" not in str(error.value)
        assert not other.asked  # no redirect is followed


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def endless_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Many: " + b"a" * 1000 + b"\r\n")


def silence(connection: socket.socket) -> None:
    connection.recv(1)


def noise(connection: socket.socket) -> None:
    connection.sendall(bytes(range(256)) * 100)


@pytest.mark.parametrize("talk", [drip, endless_headers, silence, noise])
def test_webhook__that_never_answers_properly__fails_in_time(talk: Callable[[socket.socket], None]) -> None:
    began = time.monotonic()
    with raw_server(talk) as url, pytest.raises(OSError) as error:
        Webhook(url, timeout_s=_TIMEOUT_S).send(MESSAGE)
    assert time.monotonic() - began < 10 * _TIMEOUT_S
    assert "s3cr3tpath" not in str(error.value)


def test_webhook__with_an_endless_body__is_sent_and_the_body_not_read() -> None:
    num_sent = 0

    def endless_body(connection: socket.socket) -> None:
        nonlocal num_sent
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
        while True:
            num_sent += connection.send(b"a" * 65536)

    with raw_server(endless_body) as url:
        Webhook(url, timeout_s=5).send(MESSAGE)
    assert num_sent < 64 * 2**20


def test_webhook__without_a_server__fails(closed_port: int) -> None:
    for host in (f"127.0.0.1:{closed_port}", "localhost:1"):
        with pytest.raises(OSError, match="cannot be reached") as error:
            Webhook(f"http://{host}/s3cr3tpath", timeout_s=5).send(MESSAGE)
        assert "s3cr3tpath" not in str(error.value)
    with pytest.raises(OSError, match=r"no-such-host\.invalid"):
        Webhook("https://no-such-host.invalid/s3cr3tpath", timeout_s=5).send(MESSAGE)


def test_webhook__whose_variable_is_not_set_or_bad__is_refused() -> None:
    for url in ("${env:ALERT_URL}", "http://example.com/s3cr3tpath"):
        with pytest.raises(ReceiverRefusedError) as error:
            Webhook(url).send(MESSAGE)
        assert "s3cr3tpath" not in str(error.value)


def test_command__gets_json_on_stdin_without_shell_or_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("PLAIN", "visible")
    code = (
        "import json, os, sys; from pathlib import Path; "
        "Path(sys.argv[1]).write_text(json.dumps([json.load(sys.stdin), dict(os.environ), sys.argv[2]]))"
    )
    Command((sys.executable, "-c", code, str(tmp_path / "out"), "$(touch x); `id`"), folder=tmp_path).send(MESSAGE)
    body, environment, argument = json.loads((tmp_path / "out").read_text())
    assert body == {
        "run_id": "tiny-1",
        "kind": "preempted",
        "text": "tiny-1: <!channel> a & b",
        "step": 3,
        "time": 1.5,
        "count": 2,
    }
    assert environment["PLAIN"] == "visible" and "WANDB_API_KEY" not in environment
    assert argument == "$(touch x); `id`"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_command__that_does_not_end__is_killed_with_its_children(tmp_path: Path) -> None:
    script = f"sleep 60 & echo $! > {tmp_path / 'child'}; sleep 60"
    with pytest.raises(TimeoutError, match=r"sh was killed after 0\.5 s"):
        Command(("/bin/sh", "-c", script), folder=tmp_path, timeout_s=_TIMEOUT_S).send(MESSAGE)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_command__that_fails_or_cannot_start__says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="sh ended with exit status 3"):
        Command(("/bin/sh", "-c", "exit 3"), folder=tmp_path).send(MESSAGE)
    with pytest.raises(OSError, match="sh ended with SIGKILL"):
        Command(("/bin/sh", "-c", "kill -9 $$"), folder=tmp_path).send(MESSAGE)
    with pytest.raises(ReceiverRefusedError, match="absent cannot be started: No such file"):
        Command(("/no/such/absent",), folder=tmp_path).send(MESSAGE)
    Command(("/bin/true",), folder=tmp_path).send(MESSAGE)  # reads nothing
