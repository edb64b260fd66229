"""What each rank of a layout sends and holds, counted on real ranks and by the plan's formulas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from forge.plan.gpus import find_gpu
from forge.plan.inputs import CorpusInfo, TrainedParameter
from forge.plan.parameter_groups import groups_of, optimizer_state
from forge.plan.plan import Plan, make_plan, plan_to_json
from forge.plan.rank_groups import RankGroups
from forge.plan.step_work import step_work_of_job
from forge.plan.throughput import bytes_moved
from tests.support.held_state import held_bytes
from tests.support.jobs import CPU, VOCAB, tiny_facts, tiny_job
from tests.support.ranks import on_ranks, train_one_rank
from tests.support.traffic import Traffic

HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS = 128, 256, 2, 8, 4
_KEYS = HIDDEN * KEY_HEADS // HEADS
_LAYER = (
    ("self_attn.q_proj", (HIDDEN, HIDDEN)),
    ("self_attn.k_proj", (_KEYS, HIDDEN)),
    ("self_attn.v_proj", (_KEYS, HIDDEN)),
    ("self_attn.o_proj", (HIDDEN, HIDDEN)),
    ("mlp.gate_proj", (INNER, HIDDEN)),
    ("mlp.up_proj", (INNER, HIDDEN)),
    ("mlp.down_proj", (HIDDEN, INNER)),
    ("input_layernorm", (HIDDEN,)),
    ("post_attention_layernorm", (HIDDEN,)),
)
_STEPS = 4
_EXCHANGES = {"all_to_all", "all_to_all_single"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """How ranks divide a model and its sequences."""

    world_size: int
    stage: int
    hpz: int = 1
    shard_group: int | None = None
    """Ranks of a shard group; None: all."""
    degree: int = 1
    """Ranks that share a sequence."""
    recomputes: bool = False
    """With activation checkpointing."""

    def __str__(self) -> str:
        words = [f"ZeRO {self.stage}"]
        words += [f"hpZ {self.hpz}"] if self.hpz > 1 else []
        words += [f"shard groups of {self.shard_group}"] if self.shard_group else []
        words += [f"Ulysses {self.degree}"] if self.degree > 1 else []
        words += ["checkpointing"] if self.recomputes else []
        return ", ".join(words)


LAYOUTS = (
    *(RankLayout(world_size=size, stage=stage) for stage in range(4) for size in (2, 3, 4, 6)),
    *(RankLayout(world_size=size, stage=3, hpz=2) for size in (4, 6)),
    *(RankLayout(world_size=size, stage=stage, shard_group=2) for stage in (1, 2, 3) for size in (4, 6)),
    *(RankLayout(world_size=2 + 2 * (stage // 2), stage=stage, degree=2) for stage in range(4)),
    RankLayout(world_size=6, stage=3, degree=2),
    RankLayout(world_size=4, stage=1, degree=4),
    RankLayout(world_size=4, stage=3, degree=4),
    RankLayout(world_size=2, stage=1, degree=2, recomputes=True),
    RankLayout(world_size=4, stage=3, shard_group=2, degree=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A cost of a rank, in bytes."""

    name: str
    counted: float
    """What is sent, of the rank that differs most from the plan; what is held, of the rank that holds most, as the
    plan's memory is that of the fullest one."""
    planned: float


def rank_costs(layout: RankLayout, corpus: CorpusInfo, folder: Path) -> list[Cost]:
    """Train a tiny model on real ranks. Returns: the bytes of each kind that a rank sends in a step and holds."""
    plan = _planned(layout, corpus)
    expected = _expected(layout, plan)
    found = on_ranks(_count, plan_to_json(plan), str(folder), layout, world_size=layout.world_size)
    costs = []
    for name, planned in expected.items():
        values = [rank[name] for rank in found]
        is_sent = name.startswith("sent")
        counted = max(values, key=lambda value: abs(value - planned)) if is_sent else max(values)
        costs.append(Cost(name=name, counted=counted, planned=planned))
    return costs


def _planned(layout: RankLayout, corpus: CorpusInfo) -> Plan:
    zero = {
        "stage": layout.stage,
        "hpz_partition_size": layout.hpz,
        "shard_group_size": layout.shard_group or "all",
    }
    job = tiny_job(
        model__hidden_size=HIDDEN,
        model__intermediate_size=INNER,
        model__num_attention_heads=HEADS,
        model__num_key_value_heads=KEY_HEADS,
        training__zero=zero,
        training__micro_batch_size=1,
        training__precision="bf16",
        training__evaluate_every="100 steps",
        training__ema={"decay": 0.5},
        training__sequence_parallel=layout.degree,
        training__activation_checkpointing=layout.recomputes,
        resources__workers="1..6",
    )
    trained = [
        TrainedParameter(name=name, shape=shape)
        for name, shape in (
            ("model.embed_tokens.weight", (VOCAB, HIDDEN)),
            *((f"model.layers.{layer}.{name}.weight", shape) for layer in range(LAYERS) for name, shape in _LAYER),
            ("model.norm.weight", (HIDDEN,)),
            ("lm_head.weight", (VOCAB, HIDDEN)),
        )
    ]
    numel = sum(parameter.numel for parameter in trained)
    facts = tiny_facts(
        num_parameters=numel,
        num_trainable_parameters=numel,
        trained=tuple(trained),
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        attention_width=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
    )
    plan = make_plan(job, model=facts, corpus=corpus, hardware=CPU)
    for world in plan.worlds if layout.stage == 3 else ():
        # As in a model that is larger than what DeepSpeed keeps of it between two passes.
        world.deepspeed["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    return plan


def _expected(layout: RankLayout, plan: Plan) -> dict[str, float]:
    world = plan.for_world_size(layout.world_size)
    shard_groups = layout.world_size // (layout.shard_group or layout.world_size)
    assert world.groups == RankGroups(hpz_partition_size=layout.hpz, num_shard_groups=shard_groups)
    assert world.batch.sequence_parallel_size == layout.degree and not world.batch.num_spare_ranks
    gpu = find_gpu("H100-80GB")
    assert gpu is not None
    state = optimizer_state(groups_of(plan.job.training, plan.model))
    moved = bytes_moved(
        step_work_of_job(plan.job, model=plan.model, batch=world.batch, state=state, gpu=gpu, groups=world.groups)
    )
    return {
        "sent, sharing": moved.sharing,
        "sent, hpZ": moved.in_groups,
        "sent, between": moved.between_groups,
        "sent, exchanged": moved.exchanged,
        "held, weights": world.memory.weights_bytes,
        "held, gradients": world.memory.gradients_bytes,
        "held, optimizer": world.memory.optimizer_bytes,
        "held, average": world.memory.ema_bytes,
    }


def _count(rank: int, plan_json: str, folder: str, layout: RankLayout) -> dict[str, float]:
    """Train as one rank. Returns: the bytes that it sent per step, without the first, and that it held at most."""
    from forge.train.engine import Engine

    traffic = Traffic()
    before: list[Counter[tuple[str, tuple[int, ...]]]] = []
    held: list[dict[str, int]] = []
    step_of = Engine.step

    def counted(engine: Engine, step: int, *arguments: Any, **options: Any) -> Any:
        before.append(Counter(traffic.sent))
        ordinary = engine.on_progress
        if step == 2:  # there is no state of the optimizer before the first update
            engine.on_progress = _measuring(engine, held)
        try:
            return step_of(engine, step, *arguments, **options)
        finally:
            engine.on_progress = ordinary

    Engine.step = counted  # type: ignore[method-assign]
    train_one_rank(rank, plan_json, folder, layout.world_size, _STEPS + 1)
    sent = _by_purpose(before[-1] - before[1], layout)  # in the first step DeepSpeed learns the order of modules
    costs = {f"sent, {name}": num_bytes / (len(before) - 2) for name, num_bytes in sent.items()}
    most = {name: max(one[name] for one in held) for name in held[0]}
    return costs | {
        "held, weights": most["weights"],
        "held, gradients": most["gradients"],
        "held, optimizer": most["optimizer"],
        "held, average": most["ema"],
    }


def _measuring(engine: Any, held: list[dict[str, int]]) -> Callable[[], None]:
    """Return a callback that the engine calls before a micro-batch's passes, after them, and after its step."""
    calls, ordinary = count(1), engine.on_progress

    def progressed() -> None:
        ordinary()
        if next(calls) % 3 == 2:
            held.append(held_bytes(engine))

    return progressed


def _by_purpose(sent: Counter[tuple[str, tuple[int, ...]]], layout: RankLayout) -> Counter[str]:
    """Add up what was sent in a step by purpose: by the operation, and by the ranks that took part."""
    found: Counter[str] = Counter({"sharing": 0, "hpZ": 0, "between": 0, "exchanged": 0})
    for (operation, ranks), num_bytes in sent.items():
        is_all = len(ranks) == layout.world_size
        is_consecutive = ranks == tuple(range(ranks[0], ranks[0] + len(ranks)))
        if operation in _EXCHANGES:
            assert is_consecutive and len(ranks) == layout.degree
            found["exchanged"] += num_bytes
        elif layout.shard_group is not None and not is_consecutive:
            assert len(ranks) * layout.shard_group == layout.world_size
            found["between"] += num_bytes
        elif layout.hpz > 1 and not is_all:
            assert is_consecutive and len(ranks) == layout.hpz
            found["hpZ"] += num_bytes
        else:
            assert is_all or len(ranks) == layout.shard_group
            found["sharing"] += num_bytes
    return found
