"""forge's wheel and its locked requirements."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from importlib.metadata import distribution
from io import BytesIO
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from forge.cluster.ssh import wheel as wheel_module
from forge.cluster.ssh.bootstrap import Package
from forge.cluster.ssh.wheel import Requirements, build_wheel, digest_of, wheel_name
from forge.errors import ClusterError


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


def pins_of(text: str) -> dict[str, str]:
    """The version of each package in a file for pip; every line has hashes."""
    lines = text.replace("\\\n", "").splitlines()
    assert all("--hash=sha256:" in line for line in lines)
    needed = [Requirement(line.partition("--hash")[0]) for line in lines]
    return {one.name: str(one.specifier) for one in needed}


def test_requirements__locked__pin_everything_with_hashes() -> None:
    locked = Requirements.locked()
    wheels, sources = pins_of(locked.wheels), pins_of(locked.sources)
    assert {"ray", "torch", "transformers", "pydantic", "aiohttp", "colorful", "s3fs", "gcsfs", "adlfs"} <= {
        *wheels
    }
    assert {*sources} == {"deepspeed"}, "the only one without a wheel"
    assert not {"pytest", "ruff", "forge-train"} & {*wheels}
    assert all(pin.startswith("==") and "+" not in pin for pin in (wheels | sources).values())


@pytest.mark.parametrize("name", ["ray", "torch"])
def test_requirements__other_version_here__is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_module, "version", lambda one: "9.9" if one == name else distribution(one).version)
    with pytest.raises(ClusterError, match=rf"{name} is 9\.9 on this machine .*wheels: .* or python:"):
        Requirements.locked()


def a_wheel(folder: Path, name: str, number: str, *, tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-{number}-{tag}.whl"
    path.write_bytes(f"{name} {number} {tag}".encode())
    return path


def test_requirements__folder_of_wheels__have_the_hashes_of_its_files(tmp_path: Path) -> None:
    numbers = {name: distribution(name).version.partition("+")[0] for name in ("ray", "torch")}
    for name, number in numbers.items():
        a_wheel(tmp_path, name, number)
    other = a_wheel(tmp_path, "some_thing", "1.0", tag="cp311-cp311-linux_x86_64")
    a_wheel(tmp_path, "some_thing", "1.0", tag="cp312-cp312-linux_x86_64")
    found = Requirements.of_folder(tmp_path)
    assert pins_of(found.wheels) == {
        name: f"=={number}" for name, number in (numbers | {"some-thing": "1.0"}).items()
    }
    assert hashlib.sha256(other.read_bytes()).hexdigest() in found.wheels and found.sources == ""
    with tarfile.open(fileobj=BytesIO(Package.of(str(tmp_path)).content)) as archive:
        assert f"wheels/{other.name}" in archive.getnames()
    a_wheel(tmp_path, "some_thing", "2.0")
    with pytest.raises(ClusterError, match="some-thing in two versions"):
        Requirements.of_folder(tmp_path)


def test_requirements__folder_without_torch_or_wheels__is_refused_before_anything_is_rented(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="has no wheels"):
        Package.of(str(tmp_path))
    with pytest.raises(ClusterError, match="has no wheels"):
        Package.of(str(tmp_path / "nowhere"))
    a_wheel(tmp_path, "ray", distribution("ray").version)
    with pytest.raises(ClusterError, match=r"needs a wheel of torch .* and has none"):
        Package.of(str(tmp_path))
    a_wheel(tmp_path, "not a wheel", "x")
    with pytest.raises(ClusterError, match="wheels: "):
        Package.of(str(tmp_path))


def test_package__own_wheel__has_its_hash_and_pip_takes_no_other(tmp_path: Path) -> None:
    package = Package.of(None)
    with tarfile.open(fileobj=BytesIO(package.content)) as archive:
        names = set(archive.getnames())
        source = archive.extractfile("source.txt")
        assert source is not None
        last = source.read().decode().splitlines()[-1]
    assert {"requirements.txt", "aws.txt", "gcp.txt", "azure.txt", "uv.txt", wheel_name()} <= names
    assert last == f"./{wheel_name()} --hash=sha256:{hashlib.sha256(build_wheel()).hexdigest()}"
    (tmp_path / "source.txt").write_text(f"{last}\n")
    for content, code in ((build_wheel(), 0), (build_wheel() + b"\0", 1)):
        (tmp_path / wheel_name()).write_bytes(content)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", "there", "--upgrade"]
        pip += ["--require-hashes", "--no-deps", "--no-index", "-r", "source.txt"]
        done = subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.parametrize("has_wheels", [True, False])
def test_install_commands__every_step_of_pip__requires_hashes(has_wheels: bool) -> None:
    package = Package(content=b"", digest="0", has_wheels=has_wheels)
    *steps, compiles = package.install_commands("pip", python="python3", locks=("aws",)).split(" && ")
    assert compiles.startswith("{ python3 -P -c ")
    assert len(steps) == (2 if has_wheels else 3)
    assert all("--require-hashes" in step for step in steps)
    assert all("--only-binary :all:" in step for step in steps[:-1])
    assert "--no-build-isolation" in steps[-1], "build tools would come without a hash"
    assert all(("--no-index" in step) is has_wheels for step in steps)


def test_digest_of__changes_with_wheel_and_requirements() -> None:
    wheel, requirements = build_wheel(), Requirements.locked()
    assert digest_of(wheel, requirements) == digest_of(wheel, requirements)
    assert digest_of(wheel, replace(requirements, sources=requirements.sources + "one-more==1\n")) != digest_of(
        wheel, requirements
    )
    assert digest_of(wheel + b" ", requirements) != digest_of(wheel, requirements)
