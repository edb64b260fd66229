"""The job that a search has found is the job itself, with the values found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.config.job import JobSpec
from forge.config.load import load_job
from forge.config.overrides import trial_job
from forge.errors import JobFileError
from forge.plan.inputs import CodeInfo
from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.runs.trials import TrialTable
from forge.search.best_job import best_job_yaml
from tests.support.jobs import tiny_plan
from tests.support.searches import LR, WARMUP, SearchHistory, search_plan

VALUES = {LR: 3e-3, WARMUP: 1}


def found(
    table: TrialTable, folder: Path, plan: Plan | None = None, *, search_id: str = "t-1"
) -> tuple[str, JobSpec]:
    """The file, and the job that is loaded from it; the plan has gone through its file."""
    text = best_job_yaml(plan_from_json(plan_to_json(plan or search_plan())), table, search_id=search_id)
    assert text is not None
    path = folder / "best.yaml"
    path.write_text(text)
    return text, load_job(path).job


def one_trial(*, values: dict[str, Any] = VALUES, **options: Any) -> TrialTable:
    history = SearchHistory()
    history.run(values, [3.0, 2.5], **options)
    return history.table


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__schedule": {"kind": "constant", "warmup": 2}},
        {"training__ema": {"decay": 0.99}},
        {"training__total_steps": None, "training__total_tokens": 5000, "resources__workers": "2"},
        {"checkpoint": {"every": "50 steps", "to": "s3://bucket/runs"}},
    ],
)
def test_best_job_yaml__best_trial__is_the_job_with_its_values_and_no_search(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    plan = search_plan(**changes)
    _, job = found(one_trial(), tmp_path, plan)
    assert job == trial_job(plan.job, VALUES, is_proxied=False)
    assert job.search is None and job.training.optimizer.lr == 3e-3 and job.name == plan.job.name


def test_best_job_yaml__value_equals_the_default__is_written(tmp_path: Path) -> None:
    space = {"training.optimizer.weight_decay": {"choice": [0.0, 0.1]}}
    default = search_plan().job.training.optimizer.weight_decay
    values = {"training.optimizer.weight_decay": default}
    text, _ = found(one_trial(values=values), tmp_path, search_plan({"space": space}))
    assert f"\n    weight_decay: {default}\n" in text


def test_best_job_yaml__computed_keys_and_proxy__only_the_first_are_in_the_job(tmp_path: Path) -> None:
    space = {LR: {"loguniform": [1e-4, 1e-1]}, "training.optimizer.eps": {"of": LR, "times": 1e-3}}
    plan = search_plan({"space": space, "proxy": {"training.total_steps": 2}})
    text, job = found(one_trial(values={LR: 2e-3}), tmp_path, plan)
    assert (job.training.total_steps, job.training.optimizer.eps) == (6, pytest.approx(2e-6))
    assert "# The trials were a proxy of the job below" in text and "#   training.total_steps: 2\n" in text


def test_best_job_yaml__comments__name_search_and_trial(tmp_path: Path) -> None:
    history = SearchHistory()
    history.run({LR: 1e-2, WARMUP: 2}, [4.0])
    history.run(VALUES, [3.0, 2.5])
    text, _ = found(history.table, tmp_path, search_id="tune-tiny-0101")
    assert "search tune-tiny-0101: trial 2 of 2, with\n# eval/loss 2.5 at step 2 (less is better)." in text
    assert f"#   {LR}: 0.003\n#   {WARMUP}: 1\n" in text
    assert "# Every trial was the full job" in text and "steps." not in text


def test_best_job_yaml__code_of_the_users__comments_name_what_the_trials_ran(tmp_path: Path) -> None:
    code = CodeInfo(digest="0123456789abcdef" * 2, num_files=1, size_bytes=1)
    text, _ = found(one_trial(), tmp_path, replace(search_plan(), code=code), search_id="tune-1")
    assert f"# The trials ran the code of the digest {code.digest}, which is in code.tar of tune-1;\n" in text
    assert "code.tar" not in found(one_trial(), tmp_path)[0]


def test_best_job_yaml__stopped_trial__comments_say_at_which_step(tmp_path: Path) -> None:
    plan = search_plan({"scheduler": {"kind": "asha"}})
    text, _ = found(one_trial(status="stopped", reason="its rung"), tmp_path, plan)
    assert "# The trial ran 2 of 6 steps under the scheduler asha; it is stopped (its rung).\n" in text


def test_best_job_yaml__population__comments_name_the_donors(tmp_path: Path) -> None:
    history = SearchHistory()
    history.suggest(VALUES)
    history.suggest({LR: 1e-2, WARMUP: 2})
    history.report(1, 2, 3.0)
    history.move(1, donor=2, step=2, values={LR: 8e-3, WARMUP: 1})
    history.report(1, 4, 2.0)
    history.end(1)
    plan = search_plan({"scheduler": {"kind": "pbt", "interval_steps": 2}})
    text, job = found(history.table, tmp_path, plan)
    assert "#   at step 2 it continued from the state of trial 2\n" in text
    assert job.training.optimizer.lr == 8e-3


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\r\n", "\x00"])
def test_best_job_yaml__line_break_in_a_value__stays_in_its_comment(end: str, tmp_path: Path) -> None:
    evil = f"x{end}name: stolen"
    space = {"data.source": {"choice": [evil]}}
    plan = search_plan({"space": space, "scheduler": {"kind": "asha"}, "proxy": {"name": evil}})
    table = one_trial(values={"data.source": "python-stdlib", LR: 1e-3}, status="stopped", reason=evil)
    text, job = found(table, tmp_path, plan, search_id=evil)
    assert job.name == "tiny"
    assert text.count("\nname: ") == 1 and text.index("\nname: tiny\n") == text.rindex("# ") + len(
        text[text.rindex("# ") :].split("\n")[0]
    )


def test_best_job_yaml__no_objective_value__is_none() -> None:
    assert best_job_yaml(search_plan(), TrialTable(), search_id="t") is None
    history = SearchHistory()
    history.run(VALUES, [], status="failed")
    history.run(VALUES, [float("nan")], status="diverged")
    assert best_job_yaml(search_plan(), history.table, search_id="t") is None


def test_best_job_yaml__plan_of_a_run__raises() -> None:
    with pytest.raises(JobFileError, match="search: is missing"):
        best_job_yaml(tiny_plan(), TrialTable(), search_id="t")
