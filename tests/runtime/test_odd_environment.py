"""A run, and `forge doctor`, in environments that are merely different from the usual."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import environment

JOB = """\
name: small
model: {architecture: llama, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}
data: {files: "corpus ü/*.txt", seq_len: 64, tokenizer: {vocab_size: 300}}
training: {total_steps: 4, global_batch_size: 8}
resources: {workers: 1..2}
"""
POISON = "import pathlib\npathlib.Path({marker!r}).touch()\nraise SystemExit('the current folder was imported')\n"
POISONED = ("queue", "random", "tokenizers", "ray", "torch", "psutil", "yaml", "forge", "numpy", "typer", "wandb")
_FORGE = [sys.executable, "-P", "-m", "forge.cli.app"]
_UV_RUN = [str(Path(sys.executable).parent / "uv"), "run", "--offline", "--no-project", "--python", sys.executable]
_AS_ANOTHER_USER = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]


_APART = ["unshare", "--mount", "--net", "sh", "-c"]
_ENTER = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && ip link set lo up && exec "$@"'
"""A container with Docker's default of shared memory, and without any network but loopback."""


def in_a_container() -> list[str]:
    """Return what runs a command with little shared memory and no network; nothing if this user may not."""
    can = subprocess.run([*_APART, _ENTER, "sh", "true"], capture_output=True, check=False).returncode == 0
    return [*_APART, _ENTER, "sh"] if can else []


def as_another_user() -> list[str]:
    """Return what runs a command as a user id without a passwd entry; nothing if the kernel does not allow it."""
    try:
        can = subprocess.run([*_AS_ANOTHER_USER, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        can = False
    return _AS_ANOTHER_USER if can else []


def odd_environment(folder: Path) -> dict[str, str]:
    """Everything odd at once that a run must not notice."""
    temporary = folder / ("temporary-" + 90 * "x")
    temporary.mkdir()
    return environment(folder, TMPDIR=str(temporary), HOME=str(folder / "home")) | {
        **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9"),
        **{"NO_PROXY": "example.org", "OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": ""},
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        # forge was started in a task of another Ray cluster, a W&B run, and a job of SLURM and torchrun.
        **{"RAY_ADDRESS": "192.0.2.1:6379", "RAY_JOB_ID": "01000000", "RAY_NAMESPACE": "other"},
        **{"WANDB_RUN_ID": "outer", "WANDB_SWEEP_ID": "outer", "WANDB__SERVICE": "2-1-tcp-localhost-1"},
        **{"SLURM_JOB_ID": "1", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "RANK": "3", "WORLD_SIZE": "8"},
        **{"LOCAL_RANK": "3", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"},
    }


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))


@pytest.mark.slow
def test_train__everything_odd_at_once__finishes_and_imports_nothing_from_the_current_folder(
    tmp_path: Path,
) -> None:
    folder = tmp_path / 'odd ü\'s "folder"'
    marker = tmp_path / "imported"
    (folder / "corpus ü").mkdir(parents=True)
    (folder / "home").mkdir()
    (folder / "job.yaml").write_text(JOB, encoding="utf-8")
    (folder / "corpus ü" / "a.txt").write_text("Übung macht den Meister. " * 2000, encoding="utf-8")
    for name in POISONED:
        (folder / f"{name}.py").write_text(POISON.format(marker=str(marker)))
    done = subprocess.run(
        [*in_a_container(), *as_another_user(), *_UV_RUN, *_FORGE, "train", "job.yaml"],
        cwd=folder,
        env=odd_environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=240,
        preexec_fn=few_files,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")
    assert not marker.exists()
    [run] = (folder / "runs").iterdir()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    names = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert [name.endswith(run.name) for name in names] == [True]
