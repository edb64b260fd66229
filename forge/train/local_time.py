"""Measures how long a rank computes by itself in a step: the signal that finds a slow node.

Every rank's step takes as long as the slowest rank's, since all wait for it in collectives. What tells a slow rank
from one that waits is the time without collectives: fetching a micro-batch and the forward pass, or under ZeRO 3,
where the forward pass gathers weights, the forward passes of the largest layers, which run between two gathers.
Ranks that share sequences exchange parts of them in the forward pass: each exchange, with its wait, is timed and
subtracted. On CUDA all is timed by events on the stream, and read after the wait that ends a step anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


MAX_LAYERS = 32
"""Layers that are timed under ZeRO 3."""


class LocalTime:
    """The time of one rank's own work in the current step."""

    def __init__(self, module: nn.Module, *, device: torch.device, gathers_weights: bool) -> None:
        """Args:
        module: the model, after DeepSpeed has added its hooks: these run outside of what is timed.
        gathers_weights: whether forward passes gather weights (ZeRO 3), so that only single layers are timed.
        """
        self.on_step: Callable[[float], None] = lambda seconds: None
        """Called with the seconds of each step."""
        self._is_cuda = device.type == "cuda"
        self._gathers = gathers_weights
        self._host_s = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._waits: list[tuple[Any, Any]] = []
        self._in_forward = False
        self._began: dict[nn.Module, Any] = {}
        for layer in _largest_layers(module) if gathers_weights else ():
            layer.register_forward_pre_hook(self._layer_begins)
            layer.register_forward_hook(self._layer_ends, prepend=True)

    def fetching(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and time how long each takes to come."""
        source = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(source, None)
            self._host_s += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time a forward pass."""
        began = None if self._gathers else self._now()
        self._in_forward = True
        try:
            yield
        finally:
            self._in_forward = False
        if began is not None:
            self._add(began)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Leave an exchange with other ranks out of the forward pass that it is a part of."""
        began = self._now() if self._in_forward and not self._gathers else None
        yield
        if began is not None:
            self._add(began, is_wait=True)

    def end_step(self) -> None:
        """Report the seconds of the step; call it after the host has waited for the device."""
        device_ms = sum(began.elapsed_time(ended) for began, ended in self._events)
        device_ms -= sum(began.elapsed_time(ended) for began, ended in self._waits)
        seconds = self._host_s + device_ms / 1000
        self._host_s, self._events, self._waits = 0.0, [], []
        self.on_step(seconds)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _layer_begins(self, layer: nn.Module, arguments: Any) -> None:
        if self._in_forward:  # not when checkpointed activations are computed again
            self._began[layer] = self._now()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _layer_ends(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        began = self._began.pop(layer, None)
        if began is not None:
            self._add(began)

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _add(self, began: Any, *, is_wait: bool = False) -> None:
        if self._is_cuda:
            (self._waits if is_wait else self._events).append((began, self._now()))
        else:
            elapsed_s = time.perf_counter() - began
            self._host_s += -elapsed_s if is_wait else elapsed_s


def _largest_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers without layers of their own that have the most parameters."""
    leaves = [layer for layer in module.modules() if not any(layer.children()) and _num_parameters(layer)]
    return sorted(leaves, key=_num_parameters, reverse=True)[:MAX_LAYERS]


def _num_parameters(layer: nn.Module) -> int:
    # DeepSpeed leaves an empty tensor in place of a partitioned parameter.
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in layer.parameters())
