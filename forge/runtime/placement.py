"""Places for ranks, as Ray gives them: placement groups, and an agent on every node that has some.

The smallest number of workers is one group, which Ray gives whole or not at all; so two runs never hold
half of what each needs. Every further worker is a group of its own, taken where there is room and given
back when another run waits. Groups that wait are what Ray's autoscaler starts machines for. They are named
and outlive the supervisor, which finds them again when it is restarted.
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

_log = logging.getLogger(__name__)
_POLL_S = 0.5
# How long the smallest number of workers is waited for before other runs are asked to give places back.
_PATIENCE_S = 1.0
_ASK_AGAIN_S = 2.0
# Ray needs less to start a supervisor anew.
_ORPHAN_S = 10.0
_NODE_DIGITS = 8
SUPERVISOR = "supervisor-"
"""How the names of supervisors' actors begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The places of this run on one of Ray's nodes."""

    node_id: str
    num_slots: int
    num_guaranteed: int
    """Of them, those of the smallest number of workers: they are never given back."""
    devices: tuple[str, ...] = ()
    """Numbers of the GPUs, where a rank takes one."""


class PlacementManager:
    """Claims places for a run and has an agent on each of their nodes; `tend` is all of its life."""

    def __init__(
        self,
        *,
        run_id: str,
        low: int,
        high: int,
        resource: str,
        start_agent: Callable[[str, Allocation], Any],
        on_granted: Callable[[str, Allocation], None],
        on_notice: Callable[[str, float | None], None],
        end_agent: Callable[[Any], None] | None = None,
        is_resting: bool = False,
    ) -> None:
        """Args:
        resource: what a rank takes one of, `CPU` or `GPU`.
        start_agent: starts an actor for an agent of a given name, and returns its handle.
        end_agent: ends what `start_agent` has returned; by default an actor of its own.
        is_resting: have no agents before `serve` is called.
        on_granted: told of a node's agent when its places have changed.
        on_notice: told of a node's agent, again and again, that Ray drains the node, and of the seconds left.
        """
        self._run_id, self._low, self._high, self._resource = run_id, low, high, resource
        self._start_agent, self._on_granted, self._on_notice = start_agent, on_granted, on_notice
        self._end_agent = end_agent or _kill
        self._is_resting, self._num_rests = is_resting, 0
        self._groups: dict[str, PlacementGroup] = {}
        self._agents: dict[str, tuple[str, Any, Allocation]] = {}
        """By Ray's node: the agent's name, its actor, its places."""
        self._going: set[str] = set()
        self._num_agents = self._num_groups = 0
        self._used: Mapping[str, int] = {}
        self._orphans: dict[str, float] = {}
        """Groups of other runs without a supervisor, and since when."""
        self._wanted = high
        self._asked_at = 0.0
        self._pending_since: float | None = None
        self._is_ending = False
        self._wakes = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()

    async def tend(self) -> None:
        """Keep claims and agents as they are wished for, until told to end."""
        await asyncio.to_thread(self._find_groups)
        while not self._is_ending:
            try:
                await self._tend_once()
            except ray.exceptions.RayError as error:  # the control store may be busy; what was wished for stays
                _log.warning("the cluster did not answer: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wakes.wait(), timeout=_POLL_S)
            self._wakes.clear()

    def slots_of(self, node: str) -> tuple[int, int] | None:
        """Places of an agent's node, and how many of them are firm; None if it is not ours."""
        return next(((g.num_slots, g.num_guaranteed) for name, _, g in self._agents.values() if name == node), None)

    def claim_slots(self) -> None:
        """Ask for as many places as the job allows."""
        self._wanted = self._high
        self._wakes.set()

    def set_used(self, used: Mapping[str, int]) -> None:
        """Ranks are at work on so many places of each agent's node: these are kept, whatever is given back."""
        self._used = used

    def release_unused(self) -> None:
        """Keep no more than the smallest number, and what is used beyond it."""
        self._wanted = max(self._low, sum(self._used.values()))
        self._wakes.set()

    def replace_node(self, node: str, *, seconds_left: float | None) -> None:
        """Mark a node as draining, so that Ray puts nothing new there, and ask for another."""
        for node_id, (name, _, _) in self._agents.items():
            if name == node and node_id not in self._going:
                self._going.add(node_id)
                self._beside(_mark_going, node_id, seconds_left)
        self._wakes.set()

    def agent_lost(self, node: str) -> None:
        """End what is left of an agent; if its place is still ours, it gets another."""
        for node_id, (name, actor, _) in list(self._agents.items()):
            if name == node:
                del self._agents[node_id]
                self._beside(self._end_agent, actor)
        self._wakes.set()

    async def rest(self) -> None:
        """Have no agents any more, and keep the places for the next run; returns when they have ended."""
        self._is_resting = True
        self._num_rests += 1
        agents, self._agents, self._used = list(self._agents.values()), {}, {}
        await asyncio.gather(*(asyncio.to_thread(self._end_agent, actor) for _, actor, _ in agents))

    def serve(self) -> None:
        """Have agents again."""
        self._is_resting = False
        self._wakes.set()

    def adopt(self, node: str, actor: Any, grant: Allocation) -> None:
        """An agent that was there before this supervisor."""
        self._agents[grant.node_id] = (node, actor, grant)

    def end(self) -> None:
        """Start nothing more: `tend` returns."""
        self._is_ending = True
        self._wakes.set()

    def close(self) -> None:
        """End all agents and give everything back, after `tend` has returned."""
        for _, actor, _ in self._agents.values():
            self._end_agent(actor)
        for group in self._groups.values():
            remove_placement_group(group)

    def _beside(self, call: Callable[..., None], *arguments: Any) -> None:
        """On another thread: Ray's calls wait for its control store."""
        task = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _tend_once(self) -> None:
        going = await asyncio.to_thread(_draining)
        self._going |= going.keys()
        await asyncio.to_thread(self._shape_groups)
        grants = await asyncio.to_thread(self._grants)
        for node_id, grant in grants.items():
            known = self._agents.get(node_id)
            if known is None:
                if not self._is_resting:
                    await self._start_on(node_id, grant)
            elif (known[2].num_slots, known[2].num_guaranteed) != (grant.num_slots, grant.num_guaranteed):
                grant = replace(grant, devices=await asyncio.to_thread(self._devices_on, node_id))
                self._agents[node_id] = (known[0], known[1], grant)
                self._on_granted(known[0], grant)
        for node_id, (name, actor, grant) in list(self._agents.items()):
            if node_id not in grants and grant.num_slots:
                nothing = Allocation(node_id=node_id, num_slots=0, num_guaranteed=0)
                self._agents[node_id] = (name, actor, nothing)
                self._on_granted(name, nothing)
        for node_id, seconds_left in going.items():
            if node_id in self._agents:  # said every time: its agent may be another one now
                self._on_notice(self._agents[node_id][0], seconds_left)
        await self._ask_others(has_minimum=sum(grant.num_guaranteed for grant in grants.values()) >= self._low)

    async def _start_on(self, node_id: str, grant: Allocation) -> None:
        """Have an agent on a node, unless the run that it is for has ended meanwhile."""
        num_rests = self._num_rests
        grant = replace(grant, devices=await asyncio.to_thread(self._devices_on, node_id))
        self._num_agents += 1
        name = f"{node_id[:_NODE_DIGITS]}-{int(time.time()) % 100_000}{self._num_agents:03d}{secrets.token_hex(1)}"
        actor = await asyncio.to_thread(self._start_agent, name, grant)
        if self._num_rests == num_rests:
            self._agents[node_id] = (name, actor, grant)
        else:
            self._beside(self._end_agent, actor)

    def _shape_groups(self) -> None:
        """One group for the smallest number, one for each worker beyond it, and one for each place that will go."""
        table = _table()
        for name, group in list(self._groups.items()):  # somebody else may have given it back
            if table.get(group.id.hex(), {}).get("state") == "REMOVED":
                del self._groups[name]
        self._ensure(self._base, self._low)
        nodes = {name: _nodes_of(_table(), group) for name, group in self._groups.items()}
        num_going = sum(node_id in self._going for places in nodes.values() for node_id in places)
        target = self._wanted - self._low + num_going
        singles = [name for name in self._groups if name != self._base]
        firm = Counter(nodes.get(self._base, []))
        # A place beyond the firm ones that a rank is using stays, whatever the target is.
        needed = Counter({node_id: self._used_on(node_id) - firm[node_id] for node_id in self._agents})
        spare = []
        for name in sorted(singles, key=lambda name: (not nodes.get(name), name)):
            place = next(iter(nodes.get(name, [])), None)
            if place is not None and needed[place] > 0:
                needed[place] -= 1
            else:
                spare.append(name)
        while len(singles) > target and spare:  # first those that the cluster has no room for
            name = spare.pop()
            remove_placement_group(self._groups.pop(name))
            singles.remove(name)
        while len(singles) < target:
            self._num_groups += 1
            singles.append(f"forge-{self._run_id}-{self._num_groups}")
            self._ensure(singles[-1], 1)

    @property
    def _base(self) -> str:
        return f"forge-{self._run_id}-base"

    def _used_on(self, node_id: str) -> int:
        return self._used.get(self._agents[node_id][0], 0)

    def _ensure(self, name: str, size: int) -> None:
        if name not in self._groups:
            self._groups[name] = placement_group(
                [{self._resource: 1.0}] * size, strategy="PACK", name=name, lifetime="detached"
            )

    def _find_groups(self) -> None:
        """Those of a supervisor before this one."""
        for name, run_id in _groups_of_runs():
            if run_id == self._run_id:
                with contextlib.suppress(ValueError):  # it was removed meanwhile
                    self._groups[name] = ray.util.get_placement_group(name)
                    number = name.rpartition("-")[2]
                    self._num_groups = max(self._num_groups, int(number) if number.isdigit() else 0)

    def _remove_orphans(self) -> None:
        """Give back what runs have left behind whose supervisor is gone, and is not only being restarted."""
        groups = _groups_of_runs()  # before the supervisors, so that a run that has just begun has both
        running = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        orphans = [name for name, run_id in groups if f"{SUPERVISOR}{run_id}" not in running]
        now = time.monotonic()
        self._orphans = {name: self._orphans.get(name, now) for name in orphans}
        for name, since in self._orphans.items():
            if now - since > _ORPHAN_S:
                with contextlib.suppress(ValueError):  # it was removed meanwhile
                    remove_placement_group(ray.util.get_placement_group(name))

    def _grants(self) -> dict[str, Allocation]:
        """Places by node, of nodes that Ray believes alive."""
        table = _table()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        all_places = Counter(node_id for group in self._groups.values() for node_id in _nodes_of(table, group))
        firm = Counter(_nodes_of(table, self._groups[self._base]))
        return {
            node_id: Allocation(node_id=node_id, num_slots=count, num_guaranteed=firm[node_id])
            for node_id, count in all_places.items()
            if node_id in alive
        }

    def _devices_on(self, node_id: str) -> tuple[str, ...]:
        """The numbers of the GPUs that Ray has put into this run's places on a node.

        Those that are given back first come last: ranks take them in this order.
        """
        if self._resource != "GPU":
            return ()
        asked, table = [], _table()
        for _, group in sorted(self._groups.items(), key=lambda item: (item[0] != self._base, item[0])):
            for index, place in enumerate(_nodes_of(table, group)):
                if place == node_id:
                    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
                    asked.append(_gpu_numbers.options(scheduling_strategy=strategy).remote())
        return tuple(str(number) for numbers in ray.get(asked) for number in numbers)

    async def _ask_others(self, *, has_minimum: bool) -> None:
        """While the smallest number of workers is not there, ask other runs to give back what they can spare."""
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
    """Names of the groups that runs have, and each one's run."""
    names = [entry["name"] for entry in _table().values() if entry["state"] != "REMOVED"]
    return [(name, name[len("forge-") :].rpartition("-")[0]) for name in names if name.startswith("forge-")]


def _ask_to_yield(run_id: str) -> None:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith(SUPERVISOR) and actor["name"] != f"{SUPERVISOR}{run_id}":
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                ray.get_actor(actor["name"], namespace=actor["namespace"]).yield_places.remote()


def _draining() -> dict[str, float | None]:
    """Seconds left of the nodes that Ray drains; None where no time was given."""
    deadlines_ms: dict[str, int] = ray._private.state.state.get_draining_nodes()
    now_ms = time.time() * 1000
    return {node_id: (ms - now_ms) / 1000 if ms else None for node_id, ms in deadlines_ms.items()}


def drain(node_id: str, seconds_left: float | None, *, gcs_address: str) -> None:
    """Tell Ray that a node is going to be taken away; the same call as `ray drain-node`.

    Raises: RuntimeError if Ray refuses; RpcError if there is no such cluster.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    is_accepted, refusal = GcsClient(address=gcs_address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the machine will be taken away",
        0 if seconds_left is None else int((time.time() + max(0.0, seconds_left)) * 1000),
    )
    if not is_accepted:
        raise RuntimeError(refusal)


def nodes_alive(*, gcs_address: str) -> dict[str, bool]:
    """Ray's ids of the nodes that it believes alive, and whether each is the head.

    Does not connect this process to the cluster.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    found = GcsClient(address=gcs_address).get_all_node_info()
    return {node_id.hex(): info.is_head_node for node_id, info in found.items() if info.state == 0}


def _mark_going(node_id: str, seconds_left: float | None) -> None:
    address = ray.get_runtime_context().gcs_address
    try:
        # Of the head nothing would be left to be marked; and the supervisor could not be restarted on it.
        if not nodes_alive(gcs_address=address).get(node_id):
            drain(node_id, seconds_left, gcs_address=address)
    except Exception as error:  # an inner interface of Ray's: the change goes on without it
        _log.warning("node %s could not be marked as draining: %s", node_id, error)


def _kill(actor: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(actor)
