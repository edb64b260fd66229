"""Start, query or stop the Ray node of this host: `python -m forge.cluster.ssh.node_cli up|status|down FOLDER`.

The request is JSON on stdin, so that no secret is on a command line; secrets are written to files that only their
owner can read. State is kept under `FOLDER/clusters/<cluster>/<host>`. The answer, or an error, is one line of
JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge.cluster.local.ray_process import NodeProcess, await_start, end_node, family_of, launch, require_free
from forge.errors import ClusterError, ForgeError
from forge.fs import make_private, write_atomic
from forge.limits import usable_cpus
from forge.process import free_port

_OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory for Ray's objects: forge sends pieces of a corpus through it, and no tensors."""

_TEMPORARY = Path("/tmp")
_TEMPORARY_NAME = "temporary"
_WORKER_PORTS = range(10002, 20000)
"""Source: `ray start --help`, --min-worker-port and --max-worker-port."""


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2]).expanduser()
    request = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = {"answer": {"up": _up, "status": _status, "down": _down}[verb](folder, request)}
    except ForgeError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"{error.filename}: {error.strerror}"}
    sys.stdout.write(json.dumps(answer) + "\n")


def _up(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Start this host's node, unless it runs and belongs to the running head.

    All nodes of a cluster have the `session` of its head, which changes whenever the head is started, so a node of
    another session belongs to a former head.

    Returns: `was_up`; and `job_port`, which is 0 except on the head.
    """
    state_folder = _state_folder(folder, request)
    for private in (folder / "clusters", state_folder, Path("~/.forge").expanduser()):  # runs keep their logs there
        make_private(private)
    known = _read_state(state_folder)
    if known is not None and known["node"].is_alive:
        _require_same_settings(known, request, state_folder)
        if known["session"] == request["session"]:
            return {"was_up": True, "job_port": known["job_port"]}
    if known is not None:
        end_node(known["node"])
    _prepare_environment(request, state_folder / "token")
    is_head = request["head"] is None
    job_port = free_port() if is_head else 0
    arguments = _ray_arguments(request, job_port=job_port, temporary=_make_temporary(state_folder))
    log = state_folder / "ray.log"
    with _ignore_sigterm():  # until the process is recorded, so that `down` finds it
        node, process = launch(arguments, log=log, after=request["head"])
        state = {"node": asdict(node), "python": sys.executable, "session": request["session"]}
        state |= {"job_port": job_port, "port": request["port"], "id": request["id"]}
        write_atomic(state_folder / "node.json", json.dumps(state))
    try:
        await_start(process, log=log)
    except BaseException:
        end_node(node)
        raise
    return {"was_up": False, "job_port": job_port}


def _prepare_environment(request: dict[str, Any], token: Path) -> None:
    """Write the token, and set what Ray's processes inherit."""
    write_atomic(token, request["token"], mode=0o600)
    os.environ.pop("RAY_AUTH_TOKEN", None)  # of another cluster, and Ray would prefer it
    os.environ.update(request["environment"] | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})


def _make_temporary(state_folder: Path) -> Path:
    """Make a folder for Ray's logs and sockets, whose paths must be short; remove the former one.

    Its name is random, so that another user of this host cannot take it before.
    """
    _remove_temporary(state_folder)
    temporary = _TEMPORARY / f"forge-{secrets.token_hex(5)}"
    write_atomic(state_folder / _TEMPORARY_NAME, str(temporary))  # first, so that `down` finds it
    temporary.mkdir(mode=0o700)
    return temporary


def _remove_temporary(state_folder: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree((state_folder / _TEMPORARY_NAME).read_text(), ignore_errors=True)


def _ray_arguments(request: dict[str, Any], *, job_port: int, temporary: Path) -> list[str]:
    """Return the arguments of `ray start`. Raises: ClusterError if the head's port is taken."""
    arguments = ["--node-ip-address", request["address"], "--object-store-memory", str(_OBJECT_STORE_BYTES)]
    arguments += ["--temp-dir", str(temporary), "--num-cpus", str(usable_cpus())]
    if request["head"] is not None:
        return [*arguments, "--address", request["head"]]
    require_free(request["port"], message="is taken there ({}); choose another: ray_port in the cluster's file")
    arguments += ["--head", "--port", str(request["port"]), "--include-dashboard", "true", "--log-color", "false"]
    arguments += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(job_port), "--no-monitor"]
    if request["port"] in _WORKER_PORTS:  # Ray refuses a port that its workers might take
        arguments += ["--min-worker-port", "20000", "--max-worker-port", "29999"]
    return arguments


def _require_same_settings(known: dict[str, Any], request: dict[str, Any], state_folder: Path) -> None:
    """Raises: ClusterError if the running node has another version, port or token than requested."""
    if _is_of_another(known, request):
        raise ClusterError(
            f"another cluster named '{request['cluster']}' runs there, started from another machine; it was not "
            "touched. Choose another name: in the cluster's file"
        )
    first = f"forge cluster down {request['cluster']} first"
    if known["python"] != sys.executable:
        raise ClusterError(f"another version of forge runs there, {known['python']}; {first}")
    if known["port"] != request["port"]:
        raise ClusterError(
            f"Ray runs there with port {known['port']}, the file says {request['port']} now; {first}"
        )
    if (state_folder / "token").read_text() != request["token"]:
        raise ClusterError(f"Ray runs there with another token than this machine's; {first}")


def _status(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Returns: the `session` of the node that runs on this host; None without a node."""
    known = _read_state(_state_folder(folder, request))
    return {"session": known["session"] if known is not None and known["node"].is_alive else None}


def _down(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Stop this host's node, unless it belongs to another cluster of the name.

    Returns: `left`, its processes that still run; and `is_other`.
    """
    state_folder = _state_folder(folder, request)
    known = _read_state(state_folder)
    if known is not None and _is_of_another(known, request):
        return {"left": [], "is_other": True}
    left: list[str] = []
    if known is not None:
        end_node(known["node"])
        left = [f"process {process.pid}" for process in family_of(known["node"])]
    if not left:
        _remove_temporary(state_folder)
        shutil.rmtree(state_folder, ignore_errors=True)
    return {"left": left, "is_other": False}


def _is_of_another(known: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether the node was started by the cluster of another machine, whose user chose the same name."""
    return bool(known.get("id", request["id"]) != request["id"])


def _state_folder(folder: Path, request: dict[str, Any]) -> Path:
    return folder / "clusters" / str(request["cluster"]) / str(request["host"])


def _read_state(state_folder: Path) -> dict[str, Any] | None:
    try:
        body: dict[str, Any] = json.loads((state_folder / "node.json").read_text())
        return body | {"node": NodeProcess(**body["node"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _ignore_sigterm() -> Iterator[None]:
    """Finish the block even if the connection is lost."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # SIG_IGN would be inherited by Ray
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
