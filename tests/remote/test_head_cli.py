"""The commands on a cluster's head, called in this process."""

from __future__ import annotations

import argparse
import io
import os
import stat
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from forge.errors import ArgumentError
from forge.plan.plan import plan_to_json
from forge.remote import head_cli
from forge.remote.submit import _marked
from tests.support.jobs import tiny_plan


@pytest.mark.parametrize("exists", [False, True])
def test_upload__run_folder_under_the_home_folder__closed_to_other_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        plan = plan_to_json(tiny_plan()).encode()
        entry = tarfile.TarInfo("plan.json")
        entry.size = len(plan)
        archive.addfile(entry, io.BytesIO(plan))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"{}\n" + content.getvalue())))
    before = os.umask(0o022)
    try:
        if exists:
            (tmp_path / ".forge" / "runs").mkdir(parents=True)
        answer = head_cli._upload(argparse.Namespace(run_id="tiny-1", folder=None, mark=None))
    finally:
        os.umask(before)
    assert answer == {"folder": str(tmp_path / ".forge" / "runs" / "tiny-1"), "has_corpus": False}
    assert stat.S_IMODE((tmp_path / ".forge").stat().st_mode) == 0o700


def test_upload__folder_that_the_client_writes_too__is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "tiny-1"
    folder.mkdir(parents=True)
    with _marked(folder) as mark:
        assert [path.name for path in folder.iterdir()] == [mark]
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"{}\n")))
        link = tmp_path / "mounted"  # the same folder, by another name on the cluster
        link.symlink_to(tmp_path / "runs")
        options = argparse.Namespace(run_id="tiny-1", folder=link / "tiny-1", mark=mark)
        with pytest.raises(ArgumentError, match="is also the run's folder on this machine"):
            head_cli._upload(options)
        assert [path.name for path in folder.iterdir()] == [mark]
    assert list(folder.iterdir()) == []
