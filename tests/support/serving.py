"""A tiny model behind a real HTTP server in this process, for tests of the API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forge.process import free_port
from forge.runtime.servers import await_ready, server_process, start_server
from forge.serve.calls import (
    GenerateCall,
    ServedModel,
    TextDelta,
    TextsCall,
)
from forge.serve.http.api_keys import KeyRing
from forge.serve.http.app import build_app
from forge.serve.http.connection import LimitedConnection
from forge.serve.http.serving import Serving
from forge.serve.http.settings import ServerSettings
from forge.serve.service import ModelService
from tests.support.objectives import write_tokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_causal_lm(folder: Path, *, seed: int = 0, max_positions: int = 128, **shape: Any) -> Path:
    """Write a random Llama of 2 layers with a tokenizer and a chat template, as a folder of transformers."""
    write_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_positions,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | shape)).save_pretrained(folder)
    return folder


def write_model(folder: Path, build: Callable[[], PreTrainedModel]) -> Path:
    """Write a model with random weights and a tokenizer, as a folder of transformers."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    build().save_pretrained(folder)
    return folder


class LocalBackend:
    """A `ModelBackend` over a model in this process."""

    def __init__(self, service: ModelService) -> None:
        self.service, self.info = service, service.info

    async def generate(self, call: GenerateCall | TextsCall) -> AsyncGenerator[Sequence[TextDelta], None]:
        async with contextlib.aclosing(self.service.generate(call)) as batches:
            async for batch in batches:
                yield batch

    async def stats(self) -> Mapping[str, Mapping[str, Any]]:
        return {"local": self.service.stats()}


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server that answers on a port of loopback."""

    serving: Serving
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def running(backend: Any, *, keys: KeyRing | None = None, **settings: Any) -> Iterator[RunningServer]:
    """Serve a backend on a free port by a thread of this process."""
    options = ServerSettings(name="test", source="", model_name=backend.info.name, **settings)
    serving = Serving(settings=options, backend=backend, keys=keys or KeyRing((), limits=options.limits))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        protocol = LimitedConnection.within(serving.connections)
        config = uvicorn.Config(
            build_app(serving), http=protocol, lifespan="off", log_config=None, server_header=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[listener]),), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield RunningServer(serving=serving, port=listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(10)


def info_of(**changes: Any) -> ServedModel:
    """What a backend of a test says about its model."""
    return ServedModel(
        **({"name": "tiny", "kind": "causal-lm", "max_positions": 128, "digest": "0" * 64} | changes)
    )


@contextlib.contextmanager
def serving(state: Path, *, source: Path, variables: dict[str, str] | None = None, **changes: Any) -> Iterator[str]:
    """Run a server named `test` on a Ray cluster of its own; yields its URL."""
    before = dict(os.environ)
    os.environ |= {"FORGE_STATE": str(state)} | (variables or {})
    settings = ServerSettings(
        name="test", source=str(source), model_name="tiny", port=free_port("127.0.0.1"), **changes
    )
    try:
        start_server(settings)
        await_ready("test", on_message=print)
        yield settings.url
    finally:
        process = server_process("test")
        if process is not None:
            process.request_stop()
            process.wait()
        os.environ.clear()
        os.environ.update(before)
