"""The runs that a scaling law is fitted to, and the file of the law."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from forge.errors import ArgumentError, printable
from forge.foreign import from_record, parse_object, read_file
from forge.fs import write_atomic
from forge.plan.scaling import WORTHWHILE_PASSES, ScalingLaw
from forge.plan.scaling_fit import RunPoint
from forge.runs.reader import RunSummary, find_run, read_metrics, read_run

_LAST_SHARE = 0.05
"""Of the steps, whose mean training loss stands for a held-out loss that was not measured."""
_MAX_FILE_BYTES = 2**20
_EXPONENTS = (0.01, 2.0)
"""Of laws that can be computed with; published ones lie between 0.28 and 0.37."""
_MOST = 1e12
"""Largest factor, variance or loss."""
_COMMENT = "# A scaling law, written by `forge scaling`; `forge plan --law FILE` sizes models by it.\n"
"""The rest of the file is JSON, which is YAML too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LawFile:
    """A fitted law and the runs that it was fitted to."""

    law: ScalingLaw
    runs: tuple[RunPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRuns:
    """Finished runs, and what there is to say about them."""

    points: tuple[RunPoint, ...]
    notes: tuple[str, ...]


def read_points(names: Sequence[str], *, root: Path) -> ScalingRuns:
    """Read the size, the tokens and the last loss of runs.

    Raises: ArgumentError if a run does not exist, has not finished, or began with trained weights, or if the
        runs' losses cannot be compared: other objectives, or vocabularies of another size.
    """
    points: list[RunPoint] = []
    notes: list[str] = []
    corpora, kinds = set(), {}
    for folder in dict.fromkeys(find_run(name, root=root) for name in names):
        run = read_run(folder)
        _require_comparable(run)
        point = _point(run, notes=notes)
        if (passes := point.num_tokens / max(1, run.plan.corpus.num_train_tokens)) > WORTHWHILE_PASSES:
            notes.append(
                f"{run.run_id} reads its corpus {passes:.1f} times; after {WORTHWHILE_PASSES} times, repeated "
                "tokens are worth less than new ones (Muennighoff et al. 2023, arXiv 2305.16264)"
            )
        kinds[run.run_id] = (run.plan.job.training.objective, run.plan.corpus.vocab_size)
        corpora.add(run.plan.corpus.digest)
        points.append(point)
    if len(set(kinds.values())) > 1:
        listed = "; ".join(f"{name}: {kind}, {size:,} tokens" for name, (kind, size) in kinds.items())
        raise ArgumentError(f"losses of other objectives or vocabularies cannot be compared: {listed}")
    if len(corpora) > 1:
        notes.append(f"the runs have {len(corpora)} corpora; a law needs losses of the same held-out text")
    return ScalingRuns(points=tuple(points), notes=tuple(notes))


def _require_comparable(run: RunSummary) -> None:
    """Raises: ArgumentError if the loss of a run is not that of its size and tokens."""
    if run.status != "finished" or run.is_stopped_early:
        state = "stopped early" if run.is_stopped_early else f"is {run.status}"
        raise ArgumentError(
            f"{run.run_id} {state}: its learning rate has not reached its end, so its loss is not that of its "
            "tokens; leave it out, or resume it"
        )
    if run.plan.search is not None:
        raise ArgumentError(f"{run.run_id} is a search; name runs, or its trials")
    if run.plan.job.model.is_pretrained:
        raise ArgumentError(f"{run.run_id} began with trained weights, whose tokens are not counted; leave it out")


def _point(run: RunSummary, *, notes: list[str]) -> RunPoint:
    """The size, the tokens and the last loss of a run. Raises: ArgumentError if they are not recorded."""
    steps = read_metrics(run.folder)
    last = steps[-1] if steps else {}
    loss = last.get("eval/loss")
    if loss is None:
        newest = steps[-max(1, round(_LAST_SHARE * len(steps))) :]
        losses = [step["train/loss"] for step in newest if step.get("train/loss") is not None]
        loss = statistics.fmean(losses) if losses else None
        notes.append(f"{run.run_id}: no held-out loss at its last step; the mean training loss of the last 5 %")
    tokens = last.get("train/tokens")
    if not loss or not tokens or not (0 < loss < math.inf and 1 <= tokens < math.inf):
        raise ArgumentError(f"{run.run_id} cannot be used: its last loss is {loss}, after {tokens} tokens")
    return RunPoint(
        name=run.run_id,
        num_parameters=run.plan.model.num_parameters,
        num_tokens=int(tokens),
        loss=float(loss),
    )


def write_law(path: Path, law: ScalingLaw, *, runs: Sequence[RunPoint]) -> None:
    """Write the file of a law. Raises: ArgumentError if something else has this name."""
    if path.is_dir():
        raise ArgumentError(f"{path} is a folder; the first argument is the file that the law is written to")
    if path.exists():
        read_law(path)
    body = {"law": asdict(law), "runs": [asdict(run) for run in runs]}
    try:
        write_atomic(path, _COMMENT + json.dumps(body, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error.strerror}") from error


def read_law(path: Path) -> LawFile:
    """Read the file of a law. Raises: ArgumentError if it is none."""
    try:
        text = read_file(path, max_bytes=_MAX_FILE_BYTES).decode()
        comment, _, body = text.partition("\n")
        if not comment.startswith("# A scaling law"):
            raise ValueError("its first line is not that of `forge scaling`")
        found = from_record(LawFile, parse_object(body))
        _require_usable(found)
    except FileNotFoundError as error:
        raise ArgumentError(f"there is no file {path}; give RUNS to fit a law and write it") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ArgumentError(f"{path} is not the file of a law: {printable(str(error), limit=300)}") from error
    return found


def _require_usable(file: LawFile) -> None:
    """Raises: ValueError if a law cannot be computed with, as after an edit of its file."""
    law = file.law
    numbers = {key: value for key, value in asdict(law).items() if isinstance(value, float)}
    for key, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{key} is {value}, not a positive number")
        low, high = _EXPONENTS if key.endswith("_exponent") else (0.0, _MOST)
        if not low <= value <= high:
            raise ValueError(f"{key} is {value:g}; expected {low:g} to {high:g}")
    if not law.name.isprintable():
        raise ValueError("the name has control characters")
    if not file.runs:
        raise ValueError("it has no runs")
    if any(min(run.num_parameters, run.num_tokens, run.loss) <= 0 for run in file.runs):
        raise ValueError("a run has no parameters, no tokens or no loss")
    if law.covariance:
        if [len(row) for row in law.covariance] != [5] * 5:
            raise ValueError("covariance is not 5 rows of 5 numbers")
        if not all(abs(value) <= _MOST for row in law.covariance for value in row):
            raise ValueError(f"covariance has a number beyond {_MOST:g}")
        if any(row[index] < 0 for index, row in enumerate(law.covariance)):
            raise ValueError("covariance has a negative variance")
