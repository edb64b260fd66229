"""The `search` section: valid spaces, and mistakes reported before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.config.dump import dump_job
from forge.config.load import LoadedJob, load_job
from forge.config.overrides import check_space, own_values, trial_job
from forge.errors import JobFileError

JOB = """\
name: tune
model: {architecture: llama, hidden_size: 64, num_hidden_layers: 2}
data: {source: python-stdlib}
training: {total_steps: 60, optimizer: {lr: 1.0e-3}, schedule: {warmup: 5}}
search:
  space:
    training.optimizer.lr: {loguniform: [1.0e-4, 3.0e-2]}
    training.schedule.warmup: {int: [0, 20]}
    model.intermediate_size: {of: model.hidden_size, times: 4}
  proxy: {model.num_hidden_layers: 1}
  max_trials: 8
"""


def load(folder: Path, old: str = "", new: str = "", *, overrides: tuple[str, ...] = ()) -> LoadedJob:
    assert old in JOB
    (folder / "tune.yaml").write_text(JOB.replace(old, new))
    loaded = load_job(folder / "tune.yaml", overrides=overrides)
    check_space(loaded)
    return loaded


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optimizer.lr:", "optimizer.learning_rate:", r":7: .*did you mean 'training.optimizer.lr'"),
        ("optimizer.lr:", "optimiser.lr:", r":7: search.space.training.optimiser.lr: .*unknown key"),
        (
            "[0, 20]",
            "[0, 200]",
            r":8: .*cannot be 200: is longer than the training: 200 warm-up steps",
        ),
        ("[0, 20]", "[0, 2.5]", r":8: .*must have whole numbers as bounds"),
        ("loguniform: [1.0e-4", "loguniform: [0", r":7: .*loguniform: must be greater than 0"),
        ("[1.0e-4, 3.0e-2]", "[3.0e-2, 1.0e-4]", r":7: .*is empty: 0.03 is not below 0.0001"),
        ("loguniform: [1.0e-4, 3.0e-2]", "choice: []", r":7: .*a list of at least one value"),
        ("loguniform: [1.0e-4, 3.0e-2]", "choice: [fast]", r":7: .*cannot be 'fast': must be a number"),
        ("loguniform: [1.0e-4, 3.0e-2]", "choice: [0.1, 0.1]", r":7: .*contains a value twice"),
        ("loguniform: [1.0e-4, 3.0e-2]", "grid: [0.1]", r":7: .*grid requires searcher.*did you mean 'choice'"),
        ("loguniform: [1.0e-4, 3.0e-2]", "choice: [1], int: [1, 2]", r":7: .*exactly one of choice"),
        ("of: model.hidden_size", "of: model.hidden", r":9: .*'model.hidden' is not a number"),
        ("of: model.hidden_size, times: 4", "of: model.hidden_size", r":9: .*one of 'times' and 'divided_by'"),
        ("times: 4", "tims: 4", r":9: .*unknown key; did you mean 'times'"),
        (
            "training.schedule.warmup: {",
            "resources.workers: {",
            r":8: .*does not affect the result of the training",
        ),
        ("model.num_hidden_layers: 1", "training.total_steps: many", r":10: .*cannot be 'many'"),
        ("model.num_hidden_layers: 1", "training.optimizer.lr: 1", r":10: .*is also in search.space"),
        ("max_trials: 8", "metric: eval/accuracy", r":11: .*is not a metric; trials report eval/loss"),
        ("max_trials: 8", "metric: eval/perplexty", r":11: .*did you mean 'eval/perplexity'"),
        ("max_trials: 8", "scheduler: {kind: asha2}", r":11: .*did you mean 'asha'"),
        ("max_trials: 8", "scheduler: {kind: pbt}", r":11: .*interval_steps: is missing: pbt requires it"),
        ("max_trials: 8", "max_trials: 0", r":11: .*must be at least 1"),
        (
            "max_trials: 8",
            "scheduler: {kind: pbt, interval_steps: 20}",
            r"model.intermediate_size: pbt changes values during a trial",
        ),
    ],
)
def test_search__mistake__is_reported_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(JobFileError, match=message):
        load(tmp_path, old, new)


def test_search__space_of_computed_keys_only__is_empty(tmp_path: Path) -> None:
    searched = JOB[JOB.index("    training.optimizer.lr") : JOB.index("    model.inter")]
    with pytest.raises(JobFileError, match=r"search.space: is empty"):
        load(tmp_path, searched)


def test_dump_job__with_a_search__loads_equal(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    (tmp_path / "again.yaml").write_text(dump_job(loaded.job))
    assert load_job(tmp_path / "again.yaml").job == loaded.job


def test_trial_job__proxy_values_and_computed_keys__are_set(tmp_path: Path) -> None:
    job = load(tmp_path).job
    values = {"training.optimizer.lr": 0.02, "training.schedule.warmup": 3}
    trial = trial_job(job, values)
    assert trial.search is None
    assert (trial.training.optimizer.lr, trial.training.schedule.warmup.steps) == (0.02, 3)
    assert trial.model.config_overrides == {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 256}
    whole = trial_job(job, values, is_proxied=False)
    assert whole.model.config_overrides == {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256}


def test_override__dotted_key_of_the_space__is_set(tmp_path: Path) -> None:
    overrides = (
        "search.proxy.training.total_steps=30",
        "search.space.training.optimizer.lr={choice: [0.1, 0.2]}",
    )
    search = load(tmp_path, overrides=overrides).job.search
    assert search is not None
    assert search.proxy == {"model.num_hidden_layers": 1, "training.total_steps": 30}
    assert search.space["training.optimizer.lr"].choice == (0.1, 0.2)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", {"training.optimizer.lr": 1e-3, "training.schedule.warmup": 5}),
        ("lr: 1.0e-3", "lr: 1.0", None),
        ("[0, 20]", "[6, 20]", None),
        ("loguniform: [1.0e-4, 3.0e-2]", "choice: [0.1, 0.2]", None),
    ],
)
def test_own_values__outside_the_space__are_none(
    tmp_path: Path, old: str, new: str, expected: dict[str, float] | None
) -> None:
    assert own_values(load(tmp_path, old, new).job) == expected


@pytest.mark.parametrize(
    ("keys", "mode"),
    [
        ("metric: eval/perplexity", "min"),
        ("metric: speed/mfu", "max"),
        ("metric: speed/tokens_per_s", "max"),
        ("metric: speed/mfu, mode: min", "min"),
    ],
)
def test_search__mode__is_the_direction_of_the_metric_unless_given(tmp_path: Path, keys: str, mode: str) -> None:
    search = load(tmp_path, "max_trials: 8", keys.replace(", ", "\n  ")).job.search
    assert search is not None
    assert search.direction == mode


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{total", "{early_stopping: {metric: eval/los}, total", r":4: .*report eval/loss, .*mean 'eval/loss'"),
        ("{total", "{early_stopping: {metric: train/loss}, total", r":4: .*is not a metric.*got train/loss"),
        ("{total", "{early_stopping: {patience: 0}, total", r":4: .*patience: must be at least 1"),
        (
            "stdlib}\ntraining: {",
            "stdlib, held_out: 0}\ntraining: {early_stopping: {}, ",
            r":4: .*measured on held-out data, but data.held_out is 0",
        ),
    ],
)
def test_early_stopping__mistake__is_reported_with_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(JobFileError, match=message):
        load(tmp_path, old, new)
