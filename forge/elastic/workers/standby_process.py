"""A standby process until it becomes a rank: create the CUDA context, report, wait for the launch spec.

Forked from the fork server, as ranks are. It writes its pid to its socket when the device is ready; what it reads
is the launch spec of the rank and the file descriptors that the rank inherits. At the end of the socket it exits.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence

import torch

from forge.elastic.workers.worker_process import run_worker_process
from forge.process import first_line
from forge.train.cuda import create_context, set_visible_gpus

_MAX_FDS = 253
"""That one message can carry. Source: `SCM_MAX_FD`, unix(7)."""


def run_standby(sock: socket.socket, *, device: str, gpus: Sequence[str], plan_json: str) -> int:
    """Prepare a device and run one rank on it. Returns: the exit code; 0 if there was no rank to run."""
    try:
        set_visible_gpus(gpus)
        create_context(torch.device(device))
    except (
        RuntimeError
    ) as error:  # in the compute mode EXCLUSIVE_PROCESS, or without memory: a rank is forked later
        sys.stderr.write(f"no standby process on {device}: {first_line(error)}\n")
        sys.stderr.flush()
        return 1
    sock.send(str(os.getpid()).encode())
    text, fds, _, _ = socket.recv_fds(sock, 16, _MAX_FDS)
    if not text:
        return 0
    spec_fd, *inherited = fds
    with os.fdopen(spec_fd, "rb") as file:
        file.seek(0)
        spec = json.loads(file.read())
    return run_worker_process(spec, fds=[sock.detach(), *inherited], plan_json=plan_json)
