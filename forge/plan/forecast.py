"""Forecast of the hours of a job at each world size, before it starts.

A step's time is a baseline ÷ a speed. On a GPU the baseline is the estimate of `forge.plan.throughput`; on a CPU it
is the FLOPs of a step ÷ the number of workers, so that the speed is a worker's FLOP/s. The speed is measured by a
former run on the same device: the newest with the same step at the same world size, else the newest with the same
step, else the newest at the same world size, else the newest. Without one it is 1 on a GPU, and on a CPU its peak,
as a former run or `forge.train.peak` measured it, times an efficiency that is assumed.

Evaluations, checkpoints, the tasks of `evaluate` (`forge.plan.task_time`), the start and the end of the run are
added; preemptions and waiting for machines are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from forge.config.training import TrainingSpec
from forge.plan.checkpoint_interval import checkpoint_stall_s, planned_every
from forge.plan.cluster_links import ClusterLinks, cluster_links
from forge.plan.durations import Forecast, WorldHours
from forge.plan.gpus import Gpu, find_gpu
from forge.plan.inputs import CorpusInfo, HardwareInfo
from forge.plan.mixture import as_read
from forge.plan.parameter_groups import OptimizerState, groups_of, optimizer_state
from forge.plan.plan import DraftPlan, Plan
from forge.plan.space import checkpoint_bytes
from forge.plan.step_work import step_work_of_job
from forge.plan.task_time import num_scorings, scoring_s
from forge.plan.throughput import HOST_COPY_SHARE, Estimate, Interconnect, estimate_step, with_uncertainty
from forge.plan.world_size import WorldSizePlan, plan_world_size, with_quantized_gradients
from forge.units import Every, format_duration

CPU_EFFICIENCY = Estimate(low=0.1, likely=0.35, high=0.6)
"""MFU of a job on CPU whose speed was not measured.

Source: benchmarks/RESULTS.md, "Training throughput", 2026-11-23: 0.37 to 0.45 in bf16 for a Llama of 4 layers of
256; narrower models and shorter sequences have less."""
STARTUP_S = 14.0
"""From the command to the first step on machines that are up.

Source: benchmarks/RESULTS.md, `train_first_step_s`, 2026-11-23."""
_ENDING_S = 5.0
"""Generating the sample of text, which imports torch and transformers."""
_WRITTEN_BYTES_PER_S = 1.06e9 / 1.5
"""Source: benchmarks/RESULTS.md, "Checkpoints", 2026-11-25: 1.06 GB; only the last one is waited for."""
_BEYOND_STEPS = Estimate(low=0.7, likely=1.0, high=1.5)
"""Range of what is not a training step, as a multiple of its likely value."""

_Speeds = tuple[Estimate, "FormerRun | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FormerRun:
    """What a run measured; times in seconds, None if it did not get so far."""

    run_id: str
    plan: Plan
    step_s: Mapping[int, float]
    """Median of its steps by world size; empty if it did too few."""
    peak_flops: float | None
    """Of one worker."""
    startup_s: float | None
    ending_s: float | None
    """From its last step to its end."""
    evaluation_s: float | None
    """Of one evaluation."""
    stall_s: float | None
    """Of one checkpoint."""
    tasks_s: float | None = None
    """Of one scoring of its tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPeak:
    """The measured rate of matrix products on the machine that a job runs on."""

    core_flops: float
    num_cores: int
    measured_on: str

    def of_worker(self, world_size: int) -> float:
        """The rate of one of the workers that share the cores."""
        return self.core_flops * (self.num_cores // world_size or self.num_cores / world_size)


def is_same_device(one: HardwareInfo, other: HardwareInfo) -> bool:
    """Whether two workers have the same kind of device; torch and the catalog name a GPU differently."""
    if one.device == "cuda" and other.device == "cuda":
        gpu = find_gpu(one.name)
        return one.name == other.name or (gpu is not None and gpu == find_gpu(other.name))
    return (one.device, one.name) == (other.device, other.name)


def forecast(
    plan: DraftPlan,
    *,
    former: Sequence[FormerRun] = (),
    links: ClusterLinks | None = None,
    cpu: CpuPeak | None = None,
) -> Forecast:
    """Return the hours of a job at each world size, on the hardware of its plan.

    Args:
        former: runs, the newest first; those on other devices are left out.
        links: of the cluster; by default assumed.
        cpu: the peak of the machine, if its device is the CPU; a former run takes precedence.
    """
    former = [run for run in former if is_same_device(run.plan.hardware, plan.hardware)]
    gpu = find_gpu(plan.hardware.name) if plan.hardware.device == "cuda" else None
    links = links or cluster_links(None)
    worlds = []
    for world in plan.worlds:
        found = _world_hours(
            plan, world.batch.world_size, gpu=gpu, links=links.interconnect, former=former, cpu=cpu
        )
        worlds += [found] if found is not None else []
    notes = tuple(_notes(plan, worlds, gpu=gpu, former=former, links=links, cpu=cpu))
    return Forecast(worlds=tuple(worlds), notes=notes)


def forecast_hours(
    plan: DraftPlan,
    *,
    world_size: int,
    gpu: Gpu,
    interconnect: Interconnect,
    former: Sequence[FormerRun] = (),
) -> Estimate:
    """Return the hours of a job on GPUs that may differ from those of its plan; see `forecast_world`."""
    return forecast_world(plan, world_size=world_size, gpu=gpu, interconnect=interconnect, former=former).hours


def forecast_world(
    plan: DraftPlan,
    *,
    world_size: int,
    gpu: Gpu,
    interconnect: Interconnect,
    former: Sequence[FormerRun] = (),
) -> WorldHours:
    """Return the forecast of a job on GPUs that may differ from those of its plan, at any world size.

    Args:
        former: runs, the newest first; those on other devices are left out.
    """
    hardware = gpu_hardware(gpu)
    former = [run for run in former if is_same_device(run.plan.hardware, hardware)]
    found = _world_hours(plan, world_size, gpu=gpu, links=interconnect, former=former)
    assert found is not None, "the speed of a known GPU can be estimated"
    return found


def gpu_hardware(gpu: Gpu) -> HardwareInfo:
    """Return what one worker gets on a machine with this GPU."""
    return HardwareInfo(device="cuda", name=gpu.name, memory_bytes=gpu.memory_gib * 2**30, peak_flops=None)


def _world_hours(
    plan: DraftPlan,
    world_size: int,
    *,
    gpu: Gpu | None,
    links: Interconnect,
    former: Sequence[FormerRun],
    cpu: CpuPeak | None = None,
) -> WorldHours | None:
    """Return the forecast at one world size; None if nothing is known of the device's speed."""
    speeds = _speeds(plan, world_size, gpu=gpu, links=links, former=former, cpu=cpu)
    if speeds is None:
        return None
    speed, run = speeds
    step_s = speed.inverted(_baseline_s(plan, world_size, gpu=gpu, links=links))
    steps_s = step_s.scaled(plan.total_steps)
    evaluation_s = _evaluation_s(plan, step_s=step_s.likely, world_size=world_size, run=run)
    checkpoint_s = _checkpoint_s(plan, steps_s=steps_s.likely, world_size=world_size, run=run)
    startup_s = next((one.startup_s for one in former if one.startup_s is not None), STARTUP_S)
    ending_s = next((one.ending_s for one in former if one.ending_s is not None), _ENDING_S)
    beyond_s = evaluation_s + checkpoint_s + startup_s + ending_s
    once_s = scoring_s(plan, step_s=step_s, former=iter(former)) or Estimate(low=0.0, likely=0.0, high=0.0)
    tasks_s = once_s.scaled(num_scorings(plan, seconds=steps_s.likely))
    hours = Estimate(
        low=(steps_s.low + _BEYOND_STEPS.low * beyond_s + tasks_s.low) / 3600,
        likely=(steps_s.likely + beyond_s + tasks_s.likely) / 3600,
        high=(steps_s.high + _BEYOND_STEPS.high * beyond_s + tasks_s.high) / 3600,
    )
    return WorldHours(
        world_size=world_size,
        hours=hours,
        step_s=step_s.likely,
        evaluation_s=evaluation_s,
        checkpoint_s=checkpoint_s,
        startup_s=startup_s,
        tasks_s=tasks_s.likely,
        run_id=run.run_id if run is not None else None,
    )


def _baseline_s(plan: DraftPlan, world_size: int, *, gpu: Gpu | None, links: Interconnect) -> float:
    """Seconds of a step at a speed of 1; see this module's docstring."""
    if gpu is None:
        return step_flops(plan) / world_size
    state = _state(plan)
    world = world_on_gpu(plan, world_size, gpu=gpu, links=links)
    if world.num_spare:
        world = world_on_gpu(plan, world.num_ranks, gpu=gpu, links=links)
    work = step_work_of_job(
        with_quantized_gradients(plan.job, world_size=world.batch.world_size, gpus_per_node=links.gpus_per_node),
        model=plan.model,
        batch=world.batch,
        state=state,
        gpu=gpu,
        corpus=_corpus(plan),
        teacher=plan.teacher,
        groups=world.groups,
    )
    return estimate_step(work, gpu=gpu, interconnect=links).total_s


def world_on_gpu(plan: DraftPlan, world_size: int, *, gpu: Gpu, links: Interconnect) -> WorldSizePlan:
    """Return batch and memory of a job at one world size on GPUs that may differ from the plan's."""
    return plan_world_size(
        plan.job,
        model=plan.model,
        hardware=gpu_hardware(gpu),
        world_size=world_size,
        state=_state(plan),
        teacher=plan.teacher,
        links=links,
    )


def step_flops(plan: DraftPlan) -> int:
    """FLOPs of a step of all workers together, padding included."""
    return plan.flops_per_token * plan.job.training.global_batch_size * plan.job.data.seq_len


def _state(plan: DraftPlan) -> OptimizerState:
    return optimizer_state(groups_of(plan.job.training, plan.model))


def _corpus(plan: DraftPlan) -> CorpusInfo | None:
    return as_read(plan.job.data, plan.corpus) if isinstance(plan, Plan) else None


def _speeds(
    plan: DraftPlan,
    world_size: int,
    *,
    gpu: Gpu | None,
    links: Interconnect,
    former: Sequence[FormerRun],
    cpu: CpuPeak | None,
) -> _Speeds | None:
    """The speed, and the run that measured it."""
    measured = [(run, size) for run in former for size in run.step_s]
    if measured:
        run, size = min(measured, key=lambda one: (not is_same_step(one[0].plan, plan), one[1] != world_size))
        speed = _baseline_s(run.plan, size, gpu=gpu, links=links) / run.step_s[size]
        is_same = is_same_step(run.plan, plan)
        return _spread(is_same=is_same, is_same_size=size == world_size, on_gpu=gpu is not None).scaled(speed), run
    if gpu is not None:
        return with_uncertainty(1.0, gpu=gpu), None
    peak = _peak_of_runs(former) or (cpu.of_worker(world_size) if cpu is not None else None)
    return None if peak is None else (CPU_EFFICIENCY.scaled(peak), None)


def _peak_of_runs(former: Sequence[FormerRun]) -> float | None:
    return next((run.peak_flops for run in former if run.peak_flops), None)


def _spread(*, is_same: bool, is_same_size: bool, on_gpu: bool) -> Estimate:
    """Range of a speed relative to a measured one.

    Assumed, not fitted: other programs on a machine change the speed of CPUs, and more workers may share its cores.
    """
    if is_same and is_same_size:
        low, high = (0.95, 1.05) if on_gpu else (0.85, 1.15)
    elif is_same:
        low, high = (0.8, 1.15) if on_gpu else (0.5, 1.2)
    else:
        low, high = (0.7, 1.25) if on_gpu else (0.4, 1.7)
    return Estimate(low=low, likely=1.0, high=high)


def is_same_step(one: DraftPlan, other: DraftPlan) -> bool:
    """Whether an optimizer step of two jobs is the same work."""

    def work(plan: DraftPlan) -> tuple[object, ...]:
        training: TrainingSpec = plan.job.training
        return (
            plan.flops_per_token,
            plan.model.num_parameters,
            plan.model.num_trainable_parameters,
            plan.job.data.seq_len,
            *(training.global_batch_size, training.micro_batch_size, training.precision, training.objective),
            *(training.zero, training.activation_checkpointing, training.optimizer.name, training.cross_entropy),
            *(training.activation_offload, training.fp8, training.compile, training.liger, training.attention),
        )

    return work(one) == work(other)


def _evaluation_s(plan: DraftPlan, *, step_s: float, world_size: int, run: FormerRun | None) -> float:
    """Of all evaluations: each is a forward pass, a third of a step, over all held-out sequences."""
    ema = plan.job.training.ema
    num = _count(plan.job.training.evaluate_every, steps=plan.total_steps, seconds=plan.total_steps * step_s)
    num = num * 2 if ema and ema.evaluate == "always" else num + bool(ema)
    once_s = _held_out_share(plan) * step_s / 3
    if run is not None and run.evaluation_s is not None and (share := _held_out_share(run.plan)):
        size = world_size if world_size in run.step_s else max(run.step_s)
        once_s *= run.evaluation_s / (share * run.step_s[size] / 3)
    return num * once_s


def _held_out_share(plan: DraftPlan) -> float:
    """Held-out sequences ÷ those of a step; 0 if the corpus is not prepared."""
    held_out = plan.corpus.num_held_out_sequences if isinstance(plan, Plan) else 0
    return held_out / plan.job.training.global_batch_size


def _checkpoint_s(plan: DraftPlan, *, steps_s: float, world_size: int, run: FormerRun | None) -> float:
    """Training stalls, and the wait for the last one if no run's end was measured."""
    num = num_checkpoints(plan, world_size=world_size, steps_s=steps_s)
    if run is not None and run.stall_s is not None and is_same_step(run.plan, plan):
        return num * run.stall_s
    last_s = checkpoint_bytes(plan.model, plan.job.training) / _WRITTEN_BYTES_PER_S / world_size
    return num * checkpoint_stall_s(plan, world_size=world_size) + last_s


def num_checkpoints(plan: DraftPlan, *, world_size: int, steps_s: float) -> int:
    """Return how many checkpoints a run writes whose steps take `steps_s`."""
    return _count(planned_every(plan, world_size=world_size), steps=plan.total_steps, seconds=steps_s)


def _count(every: Every, *, steps: int, seconds: float) -> int:
    """How often an interval ends in a run, its last step included."""
    if every.steps is not None:
        return math.ceil(steps / every.steps)
    return 1 + int(seconds / (every.seconds or math.inf))


def _notes(
    plan: DraftPlan,
    worlds: Sequence[WorldHours],
    *,
    gpu: Gpu | None,
    former: Sequence[FormerRun],
    links: ClusterLinks,
    cpu: CpuPeak | None,
) -> Iterator[str]:
    """Say what a forecast is based on, and what it assumes or leaves out."""
    device = plan.hardware.name
    has_links = plan.hardware.device == "cuda" and plan.worlds[-1].batch.world_size > 1
    if not worlds:
        yield f"unknown: no run on {device} was measured; the first one will tell"
        yield from (links.note,) if has_links else ()
        return
    runs = [run for run in former if any(world.run_id == run.run_id for world in worlds)]
    for run in runs:
        what = "the same step" if is_same_step(run.plan, plan) else "another job"
        sizes = ", ".join(map(str, sorted(run.step_s)))
        yield f"measured by {run.run_id} on {device}, {what}, at {sizes} worker{'s' if sizes != '1' else ''}"
    if not runs and gpu is not None:
        yield f"estimated for {gpu.name}, not measured"
    elif not runs:
        yield _assumed_share(device, peak=_peak_of_runs(former), cpu=cpu)
    if has_links:
        yield links.note
    left_out = "preemptions and waiting for machines"
    if not isinstance(plan, Plan) and plan.job.data.held_out:
        left_out += ", evaluations (the corpus is not prepared)"
    if plan.job.evaluate is not None and worlds[0].tasks_s == 0:
        left_out += ", the tasks of evaluate (set evaluate.limit)"
    elif plan.job.evaluate is not None:
        num = num_scorings(plan, seconds=worlds[0].step_s * plan.total_steps)
        first, last = (format_duration(world.tasks_s) for world in (worlds[0], worlds[-1]))
        yield f"scoring the tasks of evaluate, {num:,} times, takes {first} of it" + (
            f", with {worlds[-1].world_size} workers {last}" if len(worlds) > 1 else ""
        )
    if plan.job.training.zero.offload == "cpu" and gpu is not None and not runs:
        left_out += ", the time of training.zero.offload"
    if plan.job.training.activation_offload and gpu is not None and not runs:
        rate = HOST_COPY_SHARE * gpu.host_bytes_per_s / 1e9
        yield f"with copies of training.activation_offload at {rate:.0f} GB/s (assumed), beside which nothing runs"
    yield f"without {left_out}"


def _assumed_share(device: str, *, peak: float | None, cpu: CpuPeak | None) -> str:
    share = f"{CPU_EFFICIENCY.low:.0%} to {CPU_EFFICIENCY.high:.0%}, likely {CPU_EFFICIENCY.likely:.0%},"
    if peak is not None:
        return f"assumed: {share} of the {peak / 1e9:,.1f} GFLOP/s that a former run measured on {device}"
    assert cpu is not None, "without a peak there is no forecast"
    cores = f"{cpu.num_cores} core{'s' if cpu.num_cores != 1 else ''}"
    return (
        f"assumed: {share} of the {cpu.core_flops / 1e9:,.1f} GFLOP/s that matrix products reached on a core of "
        f"{device}, {cores}, on {cpu.measured_on}; no run was measured"
    )
