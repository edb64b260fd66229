"""The model of a server as a deployment of Ray Serve, and the `ModelBackend` that calls it.

Ray Serve's own HTTP and gRPC proxies are not started, so nothing of it listens: requests reach replicas through
deployment handles, or by the `piece_channel` where the only replica is on the server's machine. A generation is one
streaming call, whose cancellation cancels the generation; its pieces take the channel from replicas on the server's
machine, and return through Ray otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from forge.code_archive import TRUST
from forge.errors import ClusterError
from forge.limits import usable_cpus
from forge.process import first_line, redirect_output
from forge.runs.reader import error_named
from forge.runs.run_files import find_run_files, pack_run
from forge.runs.secrets import credentials
from forge.runtime.local_cluster import is_local_cluster
from forge.runtime.piece_channel import Inbox, Item, PieceReceiver, PieceSenders, ReturnAddress
from forge.runtime.vllm_replicas import vllm_place
from forge.serve.calls import (
    GenerateCall,
    ReplicaLostError,
    ServedModel,
    TextDelta,
    TextsCall,
)
from forge.serve.http.errors import ApiError
from forge.serve.http.settings import MAX_GENERATED, ServerSettings

_log = logging.getLogger("forge.serve")
_HEALTH_PERIOD_S = 5.0
_OWN_ERRORS = "forge.errors."
"""How Ray names one of forge's errors in a traceback."""
_TARGET_LOAD = 0.7
"""Share of `max_running` above which Ray Serve adds a replica."""
_MAX_CALLS = 100_000
"""Calls that may wait in a replica; the server itself bounds them."""
_LATE_S = 10.0
"""How long after a call's return its last pieces may come by the channel."""
_SPINS = 2000
"""Turns that a thread of OpenMP waits for another before it sleeps. With libgomp's 300,000 waiting threads take the
cores from others: on a busy machine a step used six times as much CPU time."""
_LOST = (RayError, DeploymentUnavailableError, ReplicaUnavailableError, BackPressureError)
"""Of a call whose replica is gone; an error of its code is a `RayTaskError`, which is a `RayError` too."""


class ModelReplica:
    """One copy of the model, with its engine."""

    def __init__(
        self,
        settings: ServerSettings,
        folder: str,
        threads: str | None,
        packed: Mapping[str, str],
        environment: Mapping[str, str],
    ) -> None:
        """Args:
        folder: of the server, for the log.
        threads: `OMP_NUM_THREADS` of the server; None: divide the node's cores among the replicas.
        packed: the small files of runs, by their folders, for a node that does not see them.
        environment: credentials for storage.
        """
        _open_no_port()
        os.environ.update(environment)
        self._id = serve.get_replica_context().replica_id.unique_id
        redirect_output(Path(folder) / "logs" / f"replica-{self._id}.log")
        # Ray has set 1, the number of CPUs that the replica reserves.
        os.environ["OMP_NUM_THREADS"] = threads or str(max(1, usable_cpus() // settings.max_replicas))
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))
        os.environ.setdefault("MKL_CBWR", "AUTO")  # bits of a product do not depend on which thread computes it
        _log.warning("torch computes with %s threads", os.environ["OMP_NUM_THREADS"])
        from forge.serve.service import ModelService

        here = _readable(settings, packed=packed)
        self._service = ModelService.start(here, vllm=vllm_place(here, folder=Path(folder), replica=self._id))
        self._senders = PieceSenders(self._items)

    def __del__(self) -> None:
        """End vLLM and the process that renders chats; called by Ray Serve when the replica is removed."""
        if (service := getattr(self, "_service", None)) is not None:
            service.close()

    def describe(self) -> ServedModel:
        return self._service.info

    async def check_health(self) -> None:
        """Called by Ray Serve every few seconds, which replaces the replica if it raises."""
        self._service.require_healthy()
        await self._service.warm_up()

    def stats(self) -> tuple[str, dict[str, Any]]:
        return self._id, self._service.stats() | {"pid": os.getpid(), "node": ray.util.get_node_ip_address()}

    async def generate(self, call: GenerateCall | TextsCall, address: ReturnAddress) -> AsyncGenerator[Item, None]:
        """Generate; the items are sent to the address, and yielded where it cannot be reached."""
        sender = await self._senders.to(address.path)
        async with contextlib.aclosing(self._items(call)) as items:
            async for item in items:
                if sender is None:
                    yield item
                elif sender.is_open:
                    sender.send(address.call, item)
                else:
                    return  # the server's process has ended

    async def _items(self, call: GenerateCall | TextsCall) -> AsyncGenerator[Item, None]:
        """The pieces of a call and its end; an error that is expected is an item, because Ray would wrap it."""
        from forge.serve.request import EngineError

        try:
            async with contextlib.aclosing(self._service.generate(call)) as batches:
                async for batch in batches:
                    yield batch
            yield None
        except ApiError as error:
            yield error
        except EngineError as error:
            yield ReplicaLostError(str(error))


def _readable(settings: ServerSettings, *, packed: Mapping[str, str]) -> ServerSettings:
    """The settings with folders of this node."""

    def here(folder: str) -> str:
        return str(find_run_files(Path(folder), packed=packed.get(folder)))

    adapters = tuple(f"{name}={here(folder)}" for name, folder in settings.named_adapters().items())
    return replace(settings, source=here(settings.source), adapters=adapters)


class RayBackend:
    """The replicas of one application of Ray Serve.

    Args:
        is_single: there is one replica, so that Ray Serve need not choose it for each call.
    """

    def __init__(self, handle: Any, *, app: str, info: ServedModel, is_single: bool) -> None:
        self.info, self.app, self._is_single = info, app, is_single
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._receiver = PieceReceiver()
        self._forwarding: set[asyncio.Task[None]] = set()
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def generate(self, call: GenerateCall | TextsCall) -> AsyncGenerator[Sequence[TextDelta], None]:
        path = await self._receiver.listen()
        with self._counted(), self._receiver.inbox() as (number, inbox):
            cancel = self._begin(call, ReturnAddress(path=path, call=number), inbox)
            is_over = False
            try:
                while (pieces := await inbox.take()) is not None:
                    yield pieces
                is_over = True
            except Exception:
                is_over = True
                raise
            finally:
                if not is_over:
                    cancel()

    def _begin(self, call: GenerateCall | TextsCall, address: ReturnAddress, inbox: Inbox) -> Callable[[], None]:
        """Send a call to a replica. Returns: what ends it early."""
        if self._is_single and (connection := self._receiver.connection) is not None:
            return connection.begin(address.call, call, inbox)
        response = self._streaming.generate.remote(call, address)
        forwarding = asyncio.ensure_future(_forward(response, inbox))
        self._forwarding.add(forwarding)
        forwarding.add_done_callback(self._forwarding.discard)
        return response.cancel  # type: ignore[no-any-return]

    async def stats(self) -> Mapping[str, Mapping[str, Any]]:
        """The state of the replicas that answer."""
        try:
            responses = self._handle.broadcast("stats")
            found = await asyncio.to_thread(responses.results, timeout_s=_HEALTH_PERIOD_S)
        except (TimeoutError, *_LOST) as error:
            _log.warning("the replicas do not say how they are: %s", first_line(error))
            return {}
        return dict(found)

    def close(self) -> None:
        """Close what the replicas send pieces to."""
        self._receiver.close()

    async def wait_idle(self, *, timeout_s: float) -> bool:
        """Wait until no call is running. Returns: whether that is so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()

    @contextlib.contextmanager
    def _counted(self) -> Any:
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if not self._num_calls:
                self._idle.set()


async def _forward(response: Any, inbox: Inbox) -> None:
    """Put into a call's inbox what it returns through Ray, and with what it fails."""
    try:
        async for item in response:
            inbox.put(item)
    except RayTaskError as error:
        inbox.put(error)
    except _LOST as error:
        inbox.put(ReplicaLostError(first_line(error)))
    except Exception as error:
        inbox.put(error)
    if not inbox.is_over:
        await asyncio.sleep(_LATE_S)
        inbox.put(ReplicaLostError("its answer has no end"))


def _open_no_port() -> None:
    """Keep the replica from listening for gRPC calls of other deployments.

    That port listens on all addresses, knows no token and unpickles what it gets. Nothing of forge uses it.

    Raises: ClusterError if this version of Ray Serve opens it in another way.
    """
    from ray.serve._private import replica

    if not hasattr(replica, "add_port_to_grpc_server"):
        raise ClusterError("this version of Ray Serve opens a port without authentication; use the pinned one")
    replica.add_port_to_grpc_server = lambda server, address: 0


def start_serve() -> None:
    """Start Ray Serve without its proxies."""
    serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})


def deploy(settings: ServerSettings, *, app: str, folder: Path) -> RayBackend:
    """Deploy the model as an application and wait until a replica is ready.

    Raises: ClusterError with the reason if none becomes ready.
    """
    resource = _require_room(settings)
    replicas: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        replicas = {
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": max(1.0, (settings.max_running or MAX_GENERATED) * _TARGET_LOAD),
                "upscale_delay_s": settings.upscale_delay_s,
                "downscale_delay_s": settings.downscale_delay_s,
            }
        }
    deployment = serve.deployment(ModelReplica).options(
        name="model",
        max_ongoing_requests=_MAX_CALLS,
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=settings.drain_s,
        max_constructor_retry_count=1,
        ray_actor_options={f"num_{resource.lower()}s": 1},
        **replicas,
    )
    try:
        bound = deployment.bind(
            settings, str(folder), os.environ.get("OMP_NUM_THREADS"), _packed(settings), _environment()
        )
        handle = serve.run(bound, name=app, route_prefix=None)
        info = handle.describe.remote().result()
    except (RuntimeError, *_LOST) as error:
        reason = _failure_of(app) or first_line(error)
        remove(app)
        is_own = reason.startswith(_OWN_ERRORS)
        kind, _, message = (
            reason.removeprefix(_OWN_ERRORS).partition(": ") if is_own else ("ClusterError", "", reason)
        )
        raise error_named(kind, message=f"no replica of the model became ready: {message}") from error
    return RayBackend(handle, app=app, info=info, is_single=settings.max_replicas == 1)


def _packed(settings: ServerSettings) -> dict[str, str]:
    folders = (settings.source, *settings.named_adapters().values())
    return {folder: content for folder in folders if (content := pack_run(Path(folder))) is not None}


def _environment() -> dict[str, str]:
    """What replicas need of this process's environment."""
    keys = credentials(os.environ, with_files=is_local_cluster())
    return keys | ({TRUST: os.environ[TRUST]} if TRUST in os.environ else {})


def remove(app: str) -> None:
    """Delete an application; its replicas end once their running requests have ended."""
    with contextlib.suppress(RayError, RuntimeError):
        serve.delete(app)


def running_replicas(app: str) -> int:
    """How many replicas of an application are ready."""
    found = serve.status().applications.get(app)
    if found is None:
        return 0
    return sum(deployment.replica_states.get("RUNNING", 0) for deployment in found.deployments.values())


def _failure_of(app: str) -> str:
    """The last line of what Ray Serve says about an application that failed."""
    found = serve.status().applications.get(app)
    texts = [found.message, *(each.message for each in found.deployments.values())] if found else []
    lines = [line.strip() for text in texts for line in text.splitlines() if "Error" in line]
    return lines[-1] if lines else ""


def _require_room(settings: ServerSettings) -> str:
    """Return the resource of which each replica takes one.

    Raises: ClusterError if the cluster has fewer free than there are replicas, which would wait without end.
    """
    resource = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    free = int(ray.available_resources().get(resource, 0))
    if free < settings.min_replicas:
        raise ClusterError(
            f"{settings.min_replicas} replicas take one {resource} each, and {free} of the cluster are free; an "
            "update needs them beside those in use. End something on it, add nodes, or ask for fewer --replicas"
        )
    return resource
