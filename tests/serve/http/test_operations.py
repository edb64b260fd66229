"""What operates a server: a notice that its machine is taken away, more and fewer replicas, TLS, adapters by name.

In the slow set, because every server starts Ray: `pytest -m slow tests/serve/http/test_operations.py`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from forge.inference.generate import generate
from forge.inference.loaded import load
from forge.inference.sampling import SamplingParams
from forge.runtime.servers import ServerStatus, find_server
from forge.serve.http.api_keys import add_key, new_key
from tests.support.command import wait_for
from tests.support.lora_runs import train_lora_runs
from tests.support.serving import serving, write_causal_lm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GREEDY: dict[str, Any] = {"model": "tiny", "prompt": "the quick", "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal_lm(tmp_path_factory.mktemp("model") / "tiny", max_positions=2048)


def client_of(url: str, **options: Any) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(trust_env=False, timeout=120, **options)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0)


def status() -> ServerStatus:
    return find_server("test")


def test_spot_notice__a_running_stream__is_finished_and_new_requests_are_refused(
    model: Path, tmp_path: Path
) -> None:
    notice = tmp_path / "notice.json"
    variables = {"FORGE_CLOUD": "kubernetes", "FORGE_NOTICE_FILE": str(notice)}

    async def run(url: str) -> None:
        async with client_of(url) as client:
            options = {"max_tokens": 1500, "stream": True, "stream_options": {"include_usage": True}}
            events = aiter(await client.completions.create(**(GREEDY | options)))
            await anext(events)
            draft = tmp_path / "draft.json"
            draft.write_text(json.dumps({"deadline": time.time() + 180}))
            draft.rename(notice)
            refused = None
            while refused is None:
                try:
                    await client.completions.create(**(GREEDY | {"max_tokens": 1}))
                except openai.APIStatusError as error:
                    refused = error
                await asyncio.sleep(0.1)
            assert refused.status_code == 503  # while the stream goes on
            *_, last = [event async for event in events]
            assert last.usage is not None and last.usage.completion_tokens == 1500

    with serving(tmp_path / "state", source=model, variables=variables) as url:
        asyncio.run(run(url))
        wait_for(lambda: not status().is_alive, timeout_s=240)
        assert status().state == "stopped" and status().message == "kubernetes takes this machine away"


def test_replicas__load_rises_and_falls__added_and_removed_without_a_lost_request(
    model: Path, tmp_path: Path
) -> None:
    found: Counter[str] = Counter()

    async def ask(client: openai.AsyncOpenAI) -> None:
        answer = await client.completions.create(**(GREEDY | {"max_tokens": 100, "prompt": f"cat {found.total()}"}))
        found["ok" if answer.usage and answer.usage.completion_tokens else "empty"] += 1

    async def until(url: str, *, num_clients: int, is_reached: Any) -> None:
        is_over = asyncio.Event()
        async with client_of(url) as client:

            async def one() -> None:
                while not is_over.is_set():
                    await ask(client)
                    await asyncio.sleep(0.0 if num_clients > 1 else 0.5)

            clients = [asyncio.ensure_future(one()) for _ in range(num_clients)]
            deadline = time.monotonic() + 300
            while not is_reached(status().record["replicas"]):
                assert time.monotonic() < deadline, status().record["replicas"]
                await asyncio.sleep(0.5)
            is_over.set()
            await asyncio.gather(*clients)  # an error of any request fails the test

    few: dict[str, Any] = {"max_running": 2, "upscale_delay_s": 1.0, "downscale_delay_s": 5.0}
    with serving(
        tmp_path / "state",
        source=model,
        min_replicas=1,
        max_replicas=4,
        verify_start=False,
        **few,
    ) as url:
        asyncio.run(until(url, num_clients=12, is_reached=lambda count: count >= 2))
        asyncio.run(until(url, num_clients=1, is_reached=lambda count: count == 1))
    assert set(found) == {"ok"} and found["ok"] > 12


def test_tls__keys_and_adapters_of_two_runs__answer_by_name_as_the_runs(tmp_path: Path) -> None:
    base = train_lora_runs(tmp_path, names=("one", "two"))
    certificate, key_file, key = tmp_path / "cert.pem", tmp_path / "key.pem", new_key()
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key_file), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    add_key(tmp_path / "keys.toml", name="alice", key=key)
    settings: dict[str, Any] = {
        "adapters": tuple(f"{name}={tmp_path / name}" for name in ("one", "two")),
        "keys_file": str(tmp_path / "keys.toml"),
        "tls_cert": str(certificate),
        "tls_key": str(key_file),
    }
    with serving(tmp_path / "state", source=base, **settings) as url:
        assert url.startswith("https://")
        verified = httpx.Client(verify=ssl.create_default_context(cafile=str(certificate)), trust_env=False)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=verified, max_retries=0)
        assert {each.id for each in client.models.list()} == {"tiny", "one", "two"}
        asked = {"prompt": "w5 w7 w9", "max_tokens": 6, "temperature": 0, "logprobs": 1}
        texts = {}
        for name in ("tiny", "one", "two"):
            [choice] = client.completions.create(model=name, **asked).choices
            texts[name] = (choice.text, tuple(choice.logprobs.token_logprobs))  # type: ignore[union-attr]
        stranger = openai.OpenAI(base_url=f"{url}/v1", api_key=new_key(), http_client=verified, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(httpx.HTTPError):  # its certificate is not one of this machine's authorities
            httpx.get(f"{url}/health", trust_env=False)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url.replace('https', 'http')}/health", trust_env=False)
    sampling = SamplingParams(max_tokens=6, logprobs=1)
    for name, folder in {"tiny": base, "one": tmp_path / "one", "two": tmp_path / "two"}.items():
        [made] = generate(load(folder, device="cpu"), ["w5 w7 w9"], sampling)
        text, logprobs = texts[name]
        assert text == made.text
        assert logprobs == pytest.approx([each.logprob for each in made.logprobs or ()], abs=2e-3)
    assert len({logprobs for _, logprobs in texts.values()}) == 3
