"""A trial of a search, as Ray Tune sees it: values go in, and what it is judged by comes out, step by step.

It is a run like any other, carried by a stage. Tune's actor plans it, has the stage carry it out, and passes on
what it is judged by; it is used for one trial after the other, and so are the stage and what belongs to it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from forge.checkpoint.fork import adopt_checkpoint
from forge.checkpoint.storage import open_storage
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.locations import SourceMap
from forge.config.overrides import search_of, trial_job, usual_values
from forge.errors import DivergedError, ForgeError, RunError
from forge.events import TrialStarted
from forge.plan.inputs import CorpusInfo, ModelInfo
from forge.plan.plan import Plan, config_digest, make_plan, plan_from_json, plan_to_json
from forge.runs.create import fill_run_folder
from forge.runs.reader import error_named
from forge.runs.trials import trial_folder
from forge.runtime.placement import SUPERVISOR
from forge.runtime.probe import model_facts
from forge.search.encoding import plain_values
from forge.search.messages import TrialAssignment, TrialUpdate
from forge.search.node_actor import NodePool
from forge.search.trial_runner import TrialRunnerActor
from forge.units import Every

_PATIENCE_S = 2.0
_HALTED_S = 0.5
_RETRY_S = 0.2
_STAGE_SILENCE_S = 60.0
_CHECKPOINT = "trial.json"
# A population's checkpoints are copied one round after they were made.
_KEPT_IN_POPULATION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """What every trial of a search is told."""

    search_folder: str
    plan_json: str
    hosts: NodePool
    recorder: Any
    """The search's, an actor."""


class TrialTrainable(tune.Trainable):  # type: ignore[misc]
    """One trial after the other; Tune calls `step` until a result says that it is done.

    A trial's config: `values`, if it has them from the start; `reported`, the step up to which the search knows how
    it is judged; `replay`, whether it begins by saying again what it was judged by there; `moved`, the step and the
    trial whose state it goes on from.
    """

    def setup(self, config: dict[str, Any], *, wiring: TrialConfig) -> None:
        """Once for each actor; also begins its first trial."""
        self._wiring = wiring
        self._search = plan_from_json(wiring.plan_json)
        self._stage_name = f"{SUPERVISOR}{Path(wiring.search_folder).name}.{secrets.token_hex(2)}"
        self._stage = TrialRunnerActor.options(  # type: ignore[attr-defined]
            name=self._stage_name,
            namespace=wiring.hosts.namespace,
            # Here, on the head, and not in the placement group that Tune has made for this actor.
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
        ).remote(self._stage_name, wiring.hosts)
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Another trial, or this one with other values."""
        self._config = config
        self._reported = int(config.get("reported", 0))
        self._source: tuple[int, int] | None = tuple(config["moved"]) if config.get("moved") else None
        self._part: TrialAssignment | None = None
        self._plan: Plan | None = None
        self._is_introduced = False
        self._has_started = False
        self._failure: ForgeError | None = None
        return True

    @property
    def number(self) -> int:
        """Of the trial, from 1."""
        return int(self.trial_id)

    def step(self) -> dict[str, Any]:
        """The next that the trial is judged by."""
        if not self._is_introduced:
            self._is_introduced = True
            return self._result(step=self._reported, is_hello=True)
        try:
            if self._plan is None and not self._begin():
                return self._result(step=self._reported, is_hello=True)
            if self._config.pop("replay", False):
                return self._replay()
            self._raise_on_stage()
            return self._await_result()
        except ForgeError as error:
            status = "diverged" if isinstance(error, DivergedError) else "failed"
            return self._result(step=self._reported, done=True, status=status, reason=str(error))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where its state lies: forge's own checkpoint, written when it paused."""
        body = json.dumps({"trial": self.number, "step": self._reported})
        (Path(checkpoint_dir) / _CHECKPOINT).write_text(body)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from that state, another trial's perhaps."""
        found = json.loads((Path(checkpoint_dir) / _CHECKPOINT).read_text())
        self._reported = found["step"]
        self._source = (found["step"], found["trial"]) if found["trial"] != self.number else None

    def cleanup(self) -> None:
        """Nothing of it stays on the cluster."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._stage.close.remote(), timeout=_STAGE_SILENCE_S)
        ray.kill(self._stage)

    # --- within

    def _begin(self) -> bool:
        """Plan the trial. Returns: whether its values are known already."""
        decided_at = time.time()
        values = self._config.get("values")
        if values is None:
            assigned = self._ask(partial(self._stage.assignment.remote, self.number, _PATIENCE_S))
            if assigned is None:
                return False
            values, decided_at = assigned
        else:
            values = plain_values(values, search_of(self._search.job))
        plan = plan_trial(self._search, values)
        population = search_of(self._search.job).scheduler
        if population.is_population:
            interval = population.interval_steps or 1
            plan = replace(plan, pause_at=(self._reported // interval + 1) * interval)
        self._plan = plan
        folder = Path(trial_folder(self._wiring.search_folder, self.number))
        fill_run_folder(folder, plan)
        if self._source is not None:
            step, donor = self._source
            donor_folder = trial_folder(self._wiring.search_folder, donor)
            adopt_checkpoint(
                open_storage(plan.job.checkpoint.url_of(donor_folder)),
                open_storage(plan.job.checkpoint.url_of(str(folder))),
                step=step,
                recipe=config_digest(plan.job),
            )
        self._next = TrialAssignment(
            run_folder=str(folder),
            plan_json=plan_to_json(plan),
            group=Path(self._wiring.search_folder).name,
            reported_step=self._reported,
            decided_at=decided_at,
            secret=secrets.token_hex(32),
        )
        return True

    def _raise_on_stage(self) -> None:
        if self._part is None:
            self._part = self._next
            self._ask(partial(self._stage.begin.remote, self._part), is_begin=True)

    def _await_result(self) -> dict[str, Any]:
        """Of the trial that is on."""
        assert self._plan is not None
        last_step = min(self._plan.total_steps, self._plan.pause_at or self._plan.total_steps)
        while True:
            report: TrialUpdate = self._ask(
                partial(self._stage.report.remote, self._reported, _PATIENCE_S, is_started=self._has_started)
            )
            if report.first_step is not None and not self._has_started:
                self._has_started = True
                self._tell_started(report)
            records = [record for record in report.records if record["step"] < last_step or report.outcome]
            if records:
                return self._judged(records[0])
            if report.outcome is None:
                continue
            if report.outcome.error is not None:
                raise error_named(report.outcome.error, message=report.outcome.reason)
            if report.outcome.step < last_step:  # it was asked to stop; the search is about to end
                time.sleep(_HALTED_S)
                return self._result(step=self._reported, is_halted=True)
            raise RunError(f"it ended at step {report.outcome.step} without anything to be judged by")

    def _judged(self, record: Mapping[str, Any]) -> dict[str, Any]:
        assert self._plan is not None
        metric = search_of(self._search.job).metric
        if metric not in record:
            raise RunError(f"step {record['step']} has no {metric}: there is no held-out text to measure it on")
        if record[metric] is None and not metric.startswith("speed/"):
            raise DivergedError(f"step {record['step']}: {metric} is no number")
        if record[metric] is None:
            raise RunError(f"{metric} is not known on this hardware")
        self._reported = int(record["step"])
        is_done = self._reported >= self._plan.total_steps
        status = {"status": "finished"} if is_done else {}
        return self._result(step=self._reported, value=record[metric], metrics=dict(record), done=is_done, **status)

    def _replay(self) -> dict[str, Any]:
        """Say again what it was judged by at the step where a search before this one ended."""
        return self._result(step=self._reported, value=self._config["value"], metrics={}, is_replay=True)

    def _result(self, *, done: bool = False, **body: Any) -> dict[str, Any]:
        return {"stage": self._stage_name, "done": done, **body}

    def _tell_started(self, report: TrialUpdate) -> None:
        assert report.first_step is not None and self._plan is not None
        started = TrialStarted(
            trial=self.number,
            total_steps=self._plan.total_steps,
            seconds=report.first_step.seconds,
            is_warm=report.first_step.is_warm,
        )
        ray.get(self._wiring.recorder.event.remote(started))

    def _ask(self, call: Any, *, is_begin: bool = False) -> Any:
        """The stage's answer; one that was restarted is told again which trial is on.

        Raises: RunError if there is none for so long that it will not come back.
        """
        answered_at = time.monotonic()
        while True:
            try:
                return ray.get(call())
            except ray.exceptions.RayActorError as error:
                if time.monotonic() - answered_at > _STAGE_SILENCE_S:
                    raise RunError(f"the trial's supervisor does not come back: {error}") from error
                time.sleep(_RETRY_S)
                if self._part is not None and not is_begin:
                    again = replace(self._part, reported_step=self._reported)
                    self._ask(partial(self._stage.begin.remote, again), is_begin=True)


def plan_trial(search: Plan, values: Mapping[str, Any]) -> Plan:
    """The plan of one trial.

    Raises: JobFileError, PlanError, DataError if these values do not go together.
    """
    job = trial_job(search.job, values)
    scheduler = search_of(search.job).scheduler
    if scheduler.is_population:
        checkpoint = job.checkpoint.model_copy(
            update={
                "every": Every(steps=scheduler.interval_steps or 1),
                "keep": max(job.checkpoint.keep, _KEPT_IN_POPULATION),
            }
        )
        job = job.model_copy(update={"checkpoint": checkpoint})
    usual = trial_job(search.job, usual_values(search.job))
    corpus = _corpus(search, job, usual)
    return make_plan(job, model=_model(search, job, usual, corpus), corpus=corpus, hardware=search.hardware)


def _corpus(search: Plan, job: JobSpec, usual: JobSpec) -> CorpusInfo:
    """The search's, where the trial reads the same; it was prepared once."""
    if job.data == usual.data:
        return search.corpus
    from forge.data.prepare import prepare
    from forge.fs import default_cache_dir

    return prepare(job.data, cache_dir=default_cache_dir())


def _model(search: Plan, job: JobSpec, usual: JobSpec, corpus: CorpusInfo) -> ModelInfo:
    if job.model == usual.model and job.data.seq_len == usual.data.seq_len and corpus == search.corpus:
        return search.model
    loaded = LoadedJob(job=job, source=SourceMap(path="the trial's job", places={}))
    return model_facts(loaded, vocab_size=corpus.vocab_size, eot_id=corpus.eot_id)


def ray_trial_id(number: int) -> str:
    """What Tune calls a trial."""
    return f"{number:04d}"
