"""Timing a rank's own work: fetching and forward passes, without what runs around the layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from forge.train import local_time
from forge.train.local_time import MAX_LAYERS, LocalTime

CPU = torch.device("cpu")


class Clock:
    """Replaces the module `time`: it passes only where something works."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(local_time, "time", clock)
    return clock


class Working(nn.Linear):
    def __init__(self, clock: Clock) -> None:
        super().__init__(2, 2)
        self.clock = clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.work(0.02)
        return super().forward(x)


def timed(model: nn.Module, *, gathers_weights: bool) -> tuple[LocalTime, list[float]]:
    steps: list[float] = []
    local = LocalTime(model, device=CPU, gathers_weights=gathers_weights)
    local.on_step = steps.append
    return local, steps


def test_forward__without_gathers__whole_pass_and_fetching(clock: Clock) -> None:
    local, steps = timed(Working(clock), gathers_weights=False)

    def batches() -> Iterator[int]:
        for number in range(2):
            clock.work(0.01)
            yield number

    for _ in local.fetching(batches()):
        with local.forward():
            clock.work(0.02)
        clock.work(0.05)  # backward: waits for others
    local.end_step()
    local.end_step()
    assert steps == [pytest.approx(0.06), 0.0]


def test_forward__with_gathers__layers_without_what_is_around_them(clock: Clock) -> None:
    model = nn.Sequential(Working(clock), Working(clock))
    for layer in model:  # as DeepSpeed's: they gather weights before a layer, and release them after it
        layer.register_forward_pre_hook(lambda *_: clock.work(0.5))
        layer.register_forward_hook(lambda *_: clock.work(0.5))
    local, steps = timed(model, gathers_weights=True)
    with local.forward():
        model(torch.zeros(1, 2))
    model(torch.zeros(1, 2))  # an evaluation, or checkpointed activations computed again
    local.end_step()
    assert steps == [pytest.approx(0.04)]


class Event:
    """An event of a CUDA stream, on which the clock's work takes place."""

    clock: Clock
    at: float

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.clock.now

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.at - self.at)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_forward__exchanges_with_other_ranks__are_left_out(
    clock: Clock, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Event.clock = clock
    monkeypatch.setattr(torch.cuda, "Event", Event)
    local = LocalTime(Working(clock), device=torch.device(device), gathers_weights=False)
    steps: list[float] = []
    local.on_step = steps.append

    def layer() -> None:
        clock.work(0.02)
        with local.waiting():
            clock.work(0.3)

    for _ in range(2):
        with local.forward():
            layer()
            layer()
        layer()  # checkpointed activations computed again: not a part of the forward pass
    local.end_step()
    local.end_step()
    assert steps == [pytest.approx(0.08), 0.0]


def test_waiting__with_gathers__layers_are_timed_alone(clock: Clock) -> None:
    model = nn.Sequential(Working(clock))
    local, steps = timed(model, gathers_weights=True)
    with local.forward():
        model(torch.zeros(1, 2))
        with local.waiting():
            clock.work(0.3)
    local.end_step()
    assert steps == [pytest.approx(0.02)]


def test_layers__many__only_the_largest_are_timed() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(MAX_LAYERS)), nn.Linear(2, 9), nn.Linear(9, 2))
    LocalTime(model, device=CPU, gathers_weights=True)
    timed_layers = [layer for layer in model if layer._forward_pre_hooks]
    assert len(timed_layers) == MAX_LAYERS
    assert model[-1] in timed_layers and model[-2] in timed_layers
