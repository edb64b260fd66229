"""Mutated job files and `--set` values: loaded, planned, written and read again, and their models inspected."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge.config.dump import dump_job
from forge.config.fields import known_keys
from forge.config.job import JobSpec
from forge.config.load import LoadedJob, load_job
from forge.config.overrides import check_space, trial_job, usual_values
from forge.errors import JobFileError
from forge.model.families.base import DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.plan.plan import make_draft, make_plan, plan_from_json, plan_to_json
from forge.report.text import plan_facts, search_facts
from tests.config.test_hostile_files import MUTATIONS, NASTY, check_message
from tests.support.fuzz import mutate_bytes, mutate_json, run_cases
from tests.support.jobs import CPU, UNPREPARED, tiny_facts

JOBS = [
    path
    for path in sorted((Path(__file__).parents[2] / "jobs").rglob("*.yaml"))
    if path.parent.name != "eval" and path.stem != "task"
]
SEARCH = {
    "space": {"training.optimizer.lr": {"loguniform": [1e-4, 1e-2]},
              "training.schedule.warmup": {"int": [0, 4]}},
    "scheduler": {"kind": "asha", "grace_steps": 2},
}  # fmt: skip
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"architecture": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "data": {"source": "python-stdlib", "seq_len": 16, "tokenizer": {"vocab_size": 300}},
    "training": {"total_steps": 6, "global_batch_size": 12, "schedule": {"warmup": 2}},
    "resources": {"workers": "1..4", "gpu": "none"},
}  # fmt: skip
ARCHITECTURES = ["llama", "gpt2", "mixtral", "qwen3", "bert", "roberta", "gemma3_text", "mamba", "opt", "nonsense"]
NUMBERS = [0, -1, 1, 3, 2**31, 2**31 - 1, 2**53, 2**62, 10**9, 10**6, 9999, 1e308, 1e-308, 0.5]
_SHARE_INSPECTED = 16


def make(folder: Path, rng: random.Random) -> None:
    body = yaml.safe_load(rng.choice(JOBS).read_text()) if rng.random() < 0.4 else json.loads(json.dumps(TINY))
    if rng.random() < 0.2:
        body["search"] = SEARCH
    if rng.random() < 0.3:
        body["model"]["architecture"] = rng.choice(ARCHITECTURES)
    for _ in range(rng.choice([0, 1, 1, 2])):
        section = body.get(rng.choice(list(body)))
        numbers = [key for key, value in section.items() if type(value) is int] if isinstance(section, dict) else []
        if numbers:
            section[rng.choice(numbers)] = rng.choice(NUMBERS)
    if rng.random() < 0.4:
        body = mutate_json(body, rng)
    try:
        data = yaml.safe_dump(body, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        data = json.dumps(body).encode()
    if rng.random() < 0.15 and b": " in data:
        data = rng.choice(MUTATIONS)(data, rng)
    elif rng.random() < 0.1:
        data = mutate_bytes(data, rng)
    (folder / "job.yaml").write_bytes(data)
    keys = [*known_keys(JobSpec), "model.hidden_size", "model.num_hidden_layers", "model.revision", "a.b.c", ""]
    overrides = [
        f"{rng.choice(keys)}={rng.choice([*NASTY, *map(str, NUMBERS)])}"
        for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 3]))
    ]
    (folder / "overrides.json").write_text(json.dumps(overrides))


def process(folder: Path) -> None:
    """What `forge plan` does with a job, without its corpus."""
    path = folder / "job.yaml"
    try:
        loaded = load_job(path, overrides=json.loads((folder / "overrides.json").read_text()))
        if loaded.job.search is not None:
            check_space(loaded)
    except JobFileError as error:
        check_message(error)
        raise
    copy = folder / "copy.yaml"
    copy.write_text(dump_job(loaded.job))
    assert load_job(copy).job == loaded.job
    if zlib.crc32(path.read_bytes()) % _SHARE_INSPECTED == 0 and loaded.job.model.architecture is not None:
        inspect(loaded)
    job = loaded.job if loaded.job.search is None else trial_job(loaded.job, usual_values(loaded.job))
    facts = tiny_facts(vocab_size=2**40, max_seq_len=None)
    if job.training.epochs is None:
        draft = make_draft(job, model=facts, hardware=CPU)
        assert plan_facts(draft)
        assert search_facts(draft) == []
    text = plan_to_json(make_plan(job, model=facts, corpus=UNPREPARED, hardware=CPU))
    assert plan_to_json(plan_from_json(text)) == text


def inspect(loaded: LoadedJob) -> None:
    vocab_size = min(loaded.job.data.tokenizer.vocab_size, 1000)
    data = DataShape(vocab_size=vocab_size, seq_len=loaded.job.data.seq_len, eot_id=0)
    TransformersFamily().inspect(loaded.job.model, data)


def test_job_file__mutated__becomes_a_plan_or_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    TransformersFamily().inspect(  # its imports are not a case's
        JobSpec.model_validate(TINY).model, DataShape(vocab_size=300, seq_len=16, eot_id=0)
    )
    result = run_cases("job file", make=make, check=process, root=tmp_path)
    assert 0 < result.num_refused < result.num_cases
