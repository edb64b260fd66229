"""Placement groups for the workers of a run, and one agent on each node where the run has slots.

The minimum number of workers is one placement group, which Ray grants as a whole or not at all, so two runs never
hold half of what each needs. Every further worker is a group of its own: taken where there is room, released when
another run is waiting for its minimum. Pending groups are what Ray's autoscaler starts nodes for. Groups are named
and detached, so that a restarted supervisor finds them again.

The module is long (over 400 lines) because groups and agents are reconciled together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from forge.runtime.actor_names import SUPERVISOR

_log = logging.getLogger(__name__)
_POLL_S = 0.5
# While the run has all slots that it wants, and no node of it leaves: each look at Ray's tables costs 5 ms of CPU.
_SETTLED_POLL_S = 2.0
_RESTLESS_S = 60.0
# How long to wait for the minimum number of workers before other runs are asked to release slots.
_PATIENCE_S = 1.0
_ASK_AGAIN_S = 2.0
# Groups of a run without a supervisor are removed after this time; Ray restarts a supervisor sooner.
_ORPHAN_S = 10.0
_NODE_DIGITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The slots of a run on one Ray node; each rank takes one."""

    node_id: str
    num_slots: int
    num_guaranteed: int
    """Slots that belong to the minimum number of workers and are never released."""
    devices: tuple[str, ...] = ()
    """Indexes of the GPUs; empty for CPU ranks."""


class PlacementManager:
    """Requests slots for a run and keeps an agent on each node with slots; `reconcile` runs until `stop`."""

    def __init__(
        self,
        *,
        run_id: str,
        low: int,
        high: int,
        resource: str,
        start_agent: Callable[[str, Allocation], Any],
        end_agent: Callable[[Any], None],
        on_slots_changed: Callable[[str, Allocation], None],
        on_draining: Callable[[str, float | None], None],
        is_paused: bool = False,
    ) -> None:
        """Args:
        low, high: minimum and maximum number of workers.
        resource: the Ray resource of which each rank takes one, `CPU` or `GPU`.
        start_agent: starts an agent of a given name and returns its handle; called on another thread.
        end_agent: ends the agent of a handle; called on another thread.
        on_slots_changed: called with an agent's name when the slots of its node have changed.
        on_draining: called with an agent's name and the seconds left, repeatedly while Ray drains its node.
        is_paused: start no agents before `resume` is called.
        """
        self._run_id, self._low, self._high, self._resource = run_id, low, high, resource
        self._start_agent, self._end_agent = start_agent, end_agent
        self._on_slots_changed, self._on_draining = on_slots_changed, on_draining
        self._is_paused, self._num_pauses = is_paused, 0
        self._groups: dict[str, PlacementGroup] = {}
        self._agents: dict[str, tuple[str, Any, Allocation]] = {}
        """By Ray node id: the agent's name, its handle, its slots."""
        self._node_ids: dict[str, str] = {}
        """By the agent's name, for thousands of them that attach, get notice or are lost at once."""
        self._leaving: set[str] = set()
        """Ray node ids of nodes that are being drained or will be preempted."""
        self._at_risk: set[str] = set()
        """Of these, those that this run itself drains without a deadline, because they may be preempted."""
        self._num_agents = self._num_groups = 0
        self._used: Mapping[str, int] = {}
        self._orphans: dict[str, float] = {}
        """Groups of runs without a supervisor, and since when."""
        self._wanted, self._num_extra = high, 0
        self._asked_at = 0.0
        self._pending_since: float | None = None
        self._is_stopped = self._is_settled = False
        self._restless_until = 0.0
        self._wakes = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to reconcile, on the running event loop."""
        self._reconciling = asyncio.ensure_future(self._reconcile())

    async def _reconcile(self) -> None:
        """Bring groups and agents to what is wanted, again and again, until `stop`."""
        await asyncio.to_thread(self._find_groups)
        while not self._is_stopped:
            try:
                await self._reconcile_once()
            except ray.exceptions.RayError as error:  # Ray's control store may be busy; the next round tries again
                _log.warning("Ray did not answer: %s", error)
            with contextlib.suppress(TimeoutError):
                poll_s = _SETTLED_POLL_S if self._is_settled else _POLL_S
                await asyncio.wait_for(self._wakes.wait(), timeout=poll_s)
            self._wakes.clear()

    def slots_of(self, node: str) -> tuple[int, int] | None:
        """Slots of an agent's node, and how many of them are guaranteed; None for an unknown agent."""
        node_id = self._node_id_of(node)
        if node_id is None:
            return None
        allocation = self._agents[node_id][2]
        return allocation.num_slots, allocation.num_guaranteed

    def claim_slots(self) -> None:
        """Request as many slots as the job allows."""
        self._wanted = self._high
        self._wakes.set()

    def request_extra(self, num_slots: int) -> None:
        """Request so many slots beyond those that the job allows, on whatever machines they are found."""
        self._num_extra = num_slots
        self._wakes.set()

    def set_used(self, used: Mapping[str, int]) -> None:
        """Keep this many slots of each agent's node, whatever is released: ranks are using them."""
        if used != self._used:
            self._used = used
            self._expect_changes()

    def release_unused(self) -> None:
        """Keep the minimum, and beyond it only the slots that are used."""
        self._wanted = max(self._low, sum(self._used.values()))
        self._wakes.set()

    def replace_node(self, node: str, *, seconds_left: float | None) -> None:
        """Mark a node as draining, so that Ray places nothing new there, and ask for another node.

        Args:
            seconds_left: until the node ends; None if it may stay, and only another one is to be found.
        """
        node_id = self._node_id_of(node)
        if node_id is not None and node_id not in self._leaving:
            self._leaving.add(node_id)
            self._at_risk |= {node_id} if seconds_left is None else set()
            self._in_thread(_mark_draining, node_id, seconds_left)
        self._expect_changes()

    def agent_lost(self, node: str) -> None:
        """End what is left of an agent; a new one is started if the node still has slots of this run."""
        node_id = self._node_id_of(node)
        if node_id is not None:
            _, handle, _ = self._agents.pop(node_id)
            self._in_thread(self._end_agent, handle)
        self._node_ids.pop(node, None)
        self._expect_changes()

    async def pause(self) -> None:
        """End all agents and keep the groups for the next run; returns when the agents have ended."""
        self._is_paused = True
        self._num_pauses += 1
        agents, self._agents, self._node_ids, self._used = list(self._agents.values()), {}, {}, {}
        await asyncio.gather(*(asyncio.to_thread(self._end_agent, handle) for _, handle, _ in agents))

    def resume(self) -> None:
        """Start agents again."""
        self._is_paused = False
        self._wakes.set()

    def reattach(self, node: str, handle: Any, allocation: Allocation) -> None:
        """Take over an agent that an earlier supervisor has started."""
        self._add(node, handle, allocation)

    async def stop(self, *, timeout_s: float) -> None:
        """Start no more agents; returns when the last reconciliation is over, so that `close` sees all agents."""
        self._is_stopped = True
        self._wakes.set()
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            await asyncio.wait_for(asyncio.shield(self._reconciling), timeout=timeout_s)

    def close(self) -> None:
        """End all agents and remove all groups; call `stop` first."""
        for _, handle, _ in self._agents.values():
            self._end_agent(handle)
        for group in self._groups.values():
            remove_placement_group(group)

    def _expect_changes(self) -> None:
        """Look at Ray's tables at once, and often for a while: Ray notices a lost node seconds later."""
        self._restless_until = time.monotonic() + _RESTLESS_S
        self._wakes.set()

    def _add(self, name: str, handle: Any, allocation: Allocation) -> None:
        self._agents[allocation.node_id] = (name, handle, allocation)
        self._node_ids[name] = allocation.node_id

    def _node_id_of(self, name: str) -> str | None:
        """The Ray node of an agent; None if its node has no agent, or another one."""
        node_id = self._node_ids.get(name)
        return node_id if node_id in self._agents and self._agents[node_id][0] == name else None

    def _in_thread(self, call: Callable[..., None], *arguments: Any) -> None:
        """Run a call on another thread: Ray's functions block on its control store."""
        task = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _reconcile_once(self) -> None:
        self._is_settled = False
        draining = await asyncio.to_thread(_draining)
        self._leaving |= draining.keys()
        table = await asyncio.to_thread(self._shape_groups)
        allocations = await asyncio.to_thread(self._allocations, table)
        for node_id, allocation in allocations.items():
            known = self._agents.get(node_id)
            if known is not None:
                await self._update(node_id, allocation)
            elif not self._is_paused:
                await self._start_on(node_id, allocation)
        for node_id in self._agents.keys() - allocations.keys():
            await self._update(node_id, Allocation(node_id=node_id, num_slots=0, num_guaranteed=0))
        for node_id, seconds_left in draining.items():
            is_only_at_risk = seconds_left is None and node_id in self._at_risk  # training goes on there
            if node_id in self._agents and not is_only_at_risk:  # repeated: the node's agent may be a new one
                self._on_draining(self._agents[node_id][0], seconds_left)
        num_guaranteed = sum(allocation.num_guaranteed for allocation in allocations.values())
        await self._ask_others(has_minimum=num_guaranteed >= self._low)
        num_slots = sum(allocation.num_slots for allocation in allocations.values())
        has_all = num_slots >= self._wanted + self._num_extra and allocations.keys() == self._agents.keys()
        is_guaranteed = num_guaranteed >= self._low and not (self._leaving & allocations.keys())
        is_calm = time.monotonic() > self._restless_until
        self._is_settled = has_all and is_guaranteed and is_calm and not draining

    async def _update(self, node_id: str, allocation: Allocation) -> None:
        """Tell the supervisor if the slots of an agent's node have changed."""
        before = self._agents[node_id][2]
        if (before.num_slots, before.num_guaranteed) == (allocation.num_slots, allocation.num_guaranteed):
            return
        devices = await asyncio.to_thread(self._devices_on, node_id) if allocation.num_slots else ()
        if node_id in self._agents:
            name, handle, _ = self._agents[node_id]
            self._agents[node_id] = (name, handle, replace(allocation, devices=devices))
            self._on_slots_changed(name, self._agents[node_id][2])

    async def _start_on(self, node_id: str, allocation: Allocation) -> None:
        """Start an agent on a node; end it at once if `pause` was called in the meantime."""
        num_pauses = self._num_pauses
        allocation = replace(allocation, devices=await asyncio.to_thread(self._devices_on, node_id))
        self._num_agents += 1
        name = f"{node_id[:_NODE_DIGITS]}-{int(time.time()) % 100_000}{self._num_agents:03d}{secrets.token_hex(1)}"
        handle = await asyncio.to_thread(self._start_agent, name, allocation)
        if self._num_pauses == num_pauses:
            self._add(name, handle, allocation)
        else:
            self._in_thread(self._end_agent, handle)

    def _shape_groups(self) -> Mapping[str, Any]:
        """Make the groups: the minimum, each further worker, and a replacement for each slot on a leaving node.

        Returns: Ray's table of all groups, in which these are. It is read as rarely as possible: with thousands of
            groups it has thousands of entries.
        """
        table = _table()
        for name, group in list(self._groups.items()):  # removed as an orphan by another run
            if table.get(group.id.hex(), {}).get("state") == "REMOVED":
                del self._groups[name]
        if self._base not in self._groups:
            self._make(self._base, self._low)
            table = _table()
        before = set(self._groups)
        nodes = {name: _nodes_of(table, group) for name, group in self._groups.items()}
        num_leaving = sum(node_id in self._leaving for node_ids in nodes.values() for node_id in node_ids)
        target = self._wanted - self._low + num_leaving + self._num_extra
        singles = [name for name in self._groups if name != self._base]
        guaranteed = Counter(nodes.get(self._base, []))
        # Slots that ranks use are kept beyond the guaranteed ones, whatever the target is.
        needed = Counter({node_id: self._used_on(node_id) - guaranteed[node_id] for node_id in self._agents})
        spare = []
        for name in sorted(singles, key=lambda name: (not nodes.get(name), name)):
            node_id = next(iter(nodes.get(name, [])), None)
            if node_id is not None and needed[node_id] > 0:
                needed[node_id] -= 1
            else:
                spare.append(name)
        while len(singles) > target and spare:  # pending groups first
            name = spare.pop()
            remove_placement_group(self._groups.pop(name))
            singles.remove(name)
        while len(singles) < target:
            self._num_groups += 1
            singles.append(f"forge-{self._run_id}-{self._num_groups}")
            self._make(singles[-1], 1)
        return table if self._groups.keys() == before else _table()

    @property
    def _base(self) -> str:
        return f"forge-{self._run_id}-base"

    def _used_on(self, node_id: str) -> int:
        return self._used.get(self._agents[node_id][0], 0)

    def _make(self, name: str, size: int) -> None:
        self._groups[name] = placement_group(
            [{self._resource: 1.0}] * size, strategy="PACK", name=name, lifetime="detached"
        )

    def _find_groups(self) -> None:
        """Find the groups that an earlier supervisor of this run has made."""
        for name, run_id in _groups_of_runs():
            if run_id == self._run_id:
                with contextlib.suppress(ValueError):  # it was removed in between
                    self._groups[name] = ray.util.get_placement_group(name)
                    number = name.rpartition("-")[2]
                    self._num_groups = max(self._num_groups, int(number) if number.isdigit() else 0)

    def _remove_orphans(self) -> None:
        """Remove the groups of runs that have had no supervisor for `_ORPHAN_S`."""
        groups = _groups_of_runs()  # listed before the supervisors, so that a run that starts now is not an orphan
        running = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        orphans = [name for name, run_id in groups if f"{SUPERVISOR}{run_id}" not in running]
        now = time.monotonic()
        self._orphans = {name: self._orphans.get(name, now) for name in orphans}
        for name, since in self._orphans.items():
            if now - since > _ORPHAN_S:
                with contextlib.suppress(ValueError):  # it was removed in between
                    remove_placement_group(ray.util.get_placement_group(name))

    def _allocations(self, table: Mapping[str, Any]) -> dict[str, Allocation]:
        """Slots by node, of the nodes that Ray believes alive."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        slots = Counter(node_id for group in self._groups.values() for node_id in _nodes_of(table, group))
        guaranteed = Counter(_nodes_of(table, self._groups[self._base]))
        return {
            node_id: Allocation(node_id=node_id, num_slots=count, num_guaranteed=guaranteed[node_id])
            for node_id, count in slots.items()
            if node_id in alive
        }

    def _devices_on(self, node_id: str) -> tuple[str, ...]:
        """Indexes of the GPUs that Ray has assigned to this run's groups on a node.

        Ranks take them in this order, so the GPUs of groups that are released first come last.
        """
        if self._resource != "GPU":
            return ()
        asked, table = [], _table()
        for _, group in sorted(self._groups.items(), key=lambda item: (item[0] != self._base, item[0])):
            for index, placed_on in enumerate(_nodes_of(table, group)):
                if placed_on == node_id:
                    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
                    asked.append(_gpu_numbers.options(scheduling_strategy=strategy).remote())
        return tuple(str(number) for numbers in ray.get(asked) for number in numbers)

    async def _ask_others(self, *, has_minimum: bool) -> None:
        """While the minimum is pending, ask other runs to release slots beyond their own minimum."""
        now = time.monotonic()
        if has_minimum:
            self._pending_since = None
            return
        self._pending_since = self._pending_since or now
        if now - self._pending_since < _PATIENCE_S or now - self._asked_at < _ASK_AGAIN_S:
            return
        self._asked_at = now
        await asyncio.to_thread(self._remove_orphans)
        await asyncio.to_thread(_ask_to_yield, self._run_id)


@ray.remote(num_cpus=0, num_gpus=1)  # type: ignore[untyped-decorator]
def _gpu_numbers() -> list[Any]:
    numbers: list[Any] = ray.get_gpu_ids()
    return numbers


def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = placement_group_table()
    return table


def _nodes_of(table: Mapping[str, Any], group: PlacementGroup) -> list[str]:
    entry = table.get(group.id.hex(), {})
    if entry.get("state") not in ("CREATED", "RESCHEDULING"):
        return []
    return [node_id for node_id in entry.get("bundles_to_node_id", {}).values() if node_id]


def _groups_of_runs() -> list[tuple[str, str]]:
    """Name and run id of all groups that runs have made."""
    names = [entry["name"] for entry in _table().values() if entry["state"] != "REMOVED"]
    return [(name, name[len("forge-") :].rpartition("-")[0]) for name in names if name.startswith("forge-")]


def _ask_to_yield(run_id: str) -> None:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith(SUPERVISOR) and actor["name"] != f"{SUPERVISOR}{run_id}":
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                ray.get_actor(actor["name"], namespace=actor["namespace"]).yield_slots.remote()


def _draining() -> dict[str, float | None]:
    """Seconds left by node that Ray drains; None where the drain request had no deadline."""
    deadlines_ms: dict[str, int] = ray._private.state.state.get_draining_nodes()
    now_ms = time.time() * 1000
    return {node_id: (ms - now_ms) / 1000 if ms else None for node_id, ms in deadlines_ms.items()}


def drain(node_id: str, seconds_left: float | None, *, gcs_address: str) -> None:
    """Tell Ray that a node will be preempted; the call that `ray drain-node` makes.

    Raises: RuntimeError if Ray refuses; RpcError if the cluster does not answer.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    is_accepted, refusal = GcsClient(address=gcs_address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the machine will be preempted",
        0 if seconds_left is None else int((time.time() + max(0.0, seconds_left)) * 1000),
    )
    if not is_accepted:
        raise RuntimeError(refusal)


def nodes_alive(*, gcs_address: str) -> dict[str, bool]:
    """Ids of the nodes that Ray believes alive, and whether each is the head. Does not connect to the cluster."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    found = GcsClient(address=gcs_address).get_all_node_info()
    return {node_id.hex(): info.is_head_node for node_id, info in found.items() if info.state == 0}


def _mark_draining(node_id: str, seconds_left: float | None) -> None:
    address = ray.get_runtime_context().gcs_address
    try:
        # Draining the head would end the cluster, and the supervisor could not be restarted on it.
        if not nodes_alive(gcs_address=address).get(node_id):
            drain(node_id, seconds_left, gcs_address=address)
    except Exception as error:  # an internal interface of Ray: continue without the mark
        _log.warning("cannot mark node %s as draining: %s", node_id, error)
