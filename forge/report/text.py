"""Describe a plan, a run and a search as (name, text) pairs, for terminals and HTML pages. The module is long
because plan, run and search share their words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from forge.config.job import JobSpec
from forge.config.overrides import trial_job, usual_values
from forge.config.search import SchedulerSpec, SearcherSpec
from forge.config.training import TrainingSpec
from forge.plan.checkpoint_interval import interval_text
from forge.plan.inputs import CodeInfo, CorpusFiles, InitInfo, ModelInfo, SkippedFiles, TeacherInfo
from forge.plan.mixture import epoch_sequences
from forge.plan.plan import DraftPlan, Plan
from forge.report.data_view import corpus_facts, view_facts
from forge.report.forecast_text import forecast_facts
from forge.report.groups_text import group_facts
from forge.report.optimizer_text import optimizer_facts
from forge.report.score_text import score_text, tasks_text
from forge.report.sequence_text import sequence_facts
from forge.report.speed_text import speed_facts
from forge.report.time_limits import deadline_facts
from forge.report.trial_rows import shown
from forge.runs.event_text import short, workers
from forge.runs.goodput_report import BUCKETS, GoodputReport
from forge.runs.reader import RunSummary
from forge.runs.scores import newest_scores, read_scores
from forge.train.lr_schedule import length_change
from forge.units import counted, format_bytes, format_count, format_duration

_MAX_PATTERNS, _MAX_REASONS = 8, 6


def headline(plan: DraftPlan) -> str:
    """Describe the size of a job in a few words; of examples, only the predicted tokens are counted."""
    with_loss = " with loss" if isinstance(plan, Plan) and plan.corpus.packing != "concatenate" else ""
    return (
        f"{'each trial: ' if plan.search else ''}"
        f"{format_count(plan.model.num_parameters)} parameters, "
        f"{format_count(plan.total_tokens)} tokens{with_loss}, {counted(plan.total_steps, 'step')}"
    )


def plan_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe model, data, training and hardware of a job.

    For a search, of the job with its own values, or with the first of the space if the space does not contain them;
    each of these values says that it is searched.
    """
    job = _trained(plan.job)
    training, searched = job.training, set(plan.job.search.space) if plan.job.search is not None else set()

    def said(key: str, value: object) -> str:
        return f"{value} (searched)" if key in searched else f"{value}"

    num_positions = plan.total_steps * training.global_batch_size * job.data.seq_len
    total_flops = plan.flops_per_token * num_positions
    facts = [
        (
            "model",
            f"{plan.model.class_name}, {plan.model.num_layers} layers of {plan.model.hidden_size}"
            f"{_trained_share(plan.model)}",
        ),
        (
            "batch",
            f"{said('training.global_batch_size', training.global_batch_size)} sequences of "
            f"{said('data.seq_len', job.data.seq_len)} tokens, the same at every number of workers",
        ),
        ("training", f"{said('training.precision', training.precision)}, "
         f"ZeRO {said('training.zero.stage', training.zero.stage)}, "
         f"lr {said('training.optimizer.lr', f'{training.optimizer.lr:g}')} "
         f"({said('training.schedule.kind', training.schedule.kind)}, "
         f"{said('training.schedule.warmup', plan.schedule_steps.warmup)} "
         f"{'step' if plan.schedule_steps.warmup == 1 else 'steps'} of warm-up)"),
        *group_facts(plan),
        *optimizer_facts(plan), *sequence_facts(plan), *speed_facts(plan),
        ("arithmetic", f"{format_count(plan.flops_per_token)}FLOP per token, "
         f"{format_count(total_flops)}FLOP in all"),
        ("hardware", _hardware(plan)),
        *forecast_facts(plan),
        *checkpoint_facts(plan),
        *_memory_facts(plan),
    ]  # fmt: skip
    data: list[tuple[str, str]] = []
    if isinstance(plan, Plan):
        passes = plan.total_steps * training.global_batch_size / max(1, epoch_sequences(job.data, plan.corpus))
        data = corpus_facts(plan.corpus, passes=passes)
    data += view_facts(plan.view) if plan.view is not None else []
    data += _masks(training) if training.objective == "masked-lm" else []
    facts[1:1] = [*_files(plan.files), ("special tokens", _special_tokens(job)), *data]
    if plan.code is not None:
        facts.append(("code", _code(job, plan.code)))
    if plan.init is not None:
        facts.append(("weights", _init(plan.init)))
    if plan.adapters_init is not None:
        facts.append(("adapters", _init(plan.adapters_init)))
    if plan.teacher is not None:
        facts.append(("teacher", _teacher(plan.teacher, job)))
    if plan.job.evaluate is not None:
        facts.append(("evaluate", tasks_text(plan, spec=plan.job.evaluate)))
    if plan.former_lengths:
        facts.append(("length", _length_change(plan)))
    return facts + [("note", note) for note in plan.model.notes]


def _memory_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Name what else than the model takes memory of each worker."""
    if not plan.worlds:
        return []
    need, facts = plan.worlds[0].memory, []
    if need.libraries_bytes:
        facts.append(f"{format_bytes(need.libraries_bytes)} {_PART} Python, torch, DeepSpeed and transformers")
    if need.standby_bytes:
        facts.append(
            f"{format_bytes(need.standby_bytes)} {_PART} the CUDA context of its standby process (assumed)"
        )
    return [("memory", fact) for fact in facts]


_PART = "of each worker's ~total are"


def checkpoint_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe the interval between checkpoints that `auto` begins with; empty if the job states it."""
    text = interval_text(plan)
    return [("checkpoints", text)] if text is not None else []


def _teacher(teacher: TeacherInfo, job: JobSpec) -> str:
    use = "whole in every worker"
    if not job.holds_teacher:
        size = "" if teacher.stored_bytes is None else f"{format_bytes(teacher.stored_bytes)} "
        use = f"asked once, its outputs stored with the data ({size}on the disk)"
    count = format_count(teacher.num_parameters)
    return f"{teacher.class_name}, {count} parameters, {use}, from {teacher.source}, digest {teacher.digest[:12]}"


def _init(init: InitInfo) -> str:
    """Describe the checkpoint or the adapter folder that a run starts from."""
    if init.step is None:
        return f"those of peft in {init.source}, digest {init.digest[:12]}"
    score = "" if init.metric_value is None else f", {init.metric} {init.metric_value:.4f}"
    best = " (the best of its run)" if init.is_best else ""
    return f"step {init.step:,}{score}{best}, from {init.source}, digest {init.digest[:12]}"


def _masks(training: TrainingSpec) -> list[tuple[str, str]]:
    words = "whole words, " if training.masking.whole_words else ""
    share = f"{words}{training.masking.share:.1%} of each sequence"
    return [("masks", f"{share}, others at every step; only they carry loss")]


def _length_change(plan: DraftPlan) -> str:
    """Describe what a resumed run with another length does from its next step on."""
    change, kind = length_change(plan), plan.job.training.schedule.kind
    before = change.learning_rate_before
    rates = f"{change.learning_rate:.3g} at step {change.from_step:,}"
    if math.isfinite(before):
        rates = f"{before:.3g} at step {change.from_step - 1:,} and {rates}"
    return (
        f"{change.total_steps:,} steps instead of {change.total_steps_before:,}; from step {change.from_step:,} on "
        f"the {kind} schedule follows the new length: learning rate {rates}"
    )


def _trained_share(model: ModelInfo) -> str:
    """Say how much of a model is trained, if that is not all of it."""
    if model.num_trainable_parameters == model.num_parameters:
        return ""
    share = 100 * model.num_trainable_parameters / model.num_parameters
    return f"; {format_count(model.num_trainable_parameters)} parameters are trained ({share:.2g} %)"


def _files(files: CorpusFiles | None) -> list[tuple[str, str]]:
    """Describe the files of a corpus: one row for each pattern, and one for what is skipped of it."""
    rows: list[tuple[str, str]] = []
    for found in files.patterns[:_MAX_PATTERNS] if files is not None else ():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.items())
        size = f", {format_bytes(found.size_bytes)}" if found.size_bytes else ""
        rows.append(("files", f"{found.pattern}: {counted(found.num_files, 'file')}{size} ({kinds})"))
        rows += [("skipped", _skipped(one)) for one in found.skipped[:_MAX_REASONS]]
    if files is not None and len(files.patterns) > _MAX_PATTERNS:
        rest = files.patterns[_MAX_PATTERNS:]
        num_files = sum(found.num_files for found in rest)
        rows.append(("files", f"and {len(rest):,} more patterns with {counted(num_files, 'file')}"))
    return rows


def _skipped(skipped: SkippedFiles) -> str:
    examples = ", ".join(skipped.examples[:2]) + (", …" if skipped.count > 2 else "")
    return f"{skipped.count:,}x {skipped.reason}: {examples}"


def _special_tokens(job: JobSpec) -> str:
    if job.data.special_tokens == "parse":
        return "parsed where the text spells them (data.special_tokens: parse)"
    return "ordinary characters where the text spells them (data.special_tokens: text)"


def _code(job: JobSpec, code: CodeInfo) -> str:
    names = ", ".join(job.user_classes.values()) or "the job names no class in it"
    size = f"{code.num_files} file{'s' if code.num_files > 1 else ''}, {format_bytes(code.size_bytes)}"
    return f"{job.code}: {size}, digest {code.digest[:12]}; {names}"


def search_facts(plan: DraftPlan) -> list[tuple[str, str]]:
    """Describe the space, searcher, scheduler and limits of a search; empty for a job without one."""
    search = plan.job.search
    if search is None or plan.search is None:
        return []
    widest = max(map(len, search.space))
    keys = [f"{key:<{widest}}  {entry}" for key, entry in search.space.items()]
    facts = [("searched" if text is keys[0] else "", text) for text in keys]
    facts += [
        ("trials", f"{_trials(plan)}, {plan.search.trials_at_once} at once with {_each(plan.job)} each "
         f"(room for {workers(plan.search.num_slots)})"),
        ("searcher", _searcher(search.searcher)),
        ("scheduler", _scheduler(search.scheduler)),
        ("metric", f"{search.metric}, {'less' if search.direction == 'min' else 'more'} is better"),
    ]  # fmt: skip
    limits = [f"{search.max_hours:g} hours"] if search.max_hours is not None else []
    limits += [f"{search.max_usd:g} USD"] if search.max_usd is not None else []
    facts += [("limits", ", ".join(limits))] if limits else []
    proxy = ", ".join(f"{key}={shown(value)}" for key, value in search.proxy.items())
    return [*facts, ("proxy", f"{proxy} in every trial")] if proxy else facts


def summary_facts(run: RunSummary, goodput: GoodputReport) -> list[tuple[str, str]]:
    """Describe the results and files of a run; `forge.runs.reader.failure_of` says why it ended early."""
    unigram = run.plan.corpus.unigram_perplexity
    facts: list[tuple[str, str]] = []
    if run.last:
        facts.append(("loss", f"{number(run.last['train/loss'], '.4f')} on the last batch"))
    for weights, name in (("current", "held out"), ("ema", "held out, ema")):
        evaluated = run.newest("Evaluated", weights=weights)
        if evaluated:
            text = evaluation_text(evaluated)
            if weights == "current" and "perplexity" in evaluated["metrics"] and math.isfinite(unigram):
                text += f" (a unigram model of the same tokens has {unigram:.1f})"
            facts.append((name, text))
    facts += [(f"task {score.task}", score_text(score)) for score in newest_scores(read_scores(run.folder))]
    if run.last:
        facts.append(
            ("speed", f"{number(goodput.tokens_per_s, ',.0f')} tokens/s, MFU {number(goodput.mfu, '.3f')} "
             f"(mean of {counted(goodput.num_steps, 'step')})")
        )  # fmt: skip
    facts.append(("wall time", _wall_time(goodput)))
    cost = run.newest("CostUpdated")
    if cost:
        facts.append(("cost", f"{cost['usd']:.2f} USD"))
    facts += deadline_facts(run)
    saved = run.newest("CheckpointSaved")
    changed = run.newest("CheckpointIntervalChanged")
    every = f" (now every {format_duration(changed['seconds'])})" if changed else ""
    facts += [("checkpoint", f"{saved['folder']}{every}")] if saved else []
    facts.append(("files", f"{run.folder} (report.html, metrics.jsonl, events.jsonl, logs, wandb)"))
    return facts


def _wall_time(goodput: GoodputReport) -> str:
    text = format_duration(goodput.wall_s)
    if goodput.num_sessions < 2:
        return text
    return f"{text} in {goodput.num_sessions} sessions, without {format_duration(goodput.between_s)} between them"


def step_text(step: Mapping[str, Any], *, total_steps: int) -> str:
    """Describe a step of `metrics.jsonl` on one line."""
    parts = [
        f"step {step['step']:>6}/{total_steps}",
        f"loss {number(step['train/loss'], '.4f')}",
        f"lr {number(step['train/learning_rate'], '.2e')}",
        f"{number(step['speed/tokens_per_s'], ',.0f')} tokens/s",
        f"MFU {number(step['speed/mfu'], '.2f')}",
    ]
    return "  ".join(parts)


def evaluating_text(event: Mapping[str, Any]) -> str:
    """Describe an EvaluationProgress event."""
    which = "" if event["weights"] == "current" else f" the {event['weights']} weights"
    return f"evaluating{which}: {event['num_done']:,} of {event['num_batches']:,} batches"


def evaluation_text(event: Mapping[str, Any]) -> str:
    """Describe the metrics of an Evaluated event: the loss, and whatever the objective reports."""
    values = {"loss": event["loss"]} | event["metrics"]
    formats = {"perplexity": ".2f"}
    return ", ".join(f"{name} {number(value, formats.get(name, '.4f'))}" for name, value in values.items())


def goodput_line(goodput: GoodputReport, *, width: int) -> str:
    """Summarise goodput in at most `width` characters; empty for a run on one node without changes."""
    is_quiet = not (
        goodput.changes or goodput.num_repeated_steps or goodput.num_preemptions or goodput.num_nodes > 1
    )
    if is_quiet or not goodput.num_steps:
        return ""
    words = [f"goodput {number(goodput.goodput, '.0%')}", counted(goodput.num_nodes, "node")]
    words += [counted(goodput.num_changes, "change")] if goodput.changes else []
    by_size = sorted(BUCKETS, key=lambda bucket: -goodput.seconds[bucket])
    words += [f"{bucket} {goodput.share(bucket):.0%}" for bucket in by_size if goodput.share(bucket) >= 0.005]
    while words and len("  ".join(words)) > width:
        words.pop()
    return "  ".join(words)


def replay_facts(goodput: GoodputReport, *, num_added: int, num_removed: int) -> list[tuple[str, str]]:
    """Describe what a replayed trace did and what of it the run noticed.

    Args:
        num_added, num_removed: simulated nodes that were started, those at the start included, and killed.
    """
    unseen = num_added - goodput.num_nodes_joined, num_removed - goodput.num_nodes_left
    seen = f"{goodput.num_nodes_joined:,} joined, {goodput.num_nodes_left:,} left"
    before = "; the others were lost before the run used them, or added when it was ending" if any(unseen) else ""
    return [
        ("trace", f"{counted(num_added, 'node')} added, {num_removed:,} removed"),
        ("run", f"{seen}{before}; {counted(goodput.num_preemptions, 'preemption')} while it used them"),
    ]


def goodput_facts(goodput: GoodputReport) -> list[tuple[str, str]]:
    """Describe the goodput of a run and what reduced it."""
    steps = f"{goodput.num_steps:,} new steps of {format_duration(goodput.ideal_step_s)}"
    faster = "; above 100% because steps of fewer workers took less time" if goodput.goodput > 1 else ""
    happened = [
        counted(goodput.num_changes, "change"),
        counted(goodput.num_preemptions, "preemption"),
        counted(goodput.num_failures, "failure"),
        f"{counted(goodput.num_repeated_steps, 'step')} repeated",
    ]
    return [
        ("goodput", f"{number(goodput.goodput, '.1%')} ({steps} in {format_duration(goodput.wall_s)}){faster}"),
        ("nodes", f"{number(goodput.node_goodput, '.1%')} of the available node time was spent on new steps"),
        ("changes", ", ".join(happened)),
    ]


def bucket_rows(goodput: GoodputReport) -> list[list[str]]:
    """Rows of bucket, seconds and share for every bucket with time in it, and for the wall time."""
    shown = [bucket for bucket in BUCKETS if goodput.seconds[bucket] > 0]
    rows = [[bucket, f"{goodput.seconds[bucket]:,.1f}", f"{goodput.share(bucket):.1%}"] for bucket in shown]
    return [*rows, ["wall time", f"{goodput.wall_s:,.1f}", "100.0%"]]


def change_rows(goodput: GoodputReport, *, limit: int) -> list[list[str]]:
    """Rows of the last changes: wall time until then, cause, workers, seconds until the next step, reason."""
    return [
        [
            format_duration(change.after_s),
            change.cause,
            f"{change.from_world_size or '-'} → {change.to_world_size or '-'}",
            "-" if change.seconds is None else format_duration(change.seconds),
            short(change.reason),
        ]
        for change in goodput.changes[-limit:]
    ]


def number(value: float | None, shape: str) -> str:
    """Format a value; `-` if it is None or not finite. From a million, as of a loss that grows, 4 digits."""
    if value is None or not math.isfinite(value):
        return "-"
    return format(value, ".4g" if shape == ".4f" and abs(value) >= 1e6 else shape)


def _trained(job: JobSpec) -> JobSpec:
    """Return the job itself; for a search, the job with the values that its plan was made with."""
    return job if job.search is None else trial_job(job, usual_values(job))


def _each(job: JobSpec) -> str:
    count = job.resources.workers
    return workers(count.low) if count.low == count.high else f"{count} workers"


def _trials(plan: DraftPlan) -> str:
    assert plan.search is not None, "called for searches only"
    if plan.search.num_combinations is None:
        return f"{plan.search.num_trials}"
    if plan.search.is_whole_grid:
        return f"all {plan.search.num_combinations} combinations"
    return f"{plan.search.num_trials} of {plan.search.num_combinations} combinations"


def _searcher(searcher: SearcherSpec) -> str:
    match searcher.kind:
        case "grid":
            return "grid"
        case "random":
            return f"random, seed {searcher.seed}"
    return f"optuna, seed {searcher.seed}, the first {searcher.startup_trials} at random"


def _scheduler(scheduler: SchedulerSpec) -> str:
    first = "the first evaluation" if scheduler.grace_steps is None else f"step {scheduler.grace_steps}"
    match scheduler.kind:
        case "none":
            return "none, every trial runs to its end"
        case "asha":
            factor = scheduler.reduction_factor
            return f"asha, at {first} and at every {factor} times as many steps the best 1 of {factor} continues"
        case "median":
            return f"median, from {first} on a trial worse than the median of the others is stopped"
    share = f"{scheduler.quantile:.0%}"
    return (
        f"{scheduler.kind}, every {scheduler.interval_steps} steps the worst {share} continue from the best {share}"
    )


def _hardware(plan: DraftPlan) -> str:
    hardware = plan.hardware
    memory = f", {format_bytes(hardware.memory_bytes)} a worker" if hardware.memory_bytes else ""
    return f"{'GPU' if hardware.device == 'cuda' else 'CPU'} {hardware.name}{memory}"
