"""vLLM for the replicas of a server: its environment on every machine that may run one, and where it is found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from forge.errors import ClusterError
from forge.process import first_line
from forge.runtime.vllm_environment import find_vllm, make_vllm
from forge.serve.http.settings import EXPORTS, ServerSettings

if TYPE_CHECKING:
    from forge.serve.vllm.start import VllmPlace

_log = logging.getLogger("forge.serve")


def prepare_vllm(settings: ServerSettings, *, on_message: Callable[[str], None]) -> None:
    """Make vLLM's environment on every machine of the cluster that may run a replica, on all at once.

    Args:
        on_message: told what is installed, and how far it is.

    Raises: ClusterError with the reason if a machine cannot have it.
    """
    if settings.engine != "vllm":
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with_gpu = [node for node in nodes if node["Resources"].get("GPU")]
    here = ray.get_runtime_context().get_node_id()
    prepare = ray.remote(num_cpus=0, max_retries=0)(_prepare_there)
    running = [
        (
            node["NodeManagerAddress"],
            prepare.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                is_cuda=bool(with_gpu)
            ),
        )
        for node in with_gpu or nodes
        if node["NodeID"] != here
    ]
    if any(node["NodeID"] == here for node in with_gpu or nodes):
        make_vllm(is_cuda=bool(with_gpu), on_message=on_message)
    for address, messages in running:
        for reference in messages:
            message = ray.get(reference)
            if isinstance(message, Exception):
                raise ClusterError(f"{address}: {message}")
            on_message(f"{address}: {message}")


def vllm_place(settings: ServerSettings, *, folder: Path, replica: str) -> VllmPlace | None:
    """Where a replica on this machine has vLLM; None: it uses forge's engine.

    Raises: ClusterError if vLLM is asked for and cannot be installed.
    """
    import torch

    from forge.serve.vllm.start import VllmPlace

    is_cuda = torch.cuda.is_available()
    if settings.engine == "vllm":  # a machine that joined later has no environment yet
        install = make_vllm(is_cuda=is_cuda, on_message=_log.info)
    else:
        found = find_vllm(is_cuda=True) if settings.engine == "auto" and is_cuda else None
        if found is None:
            return None
        install = found
    return VllmPlace(install=install, log=folder / "logs" / f"vllm-{replica}.log", exports=folder / EXPORTS)


def _prepare_there(*, is_cuda: bool) -> Iterator[Any]:
    """Make the environment of another machine, as a task there. Yields: messages; an error is the last one."""
    said: SimpleQueue[Any] = SimpleQueue()

    def work() -> None:
        try:
            make_vllm(is_cuda=is_cuda, on_message=said.put)
            said.put(None)
        except Exception as error:
            said.put(ClusterError(first_line(error)))

    Thread(target=work, daemon=True).start()
    while (message := said.get()) is not None:
        yield message
        if isinstance(message, Exception):
            return
