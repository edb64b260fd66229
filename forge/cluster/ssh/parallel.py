"""Run a function for many hosts in parallel; hosts that fail are reported and the others continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from forge.cluster.base import NodeProgress, OnProgress
from forge.cluster.ssh.session import cancel_all
from forge.errors import ClusterError

MAX_THREADS = 32
_POLL_S = 0.05
_T = TypeVar("_T")


def map_hosts(
    hosts: Sequence[str], work: Callable[[str], _T], *, failures: dict[str, str], on_progress: OnProgress
) -> dict[str, _T]:
    """Call `work` for every host, in a thread each.

    Args:
        failures: the reason of each host whose `work` raised ClusterError is added here.

    Returns: the results of the other hosts.
    """
    done: dict[str, _T] = {}

    def run(host: str) -> None:
        try:
            done[host] = work(host)
        except ClusterError as error:
            failures[host] = str(error).removeprefix(f"{host} ")
            on_progress(NodeProgress(name=host, message=failures[host], is_failure=True))

    pool = ThreadPoolExecutor(max_workers=MAX_THREADS)
    futures = [pool.submit(run, host) for host in hosts]
    try:
        for future in futures:
            future.result()
    except BaseException:  # Ctrl-C: end the threads that wait for a host
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            cancel_all()
            time.sleep(_POLL_S)
        raise
    pool.shutdown()
    return {host: done[host] for host in hosts if host in done}
