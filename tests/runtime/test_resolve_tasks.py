"""`evaluate:` of a job: task files are checked when the plan is made, and kept in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forge.config.load import LoadedJob, load_job
from forge.config.task_metrics import LOWER_IS_BETTER, MetricsSpec
from forge.errors import JobFileError
from forge.evaluate.metrics.base import ScoredExample
from forge.evaluate.metrics.build import build_metrics
from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.report.text import plan_facts
from forge.runtime.resolve_tasks import with_task_direction, with_tasks
from tests.support.jobs import synthetic_corpus, tiny_plan

JOB = """
name: tiny
model: {architecture: llama}
data: {files: a.txt, held_out: 0.1}
training: {total_steps: 3}
evaluate:
  tasks: TASKS
  limit: 20
"""
TASK = "name: NAME\nkind: KIND\ndata: {held_out: true}\ntarget: text\nmetrics: METRIC\nprompt: text\n"


def job_of(folder: Path, tasks: str, job: str = JOB) -> LoadedJob:
    (folder / "job.yaml").write_text(job.replace("TASKS", tasks))
    return load_job(folder / "job.yaml")


def write_task(folder: Path, *, file: str, name: str = "text", kind: str = "log-likelihood") -> str:
    metric = {"log-likelihood": "perplexity", "classify": "accuracy"}[kind]
    text = TASK.replace("NAME", name).replace("KIND", kind).replace("METRIC", metric)
    (folder / file).write_text(text)
    return str(folder / file)


def plan_of(folder: Path, loaded: LoadedJob) -> Plan:
    plan = tiny_plan(synthetic_corpus(folder / "corpus"))
    job = plan.job.model_copy(update={"evaluate": loaded.job.evaluate})
    return with_tasks(replace(plan, job=job), loaded)


def test_with_tasks__file__is_kept_in_the_plan_and_shown(tmp_path: Path) -> None:
    path = write_task(tmp_path, file="a.yaml")
    plan = plan_of(tmp_path, job_of(tmp_path, path))
    assert plan.tasks == {path: Path(path).read_text()}
    assert plan_from_json(plan_to_json(plan)).tasks == plan.tasks
    facts = dict(plan_facts(plan))
    assert facts["evaluate"].startswith(f"the last checkpoint in {path}, at most 20 examples each; the machines")


def test_with_tasks__metric_of_a_task_as_that_of_early_stopping__is_checked(tmp_path: Path) -> None:
    path = write_task(tmp_path, file="a.yaml")
    job = JOB.replace("{total_steps: 3}", "{total_steps: 3, early_stopping: {metric: METRIC}}")
    every = job.replace("limit: 20", "every: evaluation")
    loaded = job_of(tmp_path, path, every.replace("METRIC", "evaluate/text/perplexity"))
    assert dict(plan_facts(plan_of(tmp_path, loaded)))["evaluate"].startswith(
        "at each evaluation the current weights"
    )
    assert "a copy (56.3 KiB), and at the end the last" in dict(plan_facts(plan_of(tmp_path, loaded)))["evaluate"]
    wrong = r"job\.yaml:5: .*is not a metric of the tasks: evaluate/text/perplexity; did you mean evaluate"
    with pytest.raises(JobFileError, match=wrong):
        plan_of(tmp_path, job_of(tmp_path, path, every.replace("METRIC", "evaluate/tex/perplexity")))
    with pytest.raises(JobFileError, match=r"job\.yaml:5: .*only with evaluate.every: evaluation"):
        plan_of(tmp_path, job_of(tmp_path, path, job.replace("METRIC", "evaluate/text/perplexity")))
    with pytest.raises(JobFileError, match=r"must be 'end', 'evaluation' or a number of steps such as '500 steps'"):
        job_of(tmp_path, path, job.replace("limit: 20", "every: 10m"))


def test_with_tasks__wrong_tasks__are_named_with_the_line_of_the_job(tmp_path: Path) -> None:
    one, other = write_task(tmp_path, file="a.yaml"), write_task(tmp_path, file="b.yaml")
    with pytest.raises(JobFileError, match=r"job\.yaml:7: .*b\.yaml: has the name of the task in .*a\.yaml"):
        plan_of(tmp_path, job_of(tmp_path, f"[{one}, {other}]"))
    wrong = write_task(tmp_path, file="c.yaml", kind="classify")
    with pytest.raises(JobFileError, match=r"is for models of the kind classification .*, and this is a causal-lm"):
        plan_of(tmp_path, job_of(tmp_path, wrong))
    with pytest.raises(JobFileError, match=r"job\.yaml:7: evaluate\.tasks: .*missing\.yaml: no such file"):
        plan_of(tmp_path, job_of(tmp_path, str(tmp_path / "missing.yaml")))
    Path(one).write_text("name: a\nkindd: generate\n")
    with pytest.raises(JobFileError, match=r"a\.yaml:2: kindd: unknown key"):
        plan_of(tmp_path, job_of(tmp_path, one))


def test_with_tasks__template_or_data_of_a_task__are_checked_with_its_line(tmp_path: Path) -> None:
    path = write_task(tmp_path, file="a.yaml")
    text, data = Path(path).read_text(), tmp_path / "data.jsonl"
    files = text.replace("{held_out: true}", f"{{files: {data}}}")
    data.write_text('{"text": "a"}\n')
    for given, message in (
        (text.replace("target: text", 'target: "{{ text "'), r"a\.yaml:4: target: is not a Jinja template"),
        (files.replace("data.jsonl", "none.jsonl"), r"a\.yaml:3: data: .*none\.jsonl matches no file"),
        (files.replace("target: text", "target: txt"), r"a\.yaml:3: data: .*no key 'txt' \(target\)"),
    ):
        Path(path).write_text(given)
        with pytest.raises(JobFileError, match=message):
            plan_of(tmp_path, job_of(tmp_path, path))
    Path(path).write_text(files)
    assert plan_of(tmp_path, job_of(tmp_path, path)).tasks == {path: files}


SEARCH = "search: {metric: METRIC, max_trials: 2, space: {training.seed: {choice: [1, 2]}}}\n"


def test_with_task_direction__metric_of_a_search__has_its_direction(tmp_path: Path) -> None:
    every = JOB.replace("limit: 20", "every: evaluation") + SEARCH

    def direction(metric: str, *, job: str = every) -> str:
        loaded = job_of(tmp_path, write_task(tmp_path, file="a.yaml"), job.replace("METRIC", metric))
        found = with_task_direction(loaded).job.search
        assert found is not None
        return found.direction

    assert direction("evaluate/text/perplexity") == "min"
    assert direction("evaluate/text/perplexity, mode: max") == "max"
    for metric, message in (
        ("evaluate/text/perplexty", r"did you mean evaluate/text/perplexity\?"),
        ("evaluate/other/bleu", "is not a metric of the tasks: evaluate/text/perplexity"),
    ):
        with pytest.raises(JobFileError, match=rf"job\.yaml:9: .*{message}"):
            direction(metric)
    with pytest.raises(JobFileError, match=r"it needs evaluate\.every: evaluation"):
        direction("evaluate/text/perplexity", job=every.replace("every: evaluation", "every: 5 steps"))
    with pytest.raises(JobFileError, match=r"evaluate\.every: 'end' is for single runs"):
        direction("eval/loss", job=JOB + SEARCH)


@pytest.mark.parametrize("name", MetricsSpec.model_fields)
def test_lower_is_better__every_metric__as_it_says_itself(name: str) -> None:
    spec = MetricsSpec.model_validate({name: {}})
    answer = 1.0 if name in ("mse", "r2", "pearson") else "a"
    [metric] = build_metrics(spec, examples=[ScoredExample(prediction=answer, target=answer)]).values()
    assert set(metric.directions.values()) == {"min" if name in LOWER_IS_BETTER else "max"}
