"""Add to a plan how long the job takes.

On a CPU without a measured run the peak of its matrix products is needed: kept, or measured in a subprocess,
because that needs torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from forge.config.training import TrainingSpec
from forge.foreign import from_record
from forge.limits import cpu_name, usable_cpus
from forge.plan.cluster_links import ClusterLinks
from forge.plan.deadline_outlook import deadline_warning
from forge.plan.forecast import CpuPeak, forecast
from forge.plan.plan import DraftPlan
from forge.runs.former_runs import former_runs
from forge.train.kept_peak import MeasuredPeak, kept_peak

_PlanT = TypeVar("_PlanT", bound=DraftPlan)

_MOST_S = 60.0


def with_forecast(plan: _PlanT, *, links: ClusterLinks | None = None) -> _PlanT:
    """Add how long the job takes, by what former runs in its folder measured on the same device, or by its peak."""
    former = former_runs(Path(plan.job.checkpoint.runs), hardware=plan.hardware)
    cpu = None if any(run.step_s or run.peak_flops for run in former) else find_cpu_peak(plan)
    plan = replace(plan, forecast=forecast(plan, former=former, links=links, cpu=cpu))
    warning = deadline_warning(plan, now=time.time())
    return plan if warning is None else replace(plan, warnings=(*plan.warnings, warning))


def find_cpu_peak(plan: DraftPlan) -> CpuPeak | None:
    """Return the peak of this machine's CPU in the job's precision; None if the job runs elsewhere or it failed."""
    if (plan.hardware.device, plan.hardware.name) != ("cpu", cpu_name()):
        return None
    dtype = _dtype(plan.job.training)
    found = kept_peak(cpu_name(), dtype=dtype, torch=version("torch")) or _measured(dtype)
    if found is None:
        return None
    return CpuPeak(core_flops=found.flops, num_cores=max(1, usable_cpus()), measured_on=found.measured_on)


def _dtype(training: TrainingSpec) -> str:
    return "bfloat16" if training.precision == "bf16" else "float32"


def _measured(dtype: str) -> MeasuredPeak | None:
    command = [sys.executable, "-P", "-m", "forge.train.peak", dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_S, check=True)
        return from_record(MeasuredPeak, json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, KeyError):
        return None  # the plan says that the time is unknown
