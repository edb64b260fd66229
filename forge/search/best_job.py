"""`best.yaml`: the job with the best trial's values, ready for `forge train`.

It is the full job, never the proxy; comments at the top name the trial that the values come from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from forge.config.dump import dump_job
from forge.config.job import JobSpec
from forge.config.overrides import search_of, trial_job
from forge.config.search import SearchSpec
from forge.errors import printable
from forge.plan.inputs import CodeInfo
from forge.plan.plan import Plan
from forge.runs.trials import Trial, TrialTable


def best_job_yaml(plan: Plan, table: TrialTable, *, search_id: str) -> str | None:
    """The job with the best trial's values; None if no trial has an objective value.

    Raises: JobFileError if the plan is not of a search, or the values are valid for the proxy but not for the job.
    """
    search = search_of(plan.job)
    best = table.best(search.direction)
    if best is None:
        return None
    comments = [
        *_comments(search, best, search_id=search_id, num_trials=len(table.trials)),
        *_code(plan.code, search_id=search_id),
    ]
    job = trial_job(_terse(plan.job), best.values, is_proxied=False)
    return "".join(f"{_comment(line)}\n" for line in comments) + dump_job(job, templates=plan.templates)


def _terse(job: JobSpec) -> JobSpec:
    """Remove default values from the job; a plan's job has every key."""
    body = job.model_dump(mode="json", exclude_defaults=True)
    try:
        found = JobSpec.model_validate_json(json.dumps(body))
    except ValueError:  # a default value selects which other keys the section has
        return job
    return found if found == job else job


def _comments(search: SearchSpec, best: Trial, *, search_id: str, num_trials: int) -> Iterator[str]:
    better = "less" if search.direction == "min" else "more"
    yield f"Found by the search {search_id}: trial {best.number} of {num_trials}, with"
    yield f"{search.metric} {best.value!r} at step {best.step} ({better} is better)."
    yield ""
    yield "The values found:"
    yield from _listed(best.values)
    yield ""
    yield from _length(search, best)
    yield from _exploits(best)
    yield from _what_ran(search)


def _length(search: SearchSpec, best: Trial) -> Iterator[str]:
    """Say how many steps the trial ran, unless it ran all of them without a scheduler."""
    kind, total = search.scheduler.kind, best.total_steps
    is_whole = best.status == "finished" and (total is None or best.step >= total)
    if kind == "none" and is_whole:
        return
    way = f"{best.step} steps" if total is None else f"{best.step} of {total} steps"
    by = "" if kind == "none" else f" under the scheduler {kind}"
    ending = "" if is_whole else f"; it is {best.status}" + (f" ({best.reason})" if best.reason else "")
    yield f"The trial ran {way}{by}{ending}."


def _exploits(best: Trial) -> Iterator[str]:
    """List the steps at which a population changed the trial's values; the job uses the last values."""
    if not best.moves:
        return
    yield "Its values changed while it ran; the job below has the last of them from its first step on:"
    yield from (f"  at step {step} it continued from the state of trial {donor}" for step, donor in best.moves)


def _what_ran(search: SearchSpec) -> Iterator[str]:
    if not search.proxy:
        yield "Every trial was the full job: the one below, with other values."
        return
    yield "The trials were a proxy of the job below, which has not run with these values yet. In the proxy were:"
    yield from _listed(search.proxy)


def _code(code: CodeInfo | None, *, search_id: str) -> Iterator[str]:
    if code is not None:
        yield f"The trials ran the code of the digest {code.digest}, which is in code.tar of {search_id};"
        yield "a run of the job below packs the folder as it is then."


def _listed(values: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"  {key}: {json.dumps(value)}" for key, value in values.items())


def _comment(line: str) -> str:
    """Format a comment line; line breaks are escaped, because the text after one would be read as YAML."""
    return f"# {printable(line, limit=sys.maxsize)}".rstrip()
