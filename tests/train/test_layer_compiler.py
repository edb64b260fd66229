"""Compiled layers: the same losses and gradients, a failure that is reported, a cache that the next run finds."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from forge.elastic.workers.status_page import create_status_page
from forge.elastic.workers.worker_process import AgentLink, FailureReporter
from forge.events import CompileFailed, Event, LayersCompiled
from forge.model.repeated_layers import repeated_layers
from forge.model.selective_checkpoint import enable_checkpointing
from forge.plan.inputs import CorpusInfo
from forge.train import layer_compiler
from forge.train.layer_compiler import LayerCompiler
from tests.support.jobs import tiny_plan
from tests.support.ranks import RecordingReporter, on_ranks, run_ranks

COMPILE_S = 500.0
pytestmark = pytest.mark.slow  # the compiler alone takes seconds to import


class Squares(nn.Module):
    def __init__(self, *, reads_values: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Square(reads_values=reads_values) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


class Square(nn.Module):
    def __init__(self, *, reads_values: bool) -> None:
        super().__init__()
        self.weight, self.reads_values = nn.Parameter(torch.ones(4)), reads_values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reads_values and x.sum().item() < 0:
            return x
        return torch.tanh(x * self.weight) ** 2


def step(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(torch.linspace(-1, 1, 4))
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_compile__layers_of_a_model__same_gradients_from_one_graph() -> None:
    model, reporter = Squares(reads_values=False), RecordingReporter(None)
    loss, gradients = step(model)
    compiler = LayerCompiler(model, reporter=reporter, backend="aot_eager")
    found = step(model)
    compiler.report()
    assert torch.equal(found[0], loss)
    assert all(map(torch.equal, found[1], gradients))
    (event,) = reporter.recording.events
    assert isinstance(event, LayersCompiled)
    assert event.num_layers == 3
    assert event.seconds > 0


def test_compile__layer_that_reads_values__runs_uncompiled_and_says_so_once() -> None:
    model, reporter = Squares(reads_values=True), RecordingReporter(None)
    loss, gradients = step(model)
    compiler = LayerCompiler(model, reporter=reporter, backend="aot_eager")
    for _ in range(2):
        found = step(model)
        assert torch.equal(found[0], loss)
        assert all(map(torch.equal, found[1], gradients))
    compiler.report()
    (event,) = reporter.recording.events
    assert isinstance(event, CompileFailed)
    assert "data-dependent" in event.reason


def llama_step(*, checkpointing: bool | str, is_compiled: bool) -> tuple[list[torch.Tensor], int]:
    """The gradients of a small Llama, and the products that its backward pass computed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=32, **sizes)).train()
    if checkpointing:
        enable_checkpointing(model, is_selective=checkpointing == "selective")
    reporter = RecordingReporter(None)
    if is_compiled:
        compiler = LayerCompiler(model, reporter=reporter, backend="aot_eager")
    ids = torch.arange(32).reshape(2, 16)
    loss = model(ids, labels=ids, use_cache=False).loss
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        loss.backward()
    if is_compiled:
        compiler.report()
        assert [type(event) for event in reporter.recording.events] == [LayersCompiled]
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return gradients, sum(event.count for event in profiled.key_averages() if event.key == "aten::mm")


def test_compile__selective_checkpointing__same_gradients_and_products_computed_once() -> None:
    expected, num_products = llama_step(checkpointing=False, is_compiled=False)
    gradients, num_all = llama_step(checkpointing=True, is_compiled=True)
    assert all(map(torch.equal, gradients, expected)) and num_all > num_products
    gradients, num_selective = llama_step(checkpointing="selective", is_compiled=True)
    assert all(map(torch.equal, gradients, expected)) and num_selective == num_products


def test_compile__torch_without_eager_backward_passes__runs_uncompiled_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_compiler, "_EAGER_BACKWARD", "no_such_setting")  # as in torch 2.9
    layer_compiler.prepare_compiler(num_ranks=1)
    model, reporter = Squares(reads_values=False), RecordingReporter(None)
    compiler = LayerCompiler(model, reporter=reporter, backend="aot_eager")
    step(model)
    compiler.report()
    (event,) = reporter.recording.events
    assert isinstance(event, CompileFailed)
    assert "install torch 2.10 or newer" in event.reason


def test_compile__no_repeated_layers__says_so() -> None:
    reporter = RecordingReporter(None)
    LayerCompiler(nn.Linear(2, 2), reporter=reporter)
    assert [event.reason for event in reporter.recording.events] == ["the model has no repeated layers"]


@pytest.mark.parametrize(
    "sizes", [{"model_type": "llama", "num_hidden_layers": 3}, {"model_type": "gpt2", "n_layer": 3, "n_embd": 48}]
)
def test_repeated_layers__model_of_transformers__its_decoder_layers(sizes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    assert len(repeated_layers(model)) == 3


@pytest.mark.timeout(2000)  # g++ compiles for minutes on a busy machine
def test_train__compiled__losses_equal_resume_exact_and_cache_found(
    corpus: CorpusInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    plain = tiny_plan(corpus, training__precision="fp32")
    plan = tiny_plan(corpus, training__precision="fp32", training__compile="on")
    expected = run_ranks(plain, tmp_path / "plain", world_size=1)
    whole = run_ranks(plan, tmp_path / "whole", world_size=1, timeout_s=COMPILE_S)
    first = run_ranks(plan, tmp_path / "parts", world_size=1, stop_after=3, timeout_s=COMPILE_S)
    second = run_ranks(plan, tmp_path / "parts", world_size=1, timeout_s=COMPILE_S)
    resized = run_ranks(plan, tmp_path / "two", world_size=2, timeout_s=COMPILE_S)
    assert whole.losses == pytest.approx(expected.losses, rel=1e-5)
    assert whole.losses != expected.losses  # otherwise nothing was compiled
    assert first.losses + second.losses == whole.losses
    assert resized.losses == pytest.approx(expected.losses, rel=1e-5)
    compiled = [[e for e in run.events if isinstance(e, LayersCompiled)] for run in (whole, first, resized)]
    assert [event.num_layers for (event,) in compiled] == [2, 2, 2]
    assert [event.num_from_cache for (event,) in compiled[1:]] == [event.num_graphs for (event,) in compiled[1:]]
    assert not [e for run in (whole, first, second, resized) for e in run.events if isinstance(e, CompileFailed)]


def test_compile__no_compiler_on_one_of_two_nodes__its_rank_says_so_to_its_agent(tmp_path: Path) -> None:
    found = on_ranks(compile_at_agent, str(tmp_path), world_size=2, timeout_s=COMPILE_S)
    (_, said), (loss, missing) = found
    assert loss == pytest.approx(found[0][0])
    assert said == []  # LayersCompiled of another rank than 0 is not reported
    (event,) = missing
    assert isinstance(event, CompileFailed) and "C++" in event.reason


def compile_at_agent(rank: int, folder: str) -> tuple[float, list[Event]]:
    """Compile layers as a rank but 0, on rank 1 by a C++ compiler that is missing.

    Returns: the loss, and the events that its agent got.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{rank}"
    if rank == 1:
        os.environ |= {"PATH": folder, "CXX": "no-such-compiler"}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    status = create_status_page()
    layer_compiler.prepare_compiler(num_ranks=2)
    model = Squares(reads_values=False)
    reporter, backend = FailureReporter(AgentLink(theirs, status)), "inductor" if rank == 1 else "aot_eager"
    compiler = LayerCompiler(model, reporter=reporter, backend=backend)
    for _ in range(2):
        loss, _ = step(model)
    compiler.report()
    ours.setblocking(False)
    events = []
    with contextlib.suppress(BlockingIOError):
        while True:
            kind, event = pickle.loads(ours.recv(2**16))
            assert kind == "event"
            events.append(event)
    return float(loss), events
