"""Embeddings, classification and translation over tiny models; hostile chat templates and slow headers."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from forge.data.chat_template import find_chat_template
from forge.data.tokenizer import load_tokenizer
from forge.inference.encode import classify, embed
from forge.inference.loaded import load
from forge.inference.masked import fill_masks, masked_ids
from forge.serve.calls import GenerateCall, TextDelta, TextsCall
from forge.serve.chat_prompts import ChatPrompts
from forge.serve.http import connection
from forge.serve.http.api_keys import KEYS_VARIABLE, KeyLimits, KeyRing, keys_of_environment, new_key
from forge.serve.http.settings import ServerSettings
from forge.serve.service import ModelService
from tests.support.command import wait_for
from tests.support.objectives import write_tokenizer
from tests.support.serving import LocalBackend, RunningServer, info_of, running, write_model

TEXTS = ["the quick brown fox", "dog", "pack my box with five dozen liquor jugs"]
_BERT = BertConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64, id2label={0: "bad", 1: "good", 2: "odd"},
)  # fmt: skip
_T5 = T5Config(
    vocab_size=300, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, pad_token_id=2, eos_token_id=0,
    decoder_start_token_id=2,
)  # fmt: skip


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def backend_of(folder: Path, **settings: Any) -> LocalBackend:
    options = ServerSettings(name="test", source=str(folder), model_name="tiny", **settings)
    return LocalBackend(ModelService.start(options))


def test_embeddings__texts__are_the_models_vectors(tmp_path: Path) -> None:
    folder = write_model(tmp_path, lambda: BertModel(_BERT))
    expected = np.stack(embed(load(folder), TEXTS))
    with running(backend_of(folder)) as server, client_of(server) as client:
        found = client.embeddings.create(model="tiny", input=TEXTS)  # base64, as the client asks for
        assert np.allclose([each.embedding for each in found.data], expected, atol=1e-6)
        short = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=5, encoding_format="float")
        assert np.linalg.norm(short.data[0].embedding) == pytest.approx(1)
        assert found.usage.prompt_tokens > len(TEXTS)
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model="tiny", input="a", dimensions=500)
        with pytest.raises(openai.BadRequestError, match="continues no text"):
            client.completions.create(model="tiny", prompt="a")


def test_classify__texts_of_many_clients__are_the_models_labels(tmp_path: Path) -> None:
    folder = write_model(tmp_path, lambda: BertForSequenceClassification(_BERT))
    loaded = load(folder)
    expected = [each.probabilities for each in classify(loaded, TEXTS)]
    pair = classify(loaded, [("the", "dog")])[0].probabilities
    with running(backend_of(folder)) as server, ThreadPoolExecutor(8) as pool:

        def ask(value: Any) -> Any:
            body = {"model": "tiny", "input": value}
            return httpx.post(f"{server.url}/v1/classify", json=body, trust_env=False, timeout=60).json()["data"]

        for answer in pool.map(ask, [TEXTS] * 8):
            assert [each["scores"] for each in answer] == [pytest.approx(scores) for scores in expected]
        assert ask([["the", "dog"]])[0]["scores"] == pytest.approx(pair)
        assert ask("dog")[0]["label"] == max(expected[1], key=expected[1].__getitem__)


def test_fill_mask__texts__have_the_likeliest_tokens_for_each_mask(tmp_path: Path) -> None:
    folder = write_model(tmp_path, lambda: BertForMaskedLM(_BERT))
    loaded = load(folder)
    texts = ["the [MASK] fox", "[MASK] my [MASK]"]
    expected = fill_masks(loaded, [masked_ids(loaded, text) for text in texts], num_candidates=2)
    with running(backend_of(folder)) as server:

        def ask(route: str = "fill-mask", **body: Any) -> httpx.Response:
            asked = {"model": "tiny", **body}
            return httpx.post(f"{server.url}/v1/{route}", json=asked, trust_env=False, timeout=60)

        found = ask(input=texts, top_k=2).json()
        assert [each["masks"] for each in found["data"]] == [
            [list(map(asdict, m)) for m in one] for one in expected
        ]
        assert found["usage"]["prompt_tokens"] == sum(len(masked_ids(loaded, text)) for text in texts)
        assert len(ask(input="[MASK]").json()["data"][0]["masks"][0]) == 5
        for wrong in ({"input": "no mask"}, {"input": "[MASK]", "top_k": 0}, {"input": "[MASK]", "temperature": 1}):
            assert ask(**wrong).status_code == 400, wrong
        assert "its route is /v1/fill-mask" in ask("classify", input="a").json()["error"]["message"]


def test_translate__sources__have_targets(tmp_path: Path) -> None:
    folder = write_model(tmp_path, lambda: T5ForConditionalGeneration(_T5))
    with running(backend_of(folder)) as server:
        body = {"model": "tiny", "input": TEXTS, "max_tokens": 5}
        answer = httpx.post(f"{server.url}/v1/translate", json=body, trust_env=False, timeout=60).json()
        assert len(answer["data"]) == len(TEXTS)
        assert {each["finish_reason"] for each in answer["data"]} <= {"stop", "length"}
        assert 0 < answer["usage"]["completion_tokens"] <= 15


def test_translate__max_running__bounds_the_texts_that_are_computed_at_once(tmp_path: Path) -> None:
    folder = write_model(tmp_path, lambda: T5ForConditionalGeneration(_T5))
    body = {"model": "tiny", "input": [*TEXTS, "fox", "the dog"], "max_tokens": 5}
    answers, rows = [], []
    for limit in (None, 2):
        backend, sizes = backend_of(folder, max_running=limit), set[int]()
        encoder = backend.service._loaded.model.encoder
        encoder.register_forward_hook(lambda _, __, found, sizes=sizes: sizes.add(len(found.last_hidden_state)))
        with running(backend) as server:
            answer = httpx.post(f"{server.url}/v1/translate", json=body, trust_env=False, timeout=60).json()
        answers.append([(each["index"], each["text"]) for each in answer["data"]])
        rows.append(sizes)
    assert answers[0] == answers[1] and len(answers[0]) == 5
    assert max(rows[0]) > 2 >= max(rows[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}", "more than"),
        ("{{ raise_exception('no thanks') }}", "no thanks"),
        ("{{ messages[0].__class__.__mro__ }}", "template"),
        ("{{ 'a' * 10**12 }}", "template"),
    ],
)
def test_chat_template__hostile__is_refused_and_the_next_one_answered(
    tmp_path: Path, template: str, message: str
) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    found = find_chat_template(tokenizer, own="{% if messages[0].content == 'x' %}" + template + "{% endif %}y")
    assert found is not None
    prompts = ChatPrompts(tokenizer, template=found)
    try:
        with pytest.raises(ValueError, match=message):
            asyncio.run(prompts.encode([{"role": "user", "content": "x"}], tools=()))
        assert asyncio.run(prompts.encode([{"role": "user", "content": "z"}], tools=()))
    finally:
        prompts.close()


class NoModel:
    """A backend for requests that never reach one."""

    info = info_of()


@pytest.mark.parametrize("is_later", [False, True])
def test_headers__that_do_not_end__close_the_connection(monkeypatch: pytest.MonkeyPatch, is_later: bool) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.3)
    with running(NoModel()) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        if is_later:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):  # head and body may come apart
                answer += client.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        answer = b"".join(iter(lambda: client.recv(10_000), b""))
        assert answer.startswith(b"HTTP/1.1 400")


def test_headers__too_large__close_the_connection() -> None:
    with running(NoModel()) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(OSError, match=r"reset|pipe"):
            for number in range(10_000):
                client.sendall(f"X-{number}: {'a' * 1000}\r\n".encode())


@pytest.mark.parametrize("start", [b"0\r\n", b"5;"])
def test_trailers_and_chunk_extensions__too_large__close_the_connection(start: bytes) -> None:
    with running(NoModel()) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(
            b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n" + start
        )
        with pytest.raises(OSError, match=r"reset|pipe"):
            for _ in range(10_000):
                client.sendall(b"X: " + b"a" * 1000 + (b"" if start == b"5;" else b"\r\n"))


def test_body__in_chunks_larger_than_headers_may_be__arrives() -> None:
    chunk = b"%x\r\n%s\r\n" % (50_000, b"[" * 50_000)
    with running(NoModel()) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(8):
            client.sendall(chunk)
        client.sendall(b"0\r\n\r\n")
        assert client.recv(10_000).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/nowhere", "[", 404),
        ("GET", "/health/", "elsewhere.example", 404),  # no redirect to a host that the client names
        ("POST", "/health", "localhost", 413),
        ("POST", "/page/page.js", "localhost", 413),
    ],
)
def test_request__hostile_host_or_body_without_a_key__is_answered(
    method: str, path: str, host: str, status: int
) -> None:
    key = new_key()
    keys = keys_of_environment({KEYS_VARIABLE: key}, limits=KeyLimits())
    headers = {"Host": host, "Authorization": f"Bearer {key}"}
    with running(NoModel(), keys=KeyRing(keys, limits=KeyLimits())) as server:
        answer = httpx.request(
            method, server.url + path, headers=headers, content=b"x" if method == "POST" else b"", trust_env=False
        )
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


class SlowModel:
    """A backend that reads and writes some tokens, and then has no end."""

    info = info_of(kind="seq2seq")

    def __init__(self) -> None:
        self.num_cancelled = 0

    async def generate(self, call: GenerateCall | TextsCall) -> AsyncGenerator[Sequence[TextDelta], None]:
        try:
            yield [TextDelta(index=0, prompt_tokens=40, num_tokens=3)]
            await asyncio.sleep(60)
        finally:
            self.num_cancelled += 1

    async def stats(self) -> dict[str, dict[str, Any]]:
        return {}


def figures_of(server: RunningServer) -> tuple[int, int]:
    figures = server.serving.telemetry.figures()
    return figures["prompt_tokens"], figures["completion_tokens"]


@pytest.mark.parametrize("is_gone", [False, True])
def test_translate__beyond_the_keys_time_or_for_nobody__is_cancelled_and_charged(is_gone: bool) -> None:
    model, body = SlowModel(), {"model": "tiny", "input": ["x", "y"]}
    limits = KeyLimits(seconds_per_request=None if is_gone else 0.2, tokens_per_minute=43)
    with running(model, limits=limits) as server:
        url = f"{server.url}/v1/translate"
        if is_gone:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, trust_env=False, timeout=0.3)
            wait_for(lambda: model.num_cancelled)
        else:
            answer = httpx.post(url, json=body, trust_env=False)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "time_limit")
        wait_for(lambda: server.serving.admission.num_requests == 0)
        assert model.num_cancelled == 1 and figures_of(server) == (40, 3)
        refused = httpx.post(url, json=body, trust_env=False)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
        assert f'forge_requests_cut_total{{reason="{"client" if is_gone else "time"}"}} 1.0' in metrics


@pytest.mark.parametrize("num_beams", [1, 2])
def test_translate__real_model_and_no_client__stops_within_a_step(tmp_path: Path, num_beams: int) -> None:
    folder = write_model(tmp_path, lambda: T5ForConditionalGeneration(_T5))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    backend, steps = backend_of(folder), list[int]()
    backend.service._loaded.model.decoder.register_forward_hook(lambda *_: steps.append(1))
    with running(backend) as server:
        body = {"model": "tiny", "input": TEXTS * 20, "max_tokens": 100_000, "num_beams": num_beams}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/translate", json=body, trust_env=False, timeout=1.0)
        wait_for(lambda: server.serving.admission.num_requests == 0)
        short = body | {"input": "dog", "max_tokens": 3}
        answer = httpx.post(f"{server.url}/v1/translate", json=short, trust_env=False, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] <= 3
        num_read, num_written = figures_of(server)
        assert num_read > 0 and 0 < len(steps) < 50_000
        assert num_written > 3 or num_beams > 1


@pytest.mark.parametrize("kind", ["embeddings", "classify"])
def test_single_texts__real_model_and_no_client__the_rest_is_left_out(tmp_path: Path, kind: str) -> None:
    build = BertModel if kind == "embeddings" else BertForSequenceClassification
    backend, passes = backend_of(write_model(tmp_path, lambda: build(_BERT))), list[int]()

    def slow(*_: object) -> None:
        passes.append(1)
        time.sleep(0.05)

    backend.service._loaded.model.register_forward_hook(slow)
    with running(backend) as server:
        url, texts = f"{server.url}/v1/{kind}", [f"dog {number}" for number in range(2000)]
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json={"model": "tiny", "input": texts}, trust_env=False, timeout=0.5)
        wait_for(lambda: server.serving.admission.num_requests == 0)
        num_read, _ = figures_of(server)
        answer = httpx.post(url, json={"model": "tiny", "input": "dog"}, trust_env=False, timeout=60)
        used = answer.json()["usage"]["prompt_tokens"]
        assert len(passes) < 60, "2000 texts are 125 passes or more"
        assert 0 < num_read < 1000 * used and figures_of(server) == (num_read + used, 0)


def test_openapi__of_the_server__names_its_routes() -> None:
    with running(NoModel()) as server:
        routes = json.loads(httpx.get(f"{server.url}/openapi.json", trust_env=False).text)["paths"]
        assert {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/classify"} <= set(routes)
