"""What happens to machines, in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forge.events import (
    AttentionChosen,
    CheckpointIntervalChanged,
    CompileFailed,
    DeadlineForecast,
    Event,
    ForkServerFailed,
    GenerationStarted,
    GenerationStarting,
    GradientsNotQuantized,
    KilledForMemory,
    LayersCompiled,
    MachinesChosen,
    MembershipChangeStarted,
    MixedDevices,
    NodeJoined,
    NodeLeft,
    PreemptionNoticeReceived,
    RankHung,
    RankLocation,
    RegionMoveAdvised,
    RunStarted,
    SmallGpu,
    SnapshotIntervalChanged,
    StragglerDetected,
    SupervisorRestarted,
    WaitingForMachines,
    event_to_record,
)
from forge.runs.event_text import EventDescriber

NODE, OTHER = "3f2a" + "09" * 26, "77aa" + "01" * 26
FORMED = GenerationStarted(
    generation=2,
    world_size=1,
    device="cpu",
    peak_flops=1.0,
    peak_source="test",
    seconds={},
    ranks=(RankLocation(rank=0, node=NODE, pid=1),),
)
LOSS = MembershipChangeStarted(
    generation=2, cause="loss", reason=f"node {NODE} lost: connection closed", seconds_since_cause=0.0
)
FORMING = GenerationStarting(generation=3, world_size=2, from_step=41, source="memory")

DUE = 1_796_148_000.0
OUTLOOK = DeadlineForecast(
    deadline=DUE,
    ends_at=DUE - 600,
    step=9,
    num_workers=2,
    needed_workers=2,
    max_workers=3,
    can_rent=False,
)
MOVE = RegionMoveAdvised(
    here="us-east-1",
    to="us-west-2",
    num_spot=1,
    num_wanted=4,
    missing_s=1200.0,
    slack_s=7200.0,
    pause_s=900.0,
    usd_per_hour=3.5,
    move_usd=0.25,
)
SLOW = StragglerDetected(
    generation=1,
    node=NODE,
    host="h",
    rank=1,
    device="A100",
    ratio=2.04,
    own_s=0.204,
    usual_s=0.1,
    action="kept",
    reason="resources.replace_stragglers is false",
)
_IS_SLOW = "node 3f2a is slow: 2.0 times the other ranks' own work in a step (204ms against 100ms)"
STRAGGLERS = [
    (
        SmallGpu(
            generation=1,
            node=NODE,
            host="h",
            gpu="Tesla T4",
            memory_bytes=15 * 2**30,
            needed_bytes=40 * 2**30,
            world_size=2,
            planned_gpu="H100-80GB",
        ),
        "node 3f2a has Tesla T4 with 15.0 GiB, but a rank needs 40.0 GiB of it at 2 workers by the plan, which is "
        "for H100-80GB: it may run out of memory. Take it out of the cluster, or lower training.micro_batch_size",
    ),
    (
        MixedDevices(generation=1, num_ranks={"H100": 2, "A100": 1}),
        "the ranks run on different devices (1 on A100, 2 on H100): a step takes as long as on the slowest kind",
    ),
    (SLOW, f"{_IS_SLOW}; it stays: resources.replace_stragglers is false"),
    (replace(SLOW, action="replaced"), f"{_IS_SLOW}; another node takes its place"),
    (replace(SLOW, action="requested"), f"{_IS_SLOW}; another node is requested, and it works until then"),
    (replace(SLOW, action="left out", reason="faster"), f"{_IS_SLOW}; faster"),
]
DEADLINES = [
    (OUTLOOK, "with 2 workers the run ends 10m 00s before its deadline 2026-12-01 18:00 UTC"),
    (
        replace(OUTLOOK, ends_at=DUE + 600, needed_workers=3),
        "with 2 workers the run ends 10m 00s after its deadline 2026-12-01 18:00 UTC; 3 workers are needed: add "
        "machines to the cluster",
    ),
    (
        replace(OUTLOOK, ends_at=DUE + 600, needed_workers=4, can_rent=True),
        "with 2 workers the run ends 10m 00s after its deadline 2026-12-01 18:00 UTC; 4 workers are needed, more "
        "than the 3 of resources.workers",
    ),
    (
        replace(OUTLOOK, ends_at=DUE + 600, needed_workers=None),
        "the deadline 2026-12-01 18:00 UTC has passed at step 9; the run goes on, likely until 2026-12-01 18:10 "
        "UTC",
    ),
    (
        replace(OUTLOOK, limit="max_hours"),
        "with 2 workers the run ends 10m 00s before resources.max_hours are over (2026-12-01 18:00 UTC)",
    ),
    (
        replace(OUTLOOK, ends_at=DUE + 600, needed_workers=None, limit="max_hours"),
        "resources.max_hours were over (2026-12-01 18:00 UTC) at step 9; the run goes on, likely until 2026-12-01 "
        "18:10 UTC",
    ),
    (
        replace(OUTLOOK, ends_at=None, num_workers=0, needed_workers=None),
        "the deadline 2026-12-01 18:00 UTC has passed at step 9; the run goes on",
    ),
    (
        MachinesChosen(num_spot=4, num_on_demand=2, slack_s=-60.0),
        "machines until the deadline: 4 spot, 2 on demand (1m 00s late with all of them)",
    ),
    (
        MOVE,
        "1 of 4 spot machines in us-east-1 for 20m 00s; us-west-2 may have more: a move costs 15m 00s without "
        "machines, 0.25 USD",
    ),
    (
        replace(MOVE, move_usd=None),
        "1 of 4 spot machines in us-east-1 for 20m 00s; us-west-2 may have more: a move costs 15m 00s without "
        "machines, traffic at an unknown price",
    ),
]


def lines_of(*events: Event) -> list[str]:
    describer = EventDescriber()
    return [line for event in events if (line := describer.describe(event_to_record(event))) is not None]


def test_describe__loss_of_a_node__one_line() -> None:
    for events in ([NodeLeft(node=NODE, reason="gone"), LOSS], [LOSS, NodeLeft(node=NODE, reason="gone")]):
        assert lines_of(FORMED, *events, FORMING) == [
            "node 3f2a lost: connection closed; starting generation 3 with 2 workers from step 41 (memory)"
        ]


def test_describe__reason__appears_once() -> None:
    assert lines_of(LOSS, WaitingForMachines(have=1, need=2), FORMING) == [
        "node 3f2a lost: connection closed; waiting for machines: 1 of 2 workers",
        "starting generation 3 with 2 workers from step 41 (memory)",
    ]


def test_describe__idle_node_left__has_its_own_line() -> None:
    assert lines_of(FORMED, LOSS, FORMING, NodeLeft(node=OTHER, reason="drained")) == [
        "node 3f2a lost: connection closed; starting generation 3 with 2 workers from step 41 (memory)",
        "node 77aa left: drained",
    ]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            NodeJoined(node=NODE, host="10.0.0.1", num_slots=1, agent_pid=1),
            "node 3f2a joined (10.0.0.1), with room for 1 worker",
        ),
        (
            PreemptionNoticeReceived(node=NODE, source="aws", seconds_left=120.0),
            "node 3f2a will be preempted in 2m 00s (source: aws)",
        ),
        (
            PreemptionNoticeReceived(node=NODE, source="ray", seconds_left=None),
            "node 3f2a will be preempted soon (source: ray)",
        ),
        (
            PreemptionNoticeReceived(node=NODE, source="aws", seconds_left=None, is_certain=False),
            "node 3f2a is at risk of preemption (source: aws)",
        ),
        (
            KilledForMemory(process="agent", node=NODE, host="h", pid=7, used_gib=22.43, limit_gib=23.54),
            "Ray's memory monitor killed the agent on h and its ranks, which used 22.4 GiB of 23.5 GiB",
        ),
        (
            ForkServerFailed(node=NODE, reason="ended with exit code 1: ImportError (fork-server.log)"),
            "node 3f2a could not start workers, and tries again: its process ended with exit code 1: ImportError "
            "(fork-server.log)",
        ),
        (
            RankHung(generation=1, rank=1, node=NODE, silent_s=8.2),
            "no progress for 8.2s, rank 1 is behind; every rank's log has its stacks",
        ),
        *STRAGGLERS,
        (
            GenerationStarting(generation=1, world_size=3, from_step=0, source="storage"),
            "starting generation 1 with 3 workers",
        ),
        (
            AttentionChosen(name="sdpa", reason="not flash_attention_2: the package flash-attn is not installed"),
            "attention: sdpa (not flash_attention_2: the package flash-attn is not installed)",
        ),
        (
            GradientsNotQuantized(reason="7 ranks are no multiple of the 4 GPUs of a node"),
            "gradients are not quantised (training.zero.quantized_gradients): 7 ranks are no multiple of the 4 "
            "GPUs of a node",
        ),
        (
            LayersCompiled(num_layers=12, num_graphs=2, num_from_cache=1, seconds=8.0),
            "12 layers compiled in 8s, 1 of 2 graphs from the cache",
        ),
        (
            CompileFailed(reason="no C++ compiler", seconds=1.0),
            "layers run uncompiled (training.compile): no C++ compiler",
        ),
        (
            CompileFailed(reason="no C++ compiler", seconds=1.0, node=NODE),
            "layers run uncompiled on node 3f2a (training.compile): no C++ compiler",
        ),
        (
            SnapshotIntervalChanged(every=4, seconds=0.012, share=0.009),
            "snapshots to memory every 4 steps from now on (12ms each, 0.9% of the time)",
        ),
        (
            CheckpointIntervalChanged(seconds=447.0, before_s=60.0, cost_s=0.1, mtbf_s=1e6),
            "checkpoints every 7m 27s instead of 1m 00s (100ms each; state lost every 11d 13h)",
        ),
        *DEADLINES,
        (SupervisorRestarted(pid=1), "the supervisor died and was restarted; training continued"),
        (NodeLeft(node=NODE, reason="\x1b[2J"), "node 3f2a left: \\x1b[2J"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_describe__membership_event__one_line(event: Event, line: str) -> None:
    assert lines_of(event) == [line]


def test_describe__other_event__none() -> None:
    assert lines_of(RunStarted(run_id="r", total_steps=1, resumed_from_step=0), FORMED) == []
