"""RUN|FOLDER of generate, eval and serve: what is found, and what the message says if nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.errors import ArgumentError
from forge.runs.find_model import find_model


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
