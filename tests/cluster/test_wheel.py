"""forge's wheel and its locked requirements."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

from packaging.requirements import Requirement

from forge.cluster.ssh.wheel import build_wheel, digest_of, locked_requirements, wheel_name


def test_build_wheel__same_files__same_bytes() -> None:
    assert build_wheel() == build_wheel()


def test_build_wheel__installed_by_pip__runs(tmp_path: Path) -> None:
    (tmp_path / wheel_name()).write_bytes(build_wheel())
    there = tmp_path / "there"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(there)]
    subprocess.run([*pip, str(tmp_path / wheel_name())], check=True, capture_output=True)
    code = "import forge.cli.app, forge.cluster.ssh.node_cli; print(forge.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(there)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(there / "forge" / "__init__.py")


def test_build_wheel__has_all_files() -> None:
    root = Path(__file__).parents[2] / "forge"
    names = set(zipfile.ZipFile(BytesIO(build_wheel())).namelist())
    assert {
        f"forge/{path.relative_to(root)}"
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } <= names
    assert not [name for name in names if "__pycache__" in name]


def test_locked_requirements__pin_what_is_installed() -> None:
    lines = locked_requirements().splitlines()
    pins = {Requirement(line).name: str(Requirement(line).specifier) for line in lines}
    assert len(pins) == len(lines)
    assert {"ray", "torch", "deepspeed", "transformers", "pydantic", "aiohttp", "colorful"} <= set(pins)
    assert not {"pytest", "ruff", "forge-train"} & set(pins)
    assert all(pin.startswith("==") and "+" not in pin for pin in pins.values())


def test_digest_of__changes_with_wheel_and_requirements() -> None:
    wheel, requirements = build_wheel(), locked_requirements()
    assert digest_of(wheel, requirements) == digest_of(wheel, requirements)
    assert digest_of(wheel, requirements + "one-more==1\n") != digest_of(wheel, requirements)
    assert digest_of(wheel + b" ", requirements) != digest_of(wheel, requirements)
