"""Start a cluster in the first of its regions that has capacity.

A region is saved as tried before anything is rented there, so that `down` searches it even if `up` is killed. A
region without capacity is cleaned up before the next one is tried.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from forge.cluster.base import NodeProgress, OnProgress, make_token, token_path
from forge.cluster.cloud import aws, aws_network, firewall
from forge.cluster.cloud.head import CloudHead
from forge.cluster.cloud.instance_selection import InstancePlan
from forge.cluster.cloud.other_regions import regions_of
from forge.cluster.cloud.ray_config import HEAD, RegionContext, build_ray_config
from forge.cluster.cloud.ray_launcher import LaunchResult
from forge.cluster.cloud.region_choice import RegionChoice
from forge.cluster.cloud.setup_commands import plan_install
from forge.cluster.cloud.ssh_access import make_key, own_address
from forge.cluster.cloud.state import ClusterIdentity, cluster_folder, save_state
from forge.cluster.cloud.teardown import end_region, forget, launcher_for
from forge.config.cluster import CloudSpec
from forge.config.dump import dump_plain
from forge.errors import ClusterError

_CAPACITY_TIMEOUT_S = 20.0
_CAPACITY_TIMEOUT_PER_TYPE_S = 10.0
"""Ray's autoscaler requests one instance type after another, one every five seconds."""
_HEAD_ADDRESS_TIMEOUT_S = 120.0
_POLL_S = 1.0


class RegionStarter:
    """One attempt to start a cluster in some region."""

    def __init__(
        self, spec: CloudSpec, *, choice: RegionChoice, state: dict[str, Any], on_progress: OnProgress
    ) -> None:
        """Args:
        choice: the places to try, in order.
        state: the saved state of the cluster, with its id; changed and saved as the attempt proceeds.
        """
        self._spec, self._choice, self._state, self._on_progress = spec, choice, state, on_progress
        self._cluster = ClusterIdentity.of(spec.name, state)

    def start(self) -> None:
        """Try the regions until one has the machines.

        Raises: ClusterError with the reason of each region, or the first error that is not about capacity.
        """
        refusals: list[str] = []
        left: list[str] = []
        for option in self._choice.options:
            region = option.place
            capacity_error = self._try(region, plan=option.plan, is_last=option is self._choice.options[-1])
            if capacity_error is None:
                self._show(region, "ready")
                return
            self._show(region, f"no capacity: {capacity_error}", is_failure=True)
            refusals.append(f"{region}: {capacity_error}")
            left += end_region(self._spec, cluster=self._cluster, region=region, on_progress=self._on_progress)
        if not left:
            forget(self._spec, state=self._state)
        raise ClusterError(
            f"no region has capacity now ({', '.join(refusals)}); try later, add regions or instance_types, or "
            "request a higher quota"
        )

    def _try(self, region: str, *, plan: InstancePlan, is_last: bool) -> str | None:
        """Start the cluster in a region. Returns: the cloud's error code if it has no capacity; None if it is up.

        Raises: ClusterError if the launch fails for another reason.
        """
        self._show(region, "preparing")
        self._require_own(region)
        self._state["tried"] = [*dict.fromkeys([*self._state.get("tried", []), region])]
        save_state(self._spec, self._state)
        result = self._launch(region, plan)
        if result.is_done:
            self._record_region(region, plan)
            capacity_error = self._await_min_workers(region, plan, is_last=is_last)
            if capacity_error is not None:
                del self._state["region"]
            return capacity_error
        if result.capacity_error is None:
            hint = f"; {result.hint}" if result.hint else ""
            raise ClusterError(
                f"the head in {region} could not be started: {result.output}{hint}. The log is "
                f"{cluster_folder(self._spec.name) / 'launch.log'}. Try again with forge cluster up, or terminate "
                f"what was rented: forge cluster down {self._spec.name}"
            )
        return result.capacity_error

    def _require_own(self, region: str) -> None:
        """Raises: ClusterError if something of the cluster's name belongs to another cluster."""
        if self._spec.provider == "aws":
            aws_network.require_own(self._cluster, region=region)
        else:
            firewall.require_own(self._spec, cluster=self._cluster)

    def _launch(self, region: str, plan: InstancePlan) -> LaunchResult:
        """Prepare network, key and firewall in a region, and run Ray's launcher.

        However the launcher ends, also by Ctrl-C, what it has opened to the world is closed.
        """
        spec, folder = self._spec, cluster_folder(self._spec.name)
        key = make_key(spec, folder=folder)
        context = RegionContext(
            region=region,
            key_file=key.file,
            public_key_file=key.public_file,
            public_key=key.public,
            token_file=str(token_path(spec.name)),
        )
        make_token(spec.name)
        allow_from = own_address() if spec.allow_from == "auto" else spec.allow_from
        if spec.provider == "aws":
            network = aws_network.prepare_network(
                spec, cluster=self._cluster, region=region, public_key=key.public, allow_from=allow_from
            )
            context = replace(context, **asdict(network))
        else:
            firewall.restrict_before_launch(spec, cluster=self._cluster, region=region, allow_from=allow_from)
        install = plan_install(spec, folder=folder)
        self._state["python"] = install.python
        launcher = launcher_for(spec, region=region, on_progress=self._on_progress)
        config = build_ray_config(
            spec,
            cluster=self._cluster,
            plan=plan,
            context=context,
            install=install,
            regions=regions_of(self._choice, here=region),
        )
        launcher.write(dump_plain(config))
        (folder / "known_hosts").unlink(missing_ok=True)  # a new machine may have the address of an earlier one
        try:
            result = launcher.run("up", "--yes", "--no-config-cache", timeout_s=spec.startup_timeout)
        except BaseException:
            with suppress(ClusterError):  # the first error says more; the subnet is closed in any case
                self._close_ssh(region, allow_from=allow_from)
            raise
        self._close_ssh(region, allow_from=allow_from)
        return result

    def _close_ssh(self, region: str, *, allow_from: str) -> None:
        """Raises: ClusterError if the cloud's tool fails, which was shown then."""
        try:
            firewall.restrict_after_launch(self._spec, cluster=self._cluster, region=region, allow_from=allow_from)
        except ClusterError as error:
            self._show(region, str(error), is_failure=True)
            raise

    def _record_region(self, region: str, plan: InstancePlan) -> None:
        """Save the location of the head, and the price of each node type in its region."""
        state = self._state
        state["region"] = region
        state["prices"] = {option.node_type: option.usd_per_hour for option in plan.workers}
        state["prices"][HEAD] = plan.head.usd_per_hour
        if self._spec.provider == "aws":
            head = aws.list_instances(self._cluster, region=region)[0]
            state["address"], state["private_address"] = head.address, head.private_address
        else:
            state["address"] = state["private_address"] = self._head_address(region)
        save_state(self._spec, state)

    def _head_address(self, region: str) -> str:
        """Ask Ray's launcher for the head's address. Raises: ClusterError if it does not know it."""
        launcher = launcher_for(self._spec, region=region, on_progress=lambda _: None)
        result = launcher.run("get-head-ip", timeout_s=_HEAD_ADDRESS_TIMEOUT_S)
        if not result.is_done or not result.output:
            raise ClusterError(f"the head runs, but its address could not be found out: {result.output}")
        return result.output.split()[-1]

    def _await_min_workers(self, region: str, plan: InstancePlan, *, is_last: bool) -> str | None:
        """Request the minimum of workers, and wait until AWS has started them, if there is another region to try.

        Returns: the cloud's error code if it has no capacity for them.
        """
        if plan.min_workers == 0:
            return None
        head = CloudHead.of(self._spec, state=self._state)
        head.request_workers(plan.min_workers)
        if self._spec.provider != "aws" or is_last:
            return None  # Ray's autoscaler keeps requesting them
        self._show(region, f"waiting for {plan.min_workers} workers")
        deadline = time.monotonic() + _CAPACITY_TIMEOUT_S + _CAPACITY_TIMEOUT_PER_TYPE_S * len(plan.workers)
        while time.monotonic() < deadline:
            found = aws.list_instances(self._cluster, region=region)
            if sum(instance.kind == "worker" for instance in found) >= plan.min_workers:
                return None
            time.sleep(_POLL_S)
        return head.worker_capacity_error()

    def _show(self, name: str, message: str, *, is_failure: bool = False) -> None:
        self._on_progress(NodeProgress(name=name, message=message, is_failure=is_failure))
