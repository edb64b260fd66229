"""The plan: a job resolved for every world size. It is the contract between the client and the cluster.

Input: the job and what was measured about its model, corpus and hardware (`forge.plan.inputs`). Output: everything
that can be decided without training, such as the batch split at every world size, DeepSpeed's configuration,
memory, FLOPs and the number of steps. Planning is pure: equal input gives equal bytes, written as `plan.json`.

A dry run ends with a `DraftPlan`; a `Plan` also has the prepared corpus, and only a `Plan` can be run.

Over 400 lines, because the plan's fields, its file and the checks of a job that need the model or the corpus change
together.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forge.config.errors import invalid_value
from forge.config.job import JobSpec
from forge.config.templates import with_templates, without_templates
from forge.config.training import MAX_STEPS
from forge.errors import DataError, PlanError
from forge.foreign import from_record, parse_object, typed
from forge.objective.registry import OBJECTIVES
from forge.plan.data_view import DataView
from forge.plan.durations import Forecast
from forge.plan.flops import flops_of_job
from forge.plan.inputs import (
    CodeInfo,
    CorpusFiles,
    CorpusInfo,
    HardwareInfo,
    InitInfo,
    ModelInfo,
    TeacherInfo,
)
from forge.plan.mixture import as_read, epoch_sequences
from forge.plan.parameter_groups import groups_of, optimizer_state
from forge.plan.schedule import FormerLength, ScheduleSteps, schedule_steps
from forge.plan.search import SearchPlan
from forge.plan.sequence_parallel import require_degree
from forge.plan.speed import (
    require_attention,
    require_checkpointing,
    require_compilable,
    require_fp8,
    require_liger,
)
from forge.plan.throughput import Interconnect
from forge.plan.warnings import corpus_warnings
from forge.plan.world_size import WorldSizePlan, listed_sizes, plan_world_size
from forge.process import one_line

FORMAT_VERSION = 3
_OPTIONAL = (
    *("code", "search", "pause_at", "files", "view", "warnings", "templates", "init", "teacher"),
    *("former_lengths", "forecast", "task_examples", "links"),
)
"""Fields of a plan that are left out of its file if they are empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """A job resolved for every world size it may run at, without its corpus: the result of a dry run."""

    job: JobSpec
    model: ModelInfo
    hardware: HardwareInfo
    total_steps: int
    tokens_per_step: int
    flops_per_token: int
    worlds: tuple[WorldSizePlan, ...]
    """Of the numbers of workers that `listed_sizes` chooses from `resources.workers`, ascending."""
    code: CodeInfo | None = None
    """None if the job has no code of its own."""
    search: SearchPlan | None = None
    """None if the job is a single run."""
    files: CorpusFiles | None = None
    """The files of the corpus, looked at before they are read."""
    view: DataView | None = None
    """What training sees of the corpus, or of a sample of it; None if nothing of it was prepared."""
    warnings: tuple[str, ...] = ()
    """What was asked for and cannot be had; shown with the plan."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Texts of the job file with `${env:NAME}`, by JSON pointer (`forge.config.templates`); files keep them."""
    pause_at: int | None = None
    """Step after which a trial of a population pauses, with a checkpoint, until all trials have reached it."""
    init: InitInfo | None = None
    """The checkpoint that the weights come from; None if they come from elsewhere."""
    adapters_init: InitInfo | None = None
    """The checkpoint that the adapters come from; None if they are new, or there are none."""
    teacher: TeacherInfo | None = None
    """Of a distillation."""
    tasks: Mapping[str, str] = field(default_factory=dict)
    """Texts of the task files of `evaluate`, by their paths."""
    task_examples: str | None = None
    """Digest of the examples of the tasks (`forge.runs.task_examples`); None until a run is started."""
    former_lengths: tuple[FormerLength, ...] = ()
    """Of a run that was resumed with another length, the oldest first (`forge.plan.lengths`)."""
    forecast: Forecast | None = None
    """How long it takes (`forge.plan.forecast`); None if no forecast was made."""
    links: Interconnect | None = None
    """Between the GPUs; None if assumed. Sizes that are not listed are planned with it."""

    @property
    def num_unlisted(self) -> int:
        """How many numbers of workers in `resources.workers` are not in `worlds`."""
        workers = self.job.resources.workers
        return workers.high - workers.low + 1 - len(self.worlds)

    @property
    def total_tokens(self) -> int:
        """Predicted tokens over the whole run."""
        return self.total_steps * self.tokens_per_step

    @property
    def schedule_steps(self) -> ScheduleSteps:
        """The lengths of the learning rate schedule in steps; a warm-up that an earlier length has ended stays."""
        lengths = schedule_steps(
            self.job.training.schedule, total_steps=self.total_steps, tokens_per_step=self.tokens_per_step
        )
        former = self.former_lengths[-1] if self.former_lengths else None
        if former is not None and former.until_step >= former.schedule.warmup:
            return dataclasses.replace(lengths, warmup=former.schedule.warmup)
        return lengths

    def for_world_size(self, world_size: int) -> WorldSizePlan:
        """Return the part of the plan for one world size, computed if it is not listed.

        Raises: PlanError if the job does not allow it.
        """
        for world in self.worlds:
            if world.batch.world_size == world_size:
                return world
        workers = self.job.resources.workers
        if not workers.low <= world_size <= workers.high:
            raise PlanError(f"the job allows {workers} workers, not {world_size}")
        (world,) = _plan_sizes(
            (world_size,),
            job=self.job,
            model=self.model,
            hardware=self.hardware,
            teacher=self.teacher,
            links=self.links,
        )
        return world


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(DraftPlan):
    """A job resolved completely, its prepared corpus included: everything a run needs."""

    corpus: CorpusInfo


def make_draft(
    job: JobSpec,
    *,
    model: ModelInfo,
    hardware: HardwareInfo,
    files: CorpusFiles | None = None,
    teacher: TeacherInfo | None = None,
    links: Interconnect | None = None,
) -> DraftPlan:
    """Resolve a job whose corpus is not prepared.

    Args:
        files: of the corpus, if they were looked at.
        teacher: of a distillation.
        links: between the GPUs; by default assumed, as `cluster_links` says.

    Raises: PlanError if the job cannot be run: more workers than sequences in a batch, sequences longer than the
        model's positions, examples in one row that the model does not keep apart, or a length in epochs, which only
        the corpus turns into steps.
    """
    resolved = _resolved(
        job, corpus=None, model=model, hardware=hardware, files=files, teacher=teacher, links=links
    )
    return DraftPlan(**resolved)


def make_plan(
    job: JobSpec,
    *,
    model: ModelInfo,
    corpus: CorpusInfo,
    hardware: HardwareInfo,
    files: CorpusFiles | None = None,
    teacher: TeacherInfo | None = None,
    links: Interconnect | None = None,
) -> Plan:
    """Resolve a job.

    Args:
        files: of the corpus, if they were looked at.
        teacher: of a distillation.
        links: between the GPUs; by default assumed, as `cluster_links` says.

    Raises: PlanError as `make_draft`, or if the model's vocabulary is smaller than the tokenizer's; DataError if
        the objective predicts tokens and the corpus has a target that is none.
    """
    resolved = _resolved(
        job, corpus=corpus, model=model, hardware=hardware, files=files, teacher=teacher, links=links
    )
    return Plan(**resolved, corpus=corpus)


def packing_problem(job: JobSpec, model: ModelInfo) -> str | None:
    """Return why the model cannot be trained on rows of several examples, and what to use; None if it can.

    An objective of the user's own calls the model itself, and may keep the examples apart by other means.
    """
    objective = OBJECTIVES.get(job.training.objective)
    if job.data.packing != "examples" or model.isolation_problem is None:
        return None
    if objective is None or objective.separates_examples:
        return None
    instead = "none, or concatenate" if job.data.format == "text" else "none"
    return f"{model.isolation_problem}, so the examples of a sequence would see each other; use {instead}"


def plan_to_json(plan: DraftPlan, *, is_file: bool = False) -> str:
    """Return the plan as canonical JSON: sorted keys, no NaN, final newline; equal plans give equal bytes.

    Args:
        is_file: keep `${env:NAME}` of the job file instead of the variables' values, which every reader then needs.
    """
    body = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    body["job"] = written_job(plan) if is_file else plan.job.model_dump(mode="json")
    for name in _OPTIONAL:
        if body[name] is None or body[name] in ((), {}):
            del body[name]
    body["format_version"] = FORMAT_VERSION
    return json.dumps(_plain(body), sort_keys=True, indent=1, allow_nan=False) + "\n"


def written_job(plan: DraftPlan) -> dict[str, Any]:
    """Return the job as files and trackers show it: with `${env:NAME}` instead of the variables' values."""
    body: dict[str, Any] = with_templates(plan.job.model_dump(mode="json"), plan.templates)
    return body


def plan_from_json(text: str | bytes) -> Plan:
    """Read what `plan_to_json` wrote, and check the type of every value: a plan may come from elsewhere.

    Raises: PlanError for another format, or the draft of a dry run.
    """
    try:
        body = parse_object(text)
        if body.pop("format_version", None) != FORMAT_VERSION:
            raise PlanError(f"this plan was written by another version of forge (this one reads {FORMAT_VERSION})")
        if "corpus" not in body:
            raise PlanError("this plan has no corpus: it was made by a dry run, and cannot be run")
        templates = typed(dict[str, str], body.get("templates", {}), where="templates")
        job = JobSpec.model_validate_json(json.dumps(without_templates(body.pop("job", None), templates)))
        plan = from_record(Plan, body | {"job": job}, nan_for_null=True)
        _require_not_negative(plan)
    except (ValueError, RecursionError) as error:
        raise PlanError(invalid_value(error) or f"not a plan of forge: {one_line(error)}") from error
    return plan


def _require_not_negative(value: Any, *, name: str = "") -> None:
    """Raises: ValueError if a whole number is negative; none in a plan can be."""
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} is negative: {value}")
    if isinstance(value, tuple):
        for item in value:
            _require_not_negative(item, name=name)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            _require_not_negative(getattr(value, f.name), name=f.name)


def _resolved(
    job: JobSpec,
    *,
    model: ModelInfo,
    hardware: HardwareInfo,
    corpus: CorpusInfo | None,
    files: CorpusFiles | None,
    teacher: TeacherInfo | None,
    links: Interconnect | None,
) -> dict[str, Any]:
    """Return the fields that a draft and a plan share."""
    _check_model(job, model, corpus)
    require_compilable(job, model)
    require_checkpointing(job, model)
    require_attention(job, model=model, device=hardware.device)
    require_liger(job, model=model, device=hardware.device)
    require_fp8(job, model=model, hardware=hardware)
    _check_targets(job, corpus)
    _check_class_weights(job, corpus)
    _check_quantized(job, hardware)
    require_degree(job, model)
    if (packing := packing_problem(job, model)) is not None:
        raise PlanError(f"data.packing: {packing}")
    read = None if corpus is None else as_read(job.data, corpus)
    tokens_per_step = _tokens_per_step(job, read)
    total_steps = _total_steps(job, corpus, tokens_per_step=tokens_per_step)
    return {
        "job": job,
        "model": model,
        "hardware": hardware,
        "files": files,
        "warnings": (
            *((hardware.note,) if hardware.note else ()),
            *corpus_warnings(job, files=files, corpus=corpus, total_steps=total_steps),
        ),
        "total_steps": total_steps,
        "tokens_per_step": tokens_per_step,
        "flops_per_token": flops_of_job(job, model=model, corpus=read, teacher=teacher),
        "teacher": teacher,
        "worlds": _plan_sizes(
            listed_sizes(job.resources.workers),
            job=job,
            model=model,
            hardware=hardware,
            teacher=teacher,
            links=links,
        ),
        "links": links,
    }


def _plan_sizes(
    sizes: Sequence[int],
    *,
    job: JobSpec,
    model: ModelInfo,
    hardware: HardwareInfo,
    teacher: TeacherInfo | None,
    links: Interconnect | None,
) -> tuple[WorldSizePlan, ...]:
    """Plan numbers of workers, ascending; the same for the sizes that a plan lists and for the others.

    The largest, which the job file names, is planned first: an error of too small a batch is about this number.
    """
    state = optimizer_state(groups_of(job.training, model))
    worlds = [
        plan_world_size(
            job, model=model, hardware=hardware, world_size=size, state=state, teacher=teacher, links=links
        )
        for size in reversed(sizes)
    ]
    return tuple(reversed(worlds))


def _tokens_per_step(job: JobSpec, corpus: CorpusInfo | None) -> int:
    """Predicted tokens of a step; of padded sequences, their mean."""
    size = job.training.global_batch_size
    if corpus is None or job.data.packing == "concatenate":
        return size * job.data.seq_len
    return max(1, round(size * corpus.num_train_tokens / corpus.num_train_sequences))


def _check_model(job: JobSpec, model: ModelInfo, corpus: CorpusInfo | None) -> None:
    if corpus and corpus.vocab_size > model.vocab_size:
        is_new = job.model.from_pretrained is None
        what_to_do = "leave it out to take the tokenizer's"
        if not is_new:
            what_to_do = "set model.resize_embeddings: true to add rows, each the mean of the existing ones"
        raise PlanError(
            f"the tokenizer has {corpus.vocab_size:,} tokens, but the embedding has {model.vocab_size:,} rows: "
            f"{corpus.vocab_size - model.vocab_size:,} tokens would have none; {what_to_do}",
            job_key="model.vocab_size" if is_new else "model.from_pretrained",
        )
    if model.look_ahead_problem is not None and job.training.objective in OBJECTIVES:
        origin = next(key for key in ("architecture", "from_pretrained", "class") if getattr(job.model, key))
        raise PlanError(
            f"{model.look_ahead_problem}, so it would learn to copy the next token, not to predict it; "
            "take a model that sees only earlier tokens",
            job_key=f"model.{origin}",
        )
    if model.max_seq_len is not None and job.data.seq_len > model.max_seq_len:
        problem = f"the model has positions for {model.max_seq_len:,} tokens; lower it or raise"
        problem = f"is {job.data.seq_len:,}, but {problem} model.max_position_embeddings"
        raise PlanError(problem, job_key="data.seq_len")


def _check_targets(job: JobSpec, corpus: CorpusInfo | None) -> None:
    """Raises: DataError if the objective predicts tokens and a target is none."""
    objective = OBJECTIVES.get(job.training.objective)
    if corpus is not None and corpus.foreign_target and objective is not None and objective.predicts_tokens:
        raise DataError(
            f"{corpus.foreign_target} is no token id, but training.objective {job.training.objective} predicts "
            f"tokens: targets must be in 0..{corpus.vocab_size - 1}, or -100 where nothing is predicted"
        )


def _check_class_weights(job: JobSpec, corpus: CorpusInfo | None) -> None:
    """Raises: PlanError if there is another number of weights than of labels."""
    given, labels = job.training.classification.class_weights, corpus.labels if corpus is not None else None
    if labels is not None and not isinstance(given, str) and len(given) != len(labels.names):
        problem = f"has {len(given)} weights, but the data have {len(labels.names)} labels"
        raise PlanError(problem, job_key="training.classification.class_weights")


def _check_quantized(job: JobSpec, hardware: HardwareInfo) -> None:
    """Raises: PlanError if weights or gradients are to be quantised on a CPU."""
    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(job.training.zero, key) and hardware.device == "cpu":
            problem = "needs GPUs: DeepSpeed quantises what it sends with CUDA kernels, and the device is the CPU"
            raise PlanError(f"{problem}; leave it out", job_key=f"training.zero.{key}")


def _total_steps(job: JobSpec, corpus: CorpusInfo | None, *, tokens_per_step: int) -> int:
    """Raises: PlanError if the length is beyond every limit, or shorter than the warm-up."""
    steps = _length_in_steps(job, corpus, tokens_per_step=tokens_per_step)
    if steps > MAX_STEPS:
        key = "total_tokens" if job.training.total_tokens is not None else "epochs"
        raise PlanError(f"is {steps:,} steps; a run has at most {MAX_STEPS:,}", job_key=f"training.{key}")
    if (problem := job.training.schedule_problem(steps, tokens_per_step=tokens_per_step)) is not None:
        raise PlanError(problem[1], job_key=f"training.schedule.{problem[0]}")
    return steps


def _length_in_steps(job: JobSpec, corpus: CorpusInfo | None, *, tokens_per_step: int) -> int:
    training = job.training
    if training.total_steps is not None:
        return training.total_steps
    if training.total_tokens is not None:
        return -(-training.total_tokens // tokens_per_step)
    assert training.epochs is not None, "JobSpec requires exactly one of the three"
    if corpus is None:
        raise PlanError("training.epochs needs a prepared corpus: without it the number of steps is unknown")
    return math.ceil(training.epochs * epoch_sequences(job.data, corpus) / training.global_batch_size)


def _plain(value: Any) -> Any:
    """Return dataclasses as dicts, tuples as lists, and nan as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
