"""Decide which evaluated steps are saved at once because they are among the best: `checkpoint.keep_best`.

The decision depends on the checkpoints that exist (`forge.checkpoint.best`), so a best one whose write failed, or
ended with its ranks, does not keep later ones from being saved. Rank 0 reads them at the first evaluation of a
generation and after a failed write, never while a generation starts.
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from forge.checkpoint.best import Score, best_scores, rank_scores, score_of
from forge.checkpoint.manifest import Progress
from forge.checkpoint.storage import open_storage
from forge.errors import CheckpointError


class BestCheckpoints:
    """The evaluations of the checkpoints that a new one has to beat; equal on every rank."""

    def __init__(self, *, url: str, count: int) -> None:
        """Args:
        url: folder or URL of the run's checkpoints.
        count: `checkpoint.keep_best`.
        """
        self._url, self._count = url, count
        self._scores: list[Score] | None = None

    def is_due(self, progress: Progress) -> bool:
        """Whether the state of this step is to be saved as one of the best; collective after an evaluation."""
        score = score_of(progress)
        if score is None or not self._count:
            return False
        scores = self._stored() if self._scores is None else self._scores
        if any(other.step == score.step for other in scores):
            self._scores = scores
            return False
        is_best = len(scores) < self._count or score.is_better_than(scores[-1])
        self._scores = rank_scores([*scores, score])[: self._count] if is_best else scores
        return is_best

    def forget(self) -> None:
        """Read what exists again at the next evaluation: a checkpoint could not be written."""
        self._scores = None

    def _stored(self) -> list[Score]:
        shared: list[list[Score]] = [[]]
        if dist.get_rank() == 0:
            try:
                shared = [best_scores(open_storage(self._url), count=self._count)]
            except CheckpointError as error:
                sys.stderr.write(f"the best checkpoints are not known, so the next evaluation is saved: {error}\n")
        dist.broadcast_object_list(shared, src=0)
        return shared[0]
