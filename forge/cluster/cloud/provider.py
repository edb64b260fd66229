"""Machines rented from AWS, GCP or Azure: forge chooses region and types, Ray's launcher and autoscaler rent them.

Each region is saved before anything is rented in it, and `down` searches all saved regions for machines with the
tags of the cluster's name and id, so that no machine is left behind, even if `up` was killed.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import IO, Any

from forge.cluster.base import (
    ClusterNode,
    ClusterRecord,
    ClusterStatus,
    MachineRole,
    NodeProgress,
    OnProgress,
    cluster_lock,
    read_record,
    read_token,
    token_path,
)
from forge.cluster.cloud import aws
from forge.cluster.cloud.head import CloudHead, with_price, with_ray_state
from forge.cluster.cloud.ray_config import DASHBOARD_PORT, RegionContext, build_ray_config
from forge.cluster.cloud.region_choice import (
    RegionChoice,
    choice_record,
    choose_regions,
    earlier_regions,
    places_to_move,
)
from forge.cluster.cloud.regions import RegionStarter
from forge.cluster.cloud.setup_commands import preview_install
from forge.cluster.cloud.state import ClusterIdentity, plain_spec, save_state
from forge.cluster.cloud.teardown import end_region, forget
from forge.cluster.dashboard import ray_nodes, ray_runs
from forge.cluster.tools import require_tools
from forge.config.cluster import CloudSpec
from forge.config.dump import dump_plain
from forge.errors import ClusterError
from forge.pricing.catalog import workers_of
from forge.pricing.offers import load_offers

_CREATED_BY_UP = "created-by-forge-cluster-up"
"""In a dry run, a value that only the cloud can give."""
_NO_ID = "0" * 16
"""In a dry run, instead of the random id."""


class CloudCluster:
    """The rented machines of one cluster file."""

    shares_files = False

    def __init__(self, spec: CloudSpec) -> None:
        self._spec = spec
        self._choice: RegionChoice | None = None

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def gpu(self) -> str | None:
        return None if self._spec.gpu == "none" else self._spec.gpu

    @property
    def provider(self) -> str:
        """The cloud."""
        return self._spec.provider

    @property
    def place(self) -> str | None:
        """The region, or zone on GCP, in which the cluster is; None if it is not up."""
        record = read_record(self.name)
        region = record.state.get("region") if record is not None else None
        return None if region is None else str(region)

    @property
    def storage_region(self) -> str | None:
        """The region of the storage, by the file or by AWS; None if unknown."""
        known = self._spec.storage_region
        return known or (aws.bucket_region(self._spec.storage) if self.provider == "aws" else None)

    @property
    def role(self) -> MachineRole | None:
        """On Azure the machines' identity may manage the cluster's group, and reads no storage."""
        match self._spec.provider:
            case "aws":
                return MachineRole(scheme="s3", prefixes=("AWS_",), storage=self._spec.storage or "")
            case "gcp":
                return MachineRole(scheme="gs", prefixes=("GOOGLE_", "GCS_"))
            case _:
                return None

    def token(self) -> str:
        return read_token(self.name)

    def price(self) -> float | None:
        """The most the cluster can cost in the region that is tried first, by known prices.

        Raises: JobFileError as `choose_regions`.
        """
        return (self._choice or self._find_regions(is_live=False)).options[0].plan.usd_per_hour

    def choose(self, *, is_live: bool) -> RegionChoice:
        """Choose the regions to try, and the machine types in each, for `up`.

        Args:
            is_live: ask AWS for the spot prices of now and the account's regions; other clouds are not asked.

        Raises: JobFileError as `choose_regions`; ClusterError if AWS cannot be asked.
        """
        self._choice = self._find_regions(is_live=is_live)
        return self._choice

    def to_yaml(self) -> str:
        """The file that `up` would give to Ray's launcher for the first region. Asks and creates nothing.

        Raises: JobFileError, ClusterError if the file asks for machines that do not exist.
        """
        spec = self._spec
        first = self._find_regions(is_live=False).options[0]
        context = RegionContext(
            region=first.place,
            key_file=spec.identity_file or _CREATED_BY_UP,
            public_key_file=_CREATED_BY_UP,
            public_key=_CREATED_BY_UP,
            token_file=str(token_path(self.name)),
            image=spec.image or _CREATED_BY_UP,
            cpu_image=spec.image or _CREATED_BY_UP,
            key_name=f"forge-{self.name}",
            subnets=(_CREATED_BY_UP,),
            security_group=_CREATED_BY_UP,
            head_profile=f"forge-{self.name}-head",
            worker_profile=f"forge-{self.name}-worker",
        )
        record = read_record(self.name)
        # A cluster that was not started has no id yet.
        cluster = ClusterIdentity.of(self.name, {"id": _NO_ID} | dict(record.state if record is not None else {}))
        install = preview_install(spec)
        return dump_plain(
            build_ray_config(spec, cluster=cluster, plan=first.plan, context=context, install=install)
        )

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        """Rent the head in the first region with capacity; the head rents the workers.

        Raises: ClusterError with what failed. What was rented by then stays, and `down` finds it; so
            it is after Ctrl-C.
        """
        with cluster_lock(self.name):
            workers_of(self._spec)  # fail before anything costs
            record = read_record(self.name)
            if record is not None and record.provider != self._spec.provider:
                raise ClusterError(
                    f"a cluster '{self.name}' on {record.provider} exists already; choose another name for this "
                    f"one, or stop that one: forge cluster down {self.name}"
                )
            state = dict(record.state) if record is not None else {}
            self._require_same_account(record)
            if record is not None and state.get("region") and CloudHead.of(self._spec, state=state).is_healthy():
                is_same = record.spec == plain_spec(self._spec)
                message = "ready" if is_same else "ready, started with an earlier version of its file"
                on_progress(NodeProgress(name="head", message=message))
                return self.status()
            require_tools(self._spec.provider)
            choice, self._choice = self._choice, None
            if choice is None:
                on_progress(NodeProgress(name=self._spec.provider, message="comparing prices"))
                choice = self._find_regions(is_live=True)
            ClusterIdentity.create(self.name, state)
            state["choice"] = choice_record(self._spec, choice)
            save_state(self._spec, state)
            try:
                RegionStarter(self._spec, choice=choice, state=state, on_progress=on_progress).start()
            finally:
                if not state.get("tried"):
                    forget(self._spec, state=state)
        return self.status()

    def elsewhere(self, *, to: str | None) -> RegionChoice:
        """Return the places that `move` tries: the others of the file, then the one that the cluster is in.

        Args:
            to: try this place before the others; None: in the order of `regions`.

        Raises: JobFileError as `choose_regions`; ArgumentError for a place that the file does not allow, or if it
            allows no other; ClusterError if the cluster is not up or AWS cannot be asked.
        """
        record = read_record(self.name)
        state: Mapping[str, Any] = record.state if record is not None else {}
        is_live = self._spec.provider == "aws"
        return places_to_move(
            self._spec,
            state=state,
            to=to,
            offers=load_offers().offers,
            market=aws.market_today(self._spec, region=None) if is_live and state.get("region") else None,
        )

    def move(self, choice: RegionChoice, *, on_progress: OnProgress) -> ClusterStatus:
        """End the cluster where it is, and start it in the first of these places that has capacity.

        Nothing may run on it: what is on its machines is lost.

        Args:
            choice: of `elsewhere`.

        Raises: ClusterError if something is left where it was, or no place has capacity; the cluster is down then.
        """
        with cluster_lock(self.name):
            record = read_record(self.name)
            state = dict(record.state) if record is not None else {}
            region = state.get("region")
            if region is None:
                raise ClusterError(f"the cluster '{self.name}' is not up; start it: forge cluster up FILE")
            require_tools(self._spec.provider)
            cluster = ClusterIdentity.of(self.name, state)
            for one in list(state["tried"]) if self._spec.provider == "aws" else [region]:
                left = end_region(self._spec, cluster=cluster, region=one, on_progress=on_progress)
                if left:
                    listed = "; ".join(left)
                    raise ClusterError(f"{listed} could not be removed; try again: forge cluster down {self.name}")
            for key in ("region", "address", "private_address", "prices"):
                state.pop(key, None)
            state["tried"], state["choice"] = [], choice_record(self._spec, choice)
            save_state(self._spec, state)
            RegionStarter(self._spec, choice=choice, state=state, on_progress=on_progress).start()
        return self.status()

    def status(self) -> ClusterStatus:
        """The machines according to AWS; on other clouds, which forge cannot ask quickly, according to Ray."""
        record = read_record(self.name)
        if record is None or not record.state.get("tried"):
            return ClusterStatus(name=self.name, provider=self._spec.provider, address=None)
        prices, region = record.state.get("prices", {}), record.state.get("region")
        if self._spec.provider == "aws":
            regions = [region] if region else record.state["tried"]
            cluster = ClusterIdentity.of(self.name, record.state)
            nodes = [node for one in regions for node in aws.list_nodes(cluster, region=one, prices=prices)]
        else:
            nodes = [with_price(node, prices) for node in self._ask_ray()[0]]
        runs: tuple[str, ...] = ()
        head = next((node for node in nodes if node.kind == "head" and node.state == "alive"), None)
        if head is None or not region:
            return ClusterStatus(name=self.name, provider=self._spec.provider, address=None, nodes=tuple(nodes))
        if self._spec.provider == "aws":
            with suppress(ClusterError):  # the machines cost, whether Ray answers or not
                in_ray, runs = self._ask_ray()
                by_address = {node.name: node for node in in_ray if node.state == "alive"}
                nodes = [with_ray_state(node, by_address) for node in nodes]
        return ClusterStatus(
            name=self.name,
            provider=self._spec.provider,
            address=f"{record.state['private_address']}:6379",
            nodes=tuple(nodes),
            runs=runs,
        )

    def down(self, *, on_progress: OnProgress) -> list[str]:
        """Terminate every machine in every region that was tried, and delete what was created for them.

        Returns: what is left according to the provider, one line each.
        Raises: ClusterError if it cannot be asked; the cluster's record is kept then.
        """
        with cluster_lock(self.name):
            record = read_record(self.name)
            if record is None:
                return []
            tried = record.state.get("tried", [])
            left: list[str] = []
            cluster = ClusterIdentity.of(self.name, record.state) if tried else None
            # Ray's launcher knows only the last region; earlier ones were ended before it was tried.
            for region in tried if self._spec.provider == "aws" else tried[-1:]:
                assert cluster is not None, "a region was tried"
                left += end_region(self._spec, cluster=cluster, region=region, on_progress=on_progress)
            if not left:
                forget(self._spec, state=record.state)
        return left

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        return self._head().run(command, stdin=stdin, timeout_s=timeout_s)

    @contextlib.contextmanager
    def job_server(self) -> Iterator[str]:
        with self._head().host.forward(DASHBOARD_PORT) as port:
            yield f"http://127.0.0.1:{port}"

    def forward(self, port: int, *, local: int = 0) -> AbstractContextManager[int]:
        return self._head().host.forward(port, local=local)

    def shell(self, machine: str | None) -> list[str]:
        """Workers are reached through the head, which may be the only machine with a public address."""
        head = self._head().host
        if machine is None:
            return head.ssh()
        return replace(head, host=machine).ssh_through(head)

    def _find_regions(self, *, is_live: bool) -> RegionChoice:
        spec, record = self._spec, read_record(self.name)
        state: Mapping[str, Any] = record.state if record is not None else {}
        is_live = is_live and spec.provider == "aws"
        return choose_regions(
            spec,
            offers=load_offers().offers,
            market=aws.market_today(spec, region=state.get("region")) if is_live else None,
            earlier=earlier_regions(spec, state),
        )

    def _require_same_account(self, record: ClusterRecord | None) -> None:
        """Raises: ClusterError if the file names another project than the one with the cluster's machines."""
        if record is None or not record.state.get("tried"):
            return
        for key in ("project", "resource_group"):
            before, now = record.spec.get(key), getattr(self._spec, key)
            if before != now:
                raise ClusterError(
                    f"the cluster '{self.name}' was started with {key}: {before}, and its file now says {now}: "
                    f"forge cluster down {self.name} first, or choose another name: in the file"
                )

    def _head(self) -> CloudHead:
        record = read_record(self.name)
        state: Mapping[str, Any] = record.state if record is not None else {}
        return CloudHead.of(self._spec, state=state)

    def _ask_ray(self) -> tuple[list[ClusterNode], tuple[str, ...]]:
        """Query Ray for nodes and runs. Raises: ClusterError if it does not answer."""
        with self.job_server() as url:
            return ray_nodes(url, token=self.token(), prices={}), tuple(ray_runs(url, token=self.token()))
