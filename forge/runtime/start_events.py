"""Events that a driver records when a run starts or is resumed: what it trains on, and what changed since."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from forge.events import CorpusRead, EnvironmentRecorded, Event, LengthChanged, PatternRead, RunStarted
from forge.plan.plan import Plan
from forge.runs.reader import read_run
from forge.train.lr_schedule import length_change

_MAX_PATTERNS = 100
_PACKAGES = (
    "forge-train",
    "torch",
    "deepspeed",
    "ray",
    "transformers",
    "tokenizers",
    "numpy",
    "peft",
    "bitsandbytes",
    "torchao",
    "liger-kernel",
    "flash-attn",
)


def start_events(plan: Plan, *, folder: Path, step: int, startup_s: float) -> list[Event]:
    """Return the events of a start, in their order.

    Args:
        folder: of the run, with what it has recorded before.
        step: the last recorded step; 0 for a new run.
        startup_s: from the start of the driver until now.
    """
    started = RunStarted(
        run_id=folder.name, total_steps=plan.total_steps, resumed_from_step=step, startup_s=startup_s
    )
    changed = _unrecorded_change(plan, folder=folder)
    return [started, _environment(), *([changed] if changed is not None else []), _corpus_read(plan)]


def _environment() -> EnvironmentRecorded:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # peft and others are optional
            versions[name] = version(name)
    return EnvironmentRecorded(python=platform.python_version(), platform=platform.platform(), packages=versions)


def _unrecorded_change(plan: Plan, *, folder: Path) -> LengthChanged | None:
    """Return the latest change of the run's length; None if there is none, or an earlier start has recorded it."""
    if not plan.former_lengths:
        return None
    changed = length_change(plan)
    known = read_run(folder).newest("LengthChanged")
    is_known = known is not None and (known["from_step"], known["total_steps"]) == (
        changed.from_step,
        changed.total_steps,
    )
    return None if is_known else changed


def _corpus_read(plan: Plan) -> CorpusRead:
    patterns = plan.files.patterns if plan.files is not None else ()
    return CorpusRead(
        num_documents=plan.corpus.num_documents,
        num_train_tokens=plan.corpus.num_train_tokens,
        num_held_out_tokens=plan.corpus.num_held_out_tokens,
        patterns=tuple(
            PatternRead(
                pattern=found.pattern,
                num_files=found.num_files,
                kinds=found.kinds,
                skipped={one.reason: one.count for one in found.skipped},
            )
            for found in patterns[:_MAX_PATTERNS]
        ),
        warnings=plan.warnings,
        num_skipped_records=plan.corpus.num_skipped_records,
        skipped_records=plan.corpus.skipped_records,
        noted_records=plan.corpus.noted_records,
    )
