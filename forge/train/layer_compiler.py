"""Compile the layers of a model, one by one (`training.compile`).

Layers of one class share their compiled code, so a deep model compiles as fast as a single layer (regional
compilation), and what comes before and after the layers stays as it is. A layer is compiled whole or not at all: if
that fails, all layers run uncompiled from there on, and the reason is reported once. Compiled code is stored in the
node's cache folder, where the next generation finds it, also at another world size.

Source: torch's recipe "Reducing torch.compile cold start compilation time with regional compilation".
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters

from forge.events import CompileFailed, LayersCompiled, Reporter
from forge.fs import default_cache_dir
from forge.limits import usable_cpus
from forge.model.repeated_layers import repeated_layers
from forge.process import one_line

_PROGRESS_S = 1.0
_MAX_COMPILE_S = 1800.0
"""A compilation that takes longer counts as no progress, so that the supervisor finds a rank that hangs in it."""
_MAX_THREADS = 8
_EAGER_BACKWARD = "force_non_lazy_backward_lowering"
"""torch's setting to compile the backward pass with the forward pass. Otherwise it is compiled when it first runs,
where a failure can no longer be caught. torch 2.9 does not have it."""
_COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)


class LayerCompiler:
    """The compiled layers of one model, and what became of them."""

    def __init__(
        self,
        model: nn.Module,
        *,
        reporter: Reporter,
        on_progress: Callable[[], None] = lambda: None,
        backend: str = "inductor",
    ) -> None:
        """Have each layer compiled at its first call.

        Args:
            on_progress: called every second while a layer is compiled.
            backend: as of `torch.compile`.
        """
        self._reporter, self._on_progress = reporter, on_progress
        self._seconds = self._began = 0.0
        self._is_compiling = threading.Event()
        self._has_failed = False
        self._before = _cache_counts()
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)
        layers = repeated_layers(model)
        self._num_layers = len(layers)
        if not layers:
            self.give_up("the model has no repeated layers")
        elif not hasattr(torch._functorch.config, _EAGER_BACKWARD):
            problem = "compiles backward passes when they first run, where a failure cannot be caught"
            self.give_up(f"torch {torch.__version__} {problem}; install torch 2.10 or newer")
        for layer in layers:
            layer.forward = self._compiled(layer.forward, backend=backend)

    def give_up(self, reason: str) -> None:
        """Run all layers uncompiled from here on, and report why."""
        if not self._has_failed:
            self._has_failed = True
            self._reporter.event(CompileFailed(reason=reason, seconds=self._seconds))

    def report(self) -> None:
        """Report what was compiled until now, unless it was given up."""
        if self._has_failed:
            return
        num_hits, num_misses = (now - then for now, then in zip(_cache_counts(), self._before, strict=True))
        self._reporter.event(
            LayersCompiled(
                num_layers=self._num_layers,
                num_graphs=num_hits + num_misses,
                num_from_cache=num_hits,
                seconds=self._seconds,
            )
        )

    def _compiled(self, forward: Callable[..., Any], *, backend: str) -> Callable[..., Any]:
        compiled = torch.compile(forward, fullgraph=True, backend=backend)

        @functools.wraps(forward)
        def compiled_forward(*args: Any, **kwargs: Any) -> Any:
            if self._has_failed:
                return forward(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except _COMPILE_ERRORS as error:
                self.give_up(one_line(error))
                return forward(*args, **kwargs)

        return compiled_forward

    def _begin(self, _: Any) -> None:
        self._began = time.monotonic()
        self._is_compiling.set()
        threading.Thread(target=self._keep_reporting, args=(self._began,), daemon=True).start()

    def _end(self, _: Any) -> None:
        self._is_compiling.clear()
        self._seconds += time.monotonic() - self._began

    def _keep_reporting(self, began: float) -> None:
        """Report progress while one compilation runs; it is torch's, and calls nothing in between."""
        while self._is_compiling.is_set() and self._began == began and time.monotonic() < began + _MAX_COMPILE_S:
            self._on_progress()
            time.sleep(_PROGRESS_S)


def prepare_compiler(*, num_ranks: int) -> None:
    """Set where compiled code is stored, and how much of the node one rank's compilation uses.

    Call it before anything is compiled in this process. Variables that are set already are left as they are.

    Args:
        num_ranks: of this node.
    """
    threads = max(1, min(_MAX_THREADS, usable_cpus() // num_ranks))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_cache_dir().absolute() / "compiled"))
    torch._inductor.config.compile_threads = threads
    if hasattr(torch._functorch.config, _EAGER_BACKWARD):
        setattr(torch._functorch.config, _EAGER_BACKWARD, True)


def _cache_counts() -> tuple[int, int]:
    """Graphs that torch found in its cache in this process, and those that it did not."""
    found = counters["aot_autograd"]
    return found["autograd_cache_hit"], found["autograd_cache_miss"]
