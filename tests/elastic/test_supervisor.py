"""The supervisor with simulated agents: notices, slots, budget, and the order of its commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from forge.elastic import source_shards
from forge.elastic.agent_connections import AgentConnection
from forge.elastic.commands import start_commands
from forge.elastic.gpu_watch import GpuWatch
from forge.elastic.messages import SharedMessage, to_json, unpack
from forge.elastic.rpc import Message
from forge.elastic.source_shards import SourceReader, SourceWriter
from forge.elastic.states import MemberNode, MembershipState, Phase, ReplicaLocation, StartGeneration
from forge.elastic.straggler_detector import MIN_ROUND_S, NUM_ROUNDS, WINDOW_STEPS
from forge.elastic.straggler_watch import StragglerTerms, StragglerWatch
from forge.elastic.supervisor import Supervisor
from forge.errors import ClusterError
from forge.events import (
    CompileFailed,
    CostUpdated,
    Event,
    GenerationStarted,
    GenerationStarting,
    MixedDevices,
    NodeJoined,
    PreemptionNoticeReceived,
    SmallGpu,
    StragglerDetected,
)
from forge.plan.inputs import HardwareInfo
from forge.pricing.budget import CostLimits, CostMeter, read_price
from tests.support.placement import FixedPlacement

_NO_LIMITS = CostLimits()


class RecordingPlacement(FixedPlacement):
    """Records the nodes for which a replacement was requested."""

    def __init__(self) -> None:
        super().__init__(1)
        self.replaced: list[tuple[str, float | None]] = []

    def replace_node(self, node: str, *, seconds_left: float | None) -> None:
        self.replaced.append((node, seconds_left))


class Scene:
    """A supervisor that trains, with nodes `a` and `b`."""

    def __init__(
        self, *, limits: CostLimits = _NO_LIMITS, spent_usd: float = 0.0, replaces_stragglers: bool = False
    ) -> None:
        self.now = 1000.0
        self.placement = RecordingPlacement()
        self.recorded: list[Event] = []
        self.received: dict[str, list[Any]] = {}
        self.connections: dict[str, AgentConnection] = {}
        self.supervisor = Supervisor(
            MembershipState(min_workers=1, max_workers=2),
            placement=self.placement,
            record_event=self.recorded.append,
            checkpoints="/nowhere",
            meter=CostMeter(limits, head="host-head", head_usd_per_hour=0.5, spent_usd=spent_usd),
            clock=lambda: self.now,
            stragglers=StragglerWatch(
                StragglerTerms(replaces=replaces_stragglers, global_batch_size=8),
                placement=self.placement,
                record_event=self.recorded.append,
            ),
            gpus=GpuWatch(
                HardwareInfo(device="cuda", name="H100-80GB", memory_bytes=80 * 2**30, peak_flops=None),
                needed_bytes={1: 60 * 2**30, 2: 40 * 2**30},
                record_event=self.recorded.append,
            ),
        )
        for name in ("a", "b"):
            self.connect(name)
        self.start_generation()

    def connect(self, name: str, *, usd_per_hour: float | None = 1.0, gpu: tuple[str, int] | None = None) -> None:
        self.received[name] = []
        self.connections[name] = AgentConnection(
            node=name,
            host=f"host-{name}",
            endpoint=(f"host-{name}", 7000),
            rendezvous_port=7001,
            agent_pid=1,
            send=self.received[name].append,
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
            **{"num_slots": 1, "num_guaranteed": 1, "usd_per_hour": usd_per_hour, "gpu": gpu},
        }
        self.supervisor.attach(self.connections[name], registration=registration)

    def start_generation(self) -> None:
        started = {
            **{"generation": self.supervisor.state.generation, "device": "cpu", "peak_flops": 1.0, "seconds": {}},
            **{"world_size": len(self.supervisor.state.assignment), "peak_source": "none"},
        }
        self.supervisor.receive(
            self.connections[self.supervisor.state.assignment[0]], {"report": "started", "started": started}
        )
        assert self.supervisor.state.phase is Phase.TRAINING

    def notices(self) -> list[tuple[str, str, float | None, bool]]:
        return [
            (event.node, event.source, event.seconds_left, event.is_certain)
            for event in self.recorded
            if isinstance(event, PreemptionNoticeReceived)
        ]

    def report_notice(self, node: str, **details: Any) -> None:
        notice = {"source": "aws", "seconds_left": 120.0, "is_certain": True} | details
        self.supervisor.receive(self.connections[node], {"report": "preemption", **notice})


def run_scene(script: Callable[[Scene], None], **options: Any) -> None:
    async def run() -> None:
        script(Scene(**options))

    asyncio.run(run())


def test_node_ready__first_of_a_run__joins_before_its_generation_starts() -> None:
    """In the other order goodput would count the time before as that of an available node."""

    def script(scene: Scene) -> None:
        first, second, *rest = scene.recorded
        assert isinstance(first, NodeJoined) and (first.node, first.num_slots) == ("a", 1)
        assert isinstance(second, GenerationStarting)
        assert [event.node for event in rest if isinstance(event, NodeJoined)] == ["b"]

    run_scene(script)


def test_preemption_notice__repeated__recorded_once() -> None:
    def script(scene: Scene) -> None:
        scene.report_notice("b")
        for _ in range(5):  # Ray reports it at every poll, with a deadline in whole seconds
            scene.now += 0.5
            left_s = 1120.0 - scene.now
            scene.supervisor.announce_preemption("b", source="ray", seconds_left=left_s + 0.3)
            scene.supervisor.announce_preemption("b", source="ray", seconds_left=left_s - 0.3)
        assert scene.notices() == [("b", "aws", 120.0, True)]
        assert scene.placement.replaced == [("b", 120.0)]

    run_scene(script)


def test_preemption_notice__earlier_deadline__recorded_and_used() -> None:
    def script(scene: Scene) -> None:
        scene.report_notice("b")
        scene.report_notice("b", source="ray", seconds_left=30.0)
        assert [source for _, source, _, _ in scene.notices()] == ["aws", "ray"]
        assert scene.supervisor.state.nodes["b"].preempted_at == 1030.0

    run_scene(script)


def test_preemption_notice__new_agent_of_the_node__recorded_again() -> None:
    def script(scene: Scene) -> None:
        scene.supervisor.announce_preemption("b", source="ray", seconds_left=60.0)
        scene.supervisor.detach(scene.connections["b"], reason="its connection closed")
        scene.supervisor.announce_preemption("b2", source="ray", seconds_left=59.0)  # not connected yet
        scene.connect("b2")
        scene.supervisor.announce_preemption("b2", source="ray", seconds_left=58.0)
        assert [(node, left_s) for node, _, left_s, _ in scene.notices()] == [("b", 60.0), ("b2", 58.0)]

    run_scene(script)


def test_uncertain_notice__replacement_requested_and_training_continues() -> None:
    def script(scene: Scene) -> None:
        scene.report_notice("b", seconds_left=None, is_certain=False)
        scene.supervisor.tick()
        assert scene.notices() == [("b", "aws", None, False)]
        assert scene.placement.replaced == [("b", None)]
        assert scene.supervisor.state.nodes["b"].preempted_at is None
        assert scene.supervisor.state.phase is Phase.TRAINING

    run_scene(script)


def test_update_slots__devices_sent_before_start() -> None:
    def script(scene: Scene) -> None:
        scene.received["a"].clear()
        scene.supervisor.update_slots("a", num_slots=2, num_guaranteed=1, devices=("cuda:1", "cuda:0"))
        scene.supervisor.receive(
            scene.connections["a"],
            {"report": "ended", "generation": 1, "rank": 0, "end": "broken", "step": 0, "reason": "", "error": ""},
        )
        for name in "ab":
            scene.supervisor.receive(
                scene.connections[name], {"report": "stopped", "generation": 1, "replicas": []}
            )
        orders = [(message["command"], message.get("ranks")) for message in scene.received["a"]]
        assert orders == [("set_devices", None), ("stop", None), ("start", [0, 1])]
        assert scene.received["a"][0]["devices"] == ["cuda:1", "cuda:0"]

    run_scene(script)


def test_single_node__spare_lost__peer_is_replaced() -> None:
    def script(scene: Scene) -> None:
        assert scene.supervisor.state.assignment == ("a",)  # b joins after a second
        start = next(message for message in scene.received["a"] if message["command"] == "start")
        scene.connect("c")
        for lost, left in (("b", ["host-c", 7000]), ("c", None)):
            scene.received["a"].clear()
            scene.supervisor.detach(scene.connections[lost], reason="its connection closed")
            assert scene.received["a"] == [{"command": "set_peer", "generation": start["generation"], "peer": left}]

    run_scene(script)


@pytest.mark.parametrize("num_agents", [1, 3])
def test_start_commands__from_memory__every_agent_gets_all_shards(num_agents: int) -> None:
    names = "abc"[:num_agents]
    group = StartGroup(names)
    commands = group.start(from_nodes=names)
    wanted = group.shards(names)
    assert all(SourceReader().shards(commands[name]) == wanted for name in names)


def test_start_commands__second_one__has_new_endpoints_only() -> None:
    group = StartGroup("abc")
    readers = {name: SourceReader() for name in "abcd"}
    for name, command in group.start(from_nodes="abc").items():
        assert readers[name].shards(command) == group.shards("abc")
    del group.connections["b"]
    group.connect("d", port=7777)
    commands = group.start(from_nodes="adc")  # b's rank is held by d now
    assert {name: command["source"]["first"] for name, command in commands.items()} == {"a": 3, "c": 3, "d": 0}
    assert unpack(commands["a"]["source"]["endpoints"]) == [[3, "host-d", 7777]]
    assert len(unpack(commands["d"]["source"]["endpoints"])) == 3
    for name, command in commands.items():
        assert readers[name].shards(command) == group.shards("adc")


def test_start_commands__agent_without_ranks_for_a_while__gets_what_it_missed() -> None:
    group = StartGroup("abc")
    reader = SourceReader()
    assert reader.shards(group.start(from_nodes="ab")["a"]) == group.shards("ab")
    del group.connections["b"]
    group.connect("d", port=7777)
    assert "a" not in group.start(from_nodes="cd", on="cd")
    del group.connections["d"]
    group.connect("b", port=8888)  # the node is back, with another endpoint
    assert reader.shards(group.start(from_nodes="bc")["a"]) == group.shards("bc")


def test_start_commands__new_connection__gets_all_again_and_forgets_the_numbers_of_another_supervisor() -> None:
    first, second, reader = StartGroup("abc"), StartGroup("cba"), SourceReader()
    assert reader.shards(first.start(from_nodes="abc")["a"]) == first.shards("abc")
    assert reader.shards(second.start(from_nodes="cab")["a"]) == second.shards("cab")
    second.connect("a", port=9999)
    assert reader.shards(second.start(from_nodes="cab")["a"]) == second.shards("cab")


def test_start_commands__thousands_of_nodes_one_replaced__are_short() -> None:
    names = [f"n{number:05}" for number in range(2_000)]
    group = StartGroup(names)
    group.start(from_nodes=names)
    group.connect("n00500", port=7001)
    command = group.start(from_nodes=names)["n00000"]
    assert len(json.dumps(command)) < 2000


def test_announcements__hundred_nodes__first_membership_change_is_short_and_readers_know_all() -> None:
    names = [f"n{number:03}" for number in range(100)]
    group = StartGroup(names)
    readers = {name: SourceReader() for name in [*names, "late"]}
    for name, announcement in group.announce(generation=4, nodes=names).items():
        readers[name].learn(json.loads(to_json(announcement)))
    assert group.announce(generation=4, nodes=names) == {}, "each agent gets it once"
    group.connect("late", port=1)
    del group.connections["n007"]
    holders = [name if name != "n007" else "late" for name in names]
    commands = group.start(from_nodes=holders)
    assert len(unpack(commands["n000"]["source"]["endpoints"])) == 1
    assert len(unpack(commands["late"]["source"]["endpoints"])) == 100
    for name, command in commands.items():
        assert readers[name].shards(json.loads(to_json(command))) == group.shards(holders)
    assert group.announce(generation=5, nodes=holders) == {}, "nothing is missing"


def test_announcements__more_than_the_bytes_at_a_time__continue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_shards, "_ANNOUNCED_BYTES", 3000)
    names = [f"n{number:03}" for number in range(100)]
    group = StartGroup(names)
    seen: list[str] = []
    for _ in range(100):
        found = group.announce(generation=4, nodes=names)
        assert len(found) < 10
        seen += found
    assert sorted(seen) == names


def test_announcements__few_nodes__none() -> None:
    assert StartGroup("abc").announce(generation=4, nodes="abc") == {}


class StartGroup:
    """Connected agents, and start commands that continue from snapshots on them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.connections: dict[str, AgentConnection] = {}
        self._writer = SourceWriter()
        for number, name in enumerate(names):
            self.connect(name, port=7000 + number)

    def connect(self, name: str, *, port: int) -> None:
        self.connections[name] = AgentConnection(
            node=name,
            host=f"host-{name}",
            endpoint=(f"host-{name}", port),
            rendezvous_port=1,
            agent_pid=1,
            send=lambda message: None,
            close=lambda: None,
            heard_at=0.0,
        )

    def start(self, *, from_nodes: Sequence[str], on: Sequence[str] = ()) -> dict[str, Message]:
        """Start a rank on each node, from snapshots of ranks 0, 1, ... on these nodes."""
        return self.start_from([[name] for name in from_nodes], on=on)

    def start_from(self, held: Sequence[Sequence[str]], *, on: Sequence[str] = ()) -> dict[str, Message]:
        """Start a rank on each node, from snapshots 0, 1, ..., each on several nodes."""
        size = len(held)
        nodes = {
            name: MemberNode(
                num_slots=1,
                replicas=frozenset(
                    ReplicaLocation(generation=4, rank=rank, world_size=size, step=9)
                    for rank, names in enumerate(held)
                    if name in names
                ),
            )
            for name in self.connections
        }
        start = StartGeneration(generation=5, assignment=tuple(on or self.connections), step=9, source=(4, size))
        state = MembershipState(min_workers=1, max_workers=len(nodes), nodes=nodes)
        return start_commands(start, state=state, connections=self.connections, laps={}, sources=self._writer)

    def announce(self, *, generation: int, nodes: Sequence[str]) -> Mapping[str, Message]:
        """What a tick of a generation that trains on these nodes sends."""
        state = MembershipState(min_workers=1, max_workers=100, generation=generation, assignment=tuple(nodes))
        return self._writer.announcements(state, connections=self.connections)

    def shards(self, from_nodes: Sequence[str]) -> list[Message]:
        return [
            {"generation": 4, "rank": rank, "endpoint": list(self.connections[name].endpoint)}
            for rank, name in enumerate(from_nodes)
        ]


def test_start_commands__json__equals_the_message() -> None:
    for command in StartGroup("abc").start(from_nodes="abc").values():
        assert json.loads(to_json(command)) == command
    plain = {"command": "stop", "generation": 3}
    assert to_json(SharedMessage(plain)) == to_json(plain)


def test_start_commands__from_storage__no_shards() -> None:
    def script(scene: Scene) -> None:
        order = next(message for message in scene.received["a"] if message["command"] == "start")
        assert SourceReader().shards(order) == []

    run_scene(script)


def _flags(scene: Scene) -> list[str]:
    return [
        message["flag"] for name in "ab" for message in scene.received[name] if message["command"] == "set_flag"
    ]


def test_budget__exceeded__run_stops() -> None:
    def script(scene: Scene) -> None:
        scene.supervisor.tick()
        scene.now += 600.0  # two nodes and the head: 2.5 USD per hour
        scene.supervisor.receive(scene.connections["a"], {"report": "heartbeat", "generation": 1, "ranks": []})
        scene.supervisor.receive(scene.connections["b"], {"report": "heartbeat", "generation": 1, "ranks": []})
        assert _flags(scene) == []
        scene.supervisor.tick()
        assert _flags(scene) == ["STOP"]
        costs = [event for event in scene.recorded if isinstance(event, CostUpdated)]
        assert costs[-1].usd == pytest.approx(0.7 + 2.5 / 6)
        assert costs[-1].usd_per_hour == pytest.approx(2.5)

    run_scene(script, limits=CostLimits(usd=1.0), spent_usd=0.7)


def test_hourly_budget__exceeded__run_stops() -> None:
    def script(scene: Scene) -> None:
        scene.supervisor.tick()
        assert _flags(scene) == []
        scene.connect("c", usd_per_hour=0.6)
        scene.supervisor.tick()
        assert _flags(scene) == ["STOP"]

    run_scene(script, limits=CostLimits(usd_per_hour=3.0))


def test_budget__price_unknown__run_stops() -> None:
    def script(scene: Scene) -> None:
        scene.connect("c", usd_per_hour=None)
        scene.supervisor.tick()
        assert _flags(scene) == ["STOP"]

    run_scene(script, limits=CostLimits(usd=1000.0))


def test_cost_meter__two_agents_on_one_host__counted_once() -> None:
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
def test_read_price__invalid__error_names_the_variable(text: str) -> None:
    with pytest.raises(ClusterError, match="FORGE_USD_PER_HOUR"):
        read_price({"FORGE_USD_PER_HOUR": text})


def test_cost_limits__cluster_and_job__lower_one_applies() -> None:
    limits = CostLimits(usd=5.0, usd_per_hour=3.0)
    assert limits.capped_by({"FORGE_MAX_USD_PER_HOUR": "2.5"}) == CostLimits(usd=5.0, usd_per_hour=2.5)
    assert limits.capped_by({"FORGE_MAX_USD_PER_HOUR": "9"}) == limits
    assert limits.capped_by({}) == limits


def _train_on_both(scene: Scene) -> None:
    """Have the second generation, with ranks on `a` and `b`, take its first step."""
    for _ in range(20):
        scene.now += 0.1
        for name in "ab":
            scene.supervisor.receive(scene.connections[name], {"report": "heartbeat", "generation": 1, "ranks": []})
        scene.supervisor.tick()
    drained = {
        "report": "ended",
        "generation": 1,
        "rank": 0,
        "end": "drained",
        "step": 5,
        "reason": "",
        "error": "",
    }
    scene.supervisor.receive(scene.connections["a"], drained)
    for name in "ab":
        scene.supervisor.receive(scene.connections[name], {"report": "stopped", "generation": 1, "replicas": []})
    assert scene.supervisor.state.assignment == ("a", "b")
    scene.start_generation()


def _slow_rounds(scene: Scene, *, count: int, device_of_b: str = "cpu") -> None:
    """Report that rank 1, on `b`, takes twice the time of rank 0, in so many windows."""
    generation = scene.supervisor.state.generation
    for number in range(count):
        for rank, name in enumerate(scene.supervisor.state.assignment):
            own_ns = 10**8 * (1 + (name == "b"))
            heartbeat = {"report": "heartbeat", "generation": generation, "ranks": []}
            heartbeat["device"] = device_of_b if name == "b" else "cpu"
            heartbeat["own_times"] = [[rank, own_ns, WINDOW_STEPS * (number + 1)]]
            scene.supervisor.receive(scene.connections[name], heartbeat)
        for connection in scene.connections.values():
            connection.heard_at = scene.now = scene.now + MIN_ROUND_S / len(scene.connections)
        scene.supervisor.tick()


def test_straggler__replaced_as_with_a_notice_once_another_node_is_ready() -> None:
    def script(scene: Scene) -> None:
        _train_on_both(scene)
        _slow_rounds(scene, count=NUM_ROUNDS)
        stragglers = [event for event in scene.recorded if isinstance(event, StragglerDetected)]
        assert [(event.node, event.ratio, event.action) for event in stragglers] == [("b", 2.0, "requested")]
        assert scene.placement.replaced == [("b", None)]
        assert scene.supervisor.state.phase is Phase.TRAINING
        scene.connect("c")  # the node that was requested
        _slow_rounds(scene, count=NUM_ROUNDS + 2)
        stragglers = [event for event in scene.recorded if isinstance(event, StragglerDetected)]
        assert [event.action for event in stragglers] == ["requested", "replaced"]
        assert [(node, source) for node, source, _, _ in scene.notices()] == [("b", "straggler")]
        assert scene.supervisor.state.phase is Phase.DRAINING

    run_scene(script, replaces_stragglers=True)


def test_straggler__replace_stragglers_is_false__named_once_and_kept() -> None:
    def script(scene: Scene) -> None:
        _train_on_both(scene)
        scene.connect("c")
        _slow_rounds(scene, count=3 * NUM_ROUNDS)
        stragglers = [event for event in scene.recorded if isinstance(event, StragglerDetected)]
        assert [(event.node, event.action) for event in stragglers] == [("b", "kept")]
        assert scene.notices() == [] and scene.placement.replaced == []
        assert scene.supervisor.state.phase is Phase.TRAINING

    run_scene(script)


def test_mixed_devices__said_once_and_the_slower_kind_is_no_straggler() -> None:
    def script(scene: Scene) -> None:
        _train_on_both(scene)
        _slow_rounds(scene, count=2 * NUM_ROUNDS, device_of_b="A100")
        mixed = [event.num_ranks for event in scene.recorded if isinstance(event, MixedDevices)]
        assert mixed == [{"cpu": 1, "A100": 1}]
        assert not any(isinstance(event, StragglerDetected) for event in scene.recorded)

    run_scene(script, replaces_stragglers=True)


@pytest.mark.parametrize(
    ("gib", "needed_gib", "on"), [(15, 60, "a"), (48, 60, "a"), (15, 40, "b"), (48, None, "b"), (80, None, "a")]
)
def test_small_gpu__less_than_the_estimate__named_before_the_first_step(
    gib: int, needed_gib: int | None, on: str
) -> None:
    """The ranks are on `a` at first, which needs 60 GiB, then on both, which need 40."""

    def script(scene: Scene) -> None:
        report = {"report": "gpu", "gpu": ["Tesla T4", gib * 2**30]}
        scene.supervisor.receive(scene.connections[on], report)
        _train_on_both(scene)
        scene.supervisor.receive(scene.connections[on], report)
        found = [event for event in scene.recorded if isinstance(event, SmallGpu)]
        expected = [] if needed_gib is None else [(on, f"host-{on}", gib * 2**30, needed_gib * 2**30)]
        assert [(one.node, one.host, one.memory_bytes, one.needed_bytes) for one in found] == expected
        if found:
            generation = next(event.generation for event in scene.recorded if isinstance(event, GenerationStarted))
            assert found[0].generation == generation + (on == "b")
            starts = [number for number, event in enumerate(scene.recorded) if isinstance(event, GenerationStarted)]
            assert on == "a" or scene.recorded.index(found[0]) < starts[1]

    run_scene(script)


def test_mixed_devices__gpus_by_the_driver__said_after_the_first_step() -> None:
    def script(scene: Scene) -> None:
        for name, gpu in (("a", "H100"), ("b", "A100")):
            scene.supervisor.receive(scene.connections[name], {"report": "gpu", "gpu": [gpu, 80 * 2**30]})
        _train_on_both(scene)
        scene.supervisor.tick()
        scene.supervisor.tick()
        mixed = [event.num_ranks for event in scene.recorded if isinstance(event, MixedDevices)]
        assert mixed == [{"H100": 1, "A100": 1}]

    run_scene(script)


def test_compile_failed__several_ranks_and_generations__once_for_each_cause_with_the_node() -> None:
    def script(scene: Scene) -> None:
        def report(name: str, reason: str) -> None:
            failed = {"report": "compile_failed", "reason": reason, "seconds": 1.5, "node": ""}
            scene.supervisor.receive(scene.connections[name], failed)

        report("b", "InvalidCxxCompiler: no compiler, looked in /tmp/x1")
        _train_on_both(scene)
        report("a", "InvalidCxxCompiler: no compiler, looked in /tmp/y2")
        report("a", "RuntimeError: another cause")
        found = [(event.node, event.reason[:7]) for event in scene.recorded if isinstance(event, CompileFailed)]
        assert found == [("b", "Invalid"), ("a", "Runtime")]

    run_scene(script)
