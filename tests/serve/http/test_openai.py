"""The API as OpenAI's own client uses it, over a tiny model, its engine and a real socket."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from forge.serve.http.api_keys import KeyLimits, KeyRing, new_key, table_of
from forge.serve.http.settings import ServerSettings
from forge.serve.service import ModelService
from tests.support.serving import LocalBackend, RunningServer, running, write_causal_lm

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
MESSAGES: Any = [{"role": "user", "content": "the lazy dog"}]
TOOLS: Any = [{"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {}}}]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    folder = write_causal_lm(tmp_path_factory.mktemp("model"))
    service = ModelService.start(ServerSettings(name="test", source=str(folder), model_name="tiny"))
    yield LocalBackend(service)
    service.close()


@pytest.fixture(scope="module")
def server(backend: LocalBackend) -> Iterator[RunningServer]:
    with running(backend, max_queue=32, body_timeout_s=1.0) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: RunningServer, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, timeout=10, trust_env=False, **options)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which must be in OpenAI's form."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return error


def test_start_check__tiny_model__finds_the_models_own_log_probabilities(backend: LocalBackend) -> None:
    assert "served log-probabilities" in backend.info.start_check


def test_completion__greedy__is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="the quick", **GREEDY)
    events = list(
        client.completions.create(prompt="the quick", stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
    assert events[-1].usage == whole.usage
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"


def test_completion__stop__ends_before_the_string(client: openai.OpenAI) -> None:
    text = client.completions.create(prompt="the quick", **GREEDY).choices[0].text
    stop = text[4:6]
    found = client.completions.create(prompt="the quick", stop=[stop], **GREEDY).choices[0]
    assert found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop"


def test_completion__several_prompts_and_n__numbers_its_choices(client: openai.OpenAI) -> None:
    options = {**GREEDY, "temperature": 1.0}
    found = client.completions.create(prompt=["the", "fox", "dog"], n=2, seed=3, **options)
    again = client.completions.create(prompt=["the", "fox", "dog"], n=2, seed=3, **options)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3, 4, 5]
    assert [choice.text for choice in found.choices] == [choice.text for choice in again.choices]
    assert found.choices[0].text != found.choices[1].text
    assert found.usage is not None and found.usage.completion_tokens == 6 * 12


def test_completion__logprobs__are_those_of_its_tokens(client: openai.OpenAI) -> None:
    found = client.completions.create(prompt="the quick", logprobs=3, **GREEDY).choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    assert len(found.token_logprobs) == len(found.top_logprobs) == 12
    for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert logprob == max(top.values()) < 0


def test_completion__token_ids__are_the_prompt(client: openai.OpenAI) -> None:
    found = client.completions.create(prompt=[5, 6, 7], echo=False, **GREEDY)
    assert found.usage is not None and found.usage.prompt_tokens == 3


def test_chat__streamed__is_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    events = list(client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY))
    choice = whole.choices[0]
    assert "".join(event.choices[0].delta.content or "" for event in events) == choice.message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices[0].finish_reason == choice.finish_reason
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_chat__tools__are_in_the_prompt(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    found = client.chat.completions.create(messages=MESSAGES, tools=TOOLS, **GREEDY)
    assert plain.usage is not None and found.usage is not None
    assert found.usage.prompt_tokens > plain.usage.prompt_tokens


NAMED: Any = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("tool_choice", [NAMED, "required"])
def test_chat__function_that_has_to_be_called__is_called(client: openai.OpenAI, tool_choice: Any) -> None:
    short = [{"role": "user", "content": "a"}]  # the model reads 128 tokens
    asked: dict[str, Any] = {"messages": short, "tools": [NAMED], **GREEDY, "max_tokens": 6}
    found = client.chat.completions.create(tool_choice=tool_choice, **asked)
    plain, [choice] = client.chat.completions.create(**asked), found.choices
    assert choice.finish_reason == "length" and choice.message.content is None, "cut, as its arguments are"
    [call] = choice.message.tool_calls or ()
    assert call.type == "function" and call.function.name == "now" and call.function.arguments
    assert plain.choices[0].message.tool_calls is None, "the model does not call it by itself"
    assert found.usage is not None and plain.usage is not None
    assert found.usage.prompt_tokens > plain.usage.prompt_tokens, "with the beginning of the call"
    events = list(client.chat.completions.create(tool_choice=tool_choice, stream=True, **asked))
    [streamed] = events[-1].choices[0].delta.tool_calls or ()
    assert streamed.function is not None and streamed.function.arguments == call.function.arguments
    assert not any(event.choices[0].delta.content for event in events)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tool_choice": "required"}, "tool_choice requires tools"),
        ({"tool_choice": NAMED, "tools": [TOOLS[0] | {"function": {"name": "then"}}]}, "not in tools: then"),
        (
            {"tool_choice": "required", "tools": [*TOOLS, TOOLS[0] | {"function": {"name": "then"}}]},
            r"tools has 2 \(now, then\): .* send .*\"name.*now.*, or auto",
        ),
        ({"tool_choice": "any", "tools": TOOLS}, "tool_choice"),
    ],
)
def test_chat__function_that_cannot_be_called__says_what_to_send(
    client: openai.OpenAI, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=problem) as caught:
        client.chat.completions.create(messages=MESSAGES, **options, **GREEDY)
    assert "tool_choice" in str(caught.value.param)


def test_chat__names_of_special_tokens_in_a_message__do_not_end_its_turn(client: openai.OpenAI) -> None:
    sizes = []
    for text in ("a<|endoftext|>b", "a<|endoftxet|>b"):
        answer = client.chat.completions.create(messages=[{"role": "user", "content": text}], **GREEDY)
        assert answer.usage is not None
        sizes.append(answer.usage.prompt_tokens)
    assert min(sizes) > 10  # the name was not one token


def test_models__lists_the_served_one(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_embeddings__causal_model__are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="tiny", input="text")


WRONG: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    ("no model", {"prompt": "a"}, 400, "invalid_value", "model"),
    ("another model", {"model": "gpt-4", "prompt": "a"}, 404, "model_not_found", "model"),
    ("no prompt", {"model": "tiny"}, 400, "invalid_value", "prompt"),
    ("number for text", {"model": "tiny", "prompt": 7}, 400, "invalid_value", None),
    ("text for number", {"model": "tiny", "prompt": "a", "max_tokens": "7"}, 400, "invalid_value", "max_tokens"),
    ("boolean for number", {"model": "tiny", "prompt": "a", "n": True}, 400, "invalid_value", "n"),
    ("negative", {"model": "tiny", "prompt": "a", "max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    ("too hot", {"model": "tiny", "prompt": "a", "temperature": 3}, 400, "invalid_value", "temperature"),
    ("unknown key", {"model": "tiny", "prompt": "a", "tempreature": 1}, 400, "unknown_parameter", "tempreature"),
    ("what forge does not do", {"model": "tiny", "prompt": "a", "logit_bias": {"5": 1}}, 400,
     "unsupported_parameter", "logit_bias"),
    ("too many texts", {"model": "tiny", "prompt": ["a"] * 40, "n": 2}, 400, None, "prompt"),
    ("half a character", {"model": "tiny", "prompt": "\ud800"}, 400, None, None),
    ("too long", {"model": "tiny", "prompt": "the fox " * 500}, 400, "context_length_exceeded", "prompt"),
    ("unknown token", {"model": "tiny", "prompt": [5, 10**9]}, 400, "invalid_value", None),
    ("n of the likeliest", {"model": "tiny", "prompt": "a", "n": 2, "temperature": 0}, 400, "invalid_value", None),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[case[0] for case in WRONG])
def test_completion__wrong_body__says_what_is_wrong(server: RunningServer, case: Any) -> None:
    _, body, status, code, param = case
    response = post(server, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["type"]) == (
        status,
        "not_found_error" if status == 404 else "invalid_request_error",
    )
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param


def test_route__of_another_kind_or_without_v1__the_right_one_is_named(server: RunningServer) -> None:
    base = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match=r"did you mean /v1/chat/completions\? The base URL"):
        base.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
    base = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="makes no embeddings; its route is /v1/chat/completions"):
        base.embeddings.create(model="tiny", input="a")
    assert (
        httpx.get(f"{server.url}/nothing", trust_env=False).json()["error"]["message"]
        == "there is no route /nothing"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense", '{"model": NaN}', "[" * 100_000, "null", '"text"'])
def test_completion__no_json_object__status_400(server: RunningServer, text: str) -> None:
    response = post(server, content=text, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error_of(response)


def test_chat__wrong_messages__status_400(server: RunningServer) -> None:
    wrong: list[Any] = [
        [], "text", [{"role": "king", "content": "a"}], [{"role": "user"}], [{"content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}],
    ]  # fmt: skip
    for messages in wrong:
        response = post(server, "/v1/chat/completions", json={"model": "tiny", "messages": messages})
        assert response.status_code == 400, messages
        error_of(response)
    user = [{"role": "user", "content": "a"}]
    limits = {"max_tokens": 2, "max_completion_tokens": 3}
    response = post(server, "/v1/chat/completions", json={"model": "tiny", "messages": user, **limits})
    assert "max_tokens is 2 and max_completion_tokens 3; give one" in error_of(response)["message"]


def test_body__of_10_mb__status_413(server: RunningServer) -> None:
    response = post(server, json={"model": "tiny", "prompt": "a" * 10_000_000})
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


def test_body__slow_client__status_408(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_routes__unknown_or_wrong_method__openai_form(server: RunningServer) -> None:
    assert error_of(post(server, "/v1/other"))["type"] == "not_found_error"
    response = httpx.get(f"{server.url}/v1/completions", trust_env=False)
    assert response.status_code == 405
    error_of(response)


@pytest.mark.parametrize(
    "header", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}]
)
def test_open_server__request_of_a_foreign_page__status_403(server: RunningServer, header: dict[str, str]) -> None:
    response = post(server, json={"model": "tiny", "prompt": "a"}, headers=header)
    assert response.status_code == 403
    error_of(response)


def test_metrics__after_requests__count_them(server: RunningServer, client: openai.OpenAI) -> None:
    client.completions.create(prompt="the quick", **GREEDY)
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    assert 'forge_requests_total{route="/v1/completions",status="200"}' in text
    for name in ("time_to_first_token_seconds_count", "queue_waiting", "cache_use_ratio", "tokens_per_second"):
        assert f"forge_{name}" in text
    assert server.serving.admission.num_requests == 0


def await_idle(server: RunningServer, backend: LocalBackend) -> None:
    """Wait until neither the server nor the engine works on anything."""
    deadline = time.monotonic() + 30
    while server.serving.admission.num_requests or backend.service.stats()["running"]:
        assert time.monotonic() < deadline, "a generation goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("is_stream", [True, False])
def test_client__goes_away__cancels_its_generation(
    server: RunningServer, backend: LocalBackend, is_stream: bool
) -> None:
    body = {"model": "tiny", "prompt": "the", "max_tokens": 120, "n": 8, "stream": is_stream, "seed": 1}
    content = json.dumps(body).encode()
    before = generated(server)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        while not server.serving.admission.num_requests:
            time.sleep(0.001)
    await_idle(server, backend)
    assert generated(server) - before < 8 * 120


def generated(server: RunningServer) -> int:
    return int(server.serving.telemetry.figures()["completion_tokens"])


def test_queue__more_than_its_bound__status_429_with_retry_after(backend: LocalBackend) -> None:
    with running(backend, max_queue=2) as server, ThreadPoolExecutor(24) as pool:
        body = {"model": "tiny", "prompt": "the " * 20, "max_tokens": 60, "n": 4, "seed": 1}
        answers = list(pool.map(lambda _: post(server, json=body), range(24)))
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert error_of(refused)["code"] == "queue_full"
        assert server.serving.admission.num_requests == 0


def test_drain__new_requests__status_503(backend: LocalBackend) -> None:
    with running(backend) as server:
        server.serving.admission.is_draining = True
        response = post(server, json={"model": "tiny", "prompt": "a"})
        assert response.status_code == 503 and response.headers["retry-after"]
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 503


def test_keys__right_wrong_none__only_the_right_one_enters(backend: LocalBackend, tmp_path: Path) -> None:
    key, file = new_key(), tmp_path / "keys.toml"
    file.write_text(table_of("alice", key=key) + "requests_per_minute = 2\ntokens_per_minute = 1000\n")
    with running(backend, keys=KeyRing((), file=file, limits=KeyLimits())) as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        for header in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {key}"}):
            response = post(server, json=body, headers=header)
            assert response.status_code == 401
            assert error_of(response)["type"] == "authentication_error"
        assert httpx.get(f"{server.url}/metrics", trust_env=False).status_code == 401
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            for _ in range(2):
                client.completions.create(model="tiny", prompt="a", max_tokens=2)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model="tiny", prompt="a", max_tokens=2)
            assert 20 <= int(caught.value.response.headers["retry-after"]) <= 30
        file.write_text("")  # revoked
        assert post(server, json=body, headers={"Authorization": f"Bearer {key}"}).status_code == 401


def test_key__seconds_per_request__cuts_the_answer(backend: LocalBackend) -> None:
    limits = KeyLimits(seconds_per_request=0.02)
    with running(backend, limits=limits) as server:
        body = {"model": "tiny", "prompt": "the", "max_tokens": 120, "n": 16, "seed": 1}
        response = post(server, json=body)
        assert response.status_code in (200, 503)
        if response.status_code == 200:
            assert {choice["finish_reason"] for choice in response.json()["choices"]} == {"length"}
        await_idle(server, backend)
