"""forge from Python: load a job, plan it, train it to its last step, or search for its best values.

The CLI calls the same functions. A run is executed by a driver process, so torch is never imported here, and the
caller may detach from it (`start`) or wait for it (`train_job`, `tune_job`); an exception or Ctrl-C while waiting
stops the run with a checkpoint. The module is long because all public functions are here; most of it is docstrings.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forge.chaos.trace_file import read_trace
from forge.chaos.trace_rates import trace_interruptions
from forge.cluster.registry import find_cluster, find_known, running_spec
from forge.config import load
from forge.config.load import LoadedJob
from forge.config.overrides import check_kind
from forge.data.prepare import PrepareProgress
from forge.data.view import Selection
from forge.errors import ArgumentError, ForgeWarning, JobFileError
from forge.plan.bill import Bill, BillScope, is_priced, make_bill
from forge.plan.data_view import DataView
from forge.plan.inputs import CorpusInfo
from forge.plan.lengths import is_same_length
from forge.plan.plan import DraftPlan, Plan
from forge.pricing.offers import load_offers
from forge.remote.mirror import find_run_handle
from forge.remote.submit import RemoteTarget, preflight, resolve_remote, submit
from forge.report.progress_lines import ProgressLines
from forge.report.search_summary import SearchSummary, no_result_error, search_summary
from forge.runs.alerts.check_command import command_warnings, require_command
from forge.runs.checkpoints import CheckpointEntry, best_checkpoint, embedding_of
from forge.runs.create import create_run, reopen_run, require_regular, require_same_curve, resumed_plan
from forge.runs.former_runs import former_runs
from forge.runs.index import remember_run
from forge.runs.reader import (
    RunSummary,
    count_records,
    failure_of,
    find_run,
    follow,
    read_metrics,
    read_plan,
    read_run,
    search_folder,
)
from forge.runs.remote_ref import read_remote_ref
from forge.runs.trackers.registry import package_warnings, require_credentials, require_packages
from forge.runtime.driver_process import RunHandle, start_driver
from forge.runtime.resolve import inspect_data as resolve_view
from forge.runtime.resolve import prepare_data as resolve_prepared
from forge.runtime.resolve import resolve, resolve_draft, with_data_folder
from forge.runtime.resolve_code import with_run_code
from forge.runtime.resolve_cost import with_cost, with_own_cost
from forge.runtime.resolve_init import with_init
from forge.runtime.resolve_space import with_space
from forge.runtime.torch_subprocess import answer_prompts, export_weights

if TYPE_CHECKING:
    import numpy as np

    from forge.evaluate.client import Evaluation

OnRecord = Callable[[dict[str, Any]], None]
"""Called with every step (`{"step": 1, "train/loss": ...}`) and every event (`{"event": "RunFinished", ...}`).

Without one, progress is printed to stderr as plain lines; `quiet` prints nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(RunSummary):
    """A run that ended or is running, with what it has recorded so far."""

    def metrics(self) -> Mapping[str, np.ndarray]:
        """Return every metric as an array with one entry per recorded step; nan where a step has no value.

        Shapes: every array is float64[S]; `step` is one of them.
        """
        import numpy as np

        records = read_metrics(self.folder)
        names = dict.fromkeys(name for record in records for name in record)
        return {name: np.array([_number(record.get(name)) for record in records]) for name in names}

    def history(self) -> list[dict[str, Any]]:
        """Return the recorded steps, one dict each, as in `pandas.DataFrame(run.history())`."""
        return read_metrics(self.folder)

    def best_checkpoint(self) -> CheckpointEntry | None:
        """Return the best complete checkpoint, or the newest if none was evaluated.

        The best one by the metric of `training.early_stopping`, else by the held-out loss.

        Its `url` is the folder, or the URL, that it is in.

        Raises: CheckpointError if the storage cannot be listed.
        """
        return best_checkpoint(self)

    def export(
        self,
        to: str | Path,
        *,
        step: int | Literal["best"] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Write a checkpoint's weights as a Hugging Face folder, for `from_pretrained`.

        Of a model of the user's own it has the state dict as safetensors files, and no `config.json`.

        Args:
            step: of the checkpoint; by default the best one, or the newest if none was evaluated.
            on_progress: called with the bytes that are written and those of all weights.

        Returns: the folder.
        Raises: CheckpointError if there is no such checkpoint; ArgumentError if the folder cannot be written.
        """
        best = self.best_checkpoint() if step is None else None
        answer = export_weights(
            url=self.plan.job.checkpoint.url_of(str(self.folder)),
            to=str(to),
            step=best.step if best is not None else step,
            tokenizer=str(self.folder / "tokenizer"),
            embedding=embedding_of(self.plan.job),
            on_progress=on_progress,
        )
        return Path(answer["folder"])

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]] = "",
        *,
        chat: bool = False,
        ema: bool = False,
        step: int | Literal["best"] | None = None,
        **sampling: Any,
    ) -> str:
        """Continue a prompt with a checkpoint, or answer a conversation, as `forge generate` does.

        Args:
            prompt: a text, or the messages of a conversation.
            chat: the text is a turn of the user.
            ema: use the averaged weights.
            step: of the checkpoint; by default the newest.
            sampling: `max_tokens`, `temperature`, `top_p`, `top_k`, `stop`, `seed` and the other fields of
                `forge.inference.sampling.SamplingParams`.

        Returns: the text after the prompt.
        Raises: CheckpointError if there is no intact checkpoint; ArgumentError if the model writes no text, or
            for a wrong value; UserCodeError, RunError.
        """
        config = {"source": str(self.folder), "step": step, "ema": ema, "chat": chat, "sampling": sampling}
        found = answer_prompts(
            config, [{"prompt": prompt}], on_message=lambda text: warnings.warn(text, ForgeWarning, stacklevel=3)
        )
        [answer] = found["answers"]
        if "text" not in answer:
            raise ArgumentError(f"{self.folder.name} writes no text; `forge generate` shows what it answers")
        return str(answer["text"])


def quiet(record: dict[str, Any]) -> None:
    """Ignore a record. As `on_record`, it turns the lines of progress off."""


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> LoadedJob:
    """Read and check a job file.

    Args:
        path: a YAML file.
        overrides: as `--set` takes them: `["training.total_steps=50"]`.

    Returns: the job, with the sections of the file: `job.training.optimizer.lr`.
    Raises: JobFileError with every problem found.
    """
    return load.load_job(path, overrides=overrides)


def load_run(name: str | Path, *, root: str | Path = "runs") -> Run:
    """Read a run by its folder, its id, a unique prefix of it, or `latest`.

    Raises: ArgumentError if there is no such run; PlanError if its plan cannot be read.
    """
    return _run_of(find_run(str(name), root=Path(root)))


def plan_job(
    job: str | Path | LoadedJob, *, on_progress: Callable[[PrepareProgress], None] | None = None
) -> DraftPlan:
    """Plan a job on this machine, as `forge plan` does; nothing is started or created.

    Args:
        on_progress: called while the corpus is prepared, which a length in epochs requires.

    Raises: JobFileError, PlanError, DataError.
    """
    plan = with_space(resolve_draft(_loaded(job), on_progress=on_progress), must_fit=False)
    plan = with_own_cost(plan)
    return replace(plan, warnings=plan.warnings + package_warnings(plan.job.tracking) + command_warnings(plan.job))


def price_job(
    plan: DraftPlan,
    *,
    scope: BillScope | None = None,
    refresh: bool = False,
    trace: str | Path | None = None,
) -> Bill | None:
    """Return what a planned job costs on rented GPUs; None if it asks for CPUs (`resources.gpu: none`).

    Runs on GPUs in the job's folder take precedence over estimates.

    Args:
        scope: only some machines.
        refresh: ask the clouds for their prices of today.
        trace: a spot trace, whose losses take the place of the interruptions that clouds publish.

    Raises: ArgumentError if the trace cannot be used, or no offer has the GPU or the region asked for.
    """
    if not is_priced(plan):
        return None
    lost = None if trace is None else trace_interruptions(read_trace(Path(trace)), name=str(trace))
    former = former_runs(Path(plan.job.checkpoint.runs), hardware=None)
    return make_bill(plan, load_offers(refresh=refresh), former=former, trace=lost, scope=scope)


def prepare_data(
    job: str | Path | LoadedJob, *, on_progress: Callable[[PrepareProgress], None] | None = None
) -> CorpusInfo:
    """Prepare the corpus of a job, if it is not in the cache, as `forge data prepare` does.

    Raises: JobFileError, DataError, UserCodeError.
    """
    return resolve_prepared(_loaded(job), on_progress=on_progress)


def inspect_data(
    job: str | Path | LoadedJob,
    *,
    count: int = 3,
    index: int | None = None,
    split: str | None = None,
    part: str | None = None,
    max_chars: int = 4000,
    on_progress: Callable[[PrepareProgress], None] | None = None,
) -> DataView:
    """Describe what training will see of the data, with examples as text, as `forge data inspect` does.

    A large corpus that is not prepared is sampled; `num_sampled_records` of the view is not None then.

    Args:
        count: of the examples, spread over the corpus.
        index: show `count` examples from this one on, in the order of the records.
        split: `train` or `held_out`.
        part: of `data.mixture`; an index needs one.
        max_chars: of a text between two changes of loss; longer ones are cut in the middle.

    Raises: JobFileError, DataError, UserCodeError; ArgumentError for an index or a split that does not exist.
    """
    selection = Selection(count=count, index=index, split=split, part=part, max_chars=max_chars)
    return resolve_view(_loaded(job), selection=selection, on_progress=on_progress)


def start(
    job: str | Path | LoadedJob,
    *,
    cluster: str | None = None,
    resume: Path | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    on_plan: Callable[[Plan, RemoteTarget | None], None] | None = None,
) -> RunHandle:
    """Plan a job, create its run folder, and start its driver. Returns once the driver owns the run.

    Args:
        cluster: name or file of a cluster that is up; by default this machine, or the cluster that `resume` was on.
        resume: folder of a run that ended early, to continue it from its newest checkpoint.
        on_progress: called while the corpus is prepared.
        on_plan: called with the plan and the remote cluster (None: this machine) before anything is created or
            started; an exception that it raises cancels the start.

    Raises: JobFileError, PlanError, DataError, ArgumentError, ClusterError.
    """
    loaded = with_init(_loaded(job), resume=resume)
    if resume is not None:
        loaded = with_data_folder(with_run_code(loaded, run_folder=resume), run_folder=resume)
    target = _target(cluster, resume)
    require_credentials(loaded)
    require_command(loaded, resume=resume, is_local=target is None)
    if target is None:
        require_packages(loaded)
        plan = with_space(resolve(loaded, on_progress=on_progress), run_folder=resume, must_fit=True)
        plan = with_own_cost(plan)
    else:
        spec = running_spec(target.cluster.name)
        plan = resolve_remote(target, loaded, spec=spec, on_progress=on_progress)
        plan = with_cost(plan, spec, usd_per_hour=target.cluster.price())
    if resume is not None:
        plan = resumed_plan(resume, plan)
    plan = _with_task_examples(plan, resume=resume)
    if on_plan is not None:
        on_plan(plan, target)
    if resume is None:
        folder = create_run(plan, root=loaded.job.checkpoint.runs)
    else:
        folder = resume
        reopen_run(folder, plan)
    remember_run(folder)
    return start_driver(folder) if target is None else submit(target, plan, folder=folder)


def _with_task_examples(plan: Plan, *, resume: Path | None) -> Plan:
    """Read the examples of the job's tasks, or keep those of the run that is resumed. Raises: DataError."""
    if not plan.tasks:
        return plan
    from forge.evaluate.stored_examples import with_task_examples  # imports jinja2

    return with_task_examples(plan, before=None if resume is None else read_plan(resume), run_folder=resume)


def train_job(
    job: str | Path | LoadedJob,
    *,
    cluster: str | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    on_record: OnRecord | None = None,
) -> Run:
    """Train a job to its last step.

    Args:
        cluster: name or file of a cluster that is up; by default this machine.
        on_progress: called while the corpus is prepared.
        on_record: called with every step and event; by default, progress is printed (`OnRecord`).

    Returns: the run; its status is `finished`, or `stopped` if it was asked to stop from elsewhere.
    Raises: as `start`; afterwards the error that ended the run: RunError, ClusterError, CheckpointError.
    """
    loaded = _loaded(job)
    check_kind(loaded, is_search=False)
    return _run_to_end(start(loaded, cluster=cluster, on_progress=on_progress), on_record=on_record)


def resume_run(
    name: str | Path,
    *,
    root: str | Path = "runs",
    overrides: Sequence[str] = (),
    cluster: str | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    on_record: OnRecord | None = None,
) -> Run:
    """Continue a run from its newest checkpoint to its last step.

    With another length, as in `overrides=["training.total_steps=2000"]`, also a run that has finished.

    Args:
        name: as for `load_run`.
        overrides: as for `load_job`; keys that would change the loss curve are refused.
        cluster: name or file of a cluster that is up; by default the one that the run was on.
        on_progress: called while the corpus is prepared, if that is needed again.
        on_record: called with every step and event from now on.

    Returns: the run; at once if it has finished and has the same length.
    Raises: as `train_job`; ArgumentError if it is running, a search or a trial.
    """
    folder = find_run(str(name), root=Path(root))
    found = read_run(folder)
    if found.plan.search is not None or search_folder(folder) is not None:
        raise ArgumentError(f"{folder.name} is a search or one of its trials: forge tune --resume")
    if found.status == "running":
        raise ArgumentError(f"{folder.name} is running; follow it with attach_run")
    require_regular(folder / "job.yaml")
    loaded = with_init(load_job(folder / "job.yaml", overrides), resume=folder)
    require_same_curve(folder, found.plan.job, loaded.job)
    if found.status == "finished" and is_same_length(found.plan.job, loaded.job):
        return _run_of(folder)
    past = count_records(folder)
    handle = start(loaded, cluster=cluster, resume=folder, on_progress=on_progress)
    return _run_to_end(handle, on_record=on_record, past=past)


def attach_run(name: str | Path, *, root: str | Path = "runs", on_record: OnRecord | None = None) -> Run:
    """Wait until a run ends. An exception or Ctrl-C while waiting leaves the run running.

    Args:
        name: as for `load_run`.
        on_record: called with every step and event from now on.

    Returns: the run, also if it failed; at once if it is not running.
    Raises: ArgumentError if there is no such run; what `on_record` raises.
    """
    folder = find_run(str(name), root=Path(root))
    num_events, num_steps = count_records(folder)
    handle = find_run_handle(search_folder(folder) or folder)
    if handle is not None:
        records = follow(folder, goes_on=handle.is_alive, past_events=num_events, past_steps=num_steps)
        for record in records:
            if record is not None and on_record is not None:
                on_record(record)
    return _run_of(folder)


def tune_job(
    job: str | Path | LoadedJob, *, cluster: str | None = None, on_record: OnRecord | None = None
) -> SearchSummary:
    """Run the trials of a job's search, and write `report.html` and `best.yaml` into its folder.

    Args:
        cluster: name or file of a cluster that is up; by default this machine.
        on_record: called with every event (`{"event": "TrialReported", "trial": 1, "step": 20, "value": ...}`).

    Returns: the search and its best trial; of a search that was stopped, the best so far.
    Raises: as `train_job`; RunError also if no trial reported a value.
    """
    from forge.report.search_record import write_results

    loaded = _loaded(job)
    check_kind(loaded, is_search=True)
    summary = search_summary(_run_to_end(start(loaded, cluster=cluster), on_record=on_record))
    if summary.table.trials:
        with contextlib.suppress(
            JobFileError
        ):  # the full job may reject values that its proxy accepts: no best.yaml
            write_results(summary.run.folder)
    no_result = no_result_error(summary) if summary.run.status == "finished" else None
    if no_result is not None:
        raise no_result
    return summary


def evaluate(
    models: Sequence[str | Path],
    tasks: Sequence[str | Path],
    *,
    root: str | Path = "runs",
    step: int | str | None = None,
    ema: bool = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
    limit: int | None = None,
    workers: int | None = None,
    contamination: bool | None = None,
    cluster: str | None = None,
    on_message: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score runs and folders of weights in tasks, as `forge eval` does.

    Args:
        models: runs as for `load_run`, or folders of weights.
        tasks: task files, or names of those in `jobs/eval`.
        step: of the checkpoint of runs, or `best`; by default the newest.
        ema: use the averaged weights.
        dtype: in which models compute.
        limit: most examples of each task.
        workers: most workers; by default one for each CPU or GPU of the cluster.
        contamination: whether the training data of runs are searched for the examples; by default unless they have
            more than 500M tokens.
        cluster: name of a cluster; by default the one that is up on this machine, or else this machine.
        on_message: called with what was read, reused, or happened to workers.
        on_progress: called with the shards of a model that are done and those in all.

    Raises: ArgumentError, JobFileError, DataError, CheckpointError, ClusterError, RunError.
    """
    from forge.evaluate.client import EvaluateOptions, evaluate_models

    options = EvaluateOptions(
        step=step,
        ema=ema,
        dtype=dtype,
        limit=limit,
        num_workers=workers,
        contamination=contamination,
        cluster=cluster,
    )
    return evaluate_models(
        models, tasks, options=options, root=Path(root), on_message=on_message, on_progress=on_progress
    )


def _run_to_end(handle: RunHandle, *, on_record: OnRecord | None, past: tuple[int, int] = (0, 0)) -> Run:
    """Follow a run until it ends. Raises: the error that ended it.

    Args:
        past: number of events and of steps recorded before it was resumed.
    """
    try:
        on_record = on_record or ProgressLines(read_plan(handle.folder))
        for record in follow(handle.folder, goes_on=handle.is_alive, past_events=past[0], past_steps=past[1]):
            if record is not None:
                on_record(record)
    except BaseException:
        handle.request_stop()
        raise
    finally:
        handle.wait()
    run = _run_of(handle.folder)
    failure = failure_of(run)
    if failure is not None:
        raise failure
    return run


def _target(cluster: str | None, resume: Path | None) -> RemoteTarget | None:
    """The cluster that was named, or that the run to resume was on; None for this machine."""
    ref = read_remote_ref(resume) if resume is not None else None
    if cluster is None and ref is not None:
        return preflight(find_known(ref.cluster))
    return None if cluster is None else preflight(find_cluster(cluster))


def _run_of(folder: Path) -> Run:
    summary = read_run(folder)
    return Run(**{field.name: getattr(summary, field.name) for field in fields(RunSummary)})


def _loaded(job: str | Path | LoadedJob) -> LoadedJob:
    return job if isinstance(job, LoadedJob) else load_job(job)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
