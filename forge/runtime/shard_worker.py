"""A worker of a shard map: a Ray actor that loads what it needs once, then computes one shard at a time."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import ray

from forge.errors import ForgeError
from forge.process import one_line
from forge.runtime.forwarded_warnings import forward_warnings


class ShardFunction(Protocol):
    """What a worker computes. A class of such objects is named by `ShardWorkerSpec.function`."""

    def __init__(self, config: Any) -> None:
        """Load the model."""

    def __call__(self, inputs: Any, *, report: Callable[[], None]) -> Any:
        """Return the result of one shard as JSON values; it must depend on the inputs alone.

        Args:
            report: called after every part of the work; a worker that does not call it for long is replaced.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWorkerSpec:
    """What every worker of a map is started with."""

    function: str
    """`module:Class` of a `ShardFunction`."""
    config: Any
    """Its argument; of types that pickle and that the workers can import."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Credentials for the worker's process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardAnswer:
    """The result of a shard or of loading, or the error."""

    result: Any = None
    error: str | None = None
    """Class of the exception; None if there was none."""
    message: str = ""
    traceback: str = ""
    warnings: tuple[str, ...] = ()
    """Every `ForgeWarning` since the last answer."""


@ray.remote(max_restarts=0, concurrency_groups={"watch": 1})
class ShardWorkerActor:
    """One worker."""

    def __init__(self) -> None:
        self._num_reports = 0
        self._function: Any = None
        self._warnings: list[str] = []
        forward_warnings(self._warnings.append)

    def load(self, spec: ShardWorkerSpec) -> ShardAnswer:
        """Make the function. Returns: the process id and the node."""
        os.environ.update({**spec.environment, "OMP_NUM_THREADS": "1"})
        return self._answer(lambda: self._make(spec))

    def run(self, inputs: Any) -> ShardAnswer:
        """Compute one shard."""
        return self._answer(lambda: self._function(inputs, report=self._report))

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def num_reports(self) -> int:
        """How often the work has reported progress; answered while a shard is computed."""
        return self._num_reports

    def _make(self, spec: ShardWorkerSpec) -> dict[str, Any]:
        module, _, name = spec.function.partition(":")
        kind = getattr(import_module(module), name)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        self._function = kind(spec.config)
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def _report(self) -> None:
        self._num_reports += 1

    def _answer(self, work: Callable[[], Any]) -> ShardAnswer:
        try:
            result = work()
            warnings = tuple(self._warnings)
            self._warnings.clear()
            return ShardAnswer(result=result, warnings=warnings)
        except Exception as error:
            message = str(error) if isinstance(error, ForgeError) else f"{type(error).__name__}: {one_line(error)}"
            return ShardAnswer(error=type(error).__name__, message=message, traceback=traceback.format_exc())
        finally:
            self._report()
