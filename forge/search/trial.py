"""The Ray Tune `Trainable` of a trial, whose results are the objective values of a run.

Tune's actor plans the run, starts it on a trial runner, and returns each new objective value. The actor, its runner
and the runner's slots are reused for the next trial.
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

from forge.checkpoint.fork import fork_checkpoint
from forge.checkpoint.storage import open_storage
from forge.code_archive import restore_code
from forge.config.evaluate import METRIC_PREFIX
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.locations import SourceMap
from forge.config.overrides import search_of, trial_job, usual_values
from forge.data.vocabulary import vocabulary_of
from forge.errors import DivergedError, ForgeError, RunError
from forge.events import TrialStarted
from forge.plan.curve import config_digest
from forge.plan.inputs import CorpusInfo, ModelInfo
from forge.plan.plan import Plan, make_plan, plan_from_json, plan_to_json
from forge.runs.create import fill_run_folder
from forge.runs.reader import error_named
from forge.runs.trials import trial_folder
from forge.runtime.actor_names import NAMESPACE, SUPERVISOR
from forge.runtime.probe import inspect_model
from forge.runtime.supervised_run import RunConfig
from forge.search.encoding import plain_values
from forge.search.messages import FirstStep, TrialAssignment, TrialUpdate
from forge.search.node_pool import NodePool
from forge.search.trial_runner import TrialRunnerActor
from forge.units import Every

_POLL_S = 2.0
_HALTED_S = 0.5
_RETRY_S = 0.2
_MAX_SILENCE_S = 60.0
_CHECKPOINT = "trial.json"
# A population's checkpoints are copied one round after they were written.
_KEPT_IN_POPULATION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """What all trials of a search have in common."""

    search_folder: str
    plan_json: str
    nodes: NodePool
    recorder: Any
    """Handle of the search's recorder actor."""


class TrialTrainable(tune.Trainable):  # type: ignore[misc]
    """One trial after the other; Tune calls `step` until a result says `done`.

    Keys of a trial's Tune config: `values`, if they are known from the start; `reported`, the newest step whose
    objective value the search knows; `replay`, whether to begin by repeating that value; `exploited`, the step and
    the number of the trial whose checkpoint it continues from.
    """

    def setup(self, config: dict[str, Any], *, common: TrialConfig) -> None:
        """Start the trial runner, once per Tune actor."""
        self._common = common
        self._search = plan_from_json(common.plan_json)
        if self._search.code is not None:
            restore_code(self._search.code.digest, run_folder=Path(common.search_folder))
        self._runner_name = f"{SUPERVISOR}{Path(common.search_folder).name}.{secrets.token_hex(2)}"
        self._runner = TrialRunnerActor.options(  # type: ignore[attr-defined]
            name=self._runner_name,
            namespace=NAMESPACE,
            # On the head node, where this actor is, but outside the placement group that Tune has made for it.
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
        ).remote(self._runner_name, common.nodes)
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Begin another trial, or this one with other values."""
        self._config = config
        self._reported = int(config.get("reported", 0))
        self._source: tuple[int, int] | None = tuple(config["exploited"]) if config.get("exploited") else None
        self._assignment: TrialAssignment | None = None
        self._plan: Plan | None = None
        self._is_registered = False
        self._is_active = False
        self._has_started = False
        return True

    @property
    def number(self) -> int:
        """Of the trial, from 1."""
        return int(self.trial_id)

    def step(self) -> dict[str, Any]:
        """The next result; one without `value` registers the trial's runner with the search."""
        if not self._is_registered:
            self._is_registered = True
            return self._result(step=self._reported, is_registration=True)
        try:
            if self._plan is None and not self._make_plan():
                return self._result(step=self._reported, is_registration=True)
            if self._config.pop("replay", False):
                return self._result(step=self._reported, value=self._config["value"], metrics={}, is_replay=True)
            if not self._is_active:
                self._is_active = True
                self._start_trial()
            return self._await_result()
        except ForgeError as error:
            status = "diverged" if isinstance(error, DivergedError) else "failed"
            return self._result(step=self._reported, done=True, status=status, reason=str(error))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write which of forge's own checkpoints holds the state; forge has written it when the trial paused."""
        body = json.dumps({"trial": self.number, "step": self._reported})
        (Path(checkpoint_dir) / _CHECKPOINT).write_text(body)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Continue from that state, which may be another trial's."""
        found = json.loads((Path(checkpoint_dir) / _CHECKPOINT).read_text())
        self._reported = found["step"]
        self._source = (found["step"], found["trial"]) if found["trial"] != self.number else None

    def cleanup(self) -> None:
        """End the trial runner."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._runner.close.remote(), timeout=_MAX_SILENCE_S)
        ray.kill(self._runner)

    # --- the active trial

    def _make_plan(self) -> bool:
        """Plan the trial and fill its run folder. Returns: False if the search has not chosen its values yet."""
        decided_at = time.time()
        values = self._config.get("values")
        if values is None:
            chosen = self._ask(partial(self._runner.values_of.remote, self.number, _POLL_S))
            if chosen is None:
                return False
            values, decided_at = chosen
        else:
            values = plain_values(values, search_of(self._search.job))
        plan = plan_trial(self._search, values)
        scheduler = search_of(self._search.job).scheduler
        if scheduler.is_population:
            interval = scheduler.interval_steps or 1
            plan = replace(plan, pause_at=(self._reported // interval + 1) * interval)
        self._plan = plan
        folder = Path(trial_folder(self._common.search_folder, self.number))
        fill_run_folder(folder, plan)
        self._fork_checkpoint(plan, folder)
        self._assignment = TrialAssignment(
            run=RunConfig(run_folder=str(folder), plan_json=plan_to_json(plan), secret=secrets.token_hex(32)),
            group=Path(self._common.search_folder).name,
            reported_step=self._reported,
            decided_at=decided_at,
        )
        return True

    def _fork_checkpoint(self, plan: Plan, folder: Path) -> None:
        """Copy the checkpoint to continue from, if another trial wrote it."""
        if self._source is None:
            return
        step, donor = self._source
        donor_folder = trial_folder(self._common.search_folder, donor)
        fork_checkpoint(
            open_storage(plan.job.checkpoint.url_of(donor_folder)),
            open_storage(plan.job.checkpoint.url_of(str(folder))),
            step=step,
            config_digest=config_digest(plan.job, code=plan.code),
        )

    def _start_trial(self) -> None:
        """Start the trial on the runner; repeat this after a restart of the runner."""
        assert self._assignment is not None, "_make_plan comes first"
        assignment = replace(self._assignment, reported_step=self._reported)
        self._ask(partial(self._runner.start_trial.remote, assignment), is_start=True)

    def _await_result(self) -> dict[str, Any]:
        """Wait for the next objective value, or for the end of the trial."""
        assert self._plan is not None
        last_step = min(self._plan.total_steps, self._plan.pause_at or self._plan.total_steps)
        while True:
            update: TrialUpdate = self._ask(
                partial(self._runner.update.remote, self._reported, _POLL_S, is_started=self._has_started)
            )
            if update.first_step is not None and not self._has_started:
                self._has_started = True
                self._record_start(update.first_step)
            records = [record for record in update.records if record["step"] < last_step or update.outcome]
            if records:
                return self._judge(records[0])
            if update.outcome is None:
                continue
            if update.outcome.error is not None:
                raise error_named(update.outcome.error, message=update.outcome.reason)
            if update.is_stopped_early:
                reason = f"stopped early at step {update.outcome.step}"
                return self._result(step=self._reported, done=True, status="finished", reason=reason)
            if update.outcome.step < last_step:  # it was asked to stop; the search is about to end
                time.sleep(_HALTED_S)
                return self._result(step=self._reported, is_halted=True)
            metric = search_of(self._search.job).metric
            raise RunError(f"the trial ended at step {update.outcome.step} without a value of {metric}")

    def _judge(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Build the result for Tune from a line of `metrics.jsonl`.

        Raises: DivergedError if the objective is not finite; RunError if it was not measured.
        """
        assert self._plan is not None
        metric = search_of(self._search.job).metric
        if metric not in record:
            unmeasured = "no text is held out to measure it on"
            reason = unmeasured if metric.startswith("eval/") else "it is only evaluated"
            reason = "the task's examples do not define it" if metric.startswith(METRIC_PREFIX) else reason
            raise RunError(f"step {record['step']} has no {metric}: {reason}")
        if record[metric] is None and not metric.startswith("speed/"):
            raise DivergedError(f"step {record['step']}: {metric} is not a finite number")
        if record[metric] is None:
            raise RunError(f"{metric} cannot be measured on this hardware")
        self._reported = int(record["step"])
        is_done = self._reported >= self._plan.total_steps
        status = {"status": "finished"} if is_done else {}
        return self._result(step=self._reported, value=record[metric], metrics=dict(record), done=is_done, **status)

    def _result(self, *, done: bool = False, **body: Any) -> dict[str, Any]:
        return {"runner": self._runner_name, "done": done, **body}

    def _record_start(self, first_step: FirstStep) -> None:
        assert self._plan is not None
        started = TrialStarted(
            trial=self.number,
            total_steps=self._plan.total_steps,
            seconds=first_step.seconds,
            is_warm=first_step.is_warm,
        )
        ray.get(self._common.recorder.event.remote(started))

    def _ask(self, call: Any, *, is_start: bool = False) -> Any:
        """Call the runner; if Ray had to restart it, start the active trial again first.

        Raises: RunError if it does not come back within `_MAX_SILENCE_S`.
        """
        answered_at = time.monotonic()
        while True:
            try:
                return ray.get(call())
            except ray.exceptions.RayActorError as error:
                if time.monotonic() - answered_at > _MAX_SILENCE_S:
                    raise RunError(f"the trial runner has not been restarted in time: {error}") from error
                time.sleep(_RETRY_S)
                if self._is_active and not is_start:
                    self._start_trial()


def plan_trial(search: Plan, values: Mapping[str, Any]) -> Plan:
    """The plan of the trial with these values.

    Raises: JobFileError, PlanError, DataError if the values do not make a valid job.
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
    model = _model(search, job, usual, corpus)
    plan = make_plan(job, model=model, corpus=corpus, hardware=search.hardware, teacher=search.teacher)
    return replace(
        plan, code=search.code, templates=search.templates, tasks=search.tasks, task_examples=search.task_examples
    )


def _corpus(search: Plan, job: JobSpec, usual: JobSpec) -> CorpusInfo:
    """Return the search's corpus, or prepare another if the trial changes the data section, or what is stored of a
    reference or a teacher."""
    from forge.runtime.resolve_outputs import outputs_key, with_outputs

    if job.data == usual.data and outputs_key(job) == outputs_key(usual):
        return search.corpus
    from forge.data.mixture import prepare_corpus
    from forge.fs import default_cache_dir

    code = search.code.digest if search.code is not None else None
    corpus = prepare_corpus(job.data, cache_dir=default_cache_dir(), code_digest=code)
    find = partial(_inspected, search, job, corpus)
    return with_outputs(corpus, job=job, find_model=find, on_progress=None)


def _model(search: Plan, job: JobSpec, usual: JobSpec, corpus: CorpusInfo) -> ModelInfo:
    if job.model == usual.model and job.data.seq_len == usual.data.seq_len and corpus == search.corpus:
        return search.model
    return _inspected(search, job, corpus)


def _inspected(search: Plan, job: JobSpec, corpus: CorpusInfo) -> ModelInfo:
    loaded = LoadedJob(job=job, source=SourceMap(path="the trial's job", locations={}))
    return inspect_model(loaded, vocabulary=vocabulary_of(corpus), code=search.code)
