"""Requests that are made to be misread, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest

from forge.serve.batcher import Batcher, TextBatch
from forge.serve.calls import TextDelta
from forge.serve.chat_prompts import LongChatError
from forge.serve.http.settings import ServerSettings
from forge.serve.service import ModelService
from tests.support.serving import LocalBackend, RunningServer, info_of, running, write_causal_lm

BODY = b'{"model":"tiny","prompt":"a","max_tokens":1}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
"""What Java's HttpClient sends with its first request."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelService]:
    folder = write_causal_lm(tmp_path_factory.mktemp("model"))
    service = ModelService.start(ServerSettings(name="test", source=str(folder), model_name="tiny"))
    yield service
    service.close()


@pytest.fixture(scope="module")
def server(service: ModelService) -> Iterator[RunningServer]:
    with running(LocalBackend(service), body_timeout_s=1.0) as server:
        yield server


def exchange(server: RunningServer, *parts: bytes, until: Callable[[bytes], bool] = lambda answer: False) -> bytes:
    """Send parts, and read until the server closes the connection or a condition holds."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            client.sendall(part)
        while not until(answer) and (read := client.recv(100_000)):
            answer += read
    return answer


MISREAD = {
    "two lengths": (b"Content-Length: 44\r\nContent-Length: 3\r\n\r\n", BODY),
    "length and chunks": (b"Content-Length: 44\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n"),
    "chunks and length": (b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", b"0\r\n\r\n"),
    "unknown coding": (b"Transfer-Encoding: xchunked\r\n\r\n", b"0\r\n\r\n"),
    "coding behind chunks": (b"Transfer-Encoding: chunked, identity\r\n\r\n", b"0\r\n\r\n"),
    "blank before the colon": (b"Transfer-Encoding : chunked\r\n\r\n", b"0\r\n\r\n"),
    "signed length": (b"Content-Length: +44\r\n\r\n", BODY),
    "list of lengths": (b"Content-Length: 44, 44\r\n\r\n", BODY),
    "endless length": (b"Content-Length: 99999999999999999999999\r\n\r\n", BODY),
    "chunk of 2^72 bytes": (b"Transfer-Encoding: chunked\r\n\r\n", b"ffffffffffffffffff\r\na"),
    "folded header": (b"X: a\r\n b\r\nContent-Length: 44\r\n\r\n", BODY),
    "upgrade with two lengths": (H2C + b"Content-Length: 44\r\nContent-Length: 3\r\n\r\n", BODY),
    "upgrade with both": (H2C + b"Content-Length: 44\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISREAD)
def test_request__whose_end_two_readers_could_see_differently__closes_the_connection(
    server: RunningServer, case: str
) -> None:
    head, body = MISREAD[case]
    answer = exchange(server, POST + head + body + HEALTH)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1


def test_connect__is_refused(server: RunningServer) -> None:
    assert exchange(server, b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("size", [1, 70, 10_000])
def test_upgrade__with_a_body__is_answered_as_http_1_1(server: RunningServer, size: int) -> None:
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    whole = POST + H2C + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY + POST + H2C + chunked + HEALTH
    parts = [whole[start : start + size] for start in range(0, len(whole), size)]
    answer = exchange(server, *parts, until=lambda answer: answer.endswith(b'{"status":"ok"}'))
    assert answer.count(b"HTTP/1.1 200 ") == 3 and answer.count(b'"object":"text_completion"') == 2


def test_websocket__of_a_page__gets_the_page(server: RunningServer) -> None:
    upgrade = b"Connection: close, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: aa\r\n"
    answer = exchange(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ") and b"<!doctype html>" in answer


class NeverReady:
    """A backend of embeddings that do not come."""

    info = info_of(kind="embedding")

    async def generate(self, call: Any) -> AsyncGenerator[Sequence[TextDelta], None]:
        await asyncio.sleep(60)
        yield []


@pytest.mark.slow
def test_pipelined_requests__behind_one_that_runs__are_not_read_without_end() -> None:
    body = b'{"model":"tiny","input":"x"}'
    first = POST.replace(b"completions", b"embeddings") + b"Content-Length: %d\r\n\r\n"
    flood = HEALTH * 20_000
    with running(NeverReady()) as server, socket.create_connection(("127.0.0.1", server.port), timeout=2) as client:
        client.sendall(first % len(body) + body)
        num_sent = 0
        with contextlib.suppress(TimeoutError):
            while num_sent < 200 * 2**20:
                num_sent += client.send(flood)
        assert num_sent < 40 * 2**20, "what the kernel's buffers hold"


@pytest.mark.parametrize("name", ["a" * 5000 + ".js", "%00.js", "%ED%A0%80.js", "..%2f.js", "%2e%2e%2fservice.py"])
def test_page__odd_names__status_404(server: RunningServer, name: str) -> None:
    assert httpx.get(f"{server.url}/page/{name}", trust_env=False).status_code == 404


def test_head__of_health_and_page__status_200(server: RunningServer) -> None:
    assert [httpx.head(server.url + path, trust_env=False).status_code for path in ("/", "/health")] == [200, 200]


def post(server: RunningServer, content: bytes | str, *, kind: str = "application/json") -> httpx.Response:
    headers = {"Content-Type": kind} if kind else {}
    return httpx.post(f"{server.url}/v1/completions", content=content, headers=headers, trust_env=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"model":"tiny","prompt":"a","max_tokens":1,"max_tokens":2}', "the key 'max_tokens' occurs twice"),
        ('{"model":"tiny","prompt":"a","metadata":{"a":1,"b":2,"b":3}}', "the key 'b' occurs twice"),
        ('{"model":"tiny","prompt":"a","metadata":{"\\ud800":1,"\\ud800":2}}', "occurs twice"),
        ('{"model":"tiny","prompt":"a","temperature":NaN}', "JSON has no NaN"),
        ('{"model":"tiny","prompt":"a","metadata":{"a":-Infinity}}', "JSON has no -Infinity"),
        ('{"model":"tiny","prompt":"a","seed":' + "9" * 5000 + "}", "4300 digits"),
        ('{"model":"tiny","metadata":' + '{"a":' * 100_000 + "}", "nested too deeply"),
        (b'{"model":"tiny","prompt":"\xe9"}', "not UTF-8"),
    ],
    ids=range(8),
)
def test_body__json_that_parsers_read_differently__is_refused(
    server: RunningServer, text: bytes | str, reason: str
) -> None:
    answer = post(server, text)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_json") and reason in error["message"]


@pytest.mark.parametrize("kind", ["", "application/x-www-form-urlencoded", "text/plain"])
def test_body__not_said_to_be_json__says_which_header_it_needs(server: RunningServer, kind: str) -> None:
    answer = post(server, BODY, kind=kind)
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        ({"stop": ["a", ""]}, "stop[1]: String should have at least 1 character"),
        ({"prompt": []}, "prompt: List should have at least 1 item"),
        ({"prompt": [[]]}, "prompt[0]: List should have at least 1 item"),
        ({"prompt": [5, -1]}, "prompt[1]: Input should be greater than or equal to 0"),
        ({"prompt": [], "n": 0, "top_p": 2}, "(and 2 more wrong)"),
    ],
)
def test_body__field_of_several_types__the_wrong_place_is_named(
    server: RunningServer, fields: dict[str, Any], message: str
) -> None:
    error = post(server, json.dumps({"model": "tiny", "prompt": "a"} | fields)).json()["error"]
    assert message in error["message"] and "constrained" not in f"{error}"


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-9])
def test_temperature__next_to_0__gives_the_likeliest_text(server: RunningServer, temperature: float) -> None:
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 8}
    answers = [post(server, json.dumps(asked | {"temperature": each})).json() for each in (temperature, 0)]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_tools__numbers_beyond_floats__are_refused(server: RunningServer) -> None:
    tool = '{"type":"function","function":{"name":"now","parameters":{"maximum":1e999}}}'
    text = '{"model":"tiny","messages":[{"role":"user","content":"x"}],"tools":[' + tool + "]}"
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=text,
        headers={"Content-Type": "application/json"},
        trust_env=False,
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools[0].function.parameters"


def test_prompt__of_a_megabyte__is_encoded_beside_the_event_loop(
    service: ModelService, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    encode = type(service._loaded).encode

    def noted(loaded: Any, text: str) -> list[int]:
        threads.append(threading.current_thread())
        return encode(loaded, text)

    monkeypatch.setattr(type(service._loaded), "encode", noted)
    for prompt in ("a", "a" * 2**20):
        post(server, json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 1}))
    assert len(set(threads)) == 2


def test_batch__of_several_requests__fails_for_the_wrong_one_alone() -> None:
    def work(key: Any, batch: TextBatch) -> None:
        if "bad" in batch.texts:
            raise RuntimeError("it cannot be labelled")
        for number, text in enumerate(batch.texts):
            batch.put(TextDelta(index=number, value=text, finish_reason="stop"))

    async def run() -> list[Any]:
        batcher = Batcher(work, max_texts=8)

        async def ask(text: str) -> list[Any]:
            return [delta.value async for deltas in batcher.do([text]) for delta in deltas]

        return list(await asyncio.gather(*map(ask, ("good", "bad", "fine", "well")), return_exceptions=True))

    found = asyncio.run(run())
    assert isinstance(found[1], RuntimeError)
    assert [found[at] for at in (0, 2, 3)] == [["good"], ["fine"], ["well"]]


def test_chat__longer_than_the_model__its_tokens_stay_where_they_were_made(
    service: ModelService, server: RunningServer
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "the fox " * 5_000}]}
    error = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert "tokens, and the model reads 128" in error["message"]
    assert service._chats is not None
    with pytest.raises(LongChatError):
        asyncio.run(service._chats.encode(body["messages"], tools=()))  # type: ignore[arg-type]
