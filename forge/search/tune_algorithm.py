"""The search algorithm and the stopper that Ray Tune uses: trials in the order of their numbers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.search import SearchAlgorithm


class JournalSearch(SearchAlgorithm):  # type: ignore[misc]
    """Each trial once, in the order of their numbers.

    Tune's `SearchGenerator` is not used because `PopulationBasedTraining` refuses it.
    """

    def __init__(self, configs: Mapping[int, Mapping[str, Any]]) -> None:
        """Args:
        configs: the Tune config of each trial, by number.
        """
        self._waiting = sorted(configs.items())
        self._spec: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing: Tune pickles its search algorithm, but a search is restored from its journal."""
        return {}

    @property
    def total_samples(self) -> int:
        return len(self._waiting)

    def add_configurations(self, experiments: Any) -> None:
        """Take over Tune's specification of the one experiment."""
        experiment = experiments[0] if isinstance(experiments, list) else experiments
        self._spec = experiment.spec

    def next_trial(self) -> Trial | None:
        if not self._waiting:
            return None
        number, config = self._waiting.pop(0)
        return Trial(
            self._spec["run"],
            config=dict(config),
            trial_id=trial_id(number),
            experiment_tag=str(number),
            storage=self._spec["storage"],
            placement_group_factory=self._spec["resources_per_trial"],
            stopping_criterion=self._spec["stop"],
            checkpoint_config=self._spec["checkpoint_config"],
            max_failures=self._spec["max_failures"],
        )

    def is_finished(self) -> bool:
        return not self._waiting


def trial_id(number: int) -> str:
    """Tune's id of a trial."""
    return f"{number:04d}"


class StopAll(Stopper):  # type: ignore[misc]
    """Ends all trials once an event is set, and none before."""

    def __init__(self, is_halted: threading.Event) -> None:
        self._is_halted = is_halted

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing; see `JournalSearch.__getstate__`."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop a single trial."""
        return False

    def stop_all(self) -> bool:
        return self._is_halted.is_set()
