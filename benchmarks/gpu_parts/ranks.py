"""Plans and ranks for `benchmarks.gpu`: forge.train without Ray, on a GPU or on the CPU.

Ranks are forked from a process that has imported torch, DeepSpeed and transformers and has not touched CUDA, as
forge's agents fork them. They differ from a run's in two points: the state of a killed rank is in a checkpoint, not
in another machine's memory, and two ranks share one GPU through gloo, since NCCL refuses that.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forge.config.job import JobSpec
from forge.events import Event, GenerationStarted, StepMetrics
from forge.limits import cpu_name, usable_memory_bytes
from forge.model.families.base import DataShape
from forge.model.families.registry import family_of
from forge.plan.gpus import find_gpu
from forge.plan.inputs import CorpusInfo, HardwareInfo
from forge.plan.plan import Plan, make_plan, plan_from_json, plan_to_json
from tests.support.jobs import synthetic_corpus
from tests.support.ranks import RecordingReporter, on_ranks

NEVER = "1000000 steps"
_KILL_FILE = "killed-at"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a part runs, and how large."""

    device: str
    """`cuda` or `cpu`."""
    smallest: bool
    folder: str
    """Shared by all parts of one run."""


@dataclass(kw_only=True)
class Ran:
    """What rank 0 reported."""

    steps: list[StepMetrics] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    ended_at: list[float] = field(default_factory=list)
    """Wall-clock time at which each step had ended."""

    @property
    def losses(self) -> list[float]:
        return [metrics.loss for metrics in self.steps]

    @property
    def started(self) -> GenerationStarted:
        return next(event for event in self.events if isinstance(event, GenerationStarted))

    @property
    def first_step_at(self) -> float:
        return self.ended_at[0]

    def mean_step_s(self, *, warm_up: int) -> float:
        """Seconds of a step after the warm-up by the clock, with what is between steps, as of the peers."""
        measured = self.ended_at[warm_up - 1 : -1]
        return (measured[-1] - measured[0]) / (len(measured) - 1)

    def step_s(self, *, warm_up: int) -> list[float]:
        """Seconds of the steps after the warm-up, without the last, after which the run is closed."""
        return [metrics.step_s for metrics in self.steps[warm_up:-1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """When a rank was killed, and when the other one noticed; wall-clock time."""

    at: float
    noticed_at: float


def make_job_plan(
    setting: Setting,
    *,
    model: Mapping[str, Any],
    training: Mapping[str, Any],
    checkpoint: Mapping[str, Any] | None = None,
    vocab_size: int,
    seq_len: int,
) -> Plan:
    """Plan a job of one or two workers on a synthetic corpus, as `forge plan` does on this hardware."""
    body = {
        "name": "gpu-check",
        "model": dict(model),
        "data": {"source": "python-stdlib", "seq_len": seq_len, "tokenizer": {"vocab_size": vocab_size}},
        "training": {"optimizer": {"lr": 1e-3}, "schedule": {"warmup": 2}, "evaluate_every": NEVER, **training},
        "checkpoint": {"every": NEVER, **(checkpoint or {})},
        "resources": {"workers": "1..2", "gpu": "none" if setting.device == "cpu" else "auto"},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    job = JobSpec.model_validate(body)
    made = _corpus(setting.folder, num_tokens=8_000 if setting.smallest else 300_000)
    corpus = replace(
        made,
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_train_sequences=(made.num_train_tokens - 1) // seq_len,
        num_held_out_sequences=(made.num_held_out_tokens - 1) // seq_len,
    )
    info = family_of(job.model).inspect(
        job.model, DataShape(vocab_size=vocab_size, seq_len=seq_len, eot_id=corpus.eot_id)
    )
    return make_plan(job, model=info, corpus=corpus, hardware=_hardware(setting))


@functools.cache
def _corpus(folder: str, *, num_tokens: int) -> CorpusInfo:
    return synthetic_corpus(Path(folder) / f"corpus-{os.getpid()}", num_tokens=num_tokens, num_held_out=5000)


def _hardware(setting: Setting) -> HardwareInfo:
    """What `forge.runtime.probe`, which needs Ray, says of this machine. Touches no CUDA context."""
    if setting.device == "cpu":
        share = usable_memory_bytes() // 2
        return HardwareInfo(device="cpu", name=cpu_name(), memory_bytes=share, peak_flops=None)
    found = torch.cuda.get_device_properties(0)
    gpu = find_gpu(found.name)
    peak = gpu.bf16_flops if gpu is not None else None
    return HardwareInfo(device="cuda", name=found.name, memory_bytes=found.total_memory, peak_flops=peak)


def run(
    setting: Setting,
    plan: Plan,
    *,
    to: str,
    world_size: int = 1,
    stop_after: int | None = None,
    with_snapshots: bool = False,
) -> Ran:
    """Train a plan on forked ranks, from its newest checkpoint.

    Args:
        to: name of the folder of its checkpoints.
        stop_after: the step after which to stop.
        with_snapshots: take snapshots at the pace of the job file, replicated to nowhere.
    """
    folder = str(Path(setting.folder) / to)
    arguments = (plan_to_json(plan), setting, folder, stop_after, with_snapshots, None)
    answers: list[Ran] = on_ranks(_train, *arguments, world_size=world_size)
    return answers[0]


def run_until_killed(setting: Setting, plan: Plan, *, to: str, after: str) -> Killed:
    """Train a plan on two ranks until rank 1 kills itself, as soon as a checkpoint named `after` is there.

    Raises: RuntimeError if no rank was killed.
    """
    folder = Path(setting.folder) / to
    try:
        on_ranks(_train, plan_to_json(plan), setting, str(folder), None, True, after, world_size=2)
    except Exception as error:  # of rank 0, whose peer is gone
        noticed_at = time.time()
        if (killed := folder.with_suffix(f".{_KILL_FILE}")).exists():
            return Killed(at=float(killed.read_text()), noticed_at=noticed_at)
        raise RuntimeError("the ranks failed before one was killed") from error
    raise RuntimeError("the run ended before a rank was killed")


class _TimedReporter(RecordingReporter):
    def __init__(self, stop_after: int | None) -> None:
        super().__init__(stop_after)
        self.ended_at: list[float] = []

    def step(self, metrics: StepMetrics) -> None:
        self.ended_at.append(time.time())
        super().step(metrics)


class _LocalReplicas:
    """A replica client without another machine: the shared memory of the snapshots is all."""

    def register(self, snapshot: Any, *, piece: int, num_pieces: int, is_sent: bool) -> None:
        pass

    def metadata(self) -> Mapping[str, Any]:
        return {}

    def publish(self, *, step: int, slot: int) -> None:
        pass

    def wait_replicated(self, step: int) -> None:
        pass

    def cpu_s(self) -> float:
        return 0.0


def _train(
    rank: int,
    plan_json: str,
    setting: Setting,
    folder: str,
    stop_after: int | None,
    with_snapshots: bool,
    kill_after: str | None,
) -> Ran:
    """Train in this process as one rank; on a GPU all ranks share the first one."""
    from forge.train.worker import ElasticContext, Stopwatch, WorkerContext, run_worker

    os.environ["LOCAL_RANK"] = "0"
    world_size = int(os.environ["WORLD_SIZE"])
    clock = Stopwatch()
    device = "cpu"
    if setting.device == "cuda":
        device = "cuda:0"
        torch.cuda.set_device(0)
        torch.zeros(1, device=device)
        clock.lap("CUDA context")
        if world_size > 1:  # DeepSpeed uses the existing group
            dist.init_process_group("gloo", rank=rank, world_size=world_size)

    def kill_self() -> None:
        if kill_after is not None and rank == 1 and (Path(folder) / kill_after).exists():
            Path(folder).with_suffix(f".{_KILL_FILE}").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    elastic = ElasticContext(replica_client=_LocalReplicas(), on_progress=kill_self) if with_snapshots else None
    reporter = _TimedReporter(stop_after)
    context = WorkerContext(
        rank=rank, world_size=world_size, local_world_size=world_size, device=device, checkpoints=folder
    )
    run_worker(plan_from_json(plan_json), context, reporter, elastic=elastic, clock=clock)
    found = reporter.recording
    return Ran(steps=found.steps, events=found.events, ended_at=reporter.ended_at)
