"""Find the best checkpoints of a location: `checkpoint.keep_best`, and the name `best`.

Each checkpoint's state records the evaluation of its own step, so which one is the best follows from the
checkpoints that exist, and from nothing else. A new best one replaces the old one when it is committed; until then,
and if it is never committed, the old one is the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forge.checkpoint.manifest import Progress, step_name
from forge.checkpoint.reader import Checkpoint, list_checkpoints, open_checkpoint
from forge.checkpoint.storage import Storage
from forge.checkpoint.verify import find_checkpoint, verify_checkpoint
from forge.errors import CheckpointError

BEST = "best"
"""The name of the best checkpoint, where a step can be given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The evaluation of the step of one checkpoint."""

    step: int
    metric: str
    value: float
    is_smaller_better: bool

    def is_better_than(self, other: Score) -> bool:
        """Whether its value is better; equal values are not."""
        return self.value < other.value if self.is_smaller_better else self.value > other.value


def score_of(progress: Progress) -> Score | None:
    """Return the evaluation of a state's step; None if it was not evaluated, or its value is not finite."""
    if progress.metric_value is None:
        return None
    return Score(
        step=progress.step,
        metric=progress.metric,
        value=progress.metric_value,
        is_smaller_better=progress.metric_direction == "min",
    )


def best_scores(storage: Storage, *, count: int) -> list[Score]:
    """Return the evaluations of the best complete checkpoints, best first; of equal ones, the earlier step first.

    Only sizes are checked, not checksums. Checkpoints with another metric than the newest one are not compared.

    Args:
        count: how many at most; of 0, the storage is not read.

    Raises: CheckpointError if the storage cannot be listed.
    """
    return rank_scores(_scores(storage))[:count] if count else []


def rank_scores(scores: Sequence[Score]) -> list[Score]:
    """Sort scores, the best first; those with another metric than that of the latest step are left out."""
    newest = max(scores, key=lambda score: score.step, default=None)
    if newest is None:
        return []
    sign = 1 if newest.is_smaller_better else -1
    comparable = [score for score in scores if score.metric == newest.metric]
    return sorted(comparable, key=lambda score: (sign * score.value, score.step))


def best_name(storage: Storage) -> str:
    """Return the name of the best complete checkpoint.

    Raises: CheckpointError if no complete checkpoint is of an evaluated step.
    """
    best = best_scores(storage, count=1)
    if not best:
        raise CheckpointError(
            f"{storage.url} has no best checkpoint: none is of a step that was evaluated. Set "
            "checkpoint.keep_best: 1 to save each best evaluation, or name a step"
        )
    return step_name(best[0].step)


def open_verified(storage: Storage, *, step: int | str | None = None) -> Checkpoint:
    """Open a checkpoint after reading and verifying every byte of it.

    Args:
        step: a number, or `best`; None: the newest one that verifies.

    Raises: CheckpointError if there is none.
    """
    if step is not None:
        name = best_name(storage) if step == BEST else step_name(int(step))
        problem = verify_checkpoint(storage, name)
        if problem is not None:
            raise CheckpointError(f"{storage.url}/{name}: {problem}")
        return open_checkpoint(storage, name)
    skipped: list[str] = []
    found = find_checkpoint(storage, on_skip=lambda name, why: skipped.append(f"{name}: {why}"))
    if found is None:
        why = "; ".join(skipped) or "there is none: the run has written none yet, or they were deleted or moved"
        raise CheckpointError(f"{storage.url} holds no checkpoint that verifies ({why})")
    return found


def _scores(storage: Storage) -> list[Score]:
    found: list[Score] = []
    for name in list_checkpoints(storage):
        if verify_checkpoint(storage, name, with_checksums=False) is None:
            try:
                score = score_of(open_checkpoint(storage, name).progress)
            except CheckpointError:  # removed since
                continue
            found += [score] if score is not None else []
    return found
