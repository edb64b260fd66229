"""Which hosts can be part of a cluster, and what is said about the others."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from forge.cluster.local.ray_process import NodeProcess, boot_id
from forge.cluster.ssh import node_cli
from forge.cluster.ssh.bootstrap import clock_skew, probe_script, require_usable
from forge.errors import ClusterError
from forge.process import start_ticks

VERSION = platform.python_version()
MINOR = VERSION.rpartition(".")[0]


def probed(tmp_path: Path, *, nvidia_smi: str | None = None) -> dict[str, Any]:
    """The probe's facts about this machine, with a fake `nvidia-smi`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    if nvidia_smi is not None:
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        (tools / "nvidia-smi").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-", str(tmp_path / "not" / "there"), MINOR, sys.executable],
        input=probe_script(),
        env={**os.environ, "PATH": f"{tools}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return dict(json.loads(done.stdout)) | {"skew_s": 0.0}


@pytest.mark.parametrize("nvidia_smi", [None, "echo No devices were found; exit 6"])
def test_require_usable__no_gpu__passes(tmp_path: Path, nvidia_smi: str | None) -> None:
    facts = probed(tmp_path, nvidia_smi=nvidia_smi)
    require_usable(facts, needs_install=False)
    assert facts["gpus"] == []
    assert not (tmp_path / "not").exists()


def test_probe__gpus__have_memory_and_driver(tmp_path: Path) -> None:
    facts = probed(
        tmp_path, nvidia_smi="echo 'NVIDIA A100, SXM, 81920, 550.54.15'; echo 'NVIDIA T4, 15360, 550.54.15'"
    )
    assert facts["gpus"] == [["NVIDIA A100, SXM", "81920", "550.54.15"], ["NVIDIA T4", "15360", "550.54.15"]]
    require_usable(facts, needs_install=False)


@pytest.mark.parametrize(
    "nvidia_smi",
    ["echo 'NVIDIA-SMI has failed because it could not communicate with the driver' >&2; exit 9", "exit 9"],
)
def test_require_usable__broken_driver__is_refused(tmp_path: Path, nvidia_smi: str) -> None:
    facts = probed(tmp_path, nvidia_smi=nvidia_smi)
    with pytest.raises(ClusterError, match=r"its GPU driver does not work: (NVIDIA-SMI has failed|.* with 9)"):
        require_usable(facts, needs_install=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skew_s": 31.0}, r"its clock is 31 s ahead; synchronise it"),
        ({"skew_s": -31.0}, r"its clock is 31 s behind"),
        ({"free_bytes": 10**9}, r"its disk has .* free under .*, and .* are needed"),
        ({"is_writable": False}, r"cannot be written there; choose another: folder in the file"),
        ({"version": ""}, r"does not run there"),
        ({"version": "3.9.2"}, r"it has Python 3\.9\.2 .*install python3\.\d+ there"),
        ({"versions": {}}, r"has no forge-train; install it there"),
    ],
)
def test_require_usable__unusable_host__says_why_and_what_to_do(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        require_usable(probed(tmp_path) | changes, needs_install=False)


@pytest.mark.parametrize(
    ("there", "skew_s"), [(100.0, 0.0), (130.0, 0.0), (160.0, 0.0), (95.0, -5.0), (165.0, 5.0), (300.0, 140.0)]
)
def test_clock_skew__slow_answer__is_not_counted(there: float, skew_s: float) -> None:
    assert clock_skew(there, began=100.0, ended=160.0) == skew_s


def test_node_cli__node_of_another_cluster_of_the_name__is_neither_used_nor_stopped(tmp_path: Path) -> None:
    """Two people log in to the same hosts as the same user, and call their clusters `lab`."""
    folder = tmp_path / "clusters" / "lab" / "10.0.0.1"
    folder.mkdir(parents=True)
    request = {"cluster": "lab", "host": "10.0.0.1", "id": "ours", "port": 6379, "token": "t"}
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as theirs:
        node = NodeProcess(pid=theirs.pid, started_ticks=start_ticks(theirs.pid) or 0, boot_id=boot_id())
        facts = {"python": sys.executable, "session": "s", "job_port": 1, "port": 6379, "id": "theirs"}
        (folder / "node.json").write_text(json.dumps(facts | {"node": asdict(node)}))
        with pytest.raises(ClusterError, match=r"another cluster named 'lab' runs there.*Choose another name"):
            node_cli._require_same_settings(facts, request, folder)
        assert node_cli._down(tmp_path, request) == {"left": [], "is_other": True}
        assert theirs.poll() is None and (folder / "node.json").exists()
        assert node_cli._down(tmp_path, request | {"id": "theirs"}) == {"left": [], "is_other": False}
        assert theirs.wait(timeout=20) is not None and not folder.exists()
