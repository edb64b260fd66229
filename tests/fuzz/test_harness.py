"""The harness fails on what it claims to find, and on nothing else."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forge.errors import ArgumentError
from tests.support import fuzz
from tests.support.fuzz import mutate_json, run_cases
from tests.support.seeds import FUZZ_SEED


def _make(folder: Path, rng: random.Random) -> None:
    (folder / "input").write_text(str(rng.random()))


@pytest.fixture(autouse=True)
def _one_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORGE_FUZZ_CASES", "1")
    monkeypatch.setattr(fuzz, "CASES", tmp_path / "kept")
    (tmp_path / "root").mkdir()


def _refuse(folder: Path) -> None:
    raise ArgumentError("no")


def _write_inside(folder: Path) -> None:
    (folder / "a").write_text("x")
    (folder / "a").rename(folder / "b")


@pytest.mark.parametrize("check", [_refuse, _write_inside])
def test_run_cases__forge_error_or_writes_inside__pass(tmp_path: Path, check: Callable[[Path], None]) -> None:
    result = run_cases("test", make=_make, check=check, root=tmp_path / "root")
    assert (result.num_cases, result.num_refused) == (1, check is _refuse)


def _swallow(folder: Path) -> None:
    try:
        (folder.parent / "a").write_text("x")
    except Exception:
        return


def _fail(folder: Path) -> None:
    raise KeyError("step")


def _fail_without_message(folder: Path) -> None:
    raise ArgumentError("")


def _hang(folder: Path) -> None:
    while True:
        time.process_time()


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        (_fail, "KeyError: 'step'"),
        (_fail_without_message, "a ArgumentError without a message"),
        (_swallow, "open outside of the case"),
        (lambda folder: (folder / "input").rename(folder / ".." / "a"), "os.rename outside"),
        (lambda folder: (folder.parent / "a").symlink_to("x"), "os.symlink outside"),
        (lambda folder: os.kill(os.getpid(), 0), "os.kill"),
        (lambda folder: subprocess.run(["true"], check=True), "subprocess.Popen"),
        (lambda folder: exec(compile("1", str(folder / "x.py"), "exec")), "code of the case was run"),
        (lambda folder: bytearray(2**31), "MemoryError"),
        (lambda folder: sys.exit(1), "SystemExit"),
        (_hang, "TimeoutError: it took longer than 0.2 s"),
    ],
)
def test_run_cases__deed__fails_and_keeps_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Path], None], problem: str
) -> None:
    monkeypatch.setattr(fuzz, "MAX_S", 0.2)
    with pytest.raises(pytest.fail.Exception, match=problem) as caught:
        run_cases("test", make=_make, check=check, root=tmp_path / "root")
    assert f"FORGE_FUZZ_SEED={FUZZ_SEED} FORGE_FUZZ_FIRST=0 FORGE_FUZZ_CASES=1" in str(caught.value)
    assert (next((tmp_path / "kept" / "test").iterdir()) / "input").is_file()
    assert signal.getsignal(signal.SIGALRM) is not fuzz.limited


def test_run_cases__kept_case__runs_first(tmp_path: Path) -> None:
    (tmp_path / "kept" / "test" / "one").mkdir(parents=True)
    (tmp_path / "kept" / "test" / "one" / "input").write_text("kept")
    seen: list[str] = []
    run_cases(
        "test", make=_make, check=lambda folder: seen.append((folder / "input").read_text()), root=tmp_path / "root"
    )
    assert len(seen) == 2
    assert seen[0] == "kept"


def test_mutate_json__same_seed__same_value() -> None:
    value = {"a": [1, {"b": "c"}], "d": None}
    first, second = (str(mutate_json(value, random.Random(7))) for _ in range(2))
    assert first == second
    assert len({str(mutate_json(value, random.Random(seed))) for seed in range(50)}) > 20
    assert value == {"a": [1, {"b": "c"}], "d": None}
