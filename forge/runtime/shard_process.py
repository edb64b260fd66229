"""The process that drives a shard map for `forge eval` or `forge generate`: its request, its progress, its answer.

The client starts it with `torch_subprocess.run_driver` and a request as JSON on stdin. It writes lines of JSON to
stdout: `{"progress": [3, 12]}`, `{"message": "..."}`, and at the end `{"answer": ...}` or `{"error": ...}`.
SIGTERM, or the end of the client, stops it; finished shards are stored by then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol, TextIO

from forge.code_archive import TRUST
from forge.environment import adopt_environment
from forge.errors import ForgeError, RunError
from forge.process import die_with_parent, first_line, take_stdout
from forge.redact import redact_output
from forge.runs.secrets import credentials
from forge.runtime.ray_connection import connect, prepare_connection
from forge.runtime.shard_files import ShardFiles
from forge.runtime.shard_map import MapOptions, MapTotals, ShardMap, StoppedError
from forge.runtime.shard_worker import ShardWorkerSpec
from forge.units import counted


class MapElsewhere(Protocol):
    """Computes the shards that have no result on a cluster of other machines; `forge.remote.shard_task`."""

    def __call__(
        self,
        shards: Iterable[Any],
        *,
        spec: ShardWorkerSpec,
        files: ShardFiles,
        num_workers: int | None,
        stop: threading.Event,
        process: ShardProcess,
    ) -> MapTotals:
        """Raises: as `ShardMap.run`."""


class ShardProcess:
    """This process, while it answers one request.

    Args:
        parent: the client; if it has gone, what runs on another machine is left running.
    """

    def __init__(self, stdout: TextIO | None, *, parent: int | None = None) -> None:
        self._stdout, self._parent = stdout, parent
        self._stop = threading.Event()

    @property
    def is_stopped(self) -> bool:
        """Whether it was asked to stop."""
        return self._stop.is_set()

    def message(self, text: str) -> None:
        """Tell the client something that its user should read."""
        self._write({"message": text})

    def progress(self, done: int, total: int) -> None:
        """Tell the client how much is done."""
        self._write({"progress": [done, total]})

    def map(
        self,
        shards: Callable[[], Iterable[Any]],
        *,
        spec: ShardWorkerSpec,
        files: ShardFiles,
        total: int,
        num_workers: int | None = None,
        address: str | None = None,
        resource: str = "auto",
        elsewhere: MapElsewhere | None = None,
    ) -> MapTotals:
        """Compute the shards that have no result, on the cluster at an address or on this machine.

        Args:
            shards: returns their inputs, as JSON values; called twice.
            spec: of the workers; credentials of this machine are added to it.
            files: the results; a lock in their folder keeps a second process out.
            total: number of shards, for the progress.
            num_workers: the most; None: as many as the cluster has slots.
            address: of the Ray cluster; None: one that ends with this process.
            resource: `CPU`, `GPU`, or `auto`: GPUs where the cluster has any.
            elsewhere: computes them on a cluster of other machines instead.

        Raises: what `ShardMap.run` raises; ArgumentError if another process computes the same; RunError if stopped.
        """
        with files.locked():
            files.prepare()
            if all(files.read(files.key(inputs)) is not None for inputs in shards()):  # no cluster is needed
                self.progress(total, total)
                return MapTotals(num_shards=total, num_reused=total)
            self.take_signals()
            if elsewhere is not None:
                try:
                    return elsewhere(
                        shards(), spec=spec, files=files, num_workers=num_workers, stop=self._stop, process=self
                    )
                except StoppedError as error:
                    raise RunError(f"stopped: {error}; start it again to go on") from None
            return self._map_on_ray(
                shards, spec=spec, files=files, total=total, num_workers=num_workers, address=address,
                resource=resource,
            )  # fmt: skip

    def _map_on_ray(
        self,
        shards: Callable[[], Iterable[Any]],
        *,
        spec: ShardWorkerSpec,
        files: ShardFiles,
        total: int,
        num_workers: int | None,
        address: str | None,
        resource: str,
    ) -> MapTotals:
        prepare_connection(address)
        import ray

        connect(address, min_cpus=num_workers or 1)
        self.take_signals()  # ray.init has replaced the handler
        from forge.runtime.local_cluster import is_local_cluster

        if resource == "auto":
            resource = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
        keys = credentials(os.environ, with_files=is_local_cluster())
        keys |= {TRUST: os.environ[TRUST]} if TRUST in os.environ else {}
        done: list[int] = []

        def on_done(number: int) -> None:
            done.append(number)
            self.progress(len(done), total)

        try:
            return ShardMap(
                replace(spec, environment=keys),
                files=files,
                options=MapOptions(num_workers=num_workers, resource="GPU" if resource == "GPU" else "CPU"),
                stop=self._stop,
                on_done=on_done,
                on_message=self.message,
            ).run(shards())
        except StoppedError:
            stored = f"{len(done)} of {counted(total, 'shard')}"
            raise RunError(f"stopped with {stored} stored; start it again to go on") from None
        finally:
            ray.shutdown()

    def take_signals(self) -> None:
        """Stop at SIGTERM."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client receives it, and asks this process to stop

    def has_client(self) -> bool:
        """Whether the client still runs."""
        return self._parent is None or os.getppid() == self._parent

    def _write(self, line: dict[str, Any]) -> None:
        assert self._stdout is not None, "a process without a client records events instead"
        self._stdout.write(json.dumps(line) + "\n")
        self._stdout.flush()


def answer_request(handle: Callable[[dict[str, Any], ShardProcess], Any]) -> None:
    """Answer the request on stdin; the `main` of a module that `torch_subprocess.run_driver` starts.

    Args:
        handle: returns the answer as JSON values; an error that it raises is sent to the client.
    """
    stdout = take_stdout()
    redact_output()
    adopt_environment()
    request = json.load(sys.stdin)
    parent = request.pop("parent")
    die_with_parent(parent, signal_number=signal.SIGTERM)
    process = ShardProcess(stdout, parent=parent)
    try:
        line = {"answer": handle(request, process)}
    except ForgeError as error:
        line = {"error": {"class": type(error).__name__, "message": str(error)}}
    except Exception as error:
        traceback.print_exc()
        line = {"error": {"class": "RunError", "message": f"{type(error).__name__}: {first_line(error)}"}}
    with stdout:
        json.dump(line, stdout)
