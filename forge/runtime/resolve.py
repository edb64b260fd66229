"""From a job file to a plan: prepare the corpus, inspect the model, probe the hardware, then call `make_plan`.

`make_plan` is pure; everything it needs to know about this machine and the job's files is gathered here. Nothing is
started and no run folder is created.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from forge.config.data import TokenizerSpec
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.overrides import check_space, trial_job, usual_values
from forge.data.prepare import PrepareProgress, default_cache_dir, prepare
from forge.data.tokenizer import load_tokenizer
from forge.plan.inputs import CorpusInfo, HardwareInfo
from forge.plan.plan import Plan, make_plan
from forge.plan.search import plan_search
from forge.runtime.probe import hardware, model_facts, places_here


def resolve(
    loaded: LoadedJob,
    *,
    is_dry_run: bool,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    find_hardware: Callable[[JobSpec], HardwareInfo] = hardware,
    count_slots: Callable[[HardwareInfo, JobSpec], int] = places_here,
) -> Plan:
    """Make the plan of a job.

    For a search, this is the plan of the trial with the job's own values, plus `plan.search`; every value of the
    search space is validated against the job's types first.

    Args:
        is_dry_run: do not prepare the corpus, unless `training.epochs` makes the number of steps depend on it.
        on_progress: called while the corpus is prepared.
        find_hardware: returns what one worker gets on the machines where the job will run.
        count_slots: returns how many workers fit on those machines.

    Raises: JobFileError, DataError, PlanError.
    """
    if loaded.job.search is not None:
        check_space(loaded)
        plan = resolve(
            replace(loaded, job=trial_job(loaded.job, usual_values(loaded.job))),
            is_dry_run=is_dry_run,
            on_progress=on_progress,
            find_hardware=find_hardware,
        )
        _require_held_out(plan, loaded)
        search = plan_search(loaded.job, loaded.job.search, num_places=count_slots(plan.hardware, loaded.job))
        return replace(plan, job=loaded.job, search=search)
    job = loaded.job
    corpus: CorpusInfo | None = None
    if not is_dry_run or job.training.epochs is not None:
        corpus = prepare(job.data, cache_dir=default_cache_dir(), on_progress=on_progress)
        vocab_size, eot_id = corpus.vocab_size, corpus.eot_id
    else:
        vocab_size, eot_id = _announced_vocabulary(job.data.tokenizer)
    model = model_facts(loaded, vocab_size=vocab_size, eot_id=eot_id)
    return make_plan(job, model=model, corpus=corpus, hardware=find_hardware(job))


def _require_held_out(plan: Plan, loaded: LoadedJob) -> None:
    """Raises: JobFileError if trials are compared by an `eval/` metric but no sequence is held out for it."""
    assert loaded.job.search is not None, "called for searches only"
    metric, corpus = loaded.job.search.metric, plan.corpus
    if metric.startswith("eval/") and corpus is not None and not corpus.num_held_out_sequences:
        raise loaded.source.error(
            "data.held_out",
            f"holds out no full sequence of {corpus.seq_len} tokens, so trials cannot be compared by {metric}; "
            "raise it",
        )


def _announced_vocabulary(spec: TokenizerSpec) -> tuple[int, int]:
    """Vocabulary size and end-of-text id, known before the corpus is prepared; tokenizers forge trains use id 0."""
    if spec.from_pretrained is None:
        return spec.vocab_size, 0
    tokenizer = load_tokenizer(spec.from_pretrained)
    return tokenizer.vocab_size, tokenizer.eot_id
