"""forge.fs: atomic replacement of files, private folders."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from forge import fs
from forge.fs import free_bytes


def test_write_atomic__existing_file__is_replaced_with_mode(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    fs.write_atomic(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_write_atomic__replace_fails__keeps_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        fs.write_atomic(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
    assert path.read_text() == "old"


def test_write_atomic__missing_folder__raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fs.write_atomic(tmp_path / "missing" / "x", "text")


def test_make_private__missing_and_open_folders__only_this_user_enters(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    fs.make_private(tmp_path / "a" / "b")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700] * 2
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    (tmp_path / "open").mkdir(mode=0o755)
    fs.make_private(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700


def test_free_bytes__name_too_long_for_any_file__is_unknown_or_that_of_the_parent(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / ("x" * 300)) is None
    assert free_bytes(tmp_path / "new") == free_bytes(tmp_path)
