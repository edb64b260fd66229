"""Hands Ray Tune its trials, by number: which values they have is decided when their turn has come."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search import SearchAlgorithm


class JournalSearch(SearchAlgorithm):  # type: ignore[misc]
    """Trials in the order of their numbers, each once."""

    def __init__(self, configs: Mapping[int, Mapping[str, Any]], *, on_handed_out: Callable[[], None]) -> None:
        """Args:
        configs: what Tune's actor is told of each trial.
        on_handed_out: called when no further trial will come.
        """
        self._waiting = sorted(configs.items())
        self._on_handed_out = on_handed_out
        self._parser = _make_parser()
        self._spec: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a pickle of what it is given, and never needs it: a search is known from its journal."""
        return {}

    @property
    def total_samples(self) -> int:
        """How many there still are."""
        return len(self._waiting)

    def add_configurations(self, experiments: Any) -> None:
        """The one experiment that there is."""
        experiment = experiments[0] if isinstance(experiments, list) else experiments
        self._spec = experiment.spec

    def next_trial(self) -> Trial | None:
        """The next by its number."""
        if not self._waiting:
            return None
        number, config = self._waiting.pop(0)
        spec = copy.deepcopy(self._spec)
        spec["config"] = dict(config)
        trial = _create_trial_from_spec(
            spec, self._parser, evaluated_params={}, experiment_tag=str(number), trial_id=f"{number:04d}"
        )
        if not self._waiting:
            self._on_handed_out()
        return trial

    def is_finished(self) -> bool:
        """Whether no further trial will come."""
        return not self._waiting


class StopAll(Stopper):  # type: ignore[misc]
    """Ends everything when somebody says so."""

    def __init__(self, is_halted: threading.Event) -> None:
        self._is_halted = is_halted

    def __getstate__(self) -> dict[str, Any]:
        """As that of `JournalSearch`."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial alone."""
        return False

    def stop_all(self) -> bool:
        """Whether it was said."""
        return self._is_halted.is_set()
