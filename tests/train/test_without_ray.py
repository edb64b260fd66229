"""forge.train needs no Ray, W&B or CLI: it runs from a folder of wheels on a GPU machine (`benchmarks.gpu`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "wandb", "typer", "rich", "mlflow", "accelerate", "duckdb", "pyarrow", "datasets", "boto3", "peft")
PROGRAM = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None  # import and importlib.util.find_spec find nothing
import benchmarks.gpu_parts.speed
import benchmarks.gpu_parts.training
import forge.elastic.workers.worker_process
import tests.support.fork_server
"""


def test_import__without_ray_and_other_packages__succeeds() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
