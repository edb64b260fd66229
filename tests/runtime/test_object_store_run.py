"""A whole run whose checkpoints go to S3 (moto's server on loopback), as a user runs it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from forge.runs.reader import read_metrics
from tests.support.bucket import Bucket, serve_bucket
from tests.support.command import environment, forge, start_forge, wait_for

JOB = """\
name: tiny
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 0}
training: {total_steps: 100, global_batch_size: 4, optimizer: {lr: 1.0e-2}, zero: {stage: 2}}
checkpoint: {every: 10 steps, keep: 2, to: "s3://forge-tests/runs"}
resources: {workers: 2, gpu: none}
tracking: {wandb: {mode: disabled}}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    return tmp_path


@pytest.mark.slow
def test_forge_train__bucket__keeps_checkpoints_and_resumes_from_them(home: Path) -> None:
    with serve_bucket() as bucket:
        env = environment(home, **bucket.environment)
        with start_forge("train", "job.yaml", cwd=home, env=env) as process:
            wait_for(lambda: list(home.glob("runs/*/metrics.jsonl")) or process.poll() is not None)
            wait_for(lambda: len(read_metrics(next(home.glob("runs/*")))) >= 20 or process.poll() is not None)
            process.send_signal(signal.SIGINT)
            stopped, errors = process.communicate(timeout=60)
            assert process.returncode == 130, errors
        (run,) = (home / "runs").iterdir()
        assert not (run / "checkpoints").exists()
        first = last_step(home, env, "latest")
        assert 20 <= first < 100
        by_profile = with_profile(env, home / "keys")
        done = forge("train", "--resume", "latest", cwd=home, env=by_profile)
        assert done.returncode == 0, done.stderr
        assert [record["step"] for record in read_metrics(run)] == list(range(1, 101))
        assert last_step(home, env, f"s3://forge-tests/runs/{run.name}/checkpoints") == 100
        assert forge("generate", "latest", "--max-tokens", "3", cwd=home, env=env).returncode == 0
        exported = forge("checkpoints", "export", "--to", "out", cwd=home, env=env)
        assert exported.returncode == 0, exported.stderr
        assert (home / "out" / "model.safetensors").is_file()
        require_no_secret(home, bucket, stopped + errors + done.stdout + done.stderr + exported.stderr)


def with_profile(env: dict[str, str], file: Path) -> dict[str, str]:
    """Move the keys from the environment to a profile in a file."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    file.write_text("\n".join(["[research]", *(f"{name.lower()} = {env[name]}" for name in names), ""]))
    kept = {name: value for name, value in env.items() if name not in names}
    return kept | {"AWS_PROFILE": "research", "AWS_SHARED_CREDENTIALS_FILE": str(file)}


def last_step(home: Path, env: dict[str, str], location: str) -> int:
    """Of the checkpoints there, after verifying all of them."""
    entries = json.loads(forge("checkpoints", "verify", location, "-o", "json", cwd=home, env=env).stdout)
    assert [entry["problem"] for entry in entries] == [None] * len(entries)
    assert 1 <= len(entries) <= 2
    return int(entries[0]["step"])


def require_no_secret(folder: Path, bucket: Bucket, output: str) -> None:
    secret = bucket.environment["AWS_SECRET_ACCESS_KEY"]
    assert secret not in output
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "keys":
            assert secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("to", ["file:///tmp/runs", "s3://", "s3:///"])
def test_forge_train__invalid_checkpoint_url__is_rejected_with_its_line(home: Path, to: str) -> None:
    (home / "job.yaml").write_text(JOB.replace("s3://forge-tests/runs", to))
    done = forge("plan", "job.yaml", cwd=home)
    assert done.returncode == 2
    assert "job.yaml:5: checkpoint.to" in done.stderr


@pytest.mark.slow
def test_forge_train__bucket_missing_or_unreachable__is_rejected_before_it_starts(
    home: Path, closed_port: int
) -> None:
    with serve_bucket() as bucket:
        other = ("--set", "checkpoint.to=s3://no-such-bucket/runs")
        missing = forge("train", "job.yaml", *other, cwd=home, env=environment(home, **bucket.environment))
    unreachable = Bucket(endpoint=f"http://127.0.0.1:{closed_port}").environment
    closed = forge("train", "job.yaml", cwd=home, env=environment(home, **unreachable))
    for done, expected in ((missing, "no-such-bucket"), (closed, "s3://forge-tests/runs")):
        assert done.returncode == 2, done.stderr
        assert "checkpoint.to: cannot write to s3://" in done.stderr
        assert expected in done.stderr
        assert not list(home.glob("runs/*"))
