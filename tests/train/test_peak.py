"""The peak of a CPU is measured once on a machine, whatever else runs on it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from forge.train import peak
from forge.train.peak import measure_gemm_flops, measured_peak


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path))
    measured_peak.cache_clear()
    return tmp_path


def rates(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Let each measurement return the next of these rates."""
    left = iter(values)
    monkeypatch.setattr(peak, "measure_gemm_flops", lambda device_type, *, dtype: next(left))


def another_process() -> None:
    measured_peak.cache_clear()


def test_measured_peak__second_process__takes_the_kept_rate(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, 1e9, 2e9)
    first = measured_peak("cpu", dtype=torch.float32)
    another_process()
    assert measured_peak("cpu", dtype=torch.float32) == first
    assert (first.flops, first.dtype) == (1e9, "float32")
    (file,) = (state / "peaks").glob("*.json")
    assert json.loads(file.read_text())["measured_on"] == first.measured_on


def test_measured_peak__other_precision__is_measured_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, 1e9, 2e9)
    assert [measured_peak("cpu", dtype=dtype).flops for dtype in (torch.float32, torch.bfloat16)] == [1e9, 2e9]


@pytest.mark.parametrize("damage", ["", "{", '{"flops": -1}', "[1]"])
def test_measured_peak__damaged_file__measures_again(
    state: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    rates(monkeypatch, 1e9, 2e9, 3e9)
    measured_peak("cpu", dtype=torch.float32)
    (file,) = (state / "peaks").glob("*.json")
    file.write_text(damage)
    for _ in range(2):
        another_process()
        assert measured_peak("cpu", dtype=torch.float32).flops == 2e9


def test_measured_peak__state_folder_not_writable__is_measured_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "file"))
    rates(monkeypatch, 1e9)
    assert measured_peak("cpu", dtype=torch.float32).flops == 1e9


@pytest.mark.slow
def test_measure_gemm_flops__busy_machine__is_the_rate_of_an_idle_one() -> None:
    def best_of(count: int) -> float:
        return max(measure_gemm_flops("cpu", dtype=torch.float32) for _ in range(count))

    alone, is_over = best_of(2), threading.Event()
    matrix = torch.randn(512, 512)

    def work() -> None:
        while not is_over.is_set():
            matrix @ matrix

    busy = [threading.Thread(target=work) for _ in range(8)]
    for thread in busy:
        thread.start()
    try:
        assert best_of(2) > 0.6 * alone
    finally:
        is_over.set()
        for thread in busy:
            thread.join()
