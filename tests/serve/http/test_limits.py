"""Keys, limits, queue and tool calls, without a model."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from forge.errors import ArgumentError, ClusterError
from forge.process import free_port
from forge.serve.calls import GenerateCall, ReplicaLostError, TextDelta, TextOptions
from forge.serve.http import api_keys
from forge.serve.http.admission import Admission
from forge.serve.http.answers import AnswerChoice
from forge.serve.http.api_keys import (
    KEYS_VARIABLE,
    ApiKey,
    KeyLimits,
    KeyRing,
    add_key,
    digest_of,
    keys_of_environment,
    new_key,
    read_keys,
)
from forge.serve.http.bodies import ChatBody, ClassifyBody, CompletionBody, EmbeddingBody
from forge.serve.http.errors import ApiError
from forge.serve.http.generation import Generator, Usage
from forge.serve.http.rate_limit import RateLimiter
from forge.serve.http.settings import (
    ServerSettings,
    claim_address,
    is_loopback,
    listen_on,
    require_authentication,
    settings_from_json,
    settings_to_json,
)
from forge.serve.http.telemetry import Telemetry
from forge.serve.http.tool_calls import BegunCallParser, ToolCallParser

NO_LIMITS = KeyLimits()


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def key_of(**limits: float) -> ApiKey:
    return ApiKey(name="alice", sha256="", limits=KeyLimits(**limits))


def test_key_file__added_keys__are_found_and_not_stored(tmp_path: Path) -> None:
    file, keys = tmp_path / "keys.toml", {name: new_key() for name in ("alice", "bob.2")}
    for name, key in keys.items():
        add_key(file, name=name, key=key)
    ring = KeyRing((), file=file, limits=KeyLimits(requests_per_minute=5))
    for name, key in keys.items():
        found = ring.find(f"Bearer {key}")
        assert found is not None and (found.name, found.limits.requests_per_minute) == (name, 5)
        assert key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(ArgumentError, match="has a key 'alice'"):
        add_key(file, name="alice", key=new_key())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[a]\n", "64 hex digits"),
        ("[a]\nsha256 = 'abc'\n", "64 hex digits"),
        (f"[a]\nsha256 = '{digest_of('x')}'\ntokens = 3\n", "unknown key tokens"),
        (f"[a]\nsha256 = '{digest_of('x')}'\ntokens_per_minute = -3\n", "positive number"),
        (f"[a]\nsha256 = '{digest_of('x')}'\ntokens_per_minute = nan\n", "positive number"),
        (f"['a b']\nsha256 = '{digest_of('x')}'\n", "a table with a name"),
        ("a = 3", "a table with a name"),
        ("[a\n", "is not TOML"),
        ("a = " + "[" * 10_000, "is not TOML"),
        ("a = " + "9" * 5_000, "is not TOML"),
        (f"[a]\nsha256 = '{digest_of('x')}'\ntokens_per_minute = 1{'0' * 400}\n", "positive number"),
        ("#" * (2**20 + 1), "too large"),
        ("\xff", "is not TOML"),
    ],
)
def test_key_file__wrong__says_where(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "keys.toml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ArgumentError, match=message):
        read_keys(tmp_path / "keys.toml", limits=NO_LIMITS)


def test_key_file__others_may_write_it__is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").touch(mode=0o666)
    (tmp_path / "keys.toml").chmod(0o666)
    with pytest.raises(ArgumentError, match="writable by other users"):
        read_keys(tmp_path / "keys.toml", limits=NO_LIMITS)


def test_key_file__wrong_for_a_while__is_not_read_for_each_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key, clock = tmp_path / "keys.toml", new_key(), Clock()
    monkeypatch.setattr(api_keys, "time", SimpleNamespace(monotonic=clock))
    add_key(file, name="a", key=key)
    ring = KeyRing((), file=file, limits=NO_LIMITS)
    for break_it in (lambda: file.write_text("[wrong"), file.unlink):
        break_it()
        with pytest.raises(ArgumentError):
            ring.refresh()
        ring.refresh()
        assert ring.find(f"Bearer {key}") is not None, "the former keys stay in force"
        clock.now += 2
        with pytest.raises(ArgumentError):
            ring.refresh()
    other = new_key()
    add_key(file, name="b", key=other)  # at once
    ring.refresh()
    assert ring.find(f"Bearer {other}") is not None and ring.find(f"Bearer {key}") is None


def test_key_file__becomes_a_pipe__former_keys_stay_in_force(tmp_path: Path) -> None:
    file, key = tmp_path / "keys.toml", new_key()
    add_key(tmp_path / "real.toml", name="a", key=key)
    file.symlink_to("real.toml")  # as Kubernetes mounts secrets
    ring = KeyRing((), file=file, limits=NO_LIMITS)
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises(ArgumentError, match="cannot be read"):
        ring.refresh()
    assert ring.find(f"Bearer {key}") is not None


@pytest.mark.parametrize(
    "text",
    ['{"name": ["now"], "arguments": {}}', '{"name": {}}', '{"name": "now", "arguments": {"at": "\\ud800"}}'],
)
def test_tool_calls__unusable_ones__are_content(text: str) -> None:
    parser = ToolCallParser(frozenset({"now"}))
    content = parser.feed(text)
    rest, calls = parser.finish()
    assert (content + rest, calls) == (text, [])


def chat_of(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"model": "m", "prompt": [None] * 10_000}),
        (CompletionBody, {"model": "m", "prompt": [[None] * 10_000]}),
        (CompletionBody, {"model": "m", "prompt": "x", **{f"a{number}": 0 for number in range(10_000)}}),
        (EmbeddingBody, {"model": "m", "input": [None] * 10_000}),
        (ClassifyBody, {"model": "m", "input": [[None] * 10_000] * 10}),
        (ChatBody, chat_of(messages=[None] * 9_000)),
        (ChatBody, chat_of(messages=[{"role": "user", "content": [{}] * 10_000}])),
        (ChatBody, chat_of(messages=[{"role": "assistant", "tool_calls": [{}] * 10_000}])),
        (ChatBody, chat_of(modalities=[None] * 10_000)),
        (ChatBody, chat_of(stop=[None] * 10_000)),
    ],
)
def test_body__many_wrong_values__is_refused_at_the_first(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 8


def test_body__logit_bias_of_many_tokens__is_not_supported() -> None:
    body = ChatBody.model_validate(chat_of(logit_bias=dict.fromkeys(map(str, range(10_000)))))
    with pytest.raises(ApiError, match="logit_bias is not supported"):
        body.require_supported()


@pytest.mark.parametrize("text", ['{"a":' * 200 + "1" + "}" * 200, '{"a": "\\ud800"}'])
def test_tools__parameters_that_no_prompt_can_have__are_refused(text: str) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": json.loads(text)}}
    with pytest.raises(ValidationError, match="parameters"):
        ChatBody.model_validate(chat_of(tools=[tool]))


def test_environment__short_key__is_refused() -> None:
    with pytest.raises(ArgumentError, match="could be guessed") as caught:
        keys_of_environment({KEYS_VARIABLE: f"{new_key()}, hunter2"}, limits=NO_LIMITS)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_settings__reached_by_others_without_keys__are_refused(host: str) -> None:
    settings = ServerSettings(name="a", source="", model_name="m", host=host)
    require_authentication(settings, has_keys=True)
    with pytest.raises(ArgumentError, match="forge serve key"):
        require_authentication(settings, has_keys=False)


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_address__claimed_by_a_server_that_does_not_listen_yet__is_refused() -> None:
    port = free_port("127.0.0.1")
    with claim_address("127.0.0.1", port), listen_on("127.0.0.1", port):
        with pytest.raises(ClusterError, match=f"another server .* on port {port} of 127.0.0.1"):
            claim_address("127.0.0.1", port)
        claim_address("127.0.0.1", free_port("127.0.0.1")).close()
    claim_address("127.0.0.1", port).close()


def test_settings__json__round_trip() -> None:
    limits = KeyLimits(tokens_per_minute=3)
    settings = ServerSettings(name="a", source="s", model_name="m", limits=limits, adapters=("x=y",), step="best")
    assert settings_from_json(settings_to_json(settings)) == settings
    assert is_loopback("[::1]") and is_loopback("127.9.9.9") and not is_loopback("localhost.example.org")


@given(st.lists(st.floats(0, 30), min_size=1, max_size=60), st.integers(1, 20))
def test_rate_limit__any_arrivals__never_more_than_two_minutes_worth_in_one(
    pauses: list[float], limit: int
) -> None:
    clock = Clock()
    limiter, key, admitted = RateLimiter(clock=clock), key_of(requests_per_minute=limit), []
    for pause in pauses:
        clock.now += pause
        try:
            limiter.admit(key)
            admitted.append(clock.now)
        except ApiError as error:
            assert error.status == 429 and error.retry_after_s is not None and 0 < error.retry_after_s <= 60
            clock.now += error.retry_after_s + 1e-6
            limiter.admit(key)
            admitted.append(clock.now)
    for start in admitted:
        assert sum(start <= at < start + 60 for at in admitted) <= 2 * limit


def test_rate_limit__tokens__are_paid_off_before_the_next_request() -> None:
    clock = Clock()
    limiter, key = RateLimiter(clock=clock), key_of(tokens_per_minute=60)
    limiter.admit(key)
    limiter.charge(key, num_tokens=90)
    with pytest.raises(ApiError) as caught:
        limiter.admit(key)
    assert caught.value.headers() == {"Retry-After": "31"}
    clock.now += 31
    limiter.admit(key)
    assert limiter.headers(key)["x-ratelimit-limit-tokens"] == "60"


def test_rate_limit__less_than_one_per_minute__admits_after_that_time() -> None:
    clock = Clock()
    limiter, key = RateLimiter(clock=clock), key_of(requests_per_minute=0.5)
    limiter.admit(key)
    clock.now += 60
    with pytest.raises(ApiError) as caught:
        limiter.admit(key)
    assert 59 <= int(caught.value.headers()["Retry-After"]) <= 61
    clock.now += 61
    limiter.admit(key)


CALL = '{"name": "now", "arguments": {"zone": "é"}}'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "content", "num_calls"),
    [
        ("plain <tool> text", "plain <tool> text", 0),
        (f"I look.<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "I look.", 2),
        (CALL.replace("arguments", "parameters"), "", 1),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', 0),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", 0),
        ("<tool_call>" + "[" * 5_000, "<tool_call>" + "[" * 5_000, 0),
        ("ends with <tool_ca", "ends with <tool_ca", 0),
        ('{"answer": 3}', '{"answer": 3}', 0),
    ],
)
def test_tool_calls__in_pieces_of_any_size__are_separated_from_text(
    text: str, content: str, num_calls: int, size: int
) -> None:
    parser = ToolCallParser(frozenset({"now"}))
    shown = "".join(parser.feed(text[start : start + size]) for start in range(0, len(text), size))
    rest, calls = parser.finish()
    assert (shown + rest, len(calls)) == (content, num_calls)
    assert all(json.loads(call["function"]["arguments"]) == {"zone": "é"} for call in calls)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (' {"zone": "é}"}}\n</tool_call>', '{"zone": "é}"}'),
        ("{}", "{}"),
        (' {"zone": "U', '{"zone": "U'),
        (" [1]}", "[1]}"),
        ("", ""),
        (" [" * 100_000, ("[ " * 100_000).strip()),
    ],
)
def test_begun_call__text_that_goes_on__is_its_arguments(text: str, arguments: str) -> None:
    parser = BegunCallParser("now")
    assert [parser.feed(text[:3]), parser.feed(text[3:])] == ["", ""]
    content, [call] = parser.finish()
    assert (content, call["function"]) == ("", {"name": "now", "arguments": arguments})
    for reason in ("stop", "length"):
        choice = AnswerChoice(index=0, parser=BegunCallParser("now"))
        choice.add(TextDelta(index=0, text=text, finish_reason=reason))
        is_whole = arguments.endswith("}") and arguments.startswith("{")
        assert choice.finish_reason == ("tool_calls" if is_whole or reason == "stop" else "length")


class LosingBackend:
    """A backend whose replica is lost after some pieces, a number of times."""

    def __init__(self, *, after: int, times: int) -> None:
        self.after, self.times, self.num_calls = after, times, 0

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Sequence[TextDelta], None]:
        self.num_calls += 1
        for number in range(4):
            if number == self.after and self.num_calls <= self.times:
                raise ReplicaLostError("gone")
            reason = "stop" if number == 3 else None
            yield [TextDelta(index=0, text=str(number), num_tokens=1, finish_reason=reason)]


def generate(backend: Any, *, may_restart: bool) -> list[TextDelta]:
    async def run() -> list[TextDelta]:
        telemetry = Telemetry(usd_per_hour=1.0)
        admission = Admission(max_queue=1, telemetry=telemetry)
        generator = Generator(admission=admission, limiter=RateLimiter(), telemetry=telemetry)
        call = GenerateCall(request_id="1", model="m", options=TextOptions(), prompt="a")
        pieces = generator.stream(backend, [call], key=key_of(), usage=Usage(), entry={}, may_restart=may_restart)
        try:
            return [delta async for delta in pieces]
        finally:
            assert admission.num_requests == 0
            assert await admission.drain(timeout_s=1)

    return asyncio.run(run())


@pytest.mark.parametrize("times", [0, 1, 2])
def test_replica__lost_before_the_first_piece__another_one_answers(times: int) -> None:
    found = generate(LosingBackend(after=0, times=times), may_restart=False)
    assert "".join(delta.text for delta in found) == "0123"


def test_replica__lost_in_a_stream__the_stream_fails_and_a_whole_answer_begins_again() -> None:
    with pytest.raises(ApiError, match="was lost") as caught:
        generate(LosingBackend(after=2, times=1), may_restart=False)
    assert (caught.value.status, caught.value.code) == (503, "replica_lost")
    found = generate(LosingBackend(after=2, times=1), may_restart=True)
    start = next(number for number, delta in enumerate(found) if delta.restarts)
    assert "".join(delta.text for delta in found[start:]) == "0123"


def test_replicas__all_lost__status_503() -> None:
    with pytest.raises(ApiError) as caught:
        generate(LosingBackend(after=0, times=9), may_restart=True)
    assert caught.value.status == 503


def test_telemetry__cost__of_the_time_in_which_requests_ran() -> None:
    clock = Clock()
    telemetry = Telemetry(usd_per_hour=3.6, clock=clock)
    telemetry.queue(waiting=1, running=0)
    clock.now += 10
    telemetry.generated(1000, key="a")
    telemetry.queue(waiting=0, running=0)
    clock.now += 1000  # idle time is not counted
    assert telemetry.usd_per_million_tokens() == pytest.approx(3.6 / 3600 * 10 / 1000 * 1e6)
    assert telemetry.figures()["busy_tokens_per_s"] == 100
    assert b"forge_usd_per_million_tokens 10.0" in telemetry.text()
