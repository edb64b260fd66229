"""Jobs with some keys changed."""

from __future__ import annotations

from forge.config.overrides import trial_job
from tests.support.jobs import tiny_job
from tests.support.tuning import LR, SEARCH, WARMUP


def test_trial_job__given_a_search__leaves_it_unchanged() -> None:
    job = tiny_job(search=SEARCH | {"proxy": {"training.optimizer": {"name": "adamw"}}})
    before = job.model_dump_json()
    assert trial_job(job, {LR: 0.5, WARMUP: 1}).training.optimizer.lr == 0.5
    assert job.model_dump_json() == before
