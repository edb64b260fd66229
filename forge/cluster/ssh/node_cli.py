"""forge on one machine of a cluster: `python -m forge.cluster.ssh.node_cli up|look|down FOLDER`, with an order
on stdin.

It starts this machine's Ray node, knows it again, and ends it; what is to be known of it lies under
`FOLDER/clusters/<cluster>/<host>`. Secrets come on stdin and go into files of their owner's alone. The answer is
one line of JSON, an error too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge.cluster.local.ray_process import (
    NodeProcess,
    await_start,
    end_node,
    family_of,
    launch,
    require_free,
)
from forge.errors import ClusterError, ForgeError
from forge.process import free_port

_OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory for Ray's objects; forge passes pieces of a corpus through it, and no tensors."""

_NO_METRICS = {"RAY_enable_metrics_collection": "0", "DASHBOARD_METRIC_PORT": "-1"}
"""Where Prometheus' client is installed, Ray's programs let everybody read metrics from all addresses, without a
token. One has no switch; a port that there cannot be keeps it from listening. The monitor is for autoscaling."""
_WORKER_PORTS = range(10002, 20000)
"""Source: `ray start --help`, --min-worker-port and --max-worker-port."""


def main() -> None:
    """Carry the order out, and answer."""
    verb, folder = sys.argv[1], Path(sys.argv[2]).expanduser()
    order = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = {"answer": {"up": _up, "look": _look, "down": _down}[verb](folder, order)}
    except ForgeError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"{error.filename}: {error.strerror}"}
    sys.stdout.write(json.dumps(answer) + "\n")


def _up(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Start this machine's node, unless the one that runs is as it should be.

    All nodes of a cluster are started with one `session`, which is another one whenever its head is started: a node
    of another session belongs to a head that is gone.

    Returns: `was_up`; of a head its `job_port`.
    """
    place = folder / "clusters" / order["cluster"] / order["host"]
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = _known(place)
    is_head = order["head"] is None
    if known is not None and known["node"].is_alive:
        _require_as_asked(known, order, place)
        if known["session"] == order["session"]:
            return {"was_up": True, "job_port": known["job_port"]}
    if known is not None:
        end_node(known["node"])
    token = place / "token"
    with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(order["token"])
    os.environ.pop("RAY_AUTH_TOKEN", None)  # of another cluster, and Ray would prefer it
    os.environ.update(
        order["environment"] | _NO_METRICS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    )
    temporary = Path(order["temporary"])
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    arguments = ["--node-ip-address", order["address"], "--object-store-memory", str(_OBJECT_STORE_BYTES)]
    arguments += ["--temp-dir", str(temporary)]
    job_port = free_port() if is_head else 0
    if is_head:
        message = "is taken there ({}); choose another: ray_port in the cluster's file"
        require_free(order["port"], message=message)
        arguments += ["--head", "--port", str(order["port"]), "--include-dashboard", "true", "--log-color", "false"]
        arguments += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(job_port), "--no-monitor"]
        if order["port"] in _WORKER_PORTS:  # Ray refuses a port that its workers might take
            arguments += ["--min-worker-port", "20000", "--max-worker-port", "29999"]
    else:
        arguments += ["--address", order["head"]]
    log = place / "ray.log"
    with _unstoppable():  # until what was started is known, and can be found by `down`
        node, process = launch(arguments, log=log, after=order["head"])
        known = {"node": asdict(node), "python": sys.executable, "session": order["session"], "job_port": job_port}
        _write(place, known | {"port": order["port"]})
    try:
        await_start(process, log=log)
    except BaseException:
        end_node(node)
        raise
    return {"was_up": False, "job_port": job_port}


def _require_as_asked(known: dict[str, Any], order: dict[str, Any], place: Path) -> None:
    """Raises: ClusterError if what runs is not what is asked for, but for the machines."""
    first = f"forge cluster down {order['cluster']} first"
    if known["python"] != sys.executable:
        raise ClusterError(f"another version of forge runs there, {known['python']}; {first}")
    if known.get("port", order["port"]) != order["port"]:
        raise ClusterError(f"Ray runs there with port {known['port']}, the file says {order['port']} now; {first}")
    if (place / "token").read_text() != order["token"]:
        raise ClusterError(f"Ray runs there with another token than is known here; {first}")


def _look(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Returns: the `session` of the node that runs on this machine; None if none does."""
    known = _known(folder / "clusters" / order["cluster"] / order["host"])
    return {"session": known["session"] if known is not None and known["node"].is_alive else None}


def _down(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    """End this machine's node. Returns: `left`, the processes of it that run all the same."""
    place = folder / "clusters" / order["cluster"] / order["host"]
    known = _known(place)
    left: list[str] = []
    if known is not None:
        end_node(known["node"])
        left = [f"process {process.pid}" for process in family_of(known["node"])]
    if not left:
        shutil.rmtree(order["temporary"], ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
    return {"left": left}


def _known(place: Path) -> dict[str, Any] | None:
    try:
        body: dict[str, Any] = json.loads((place / "node.json").read_text())
        return body | {"node": NodeProcess(**body["node"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(place: Path, body: dict[str, Any]) -> None:
    draft = place / "node.draft"
    draft.write_text(json.dumps(body) + "\n")
    draft.replace(place / "node.json")


@contextlib.contextmanager
def _unstoppable() -> Iterator[None]:
    """Go on for a moment although the connection is gone."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # unlike one that is ignored, Ray does not inherit it
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
