"""The result of a search: its trials, the best one, and the reason if no trial reported a value."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from forge.config.overrides import own_values, search_of
from forge.config.search import SearchSpec
from forge.errors import RunError
from forge.report.trial_rows import format_value, status_of, values_in_short
from forge.runs.reader import RunSummary
from forge.runs.trials import Trial, TrialTable, trial_folder
from forge.units import format_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSummary:
    """One search at a glance."""

    run: RunSummary
    table: TrialTable
    best: Trial | None
    """None where no trial was format_value, or all of those have failed or diverged."""

    @property
    def search(self) -> SearchSpec:
        return search_of(self.run.plan.job)

    @property
    def num_trials(self) -> int:
        """Number of planned trials."""
        return self.run.plan.search.num_trials if self.run.plan.search else len(self.table.trials)

    @property
    def num_over(self) -> int:
        """Number of trials that have ended."""
        return sum(trial.is_over for trial in self.table.trials.values())


def search_summary(run: RunSummary) -> SearchSummary:
    """Summarise a search from its events. Raises: JobFileError if the run is not a search."""
    table = TrialTable(run.events)
    return SearchSummary(run=run, table=table, best=table.best(search_of(run.plan.job).direction))


def no_result_error(summary: SearchSummary) -> RunError | None:
    """Return an error with the most frequent reason if no trial reported a usable value; None if one did."""
    if summary.best is not None or not summary.num_over:
        return None
    trials = [trial for trial in summary.table.trials.values() if trial.is_over]
    (reason, count), *_ = Counter(trial.reason or f"it {trial.status}" for trial in trials).most_common(1)
    metric = summary.search.metric
    return RunError(f"none of {len(trials)} trials reported a usable {metric}; the reason of {count}: {reason}")


def outcome_facts(summary: SearchSummary) -> list[tuple[str, str]]:
    """Describe the results and files of a search."""
    run, best = summary.run, summary.best
    trials = summary.table.trials.values()
    counts = Counter(status_of(trial, goes_on=run.status == "running") for trial in trials)
    facts = [("trials", ", ".join(f"{count} {status}" for status, count in counts.items()) or "none yet")]
    if best is not None:
        facts.append(
            ("best", f"trial {best.number}, {summary.search.metric} {format_value(best.value)} "
             f"at step {best.step}: {values_in_short(best.values)}")
        )  # fmt: skip
        own = trials_own(summary)
        if own is not None and own is not best:
            facts.append(("job's own", f"trial {own.number}, {format_value(own.value)} at step {own.step}"))
        facts.append(("its run", trial_folder(str(run.folder), best.number)))
    facts.append(("wall time", format_duration(run.goodput().wall_s)))
    cost = run.newest("CostUpdated")
    if cost:
        facts.append(("cost", f"{cost['usd']:.2f} USD"))
    return [*facts, ("files", f"{run.folder} (events.jsonl, logs, trials)")]


def trials_own(summary: SearchSummary) -> Trial | None:
    """Return the first trial, if it had the job's own values and reported a value."""
    first = summary.table.trials.get(1)
    if first is None or first.value is None or first.moves or summary.search.searcher.kind == "grid":
        return None
    return first if first.values == own_values(summary.run.plan.job) else None
