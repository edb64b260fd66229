"""The process of one server: `python -m forge.runtime.serve_process FOLDER [--address ADDRESS]`.

It connects to a Ray cluster, or starts one that ends with it; deploys the model on Ray Serve; and answers HTTP.
It is independent of the client that started it; they write to each other in files of its folder.

SIGTERM once, or the notice that this machine is taken away: refuse new requests, finish the running ones, end.
Twice: end at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from forge.cluster.local.ray_cluster import require_private_token
from forge.cluster.ray_cli import NO_METRICS
from forge.elastic.preemption.notice import Notice
from forge.elastic.preemption.watch import watch
from forge.environment import adopt_environment, require_loopback, require_ray_folder
from forge.errors import ArgumentError, ClusterError, ForgeError
from forge.fs import write_atomic
from forge.limits import usable_cpus
from forge.pricing.budget import read_price
from forge.process import first_line, raise_descriptor_limit
from forge.redact import redact_output
from forge.runs.lock import LOCK
from forge.runtime.actor_names import NAMESPACE
from forge.runtime.driver_lock import acquire_lock
from forge.serve.http.api_keys import KEYS_VARIABLE, KeyRing, keys_of_environment
from forge.serve.http.app import build_app
from forge.serve.http.connection import LimitedConnection
from forge.serve.http.serving import Serving
from forge.serve.http.settings import (
    SETTINGS,
    STATUS,
    UPDATE,
    ServerSettings,
    claim_address,
    listen_on,
    require_authentication,
    settings_from_json,
    settings_to_json,
)
from forge.units import counted

if TYPE_CHECKING:
    from forge.runtime.serve_replica import RayBackend

_log = logging.getLogger("forge.serve")
_STATUS_EVERY_S = 1.0
_REPLICAS_EVERY = 5
"""The replicas are counted with every fifth status, as that costs Ray Serve's controller a few milliseconds."""
_CALM = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5"}
"""Of Ray Serve's controller, which uses 2 % of a core at its own interval of 0.1 s, also while nothing changes."""
_KEEP_ALIVE_S = 30
_NOTICE_MARGIN_S = 5.0


class ModelServer:
    """One server, from connecting to the cluster to the last answer."""

    _settings: ServerSettings
    _backend: RayBackend
    _serving: Serving
    _claim: socket.socket
    """Held until the process ends."""

    def __init__(self, folder: Path, *, address: str | None) -> None:
        self._folder, self._address = folder, address
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._drain_s: float | None = None
        self._state, self._message = "starting", ""
        self._update: dict[str, Any] | None = None
        self._num_replicas = 0
        self._generation = 1

    def run(self) -> int:
        """Serve until told to stop. Returns: the exit code."""
        try:
            self._settings = settings_from_json((self._folder / SETTINGS).read_text())
            keys = self._keys()
            self._claim = claim_address(self._settings.host, self._settings.port)
            listener = listen_on(self._settings.host, self._settings.port)
            self._say("starting", "starting Ray")
            self._connect()
            from forge.runtime.serve_replica import deploy
            from forge.runtime.vllm_replicas import prepare_vllm

            prepare_vllm(self._settings, on_message=lambda message: self._say("starting", message))
            self._say("starting", f"loading {self._settings.source}{self._vllm_note()}")
            self._backend = deploy(self._settings, app=self._app, folder=self._folder)
            self._serving = Serving(
                settings=self._settings, backend=self._backend, keys=keys, usd_per_hour=read_price(os.environ)
            )
            with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
                runner.run(self._serve(listener))
            self._say("stopped", self._message)
            return 0
        except ForgeError as error:
            _log.error("%s", error)
            self._say("failed", str(error), error=type(error).__name__)
            return error.exit_code
        except SystemExit:
            self._say("stopped", "stopped before it was ready")
            return 0
        except Exception as error:
            traceback.print_exc()
            self._say("failed", f"{type(error).__name__}: {first_line(error)}")
            return 4
        finally:
            self._disconnect()

    def on_signal(self, number: int, frame: object) -> None:
        """Begin to drain; the second time, or before the server is ready, end."""
        if self._loop is None:
            sys.exit(0)
        if self._stop.is_set():
            os._exit(128 + number)
        self._loop.call_soon_threadsafe(self._begin_stop, "stopped by a signal")

    @property
    def _app(self) -> str:
        return f"{self._settings.name}-{self._generation}"

    def _vllm_note(self) -> str:
        """Why the start may take minutes."""
        if self._settings.engine != "vllm":
            return ""
        return (
            " in vLLM, which compiles a model at its first start on a machine: about a minute, or several beside "
            f"other work; its log is {self._folder / 'logs'}/vllm-*.log"
        )

    def _keys(self) -> KeyRing:
        """Read the keys; those of the environment are taken out of it, since replicas inherit it."""
        limits = self._settings.limits
        fixed = keys_of_environment(os.environ, limits=limits)
        os.environ.pop(KEYS_VARIABLE, None)
        file = Path(self._settings.keys_file) if self._settings.keys_file else None
        keys = KeyRing(fixed, file=file, limits=limits)
        require_authentication(self._settings, has_keys=not keys.is_open)
        return keys

    def _connect(self) -> None:
        require_private_token()
        if self._address is None:
            require_ray_folder()
            require_loopback()
        import ray  # not before the token is set, whose mode Ray reads then

        from forge.runtime.serve_replica import start_serve

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if self._address is None:
            os.environ.update(NO_METRICS)
            for name, value in _CALM.items():
                os.environ.setdefault(name, value)
            os.environ.setdefault(
                "RAY_worker_niceness", "0"
            )  # Ray's default of 15 starves replicas beside other work
            cpus = max(usable_cpus(), 2 * self._settings.max_replicas)  # an update runs both
            options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 128 * 2**20}
        try:
            with contextlib.chdir("/"):  # the current folder of every actor
                ray.init(self._address or "local", namespace=NAMESPACE, **options)
            start_serve()
        except Exception as error:  # Ray raises many unrelated classes here
            raise ClusterError(
                f"cannot start Ray Serve on {self._address or 'this machine'}: {first_line(error)}"
            ) from error
        signal.signal(signal.SIGTERM, self.on_signal)  # ray.init has replaced it

    def _disconnect(self) -> None:
        import ray

        if ray.is_initialized():
            if self._address is not None:  # the cluster stays
                from forge.runtime.serve_replica import remove

                remove(self._backend.app if hasattr(self, "_backend") else self._app)
            ray.shutdown()

    async def _serve(self, listener: socket.socket) -> None:
        """Answer until told to stop, then finish what is running."""
        self._loop = asyncio.get_running_loop()
        server = _UvicornServer(
            uvicorn.Config(
                build_app(self._serving),
                http=LimitedConnection.within(self._serving.connections),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                ssl_certfile=self._settings.tls_cert,
                ssl_keyfile=self._settings.tls_key,
            )
        )
        http = asyncio.ensure_future(server.serve(sockets=[listener]))
        background = [asyncio.ensure_future(self._report()), asyncio.ensure_future(self._watch_notices())]
        self._state, self._message = "ready", self._backend.info.start_check
        _log.info("ready at %s", self._settings.url)
        await asyncio.wait({http, asyncio.ensure_future(self._stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
        self._state = "draining"
        drain_s = self._settings.drain_s if self._drain_s is None else self._drain_s
        is_drained = await self._serving.admission.drain(timeout_s=drain_s)
        left = 0 if is_drained else self._serving.admission.num_requests
        if left:
            self._message += f"; {counted(left, 'request')} cut after {drain_s:.0f} s"
        server.should_exit = True
        server.force_exit = not is_drained
        await http
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        self._backend.close()

    def _begin_stop(self, reason: str) -> None:
        if not self._stop.is_set():
            _log.info("%s: running requests are finished, new ones refused", reason)
            self._message = reason
            self._stop.set()

    async def _watch_notices(self) -> None:
        """Begin to drain when this machine is about to be taken away."""

        def on_notice(notice: Notice) -> None:
            if notice.is_certain:
                if notice.deadline is not None:
                    self._drain_s = max(0.0, notice.deadline - time.time() - _NOTICE_MARGIN_S)
                self._begin_stop(f"{notice.source} takes this machine away")

        await watch(os.environ, on_notice)

    async def _report(self) -> None:
        """Write the state once a second, and look for a request for other weights."""
        from forge.runtime.serve_replica import running_replicas

        updating: asyncio.Task[None] | None = None
        for number in itertools.count():
            if number % _REPLICAS_EVERY == 0:
                with contextlib.suppress(Exception):
                    self._num_replicas = await asyncio.to_thread(running_replicas, self._backend.app)
            # The file is flushed to the disk, for which answers would wait.
            await asyncio.to_thread(self._write_status, self._status())
            request = _read_json(self._folder / UPDATE)
            is_new = request is not None and request.get("id") != (self._update or {}).get("id")
            if request is not None and is_new and (updating is None or updating.done()):
                self._update = {"id": request.get("id"), "state": "running", "message": ""}
                updating = asyncio.ensure_future(self._update_to(request))
            await asyncio.sleep(_STATUS_EVERY_S)

    async def _update_to(self, request: dict[str, Any]) -> None:
        """Deploy other weights beside those in use, switch to them once they are ready, and remove the former."""
        from forge.runtime.serve_replica import deploy, remove

        began = time.monotonic()
        try:
            changes = {name: request[name] for name in ("source", "step", "ema") if name in request}
            adapters = tuple(request.get("adapters", self._settings.adapters))
            wanted = replace(self._settings, **changes, adapters=adapters)
            self._generation += 1
            new = await asyncio.to_thread(deploy, wanted, app=self._app, folder=self._folder)
            if new.info.kind != self._backend.info.kind:
                await asyncio.to_thread(remove, new.app)
                new.close()
                raise ArgumentError(
                    f"{Path(wanted.source).name} is a {new.info.kind} model, and clients of this server use the "
                    f"routes of a {self._backend.info.kind} model; serve it beside this one, with another --name"
                )
        except Exception as error:
            text = str(error) if isinstance(error, ForgeError) else f"{type(error).__name__}: {first_line(error)}"
            _log.error("the update failed, and the former weights stay in use: %s", text)
            self._update = {"id": request.get("id"), "state": "failed", "message": text}
            return
        former, self._backend = self._backend, new
        self._settings, self._serving.backend = wanted, new
        write_atomic(self._folder / SETTINGS, settings_to_json(wanted), mode=0o600)
        what = f"{Path(wanted.source).name} ({new.info.digest[:16]})"
        message = f"{what} serves as '{wanted.model_name}', {time.monotonic() - began:.1f} s after the request"
        if not await former.wait_idle(timeout_s=wanted.drain_s):
            message += f"; requests to the former weights were cut after {wanted.drain_s:.0f} s"
        await asyncio.to_thread(remove, former.app)
        former.close()
        _log.info("updated: %s", message)
        self._update = {"id": request.get("id"), "state": "done", "message": message}

    def _say(self, state: str, message: str, *, error: str | None = None) -> None:
        self._state, self._message = state, message
        self._write_status(self._status() | ({"error": error} if error is not None else {}))

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = {"pid": os.getpid(), "state": self._state, "message": self._message}
        status |= {"update": self._update}
        status |= {"ray_address": self._address} if self._address is not None else {}
        if hasattr(self, "_settings"):
            status |= {"name": self._settings.name, "url": self._settings.url, "model": self._settings.model_name}
            status |= {"source": self._settings.source}
        if hasattr(self, "_serving"):
            status |= self._serving.admission.counts() | self._serving.telemetry.figures()
            status |= {"replicas": self._num_replicas, "digest": self._backend.info.digest}
            status["engine"] = self._backend.info.engine
        return status

    def _write_status(self, status: Mapping[str, Any]) -> None:
        write_atomic(self._folder / STATUS, json.dumps(status) + "\n", mode=0o600)


def main() -> None:
    """Serve the model of the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m forge.runtime.serve_process")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    redact_output()
    adopt_environment()
    raise_descriptor_limit()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    folder: Path = arguments.folder.resolve()
    server = ModelServer(folder, address=arguments.address)
    signal.signal(signal.SIGTERM, server.on_signal)
    lock = acquire_lock(folder / LOCK)
    code = server.run()
    lock.close()
    sys.exit(code)


class _UvicornServer(uvicorn.Server):
    """Leaves signals to this process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


if __name__ == "__main__":
    main()
