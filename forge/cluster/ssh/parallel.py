"""Many machines at once, a thread each: who fails is told of and left out, and the others go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from forge.cluster.base import NodeProgress, OnProgress
from forge.cluster.ssh.session import cancel_all
from forge.errors import ClusterError

MOST_AT_ONCE = 32
_POLL_S = 0.05
_T = TypeVar("_T")


def map_hosts(
    hosts: Sequence[str], work: Callable[[str], _T], failures: dict[str, str], on_progress: OnProgress
) -> dict[str, _T]:
    """Do something with many machines at once.

    Args:
        failures: Those that fail are added, with the reason.

    Returns: what came out, of the others.
    """
    done: dict[str, _T] = {}

    def one(host: str) -> None:
        try:
            done[host] = work(host)
        except ClusterError as error:
            failures[host] = str(error).removeprefix(f"{host} ")
            on_progress(NodeProgress(name=host, message=failures[host], is_failure=True))

    pool = ThreadPoolExecutor(max_workers=MOST_AT_ONCE)
    futures = [pool.submit(one, host) for host in hosts]
    try:
        for future in futures:
            future.result()
    except BaseException:  # Ctrl-C: nobody waits for what the others say
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            cancel_all()
            time.sleep(_POLL_S)
        raise
    pool.shutdown()
    return {host: done[host] for host in hosts if host in done}
