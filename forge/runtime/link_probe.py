"""Measure the links between the nodes of a Ray cluster with torch's collectives; runs on its head.

`python -m forge.runtime.link_probe ADDRESS` prints one line of JSON. Each GPU is a rank, or each node without one.
The ranks measure, one after the other:

    within    an all-gather within each node
    between   an exchange of each pair of neighbours in the ring of nodes, in rounds in which no node has two
    all       an all-gather over all ranks

Each is tried with a small message, then with one that takes about a third of a second, so all take about ten
seconds. They need the network alone: nothing else should run on the cluster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forge.elastic.commands import interface_of
from forge.errors import ClusterError, ForgeError
from forge.plan.measured_links import MeasuredLinks, NodeLink
from forge.process import first_line
from forge.redact import redact_output
from forge.runtime.ray_connection import connect, prepare_connection

_TIMEOUT_S = 120.0
_START_TIMEOUT_S = 90.0
_FIRST_BYTES = 2**18
_MOST_BYTES = {"cpu": 2**24, "cuda": 2**28}
_TARGET_S = 0.3
_LONGEST_S = 3.0
"""Of one operation on the slowest link."""
_REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One rank of the probe, as its process describes itself."""

    node: str
    device: str
    host: str
    port: int
    """Free on its node."""


class LinkProber:
    """One rank: a process on one node, with one GPU if the node has any."""

    def describe(self) -> Rank:
        """Where this rank is."""
        import ray
        import torch

        from forge.train.cuda import device_name

        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
        device = device_name(torch.device("cuda:0" if ray.get_gpu_ids() else "cpu"))
        return Rank(node=ray.get_runtime_context().get_node_id(), device=device, host=host, port=port)

    def measure(self, rank: int, nodes: Sequence[Sequence[int]], *, host: str, port: int) -> dict[str, list[float]]:
        """Take part in all measurements; collective.

        Args:
            nodes: the ranks of each node.
            host, port: of the store, on rank 0.

        Returns: bytes per second of this rank in each operation that it took part in: `within`; `between`, once for
            each neighbour; `all`.
        """
        import ray
        import torch
        import torch.distributed as dist

        from forge.train.cuda import set_up_nccl

        device = torch.device("cuda:0" if ray.get_gpu_ids() else "cpu")
        interface = interface_of(ray.util.get_node_ip_address())
        if device.type == "cuda":
            torch.cuda.set_device(device)
            set_up_nccl(interface=interface)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        world_size = sum(map(len, nodes))
        timeout = datetime.timedelta(seconds=_TIMEOUT_S)
        store = dist.TCPStore(host, port, world_size, rank == 0, timeout)  # type: ignore[attr-defined]
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        try:
            return _measure_all(rank, nodes, device=device)
        finally:
            dist.destroy_process_group()


def _measure_all(rank: int, nodes: Sequence[Sequence[int]], *, device: Any) -> dict[str, list[float]]:
    import torch
    import torch.distributed as dist

    dist.barrier()  # NCCL's first operation is to be one of all ranks
    groups = [dist.new_group(list(ranks)) for ranks in nodes]
    own = next(number for number, ranks in enumerate(nodes) if rank in ranks)
    found: dict[str, list[float]] = {"within": [], "between": [], "all": []}

    def gather(num_bytes: int, group: Any, size: int) -> None:
        part = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        dist.all_gather([torch.empty_like(part) for _ in range(size)], part, group=group)

    def measure(operate: Callable[[int], None] | None, *, of: str, parts: int) -> None:
        num_bytes, seconds = _timed(operate, device=device)
        if operate is not None:
            found[of].append(parts * num_bytes / seconds)

    if max(map(len, nodes)) > 1:
        size = len(nodes[own])
        within = None if size == 1 else lambda num_bytes: gather(num_bytes, groups[own], size)
        measure(within, of="within", parts=size - 1)
    for pairs in rounds(len(nodes)):
        peer = next((_peer(rank, nodes, pair) for pair in pairs if own in pair), None)

        def exchange(num_bytes: int, peer: int | None = peer) -> None:
            sent, got = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
            operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, got, peer)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        measure(None if peer is None else exchange, of="between", parts=1)
    world_size = sum(map(len, nodes))
    if world_size > 1:
        measure(lambda num_bytes: gather(num_bytes, None, world_size), of="all", parts=world_size - 1)
    return found


def rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Pair each node with both of its neighbours in a ring, so that no node is in two pairs of a round."""
    if num_nodes < 2:
        return []
    even = [(i, i + 1) for i in range(0, num_nodes - 1, 2)]
    odd = [(i, i + 1) for i in range(1, num_nodes - 1, 2)]
    if num_nodes == 2:
        return [even]
    last = [(num_nodes - 1, 0)]
    return [even, odd + last] if num_nodes % 2 == 0 else [even, odd, last]


def _peer(rank: int, nodes: Sequence[Sequence[int]], pair: tuple[int, int]) -> int | None:
    """The rank of the other node with which a rank exchanges; None if that node has fewer ranks."""
    mine, other = (nodes[number] for number in (pair if rank in nodes[pair[0]] else pair[::-1]))
    at = list(mine).index(rank)
    return other[at] if at < len(other) else None


def _timed(operate: Callable[[int], None] | None, *, device: Any) -> tuple[int, float]:
    """Time an operation in which this rank may have no part; collective. Returns: bytes, and median seconds."""
    if operate is not None:
        operate(_FIRST_BYTES)  # connects
    first_s = _once(operate, _FIRST_BYTES, device=device)
    fastest_s, slowest_s = _over_ranks(first_s, device=device)
    wanted = min(_FIRST_BYTES * _TARGET_S / fastest_s, _FIRST_BYTES * _LONGEST_S / slowest_s)
    num_bytes = max(_FIRST_BYTES, min(_MOST_BYTES[device.type], int(wanted)))
    times = [_once(operate, num_bytes, device=device) for _ in range(_REPEATS)]
    return num_bytes, statistics.median(times)


def _once(operate: Callable[[int], None] | None, num_bytes: int, *, device: Any) -> float:
    import torch
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    if operate is None:
        return math.nan
    operate(num_bytes)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _over_ranks(seconds: float, *, device: Any) -> tuple[float, float]:
    """The least and the most seconds of the ranks that took part."""
    import torch
    import torch.distributed as dist

    least, most = (math.inf, 0.0) if math.isnan(seconds) else (seconds, seconds)
    both = torch.tensor([-least, most], dtype=torch.float64, device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return -both[0].item(), both[1].item()


def probe_links(address: str) -> MeasuredLinks:
    """Measure the links of the nodes of a cluster, by one rank for each of their GPUs, or for each node without.

    Raises: ClusterError if the cluster does not answer, its GPUs are in use, or a rank fails.
    """
    prepare_connection(address)
    connect(address, min_cpus=1)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in alive if node["Resources"].get("GPU", 0) >= 1]
    with_cpus = [node for node in alive if node["Resources"].get("CPU", 0) >= 1]
    remote = ray.remote(LinkProber)
    ranks = [
        remote.options(
            num_cpus=0,
            num_gpus=1 if with_gpus else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote()
        for node in with_gpus or with_cpus
        for _ in range(int(node["Resources"]["GPU"]) if with_gpus else 1)
    ]
    if not ranks:
        raise ClusterError("no node of the cluster has a CPU or GPU for workers")
    try:
        described: list[Rank] = ray.get([rank.describe.remote() for rank in ranks], timeout=_START_TIMEOUT_S)
        names = list(dict.fromkeys(rank.node for rank in described))
        nodes = [[at for at, rank in enumerate(described) if rank.node == name] for name in names]
        first = {"host": described[0].host, "port": described[0].port}
        found = ray.get(
            [rank.measure.remote(at, nodes, **first) for at, rank in enumerate(ranks)], timeout=_TIMEOUT_S
        )
    except ray.exceptions.GetTimeoutError:
        busy = "are GPUs of it in use?" if with_gpus else "is it busy, or does a firewall stand between its nodes?"
        raise ClusterError(f"the cluster's {len(ranks)} ranks did not answer in time; {busy}") from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a rank of the probe failed: {first_line(error)}") from error
    return _links(described, nodes, found)


def _links(
    described: Sequence[Rank], nodes: Sequence[Sequence[int]], found: Sequence[dict[str, list[float]]]
) -> MeasuredLinks:
    def link(ranks: Sequence[int]) -> NodeLink:
        within = [rate for rank in ranks for rate in found[rank]["within"]]
        # All ranks of a node exchange at once: together they use all of its network cards.
        neighbours = zip(*(found[rank]["between"] for rank in ranks if found[rank]["between"]), strict=False)
        between = [sum(rates) for rates in neighbours]
        first = described[ranks[0]]
        return NodeLink(
            node=first.host,
            device=first.device,
            num_ranks=len(ranks),
            within_bytes_per_s=min(within, default=None),
            between_bytes_per_s=max(between, default=None),
        )

    gathered = [rate for one in found for rate in one["all"]]
    return MeasuredLinks(
        nodes=tuple(link(ranks) for ranks in nodes),
        all_gather_bytes_per_s=min(gathered, default=None),
        measured_at=time.time(),
    )


def main() -> None:
    """Print the measured links, or the error, as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m forge.runtime.link_probe")
    parser.add_argument("address")
    redact_output()
    try:
        answer: dict[str, Any] = {"answer": asdict(probe_links(parser.parse_args().address))}
    except ForgeError as error:
        answer = {"error": {"class": type(error).__name__, "message": str(error)}}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
