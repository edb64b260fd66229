"""A run as a row of a list: for the terminal and for the page of all runs."""

from __future__ import annotations

import math

from forge.report.text import number
from forge.runs.glance import RunGlance

COLUMNS = ("progress", "loss", "held-out ppl", "tokens/s", "workers", "USD")
"""The names of what `list_cells` returns."""


def list_cells(run: RunGlance) -> list[str]:
    """Progress, loss and held-out perplexity, speed, number of workers and cost.

    For a search: ended trials, and loss and perplexity of the best one.
    """
    last, perplexity = run.last, run.perplexity
    progress = f"{int(last.get('step', 0))}/{run.total_steps}"
    if run.search is not None:
        best = run.trials.best(run.search.direction)
        last = best.last_metrics if best is not None else {}
        trials = run.trials.trials.values()
        num_over = sum(trial.is_over for trial in trials)
        progress, perplexity = f"{num_over}/{run.num_trials or len(trials)} trials", last.get("eval/perplexity")
    speed = run.last.get("speed/tokens_per_s") if run.status == "running" else None
    return [
        progress,
        number(last.get("train/loss"), ".4f"),
        number(perplexity, ".2f"),
        number(speed, ",.0f"),
        f"{run.world_size}" if run.status == "running" else "-",
        number(math.nan if run.usd is None else run.usd, ",.2f"),
    ]
