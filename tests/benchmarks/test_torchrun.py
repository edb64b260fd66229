"""A killed build of a peer's operator must not stop every later benchmark."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.torchrun import extensions_folder, remove_stale_locks


def test_remove_stale_locks__old_lock__is_removed_and_a_new_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age_s in (("old", 3600), ("building", 30)):
        folder = tmp_path / "py311_cpu" / name
        folder.mkdir(parents=True)
        (folder / "lock").touch()
        os.utime(folder / "lock", times=(time.time() - age_s,) * 2)
    remove_stale_locks(extensions_folder())
    assert [path.parent.name for path in tmp_path.glob("*/*/lock")] == ["building"]
    assert "old" in capsys.readouterr().err
