"""From a job file to a plan: prepare the corpus, inspect the model, probe the hardware, then call `make_plan`.

`make_plan` is pure; everything it needs to know about this machine and the job's files is gathered here. Nothing is
started and no run folder is created.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from forge.config.data import TokenizerSpec
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.metrics import check_metrics
from forge.config.overrides import check_space, trial_job, usual_values
from forge.config.section import FieldErrors
from forge.data.prepare import PrepareProgress, prepare
from forge.data.tokenizer import load_tokenizer
from forge.errors import PlanError
from forge.fs import default_cache_dir
from forge.plan.inputs import CodeInfo, HardwareInfo, ModelInfo
from forge.plan.plan import DraftPlan, Plan, make_draft, make_plan, packing_problem
from forge.plan.search import plan_search
from forge.runtime.probe import count_local_slots, hardware, inspect_model
from forge.runtime.resolve_code import resolve_code

_PlanT = TypeVar("_PlanT", bound=DraftPlan)


def resolve(
    loaded: LoadedJob,
    *,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    find_hardware: Callable[[JobSpec], HardwareInfo] = hardware,
    count_slots: Callable[[HardwareInfo, JobSpec], int] = count_local_slots,
) -> Plan:
    """Make the plan of a job.

    For a search, this is the plan of the trial with the job's own values, plus `plan.search`; every value of the
    search space is validated against the job's types first.

    Args:
        on_progress: called while the corpus is prepared.
        find_hardware: returns what one worker gets on the machines where the job will run.
        count_slots: returns how many workers fit on those machines.

    Raises: JobFileError, DataError, PlanError.
    """
    code = resolve_code(loaded)
    loaded = with_directions(loaded, code)
    trained = with_directions(_trained(loaded), code)
    corpus = prepare(
        trained.job.data,
        cache_dir=default_cache_dir(),
        on_progress=on_progress,
        code_digest=code.digest if code is not None else None,
    )
    model = inspect_model(trained, vocab_size=corpus.vocab_size, eot_id=corpus.eot_id, code=code)
    _require_isolation(trained, model)
    with _with_lines(trained):
        plan = make_plan(trained.job, model=model, corpus=corpus, hardware=find_hardware(trained.job))
    _require_held_out(plan, loaded)
    return _with_search(replace(plan, code=code), loaded, count_slots=count_slots)


def resolve_draft(loaded: LoadedJob, *, on_progress: Callable[[PrepareProgress], None] | None = None) -> DraftPlan:
    """Make the plan of a dry run on this machine: as `resolve`, but the corpus is prepared only if
    `training.epochs` makes the number of steps depend on it.

    Raises: JobFileError, DataError, PlanError.
    """
    trained = _trained(loaded)
    if trained.job.training.epochs is not None:
        return resolve(loaded, on_progress=on_progress)
    code = resolve_code(loaded)
    loaded = with_directions(loaded, code)
    trained = with_directions(_trained(loaded), code)
    vocab_size, eot_id = _announced_vocabulary(trained.job.data.tokenizer)
    model = inspect_model(trained, vocab_size=vocab_size, eot_id=eot_id, code=code)
    _require_isolation(trained, model)
    with _with_lines(trained):
        draft = make_draft(trained.job, model=model, hardware=hardware(trained.job))
    return _with_search(replace(draft, code=code), loaded, count_slots=count_local_slots)


@contextmanager
def _with_lines(loaded: LoadedJob) -> Iterator[None]:
    """Add the line of the job file to a PlanError about one of its keys. Raises: JobFileError."""
    try:
        yield
    except PlanError as error:
        if error.job_key is None:
            raise
        raise loaded.source.error(error.job_key, error.problem) from error


def with_directions(loaded: LoadedJob, code: CodeInfo | None) -> LoadedJob:
    """Return the job with the direction of its search's metric, which an objective of the user's own may report.

    Raises: JobFileError for a metric that the objective does not report.
    """
    job = loaded.job
    try:
        search = check_metrics(job.training, job.search, of_user=code.metric_directions if code is not None else {})
    except FieldErrors as error:
        raise loaded.source.errors(error) from error
    return replace(loaded, job=job.model_copy(update={"search": search})) if job.search is not None else loaded


def _trained(loaded: LoadedJob) -> LoadedJob:
    """Return the job itself or, for a search, the trial with the job's own values. Raises: JobFileError."""
    if loaded.job.search is None:
        return loaded
    check_space(loaded)
    job = trial_job(loaded.job, usual_values(loaded.job))
    if loaded.job.search.scheduler.is_population and job.training.early_stopping is not None:
        kind = loaded.job.search.scheduler.kind
        problem = f"is not possible under {kind}: every trial of a population must reach every round"
        raise loaded.source.error("training.early_stopping", problem, show_value=False)
    return replace(loaded, job=job)


def _with_search(plan: _PlanT, loaded: LoadedJob, *, count_slots: Callable[[HardwareInfo, JobSpec], int]) -> _PlanT:
    """Return the plan of the whole search, given that of one trial."""
    if loaded.job.search is None:
        return plan
    search = plan_search(loaded.job, loaded.job.search, num_slots=count_slots(plan.hardware, loaded.job))
    return replace(plan, job=loaded.job, search=search)


def _require_isolation(loaded: LoadedJob, model: ModelInfo) -> None:
    """Raises: JobFileError if examples would share a row of a model that does not keep them apart."""
    problem = packing_problem(loaded.job, model)
    if problem is not None:
        raise loaded.source.error("data.packing", problem)


def _require_held_out(plan: Plan, loaded: LoadedJob) -> None:
    """Raises: JobFileError if an `eval/` metric has a use but no sequence is held out for it."""
    if plan.corpus.num_held_out_sequences:
        return
    metric = loaded.job.search.metric if loaded.job.search is not None else ""
    stopping = plan.job.training.early_stopping
    if metric.startswith("eval/"):
        use = f"trials cannot be compared by {metric}"
    elif stopping is not None:
        use = f"training.early_stopping cannot measure {stopping.metric}"
    else:
        return
    raise loaded.source.error(
        "data.held_out", f"holds out no full sequence of {plan.corpus.seq_len} tokens, so {use}; raise it"
    )


def _announced_vocabulary(spec: TokenizerSpec) -> tuple[int, int]:
    """Vocabulary size and end-of-text id, known before the corpus is prepared; tokenizers forge trains use id 0."""
    if spec.from_pretrained is None:
        return spec.vocab_size, 0
    tokenizer = load_tokenizer(spec.from_pretrained)
    return tokenizer.vocab_size, tokenizer.eot_id
