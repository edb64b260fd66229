"""Lock files, bill of materials and audit: all from files, none from a network."""

from __future__ import annotations

import importlib
import json
import re
import socket
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from forge.cluster.locks import audit as audit_module
from forge.cluster.locks.audit import audit, read_advisories
from forge.cluster.locks.lock_file import ENGINE_LOCKS, LOCKS, read_lock
from forge.cluster.locks.sbom import bill_of_materials
from forge.errors import ArgumentError, ClusterError

ROOT = Path(__file__).parents[2]
EVERY = {**LOCKS, **ENGINE_LOCKS}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing here needs a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", EVERY)
def test_lock__every_package__has_one_version_and_hashes_and_no_address(name: str) -> None:
    packages, text = read_lock(EVERY[name]), EVERY[name].read_text()
    assert packages and "".join(one.to_text() for one in packages) == text, "as it was written"
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for one in packages for digest in one.hashes)
    assert not re.search(r"https?:|--(extra-)?index|--find-links|@ ", text)


def test_lock__versions__are_those_of_the_constraints() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for name, path in LOCKS.items():
        for package in read_lock(path):
            wanted = pins.get(package.name, package.version)
            assert package.version == wanted, f"{name}.txt: {package.name}; run make lock"


def test_lock__dependencies_of_pyproject__are_all_in_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {one.name: one.version for one in read_lock(LOCKS["forge"])}
    names = ("s3", "gcs", "azure", "mlflow", "tensorboard", "eval")
    extras = [line for name in names for line in project["optional-dependencies"][name]]
    for line in (*project["dependencies"], *extras):
        needed = Requirement(line)
        assert needed.specifier.contains(versions.get(needed.name, "none"), prereleases=True), (
            f"{line}; run make lock"
        )


@pytest.mark.parametrize(
    "text",
    [
        "torch\n",
        "torch>=2\n    --hash=sha256:" + "0" * 64,
        "torch==2\n",
        "torch==2 \\\n    --hash=md5:00\n",
        "-r other.txt\n",
    ],
)
def test_read_lock__package_without_version_or_hash__is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(text)
    with pytest.raises(ClusterError, match="is not one version with hashes"):
        read_lock(tmp_path / "one.txt")
    with pytest.raises(ClusterError, match="cannot be read"):
        read_lock(tmp_path / "none.txt")


def test_bill_of_materials__has_every_package_once_and_is_reproducible() -> None:
    bill = bill_of_materials()
    assert bill == bill_of_materials()
    refs = [one["bom-ref"] for one in bill["components"]]
    locked = {(one.name, one.version) for path in EVERY.values() for one in read_lock(path)}
    assert {(one["name"], one["version"]) for one in bill["components"]} == locked and len(refs) == len(locked)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    graph = {one["ref"]: set(one["dependsOn"]) for one in bill["dependencies"]}
    known = {*refs, bill["metadata"]["component"]["bom-ref"]}
    assert set(graph) == known and set().union(*graph.values()) <= known
    names = {ref.partition("@")[0] for ref in graph[bill["metadata"]["component"]["bom-ref"]]}
    assert {"pkg:pypi/torch", "pkg:pypi/ray", "pkg:pypi/deepspeed"} <= names
    assert any(ref.startswith("pkg:pypi/msgpack@") for ref in graph[f"pkg:pypi/ray@{distribution('ray').version}"])


def advisory(name: str, *events: dict[str, str], **changes: Any) -> dict[str, Any]:
    """A record in the OSV format."""
    package = {"ecosystem": "PyPI", "name": name}
    ranges = [{"type": "ECOSYSTEM", "events": list(events)}]
    record = {
        "id": "X-1",
        "modified": "2026-01-01T00:00:00Z",
        "summary": "bad",
        "affected": [{"package": package, "ranges": ranges}],
    }
    return record | changes


@pytest.mark.parametrize(
    ("records", "num_problems"),
    [
        ([advisory("Ray", {"introduced": "0"})], 1),
        ([advisory("ray", {"introduced": "0"}, {"fixed": "2.0"})], 0),
        ([advisory("ray", {"introduced": "0"}, {"fixed": "1"}, {"introduced": "2"}, {"fixed": "99"})], 1),
        ([advisory("ray", {"introduced": "99"})], 0),
        ([advisory("ray", {"introduced": "0"}, withdrawn="2026-01-02T00:00:00Z")], 0),
        ([advisory("ray", {"introduced": "not a version"})], 1),
        ([advisory("pytest", {"introduced": "0"})], 1),
        ([advisory("no-such-package", {"introduced": "0"})], 0),
    ],
)
def test_audit__advisory__is_a_problem_only_for_its_versions(
    records: list[dict[str, Any]], num_problems: int, tmp_path: Path
) -> None:
    (tmp_path / "known.json").write_text(json.dumps(records))
    report = audit(advisories=tmp_path / "known.json", reads_files=False)
    assert len([line for line in report.problems if "X-1" in line]) == num_problems
    assert any("advisories published after 2026-01-01" in line for line in report.unchecked)


def test_audit__no_advisories__says_that_they_were_not_checked() -> None:
    report = audit(reads_files=False)
    assert any(line.startswith("known advisories: ") for line in report.unchecked)
    assert not any("advisories" in line for line in report.checked)


@pytest.mark.parametrize("finder", ["importlib.metadata", "importlib_metadata"])
def test_audit__other_version_or_changed_file__is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finder: str
) -> None:
    importlib.import_module(finder)  # the second one replaces the first for the whole process
    info = tmp_path / "one-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: one\nVersion: 1.0\n")
    (tmp_path / "one.py").write_text("pass\n")
    (info / "RECORD").write_text("one.py,sha256=AAAA,5\ngone.py,sha256=AAAA,5\n../../bin/one,sha256=AAAA,5\n")
    (tmp_path / "forge.txt").write_text(f"one==2.0 \\\n    --hash=sha256:{'0' * 64}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(audit_module, "LOCKS", {"forge": tmp_path / "forge.txt"})
    problems = audit().problems
    assert "one is 1.0 here, and 2.0 in the lock" in problems
    assert any("one.py is not the file that was installed" in line for line in problems)
    assert any("gone.py is missing" in line for line in problems)
    assert len(problems) == 3, "pip's launchers have the environment's path in them"


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"id": 1}]', "[" * 100_000, '{"affected": 1, "modified": ""}'])
def test_read_advisories__not_readable__is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(text)
    for path in (tmp_path / "one.json", tmp_path, tmp_path / "none.json"):
        with pytest.raises(ArgumentError, match="cannot be read"):
            read_advisories(path)


def test_commands__print_json_and_exit_1_on_a_problem(tmp_path: Path) -> None:
    run = [sys.executable, "-P", "-m"]
    printed = subprocess.run([*run, "forge.cluster.locks.sbom"], capture_output=True, check=True, timeout=60).stdout
    assert json.loads(printed) == bill_of_materials()
    (tmp_path / "known.json").write_text(json.dumps(advisory("ray", {"introduced": "0"})))
    command = [*run, "forge.cluster.locks.audit", "--no-files", "--advisories", str(tmp_path / "known.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "WRONG: ray" in done.stdout and "not checked: " in done.stdout
