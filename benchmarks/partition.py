"""Measure how long training pauses when one machine is cut off from the network.

Three machines train, each a network namespace on a bridge; a fourth is the head. Repeatedly, for each machine in
turn, its bridge port is closed, which drops all packets without closing connections. The result is the time until
the end of the first step of the other two machines. Then the machine's processes are killed, its port is opened,
and it joins again.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.changes import SETTLE_S, Watch, costs_of_losses, report
from benchmarks.peers.forge_elastic import write_job
from benchmarks.program import end_on_sigterm, uninterrupted
from forge.config.load import load_job
from forge.runs.create import create_run
from forge.runtime.resolve import resolve
from tests.support.hosts import Hosts, can_make_hosts

_NODES = 3


def measure_partition(job: Mapping[str, Any], *, repeats: int) -> dict[str, Any]:
    """Cut machines off, `repeats` times, and print the recovery times. Returns: the figures."""
    if not can_make_hosts():
        reason = "this needs the right to make network namespaces, and iproute2"
        print(f"\nno partition: {reason}")
        return {"partition_recovery_s": None, "partition_skipped": reason}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        folder, cut_s = Path(text), []
        with network() as hosts:
            hosts.start_ray()
            watch = Watch(folder, start_run(job, hosts, folder))
            watch.await_formed(None, since_s=0.0)
            time.sleep(2 * SETTLE_S)  # late machines join
            for repeat in range(repeats):
                host = 1 + repeat % _NODES
                cut_s.append(time.time())
                hosts.cut(host)
                watch.await_formed("loss", since_s=cut_s[-1])
                time.sleep(SETTLE_S)
                add_again(host, hosts, watch)
        return report({"partition_recovery": costs_of_losses(folder, cut_s)})


@contextlib.contextmanager
def network() -> Iterator[Hosts]:
    """Create the machines; delete them at the end."""
    end_on_sigterm()
    hosts = Hosts(1 + _NODES)
    try:
        yield hosts
    finally:
        with uninterrupted():
            hosts.close()


def start_run(job: Mapping[str, Any], hosts: Hosts, folder: Path) -> subprocess.Popen[Any]:
    """Start a run as `forge train` does, which itself cannot start one on these machines."""
    os.environ["FORGE_CACHE"] = str(folder / "cache")
    file = write_job({**job, "folder": str(folder)}, workers=_NODES)
    run = create_run(resolve(load_job(file)))
    command = (sys.executable, "-m", "forge.runtime.driver", run, "--address", hosts.ray_address)
    with (run / "logs" / "driver.log").open("w") as log:
        return hosts.run(0, *command, stdout=log, stderr=subprocess.STDOUT)


def add_again(host: int, hosts: Hosts, watch: Watch) -> None:
    """Restart a machine that was cut off, and wait until it joins."""
    hosts.kill(host)
    hosts.reconnect(host)
    began_s = time.time()
    hosts.join_ray(host)
    watch.await_formed("growth", since_s=began_s)
    time.sleep(SETTLE_S)
