"""Ray's command line without the servers that forge does not use: no metrics, no Ray Client.

    python -P -m forge.cluster.ray_cli [--after HOST:PORT] start ...

`ray start` opens ports for Prometheus on all addresses, which answer without the cluster's token, and one for Ray
Client. Metrics are switched off by settings, of which two are only ports: an invalid one keeps its process from
listening. For Ray Client there is no switch; Ray does not start its server where its dependencies are missing.
forge starts every Ray node by this module, on this machine, on hosts, on clouds and in pods.

With `--after` the head may still be starting: Ray is imported while the node waits for the head's port.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time

NO_METRICS = {
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",
    "AUTOSCALER_METRIC_PORT": "-1",
}
"""The settings that keep Ray's processes from serving metrics. Source: ray 2.60, `dashboard/consts.py`,
`autoscaler/_private/constants.py` and `ray_config_def.h`."""

_TIMEOUT_S = 60.0
_POLL_S = 0.05


def main() -> None:
    """Run Ray's command line with this process's arguments."""
    os.environ.update(NO_METRICS)
    after = sys.argv.pop(2) if sys.argv[1:2] == ["--after"] else None
    if after is not None:
        del sys.argv[1]
    from ray.scripts import scripts

    if not hasattr(scripts, "get_ray_client_dependency_error"):
        sys.exit("this version of Ray cannot be started without the server of Ray Client; install the pinned one")
    scripts.get_ray_client_dependency_error = lambda: ImportError("forge does not use Ray Client")
    if after is not None:
        _wait_for_port(after)
    scripts.main()


def _wait_for_port(address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1.0):
            return
        if time.monotonic() > deadline:
            sys.exit(f"the head did not open its port {host}:{port} within {_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)


if __name__ == "__main__":
    main()
