"""RUN|FOLDER of generate, eval and serve: what is found, and what the message says if nothing is."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.errors import ArgumentError
from forge.runs.find_model import find_model, require_weights
from tests.support.checkpoints import write
from tests.support.runs import make_run


def test_find_model__folder_of_weights__is_found_by_its_marker(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model(tmp_path, root=tmp_path / "runs") == tmp_path
    with pytest.raises(ArgumentError, match=r"has no adapter_config\.json, so it holds no model; no run"):
        find_model(tmp_path, root=tmp_path / "runs", marker="adapter_config.json")


def test_find_model__neither_folder_nor_run__likeliest_cause_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))  # its index may know of runs in other folders
    (tmp_path / "smollm2").mkdir()
    root = tmp_path / "runs"
    for name, message in (
        (
            str(tmp_path / "smolm2"),
            rf"^there is no folder {tmp_path}/smolm2; did you mean {tmp_path}/smollm2\?; no run",
        ),
        (str(tmp_path / "none" / "x"), rf"^there is no folder {tmp_path}/none/x; no run"),
        (str(tmp_path / "smollm2"), r"^/.*smollm2 has no config\.json, so it holds no model; no run"),
        ("latest", r"^no run 'latest' under .*, which holds no runs$"),
        ("mine", r"^no run 'mine' under .*, which holds no runs; there is no folder of this name either$"),
        ("x" * 5000, r"^no run 'x"),
        ("a\0b", r"^no run 'a"),
    ):
        with pytest.raises(ArgumentError, match=message):
            find_model(name, root=root)


def test_require_weights__steps_and_averages_of_a_folder_of_weights__are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    require_weights(tmp_path)
    given: dict[str, Any]
    for given, options in (
        ({"ema": True}, "--ema"),
        ({"step": 3}, "--step"),
        ({"step": "best", "ema": True}, "--step and --ema"),
    ):
        with pytest.raises(ArgumentError, match=f"is a folder of weights and not a run.*; leave out {options}, or"):
            require_weights(tmp_path, **given)


def test_require_weights__checkpoint_or_average_that_a_run_has_not__is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mine-0101-000000-abcd")
    with pytest.raises(ArgumentError, match="mine-0101-000000-abcd has no checkpoint in"):
        require_weights(run)
    require_weights(run, is_elsewhere=True)
    write(str(run / "checkpoints"), 3)
    require_weights(run)
    require_weights(run, step=3)
    with pytest.raises(ArgumentError, match="has no checkpoint of step 2; it has steps: 3"):
        require_weights(run, step=2)
    for step in (None, 3):
        with pytest.raises(
            ArgumentError, match=r"step-0+3 of mine-\S+ has no averaged \(EMA\) weights: its job has no"
        ):
            require_weights(run, step=step, ema=True)


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_commands__ema_of_a_folder_of_weights__is_refused_before_a_process_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    (tmp_path / "config.json").write_text("{}")
    given = {"generate": ["-p", "a"], "serve": []}[command]
    started: list[str] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: started.append(str(words)))
    result = CliRunner().invoke(app, [command, str(tmp_path), "--ema", *given])
    assert isinstance(result.exception, ArgumentError) and "leave" in str(result.exception), result.exception
    assert "--ema" in str(result.exception) and not started
