"""benchmarks.gpu: its parts end within the time of the whole run, and its processes find forge's sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gpu
from benchmarks.gpu import LIMIT_S, PARTS, part_limit_s, problem_of, show_sources_to_children


@given(st.lists(st.floats(0, 1), min_size=len(PARTS), max_size=len(PARTS)))
def test_part_limit__parts_that_use_any_share_of_it__all_get_their_least_time(shares: list[float]) -> None:
    left_s = LIMIT_S
    for index, (part, share) in enumerate(zip(PARTS, shares, strict=True)):
        limit_s = part_limit_s(PARTS[index:], left_s=left_s)
        assert part.least_s <= limit_s <= max(part.limit_s, part.least_s)
        left_s -= share * limit_s
    assert left_s >= 0
    assert LIMIT_S < 480, "it must end within eight minutes"


def test_part_limit__part_left_out__its_time_is_for_the_others() -> None:
    options = next(part for part in PARTS if part.function == "options")
    with_ray = PARTS[-1]
    assert part_limit_s([options, with_ray], left_s=100) == 100 - with_ray.least_s
    assert part_limit_s([options], left_s=100) == 100
    assert part_limit_s([options, with_ray], left_s=50) == 0


def test_problem__forge_is_not_installed__part_with_ray_alone_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [part.function for part in PARTS if problem_of(part)] == []
    monkeypatch.setattr(gpu, "FORGE", "/nowhere/forge")
    assert [part.function for part in PARTS if problem_of(part)] == ["with_ray"]
    assert problem_of(PARTS[-1]) == "forge is not installed: /nowhere/forge is missing"


def test_show_sources__forge_is_not_installed__is_found_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = [sys.executable, "-P", "-S", "-c", "import forge.units, benchmarks"]  # -S: without installed packages
    monkeypatch.setenv("PYTHONPATH", "")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    show_sources_to_children()
    subprocess.run(command, cwd=tmp_path, check=True)
    assert os.environ["PYTHONPATH"].endswith(":/somewhere")
