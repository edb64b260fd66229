"""A format, a model and an objective of the user's own: with Ray Train, in a search, and on a cluster elsewhere.

The current folder has modules of the same names, which must never be imported.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from forge.code_archive import pack_code
from forge.config.load import load_job
from forge.plan.plan import plan_from_json
from forge.remote.submit import RemoteTarget, preflight, resolve_remote, submit
from forge.runs.create import create_run
from forge.runs.reader import read_metrics, read_run
from forge.runs.trials import TrialTable, trial_folder
from tests.support.command import forge, start_forge, wait_for
from tests.support.remote_client import elsewhere

NUM_STEPS = 120
JOB = f"""\
name: own
code: ./src
model: {{class: my_models:Bigram, width: 16}}
data:
  files: reviews.jsonl
  text_key: review
  format: my_data:Reviews
  packing: none
  seq_len: 32
  tokenizer: {{vocab_size: 300}}
  held_out: 10%
training:
  objective: my_losses:Smoothed
  total_steps: {NUM_STEPS}
  global_batch_size: 8
  precision: fp32
  optimizer: {{lr: 3.0e-2}}
  schedule: {{kind: constant}}
  evaluate_every: 20 steps
resources: {{workers: 2, gpu: none}}
tracking: {{wandb: {{mode: disabled}}}}
"""
SEARCH = """\
search:
  metric: eval/accuracy
  space: {training.optimizer.lr: {grid: [1.0e-9, 3.0e-2]}}
  searcher: {kind: grid}
  trials_at_once: 2
  proxy: {training.total_steps: 40}
"""
SOURCES = {
    "my_data.py": """\
import torch  # which the client must not import
from forge.data.formats.base import Example

class Reviews:
    def __init__(self, context):
        self._context = context

    def examples(self, record):
        ids = self._context.encode(record.fields["review"])[: self._context.seq_len]
        yield Example(arrays={"tokens": ids[:-1], "targets": ids[1:]}, weight=float(len(ids) - 1))

    def counts(self):
        return {}
""",
    "my_models.py": """\
from torch import nn

class Bigram(nn.Module):
    def __init__(self, *, vocab_size, width):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))
""",
    "my_losses.py": """\
import torch
import torch.nn.functional as F
from forge.objective.base import WeightedSum
from parts.smoothing import SMOOTHING

class Smoothed:
    metric_directions = {"accuracy": "max"}

    def batch(self, rows):
        return {name: torch.from_numpy(rows[name]) for name in ("tokens", "targets")}

    def loss(self, model, batch):
        output = model(input_ids=batch["tokens"])
        logits, targets = getattr(output, "logits", output).flatten(0, 1).float(), batch["targets"].flatten()
        total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum", label_smoothing=SMOOTHING)
        weight = (targets != -100).sum()
        hits = WeightedSum(sum=(logits.argmax(dim=-1) == targets).sum(), weight=weight)
        return WeightedSum(sum=total, weight=weight, metrics={"accuracy": hits})

    def metrics(self, model, batch):
        return {}
""",
    "parts/smoothing.py": "SMOOTHING = 0.1\n",
}
WORDS = ["the", "film", "was", "good", "and", "the", "end", "was", "short"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    for name, text in SOURCES.items():
        for folder, content in (("src", text), (".", "raise OSError('imported from the current folder')\n")):
            (home / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (home / folder / name).write_text(content)
    reviews = [" ".join((WORDS * 4)[number % 7 : number % 7 + 9 + number % 5]) for number in range(300)]
    lines = [json.dumps({"review": f"{review} {number}"}) for number, review in enumerate(reviews)]
    (home / "reviews.jsonl").write_text("\n".join(lines))
    (home / "job.yaml").write_text(JOB)
    monkeypatch.chdir(home)
    monkeypatch.setenv("FORGE_CACHE", str(home / "cache"))
    return home


@pytest.mark.slow
def test_ray_train__stopped_and_source_changed_or_gone__resumes_with_the_packed_code(home: Path) -> None:
    client = start_forge("train", "job.yaml", "--set", "resources.engine=ray-train", cwd=home)
    wait_for(lambda: any(len(read_metrics(folder)) > 5 for folder in (home / "runs").glob("*")))
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=60)
    assert client.returncode == 130, err
    (folder,) = (home / "runs").iterdir()
    assert read_run(folder).step < NUM_STEPS

    (home / "src" / "my_losses.py").write_text("raise SystemExit\n")
    refused = forge("train", "job.yaml", "--resume", "latest", cwd=home)
    assert (refused.returncode, "my_losses.py:1: SystemExit" in refused.stderr) == (2, True), refused.stderr
    (home / "src" / "my_losses.py").write_text(SOURCES["my_losses.py"] + "\n")
    refused = forge("train", "job.yaml", "--set", "resources.engine=ray-train", "--resume", "latest", cwd=home)
    assert (refused.returncode, "its code changed (my_losses.py)" in refused.stderr) == (2, True), refused.stderr
    shutil.rmtree(home / "src")
    shutil.rmtree(home / "cache" / "code")
    refused = forge("train", "job.yaml", "--resume", "latest", cwd=home)
    assert (refused.returncode, "src does not exist" in refused.stderr) == (2, True), refused.stderr

    resumed = forge("train", "--resume", "latest", cwd=home)
    assert resumed.returncode == 0, resumed.stderr
    require_trained(folder)


@pytest.mark.slow
def test_forge_tune__metric_of_the_users_objective__finds_its_maximum(home: Path) -> None:
    (home / "tune.yaml").write_text(JOB.replace("workers: 2", "workers: 1") + SEARCH)
    done = forge("tune", "tune.yaml", cwd=home)
    assert done.returncode == 0, done.stderr
    (folder,) = (home / "runs").iterdir()
    trials = TrialTable(read_run(folder).events).trials
    assert {trial.status for trial in trials.values()} == {"finished"}
    found = {trial.values["training.optimizer.lr"]: trial.value for trial in trials.values()}
    measured = {
        trial.values["training.optimizer.lr"]: read_metrics(Path(trial_folder(str(folder), number)))[-1]
        for number, trial in trials.items()
    }
    assert found == {lr: record["eval/accuracy"] for lr, record in measured.items()}
    assert found[3e-2] > found[1e-9] + 0.2
    best = load_job(folder / "best.yaml").job
    assert (best.training.optimizer.lr, best.training.objective) == (3e-2, "my_losses:Smoothed")


@pytest.mark.slow
def test_cluster_elsewhere__code_arrives_as_archive_and_is_imported_there(home: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    with elsewhere(there, num_nodes=2) as cluster:
        found = preflight(cluster)
        target = RemoteTarget(cluster=cluster, python=found.python, gpu=found.gpu, storage=str(there / "shared"))
        plan = resolve_remote(target, load_job(home / "job.yaml"))
        folder = create_run(plan, root=str(home / "runs"))
        shutil.rmtree(home / "src")
        shutil.rmtree(home / "cache" / "code")  # only the archive in the run folder is left here
        run = submit(target, plan, folder=folder)
        wait_for(lambda: not run.is_alive(), timeout_s=120)
        run.wait()
    require_trained(folder)
    assert plan.code is not None
    assert pack_code(there / "cache" / "code" / plan.code.digest).digest == plan.code.digest
    assert not (home / "cache" / "code").exists()


def require_trained(folder: Path) -> None:
    """Check that a run has finished and has learnt, with the metric of its objective in every step, each once."""
    run, records = read_run(folder), read_metrics(folder)
    assert run.status == "finished", run.events[-1]
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    assert records[-1]["train/accuracy"] > records[0]["train/accuracy"] + 0.2
    plan = plan_from_json((folder / "plan.json").read_text())
    assert plan.model.class_name == "Bigram"
    assert run.newest("SampleGenerated") is not None  # the model was loaded from its checkpoint
    saved = [event["step"] for event in run.events if event["event"] == "CheckpointSaved"]
    assert saved[-1] == NUM_STEPS and len(saved) == len(set(saved))
