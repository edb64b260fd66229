"""Every benchmark runs once at its smallest size, so that none is found broken when its figures are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAST = ("controller_scale", "deadline", "forecast")
SLOW = (
    "checkpoint",
    "cluster",
    "cold_start",
    "controller_connections",
    "data",
    "elastic_replay",
    "ema",
    "evaluate",
    "finetune",
    "gpu",
    "kills",
    "lora",
    "memory",
    "rank_costs",
    "recovery",
    "recovery_growth",
    "serve",
    "snapshot_overhead",
    "throughput",
    "tune",
    "ui",
)
"""Several programs with Ray or DeepSpeed each; half a minute and more even at their smallest size."""


def test_lists__together__name_every_benchmark() -> None:
    programs = [
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "benchmark_parser(__doc__" in path.read_text()
    ]
    assert sorted(programs) == sorted(FAST + SLOW)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
@pytest.mark.timeout(900)
def test_benchmark__smallest__writes_its_figures(name: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smallest", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(json.loads(figures.read_text())) > 1
