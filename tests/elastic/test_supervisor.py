"""The supervisor with agents that only listen: what it makes of notices and assignment, and in what order it
speaks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from forge.elastic.agent_connections import AgentConnection
from forge.elastic.commands import source_shards, start_commands
from forge.elastic.states import MemberNode, MembershipState, Phase, ReplicaLocation, StartGeneration
from forge.elastic.supervisor import Supervisor
from forge.errors import ClusterError
from forge.events import CostUpdated, Event, PreemptionNoticeReceived
from forge.pricing.budget import CostLimits, CostMeter, read_price
from tests.support.placement import EndlessClaims

_NO_LIMITS = CostLimits()


class Claims(EndlessClaims):
    """Remembers for whom another machine was asked for."""

    def __init__(self) -> None:
        super().__init__(1)
        self.replaced: list[tuple[str, float | None]] = []

    def replace_node(self, node: str, *, seconds_left: float | None) -> None:
        self.replaced.append((node, seconds_left))


class Stage:
    """A supervisor in training with machines `a` and `b`."""

    def __init__(self, *, limits: CostLimits = _NO_LIMITS, spent_usd: float = 0.0) -> None:
        self.now = 1000.0
        self.claims = Claims()
        self.told: list[Event] = []
        self.heard: dict[str, list[Any]] = {}
        self.connections: dict[str, AgentConnection] = {}
        self.supervisor = Supervisor(
            MembershipState(min_workers=1, max_workers=2),
            placement=self.claims,
            record_event=self.told.append,
            checkpoints="/nowhere",
            meter=CostMeter(limits, head="host-head", head_usd_per_hour=0.5, spent_usd=spent_usd),
            clock=lambda: self.now,
        )
        for name in ("a", "b"):
            self.come(name)
        self.form()

    def come(self, name: str, *, usd_per_hour: float | None = 1.0) -> None:
        self.heard[name] = []
        self.connections[name] = AgentConnection(
            node=name,
            host=f"host-{name}",
            endpoint=(f"host-{name}", 7000),
            rendezvous_port=7001,
            agent_pid=1,
            send=self.heard[name].append,
            close=lambda: None,
            heard_at=self.now,
        )
        registration = {
            "node": name,
            **{
                "pids": {},
                "generation": 0,
                "replicas": [],
                "is_ready": True,
                "running_ranks": {},
            },
            **{"num_slots": 1, "num_guaranteed": 1, "usd_per_hour": usd_per_hour},
        }
        self.supervisor.attach(self.connections[name], registration=registration)

    def form(self) -> None:
        formed = {
            **{"generation": self.supervisor.state.generation, "device": "cpu", "peak_flops": 1.0, "seconds": {}},
            **{"world_size": len(self.supervisor.state.assignment), "peak_source": "none"},
        }
        self.supervisor.receive(
            self.connections[self.supervisor.state.assignment[0]], {"report": "started", "started": formed}
        )
        assert self.supervisor.state.phase is Phase.TRAINING

    def notices(self) -> list[tuple[str, str, float | None, bool]]:
        return [
            (event.node, event.source, event.seconds_left, event.is_certain)
            for event in self.told
            if isinstance(event, PreemptionNoticeReceived)
        ]

    def says(self, node: str, **notice: Any) -> None:
        told = {"source": "aws", "seconds_left": 120.0, "is_certain": True} | notice
        self.supervisor.receive(self.connections[node], {"report": "preemption", **told})


def staged(scene: Callable[[Stage], None], **options: Any) -> None:
    async def play() -> None:
        scene(Stage(**options))

    asyncio.run(play())


def test_a_notice_that_is_said_again_and_again_is_one() -> None:
    def scene(stage: Stage) -> None:
        stage.says("b")
        for _ in range(5):  # Ray says it at every look, and knows the end to a second
            stage.now += 0.5
            left_s = 1120.0 - stage.now
            stage.supervisor.announce_preemption("b", source="ray", seconds_left=left_s + 0.3)
            stage.supervisor.announce_preemption("b", source="ray", seconds_left=left_s - 0.3)
        assert stage.notices() == [("b", "aws", 120.0, True)]
        assert stage.claims.replaced == [("b", 120.0)]

    staged(scene)


def test_one_that_leaves_less_time_is_told_of_and_heeded() -> None:
    def scene(stage: Stage) -> None:
        stage.says("b")
        stage.says("b", source="ray", seconds_left=30.0)
        assert [source for _, source, _, _ in stage.notices()] == ["aws", "ray"]
        assert stage.supervisor.state.nodes["b"].preempted_at == 1030.0

    staged(scene)


def test_the_next_agent_of_a_machine_that_goes_is_told_of_anew() -> None:
    def scene(stage: Stage) -> None:
        stage.supervisor.announce_preemption("b", source="ray", seconds_left=60.0)
        stage.supervisor.detach(stage.connections["b"], reason="its connection closed")
        stage.supervisor.announce_preemption("b2", source="ray", seconds_left=59.0)  # it is not there yet
        stage.come("b2")
        stage.supervisor.announce_preemption("b2", source="ray", seconds_left=58.0)
        assert [(node, left_s) for node, _, left_s, _ in stage.notices()] == [("b", 60.0), ("b2", 58.0)]

    staged(scene)


def test_a_mere_risk_has_another_machine_made_ready_and_changes_nothing() -> None:
    def scene(stage: Stage) -> None:
        stage.says("b", seconds_left=None, is_certain=False)
        stage.supervisor.tick()
        assert stage.notices() == [("b", "aws", None, False)]
        assert stage.claims.replaced == [("b", None)]
        assert stage.supervisor.state.nodes["b"].preempted_at is None
        assert stage.supervisor.state.phase is Phase.TRAINING

    staged(scene)


def test_an_agent_hears_of_its_devices_before_it_is_to_use_them() -> None:
    def scene(stage: Stage) -> None:
        stage.heard["a"].clear()
        stage.supervisor.update_slots("a", num_slots=2, num_guaranteed=1, devices=("cuda:1", "cuda:0"))
        stage.supervisor.receive(
            stage.connections["a"],
            {"report": "ended", "generation": 1, "rank": 0, "end": "broken", "step": 0, "reason": "", "error": ""},
        )
        for name in "ab":
            stage.supervisor.receive(
                stage.connections[name], {"report": "stopped", "generation": 1, "replicas": []}
            )
        orders = [(message["command"], message.get("ranks")) for message in stage.heard["a"]]
        assert orders == [("set_devices", None), ("stop", None), ("start", [0, 1])]
        assert stage.heard["a"][0]["devices"] == ["cuda:1", "cuda:0"]

    staged(scene)


def test_a_machine_at_work_alone_is_told_where_to_keep_copies_when_the_spare_one_is_lost() -> None:
    def scene(stage: Stage) -> None:
        assert stage.supervisor.state.assignment == ("a",)  # b joins a second later
        start = next(message for message in stage.heard["a"] if message["command"] == "start")
        stage.come("c")
        for lost, left in (("b", ["host-c", 7000]), ("c", None)):
            stage.heard["a"].clear()
            stage.supervisor.detach(stage.connections[lost], reason="its connection closed")
            assert stage.heard["a"] == [{"command": "set_peer", "generation": start["generation"], "peer": left}]

    staged(scene)


@pytest.mark.parametrize("num_agents", [1, 3])
def test_every_agent_is_told_where_all_parts_of_the_state_are(num_agents: int) -> None:
    names = "abc"[:num_agents]
    connections = {
        name: AgentConnection(
            node=name,
            host=name,
            endpoint=(f"10.0.0.{number}", 7000 + number),
            rendezvous_port=1,
            agent_pid=1,
            send=lambda message: None,
            close=lambda: None,
            heard_at=0.0,
        )
        for number, name in enumerate(names)
    }
    nodes = {
        name: MemberNode(
            num_slots=1, replicas=frozenset({ReplicaLocation(generation=4, rank=r, world_size=num_agents, step=9)})
        )
        for r, name in enumerate(names)
    }
    start = StartGeneration(generation=5, assignment=tuple(names), step=9, source=(4, num_agents))
    state = MembershipState(min_workers=1, max_workers=3, nodes=nodes)
    orders = start_commands(start, state=state, connections=connections, laps={})
    wanted = [
        {"generation": 4, "rank": r, "endpoint": list(connections[name].endpoint)} for r, name in enumerate(names)
    ]
    assert all(source_shards(orders[name]) == wanted for name in names)


def test_from_storage_no_agent_is_told_of_parts() -> None:
    def scene(stage: Stage) -> None:
        order = next(message for message in stage.heard["a"] if message["command"] == "start")
        assert source_shards(order) == []

    staged(scene)


def _wishes(stage: Stage) -> list[str]:
    return [message["flag"] for name in "ab" for message in stage.heard[name] if message["command"] == "set_flag"]


def test_a_run_stops_with_a_checkpoint_when_it_has_cost_what_it_may() -> None:
    def scene(stage: Stage) -> None:
        stage.supervisor.tick()
        stage.now += 600.0  # two machines and the head: 2.5 USD an hour
        stage.supervisor.receive(stage.connections["a"], {"report": "heartbeat", "generation": 1, "ranks": []})
        stage.supervisor.receive(stage.connections["b"], {"report": "heartbeat", "generation": 1, "ranks": []})
        assert _wishes(stage) == []
        stage.supervisor.tick()
        assert _wishes(stage) == ["STOP"]
        told = [event for event in stage.told if isinstance(event, CostUpdated)]
        assert told[-1].usd == pytest.approx(0.7 + 2.5 / 6)
        assert told[-1].usd_per_hour == pytest.approx(2.5)

    staged(scene, limits=CostLimits(usd=1.0), spent_usd=0.7)


def test_a_run_stops_when_its_machines_cost_too_much_an_hour() -> None:
    def scene(stage: Stage) -> None:
        stage.supervisor.tick()
        assert _wishes(stage) == []
        stage.come("c", usd_per_hour=0.6)
        stage.supervisor.tick()
        assert _wishes(stage) == ["STOP"]

    staged(scene, limits=CostLimits(usd_per_hour=3.0))


def test_a_limit_that_nobody_can_watch_is_no_limit() -> None:
    def scene(stage: Stage) -> None:
        stage.come("c", usd_per_hour=None)
        stage.supervisor.tick()
        assert _wishes(stage) == ["STOP"]

    staged(scene, limits=CostLimits(usd=1000.0))


def test_a_machine_with_two_agents_is_paid_once() -> None:
    meter = CostMeter(CostLimits(), head="h", head_usd_per_hour=1.0, spent_usd=0.0)
    meter.add_agent("a", host="h", usd_per_hour=1.0)
    meter.add_agent("b", host="x", usd_per_hour=2.0)
    meter.add_agent("c", host="x", usd_per_hour=2.0)
    assert meter.usd_per_hour == 3.0
    meter.remove_agent("b")
    assert meter.usd_per_hour == 3.0
    meter.remove_agent("c")
    assert meter.usd_per_hour == 1.0


@pytest.mark.parametrize("text", ["free", "-1", "inf", "nan"])
def test_a_price_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ClusterError, match="FORGE_USD_PER_HOUR"):
        read_price({"FORGE_USD_PER_HOUR": text})


def test_the_cluster_and_the_job_may_both_limit_the_price_of_an_hour() -> None:
    limits = CostLimits(usd=5.0, usd_per_hour=3.0)
    assert limits.capped_by({"FORGE_MAX_USD_PER_HOUR": "2.5"}) == CostLimits(usd=5.0, usd_per_hour=2.5)
    assert limits.capped_by({"FORGE_MAX_USD_PER_HOUR": "9"}) == limits
    assert limits.capped_by({}) == limits
