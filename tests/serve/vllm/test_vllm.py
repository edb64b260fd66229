"""vLLM itself behind forge's server: texts and log-probabilities of forge's engine, and the same operations.

In the slow set, and skipped where vLLM's environment was not made. To make it: forge serve FOLDER --engine vllm
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from ray.util import get_node_ip_address
from transformers import AutoModelForCausalLM

from forge.inference.adapters import load_adapters
from forge.inference.loaded import load
from forge.inference.sampling import SamplingParams
from forge.process import free_port
from forge.runtime.servers import await_ready, find_server, server_process, start_server, update_server
from forge.runtime.vllm_environment import find_vllm
from forge.serve.engine import ServingEngine
from forge.serve.http.settings import ServerSettings
from forge.serve.request import EngineError, EngineRequest, TokenEvent
from forge.serve.service import ModelService
from forge.serve.stream import TextEngine
from forge.serve.vllm.start import VllmPlace
from tests.support.ports import open_ports
from tests.support.serving import LocalBackend, running, write_causal_lm

INSTALL = find_vllm(is_cuda=False)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INSTALL is None, reason="vLLM's environment was not made on this machine"),
]
SHAPE: dict[str, Any] = {"hidden_size": 64, "initializer_range": 0.2}
"""vLLM's kernels for CPUs want heads of at least 32 numbers."""
PROMPTS = [[40, 41, 42], [50, 7], [9, 8, 7, 6, 5, 4, 3], [100]]
START_S = 240
GREEDY: dict[str, Any] = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal_lm(tmp_path_factory.mktemp("vllm") / "model", **SHAPE)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """A folder of peft with an adapter that changes every text."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    to = folder.with_name("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def service(folder: Path, adapter: Path) -> Iterator[ModelService]:
    assert INSTALL is not None
    settings = ServerSettings(
        name="test", source=str(folder), model_name="tiny", engine="vllm", adapters=(f"own={adapter}",)
    )
    place = VllmPlace(install=INSTALL, log=folder.with_name("vllm.log"), exports=folder.with_name("exports"))
    service = ModelService.start(settings, vllm=place)
    yield service
    service.close()
    assert not list(place.exports.iterdir())


@pytest.fixture(scope="module")
def own(folder: Path, adapter: Path) -> Iterator[ServingEngine]:
    """forge's engine over the same model."""
    engine = ServingEngine(load(folder, dtype=None), adapters={"own": load_adapters(adapter)})
    yield engine
    engine.close()


async def events_of(
    engine: TextEngine, prompt: list[int], *, adapter: str | None = None, **sampling: Any
) -> list[TokenEvent]:
    name = f"{time.monotonic_ns()}-{prompt[0]}"
    request = EngineRequest(request_id=name, prompt=prompt, sampling=SamplingParams(**sampling), adapter=adapter)
    return [event async for event in engine.submit(request)]


async def all_events(engine: TextEngine, **options: Any) -> list[list[TokenEvent]]:
    return await asyncio.gather(*(events_of(engine, prompt, **options) for prompt in PROMPTS))


def until(condition: Callable[[], bool], *, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_start__check__compares_log_probabilities(service: ModelService) -> None:
    assert "served log-probabilities" in service.info.start_check and service.info.engine == "vllm 0.32.0"
    service.require_healthy()


@pytest.mark.parametrize("name", [None, "own"])
def test_greedy_text_and_scores__equal_those_of_forges_engine(
    service: ModelService, own: ServingEngine, name: str | None
) -> None:
    assert service._engine is not None
    options: dict[str, Any] = {"max_tokens": 20, "logprobs": 3, "adapter": name, "repetition_penalty": 1.1}
    served = asyncio.run(all_events(service._engine, **options))
    expected = asyncio.run(all_events(own, **options))
    for ours, theirs in zip(served, expected, strict=True):
        assert [event.token_id for event in ours] == [event.token_id for event in theirs]
        assert "".join(event.text for event in ours) == "".join(event.text for event in theirs)
        assert ours[-1].finish_reason == theirs[-1].finish_reason
        for one, other in zip(ours, theirs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [token for token, _ in one.top_logprobs] == [token for token, _ in other.top_logprobs]
            values = [value for _, value in other.top_logprobs]
            assert [value for _, value in one.top_logprobs] == pytest.approx(values, abs=1e-3)


def test_adapter__its_texts__differ_from_the_models(service: ModelService) -> None:
    assert service._engine is not None
    plain, adapted = (
        asyncio.run(events_of(service._engine, [40, 41, 42], max_tokens=12, adapter=name)) for name in (None, "own")
    )
    assert [event.token_id for event in plain] != [event.token_id for event in adapted]


def test_openai_client__all_that_forges_engine_answers__is_answered(service: ModelService) -> None:
    async def run(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            sampled = GREEDY | {"temperature": 1.0, "seed": 5, "n": 2, "top_p": 0.9, "extra_body": {"top_k": 50}}
            first, second = [await client.completions.create(**sampled) for _ in range(2)]
            assert [one.text for one in first.choices] == [one.text for one in second.choices], "seeded"
            assert first.choices[0].text != first.choices[1].text
            assert first.usage is not None and first.usage.completion_tokens <= 16
            whole = (await client.completions.create(**GREEDY | {"logprobs": 2})).choices[0]
            assert whole.logprobs is not None and whole.logprobs.tokens is not None
            assert len(whole.logprobs.tokens) == 8 and all(
                len(top) == 2 for top in whole.logprobs.top_logprobs or []
            )
            stream = await client.completions.create(**GREEDY, stream=True)
            assert "".join([event.choices[0].text async for event in stream]) == whole.text
            stop = whole.text[2:4]
            cut = (await client.completions.create(**GREEDY | {"stop": [stop]})).choices[0]
            assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
            chat = await client.chat.completions.create(
                model="own", messages=[{"role": "user", "content": "fox"}], max_tokens=5, logprobs=True
            )
            assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content
            with pytest.raises(openai.BadRequestError, match="logit_bias is not supported"):
                await client.completions.create(**GREEDY, logit_bias={"5": 1})
            with pytest.raises(openai.BadRequestError, match="the model reads 128"):
                await client.completions.create(**GREEDY | {"prompt": [5] * 200})

    with running(LocalBackend(service)) as server:
        asyncio.run(run(server.url))


def test_request__client_goes_away__ends_in_vllm_too(service: ModelService) -> None:
    engine: Any = service._engine

    async def run() -> None:
        request = EngineRequest(
            request_id="gone", prompt=[5], sampling=SamplingParams(max_tokens=120, ignore_end=True)
        )
        stream = engine.submit(request)
        await anext(stream)
        assert engine.stats().running == 1
        await stream.aclose()
        deadline = time.monotonic() + 20
        while engine.stats().running:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    asyncio.run(run())
    stats = engine.stats()
    assert stats.num_cancelled == 1 and stats.num_prompt_tokens > 0 and stats.tokens_per_s > 0


def test_vllm_is_killed__requests_fail_and_the_service_is_unhealthy(service: ModelService) -> None:
    engine: Any = service._engine

    async def run() -> None:
        request = EngineRequest(
            request_id="lost", prompt=[5], sampling=SamplingParams(max_tokens=120, ignore_end=True)
        )
        stream = engine.submit(request)
        await anext(stream)
        os.kill(engine._process._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="vLLM"):
            async for _ in stream:
                pass

    asyncio.run(run())
    until(lambda: engine.stats().error is not None)
    with pytest.raises(EngineError, match="SIGKILL"):
        service.require_healthy()
    with pytest.raises(EngineError, match="SIGKILL"):
        engine.submit(EngineRequest(request_id="late", prompt=[5], sampling=SamplingParams()))


def vllm_processes() -> list[psutil.Process]:
    assert INSTALL is not None
    root = str(INSTALL.python.parent.parent)
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("VLLM_HOST_IP") == "127.0.0.1" and root in process.environ().get("PATH", ""):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_forge_serve__as_a_user_runs_it__serves_updates_recovers_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    others = set(vllm_processes())
    settings = ServerSettings(
        name="test", source=str(folder), model_name="tiny", engine="vllm", port=free_port("127.0.0.1")
    )
    client = openai.OpenAI(base_url=f"{settings.url}/v1", api_key="none", max_retries=20, timeout=60)
    start_server(settings)
    try:
        ready = await_ready("test", on_message=print)
        assert "served log-probabilities" in ready.message
        before = client.completions.create(**GREEDY).choices[0].text
        until(lambda: find_server("test").record.get("engine") == "vllm 0.32.0")
        ours = [process for process in vllm_processes() if process not in others]
        assert ours and not open_ports(ours, host=get_node_ip_address())
        other = write_causal_lm(tmp_path / "other", seed=1, **SHAPE)
        update_server("test", {"source": str(other)}, on_message=print)
        after = client.completions.create(**GREEDY).choices[0].text
        assert after != before
        until(lambda: not any(process.is_running() for process in ours))
        for process in vllm_processes():
            if process not in others:
                process.kill()
        until(lambda: bool({*vllm_processes()} - others), within_s=START_S)
        deadline = time.monotonic() + START_S
        while True:
            try:
                assert client.completions.create(**GREEDY).choices[0].text == after
                break
            except openai.APIStatusError:
                assert time.monotonic() < deadline
    finally:
        process = server_process("test")
        if process is not None:
            process.request_stop()
            process.wait()
    until(lambda: not {*vllm_processes()} - others)
