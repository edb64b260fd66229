"""From a job file to a plan: prepare the corpus, inspect the model, probe the hardware, then call `make_plan`.

`make_plan` is pure; everything it needs to know about this machine and the job's files is gathered here. Nothing is
started and no run folder is created.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from forge.config.data import DataSpec
from forge.config.evaluate import METRIC_PREFIX
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.metrics import check_metrics
from forge.config.mixture import MixturePart
from forge.config.overrides import check_space, trial_job, usual_values
from forge.config.section import FieldErrors
from forge.data.look import look_at_corpus
from forge.data.mixture import find_corpus, prepare_corpus
from forge.data.mixture_view import view_data
from forge.data.prepare import PrepareProgress
from forge.data.tokenizer import special_token_names
from forge.data.view import Selection
from forge.data.vocabulary import Vocabulary, announced_vocabulary, vocabulary_of
from forge.errors import ArgumentError, CheckpointError, DataError, PlanError
from forge.fs import default_cache_dir, leads_to_folder
from forge.plan.cluster_links import ClusterLinks
from forge.plan.data_view import DataView
from forge.plan.inputs import CodeInfo, CorpusFiles, CorpusInfo, HardwareInfo, ModelInfo
from forge.plan.outputs import must_find_labels
from forge.plan.plan import DraftPlan, Plan, make_draft, make_plan, packing_problem
from forge.plan.search import plan_search
from forge.plan.warnings import view_warnings
from forge.runs.reader import read_plan
from forge.runtime.local_links import local_links
from forge.runtime.probe import count_local_slots, hardware, inspect_model, inspect_teacher, require_packages
from forge.runtime.resolve_code import resolve_code
from forge.runtime.resolve_forecast import with_forecast
from forge.runtime.resolve_init import init_info, with_init
from forge.runtime.resolve_outputs import reference_notes, with_outputs, with_stored_size
from forge.runtime.resolve_tasks import with_task_direction, with_tasks
from forge.runtime.resolve_teacher import check_teacher_tokenizer
from forge.runtime.resolve_tokenizer import check_tokenizer, require_special_tokens
from forge.runtime.resolve_view import objective_view, view_sample, with_view

_SMALL_BYTES = 1 << 21
_SMALL_FILES = 500
_ORIGINS = ("data.files", "data.dataset", "data.mixture")

_PlanT = TypeVar("_PlanT", bound=DraftPlan)


def resolve(
    loaded: LoadedJob,
    *,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    find_hardware: Callable[[JobSpec], HardwareInfo] = hardware,
    count_slots: Callable[[HardwareInfo, JobSpec], int] = count_local_slots,
    links: ClusterLinks | None = None,
) -> Plan:
    """Make the plan of a job.

    For a search, this is the plan of the trial with the job's own values, plus `plan.search`; every value of the
    search space is validated against the job's types first.

    Args:
        on_progress: called while the corpus is prepared.
        find_hardware: returns what one worker gets on the machines where the job will run.
        count_slots: returns how many workers fit on those machines.
        links: between the GPUs of those machines; by default assumed.

    Raises: JobFileError, DataError, PlanError.
    """
    inputs = _inputs(loaded, on_progress=on_progress)
    return _resolve(inputs, find_hardware=find_hardware, count_slots=count_slots, links=links)


def resolve_draft(loaded: LoadedJob, *, on_progress: Callable[[PrepareProgress], None] | None = None) -> DraftPlan:
    """Make the plan of a dry run on this machine: as `resolve`, but of a corpus that is not in the cache only a
    sample is prepared. All of it is if the number of steps (`training.epochs`) or the labels depend on it, or if
    that takes only seconds. A reference model or a teacher is not asked.

    Raises: JobFileError, DataError, PlanError.
    """
    inputs = _inputs(loaded, on_progress=on_progress)
    job = inputs.trained.job
    must_prepare = job.training.epochs is not None or must_find_labels(job) or _is_small(job.data, inputs.files)
    if must_prepare or _cached(inputs) is not None:
        return _resolve(inputs, find_hardware=hardware, count_slots=count_local_slots, is_draft=True)
    vocabulary = announced_vocabulary(job.data.tokenizer)
    model = _inspected(inputs, vocabulary=vocabulary)
    teacher = inspect_teacher(inputs.trained, vocabulary=vocabulary)
    _require_isolation(inputs.trained, model)
    with _with_lines(inputs.trained):
        found = hardware(job)
        links = local_links(found, job)
        known = links.interconnect if links is not None else None
        draft = make_draft(job, model=model, hardware=found, files=inputs.files, teacher=teacher, links=known)
    with _with_lines(inputs.trained):
        view = view_sample(job, data=inputs.data, code_digest=_digest_of(inputs.code))
    more = view_warnings(view, seq_len=job.data.seq_len) if view is not None else ()
    draft = replace(draft, view=view, warnings=draft.warnings + more)
    draft = _with_inits(replace(draft, code=inputs.code, templates=loaded.templates), inputs.trained)
    draft = _with_search(with_tasks(draft, inputs.loaded), inputs.loaded, count_slots=count_local_slots)
    return with_forecast(draft, links=links)


def prepare_data(loaded: LoadedJob, *, on_progress: Callable[[PrepareProgress], None] | None = None) -> CorpusInfo:
    """Prepare the corpus of a job, if it is not in the cache, and what its reference or its teacher says about it.

    Raises: JobFileError, DataError, UserCodeError, PlanError, CheckpointError.
    """
    inputs = _inputs(loaded, on_progress=on_progress)
    job, corpus = inputs.trained.job, _prepared(inputs)
    find = partial(_inspected, inputs, vocabulary=vocabulary_of(corpus), corpus=corpus)
    return with_outputs(corpus, job=job, find_model=find, on_progress=on_progress)


def inspect_data(
    loaded: LoadedJob, *, selection: Selection, on_progress: Callable[[PrepareProgress], None] | None = None
) -> DataView:
    """Describe what training will see of a job's data; of a large corpus that is not prepared, of a sample.

    Raises: JobFileError, DataError, UserCodeError; ArgumentError for an index of a corpus that is not prepared, or
        one that does not exist.
    """
    inputs = _inputs(loaded, on_progress=on_progress)
    job, digest = inputs.trained.job, _digest_of(inputs.code)
    corpus = _cached(inputs)
    if corpus is None and _is_small(job.data, inputs.files):
        corpus = _prepared(inputs)
    if corpus is not None:
        with _with_lines(inputs.trained):
            objective = objective_view(job, corpus=corpus)
            return view_data(corpus, data=job.data, objective=objective, selection=selection)
    if selection.index is not None:
        path = inputs.loaded.source.path
        raise ArgumentError(f"only a prepared corpus has numbered examples; first: forge data prepare {path}")
    with _with_lines(inputs.trained):
        view = view_sample(job, data=inputs.data, code_digest=digest, selection=selection)
    if view is None:
        raise DataError(f"a sample of the corpus does not fill one sequence of data.seq_len: {job.data.seq_len}")
    return view


def with_data_folder(loaded: LoadedJob, *, run_folder: Path) -> LoadedJob:
    """Return the job of a run to resume: relative paths in its own job file mean what they meant at its start."""
    files = read_plan(run_folder).files
    locations = loaded.source.locations
    location = next((locations[key] for key in _ORIGINS if key in locations), None)
    is_own = Path(loaded.source.path).resolve() == (run_folder / "job.yaml").resolve()
    if files is None or not files.folder or not is_own or location is None or location.line is None:
        return loaded
    return replace(loaded, data_folder=files.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """A job whose code was packed and whose corpus was looked at."""

    loaded: LoadedJob
    trained: LoadedJob
    """The job itself or, for a search, the trial with the job's own values."""
    code: CodeInfo | None
    data: DataSpec
    """As in the job, with the paths of a resumed run made absolute."""
    files: CorpusFiles
    notes: tuple[str, ...]
    """What the plan says about the tokenizer."""
    on_progress: Callable[[PrepareProgress], None] | None


def _inputs(loaded: LoadedJob, *, on_progress: Callable[[PrepareProgress], None] | None) -> _Inputs:
    loaded = with_init(loaded)
    _trained(loaded)  # complains of the search space before code is packed
    code = resolve_code(loaded)
    loaded = with_task_direction(with_directions(loaded, code))
    trained = with_directions(_trained(loaded), code)
    require_packages(trained)
    if on_progress is not None:
        on_progress(PrepareProgress(phase="look"))
    data = _rebased(trained.job.data, folder=loaded.data_folder)
    notes = check_tokenizer(trained)
    check_teacher_tokenizer(trained)
    require_special_tokens(trained)
    names = special_token_names(data.tokenizer.from_pretrained) if data.source is None else ()
    names += data.tokenizer.special_tokens if data.source is None else ()
    with _with_data_lines(loaded):
        files = look_at_corpus(data, special_tokens=names)
    if loaded.data_folder is not None:
        files = replace(files, folder=loaded.data_folder)
    return _Inputs(
        loaded=loaded,
        trained=trained,
        code=code,
        data=data,
        files=files,
        notes=notes,
        on_progress=on_progress,
    )


def _rebased(data: DataSpec, *, folder: str | None) -> DataSpec:
    """Return the section with relative paths below a folder; as it is if that is the current one."""
    if folder is None or Path(folder) == Path.cwd():
        return data
    source = data.tokenizer.from_pretrained
    tokenizer = data.tokenizer.model_copy(update={"from_pretrained": source and _below(folder, source)})
    mixture = tuple(part.model_copy(update=_paths_below(folder, part)) for part in data.mixture)
    return data.model_copy(update={**_paths_below(folder, data), "mixture": mixture, "tokenizer": tokenizer})


def _paths_below(folder: str, origin: DataSpec | MixturePart) -> dict[str, Any]:
    files = origin.files and tuple(_below(folder, pattern) for pattern in origin.files)
    dataset = origin.dataset
    if dataset is not None and leads_to_folder(Path(folder, dataset)):  # otherwise the name of one on the hub
        dataset = _below(folder, dataset)
    return {"files": files, "dataset": dataset}


def _below(folder: str, path: str) -> str:
    return path if "://" in path or path.startswith(("/", "~")) else f"{folder}/{path}"


def _resolve(
    inputs: _Inputs,
    *,
    find_hardware: Callable[[JobSpec], HardwareInfo],
    count_slots: Callable[[HardwareInfo, JobSpec], int],
    links: ClusterLinks | None = None,
    is_draft: bool = False,
) -> Plan:
    trained, code = inputs.trained, inputs.code
    corpus = _prepared(inputs)
    model = _inspected(inputs, vocabulary=vocabulary_of(corpus), corpus=corpus)
    teacher = inspect_teacher(trained, vocabulary=vocabulary_of(corpus))
    teacher = with_stored_size(teacher, job=trained.job, corpus=corpus)
    _require_isolation(trained, model)
    with _with_lines(trained):
        found = find_hardware(trained.job)
        links = links or (local_links(found, trained.job) if find_hardware is hardware else None)
        plan = make_plan(
            trained.job,
            model=model,
            corpus=corpus,
            hardware=found,
            files=inputs.files,
            teacher=teacher,
            links=links.interconnect if links is not None else None,
        )
    _require_held_out(plan, inputs.loaded)
    ask = partial(with_outputs, only_if_computed=is_draft, on_progress=inputs.on_progress)
    plan = replace(plan, corpus=ask(corpus, job=trained.job, find_model=lambda: model))
    plan = _with_inits(replace(with_view(plan), code=code, templates=inputs.loaded.templates), trained)
    plan = _with_search(with_tasks(plan, inputs.loaded), inputs.loaded, count_slots=count_slots)
    return with_forecast(plan, links=links)


def _cached(inputs: _Inputs) -> CorpusInfo | None:
    """The corpus of a job, if it was prepared before."""
    return find_corpus(inputs.data, cache_dir=default_cache_dir(), code_digest=_digest_of(inputs.code))


def _prepared(inputs: _Inputs) -> CorpusInfo:
    with _with_data_lines(inputs.loaded):
        return prepare_corpus(
            inputs.data,
            cache_dir=default_cache_dir(),
            on_progress=inputs.on_progress,
            code_digest=_digest_of(inputs.code),
        )


def _digest_of(code: CodeInfo | None) -> str | None:
    return code.digest if code is not None else None


def _with_inits(plan: _PlanT, loaded: LoadedJob) -> _PlanT:
    """Add the checkpoints that a job starts from. Raises: JobFileError if one cannot be read."""
    model = loaded.job.model
    key = "model.from_pretrained"
    try:
        init = init_info(model.from_pretrained)
        key = "model.lora.init_from"
        return replace(plan, init=init, adapters_init=init_info(model.adapters_from))
    except CheckpointError as error:
        raise loaded.source.error(key, str(error), show_value=False) from error


def _inspected(inputs: _Inputs, *, vocabulary: Vocabulary, corpus: CorpusInfo | None = None) -> ModelInfo:
    found = inspect_model(inputs.trained, vocabulary=vocabulary, code=inputs.code, corpus=corpus)
    return replace(found, notes=(*found.notes, *inputs.notes, *reference_notes(inputs.trained.job, found)))


def _is_small(data: DataSpec, files: CorpusFiles) -> bool:
    """Whether a corpus is prepared in seconds, so that a dry run can say how many tokens and passes it has."""
    is_plain = all("," not in kind for pattern in files.patterns for kind in pattern.kinds)  # not compressed
    return data.source is None and is_plain and files.num_files <= _SMALL_FILES and files.size_bytes <= _SMALL_BYTES


@contextmanager
def _with_lines(loaded: LoadedJob) -> Iterator[None]:
    """Add the line of the job file to a PlanError about one of its keys. Raises: JobFileError."""
    try:
        yield
    except PlanError as error:
        if error.job_key is None:
            raise
        raise loaded.source.error(error.job_key, error.problem) from error


@contextmanager
def _with_data_lines(loaded: LoadedJob) -> Iterator[None]:
    """Add the line of the job file to a DataError that begins with a key of it."""
    try:
        yield
    except DataError as error:
        text = str(error)
        named = re.match(r"(data(?:\.\w+|\[\d+\])+): ", text)
        key = named[1] if named is not None else ""
        for number, pattern in enumerate(loaded.job.data.files or ()):
            key = f"data.files[{number}]" if text.startswith(f"data.files: {pattern} ") else key
        if not key:
            raise
        locations = loaded.source.locations
        location = locations.get(key) or locations.get(key.partition("[")[0])
        if location is None or location.line is None:
            raise
        raise DataError(f"{loaded.source.path}:{location.line}: {text}") from error


def with_directions(loaded: LoadedJob, code: CodeInfo | None) -> LoadedJob:
    """Return the job with the direction of its search's metric, which an objective of the user's own may report.

    Raises: JobFileError for a metric that the objective does not report.
    """
    job = loaded.job
    try:
        directions = code.metric_directions if code is not None else {}
        parts = [part.name for part in job.data.mixture]
        search = check_metrics(job.training, job.search, of_user=directions, parts=parts)
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
    metric = loaded.job.search.metric if loaded.job.search is not None else ""
    stopping = plan.job.training.early_stopping
    if stopping is not None and stopping.metric.startswith(METRIC_PREFIX):
        return
    missing = {f"eval/loss/{p.name}" for p in plan.corpus.parts if not p.corpus.num_held_out_sequences}
    is_missing = metric in missing or (stopping is not None and stopping.metric in missing)
    if plan.corpus.num_held_out_sequences and not is_missing:
        return
    if metric.startswith("eval/"):
        use = f"trials cannot be compared by {metric}"
    elif stopping is not None:
        use = f"training.early_stopping cannot measure {stopping.metric}"
    else:
        return
    raise loaded.source.error(
        "data.held_out", f"holds out no full sequence of {plan.corpus.seq_len} tokens, so {use}; raise it"
    )
