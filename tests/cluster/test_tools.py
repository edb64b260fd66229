"""What a provider needs on this machine is looked for before anything is rented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.cluster import tools
from forge.cluster.base import NodeProgress, list_records
from forge.cluster.registry import cluster_of
from forge.cluster.tools import TOOLS, missing_tools, remedies, require_tools
from forge.config.cluster import SECTIONS
from forge.errors import ClusterError
from forge.runtime.doctor import examine

FILES: dict[str, dict[str, Any]] = {
    "aws": {},
    "gcp": {"project": "my-project"},
    "azure": {"project": "12345678-1234-1234-1234-123456789abc"},
    "ssh": {"machines": ["192.0.2.1"]},
    "kubernetes": {"image": "x"},
}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any of the programs, beside a Python without Ray's launcher."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(tools.sys, "executable", str(folder / "python"))  # type: ignore[attr-defined]
    return folder


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize("provider", [name for name in FILES if name != "kubernetes"])
def test_up__programs_missing__starts_nothing_and_names_all(provider: str, empty: Path) -> None:
    values = {"name": "big", "provider": provider, **FILES[provider]}
    cluster = cluster_of(SECTIONS[provider].model_validate(values, strict=False))
    shown: list[NodeProgress] = []
    with pytest.raises(ClusterError, match="Nothing was started") as caught:
        cluster.up(on_progress=shown.append)
    programs = [tool.name for tool in TOOLS[provider] if tool.module is None]
    assert all(name in str(caught.value) for name in programs)
    assert caught.value.exit_code == 3 and list_records() == [] == shown


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        ("apt-get", "sudo apt-get install -y rsync"),
        ("dnf", "sudo dnf install -y rsync"),
        ("apk", "sudo apk add rsync"),
        ("brew", "brew install rsync"),
        ("none", "install rsync"),
    ],
)
def test_require_tools__rsync_missing__says_how_to_install_it(manager: str, command: str, empty: Path) -> None:
    add(empty, "ssh", "ssh-keygen", "ray", manager)
    with pytest.raises(ClusterError, match=rf"need on this machine: rsync \(copies files.*Install: {command}$"):
        require_tools("aws")
    add(empty, "rsync")
    require_tools("aws")


def test_require_tools__python_package_missing__is_installed_from_the_lock(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(empty, "ssh", "ssh-keygen", "ray", "rsync", "gcloud")
    monkeypatch.setattr(tools, "find_spec", lambda name: None)
    missing = missing_tools("gcp")
    assert [tool.name for tool in missing] == ["google-api-python-client", "google-auth"]
    (remedy,) = remedies(missing)
    assert "-m pip install --require-hashes -r" in remedy and remedy.endswith("locks/gcp.txt")


def test_doctor__lists_what_each_provider_needs(empty: Path) -> None:
    add(empty, "apt-get", "ssh")
    found = {one.what: one for one in examine()}
    assert (found["clusters: ssh"].state, found["clusters: ssh"].remedy) == ("ok", None)
    aws = found["clusters: aws"]
    assert aws.state == "note" and "rsync" in aws.found and "sudo apt-get install -y rsync" in str(aws.remedy)
    assert {f"clusters: {provider}" for provider in TOOLS} <= set(found)
