"""Records of a run whose disk is full for a while."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.runs.patient_file import PatientFile


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return filler


def test_write_line__disk_full_for_a_while__each_line_is_written_once_in_order(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = disk / "events.jsonl"
    path.write_text("a whole line\na part of")
    file = PatientFile(path)
    file.write_line("0")
    filler = fill(disk)
    lines = [f"{number} {'x' * 997}" for number in range(20)]  # four and a part of the fifth fit
    for line in lines:
        file.write_line(line)
    file.sync()
    assert path.read_text().splitlines()[1:-1] == ["0", *lines[:4]]
    assert "No space left on device; records wait in memory" in capsys.readouterr().err
    filler.unlink()
    file.write_line("last")
    assert path.read_text().splitlines() == ["a whole line", "0", *lines, "last"]


def test_sync__disk_has_space_again__writes_what_waits(disk: Path) -> None:
    file = PatientFile(disk / "events.jsonl")
    filler = fill(disk)
    file.write_line("x")
    filler.unlink()
    file.sync()
    assert (disk / "events.jsonl").read_text() == "x\n"
