"""forge's environment on a rented machine, built by the very command that Ray's launcher runs there."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from forge.cluster.cloud.setup_commands import install_command, plan_install, preview_install
from forge.cluster.ssh.bootstrap import Package
from forge.cluster.ssh.wheel import wheel_name
from forge.config.cluster import CloudSpec


def tiny_package() -> Package:
    """As `Package.of` makes it, with a wheel that needs nothing."""
    name, version = wheel_name().split("-")[:2]
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        "forge_here.py": b"WHERE = 'there'\n",
        f"{name}-{version}.dist-info/METADATA": metadata.encode(),
        f"{name}-{version}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        record = ""
        for path, content in files.items():
            archive.writestr(path, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(content)}\n"
        archive.writestr(f"{name}-{version}.dist-info/RECORD", record)
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        own = f"./{wheel_name()} --hash=sha256:{hashlib.sha256(wheel.getvalue()).hexdigest()}\n"
        files = {wheel_name(): wheel.getvalue(), "requirements.txt": b"", "source.txt": own.encode()}
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return Package(content=target.getvalue(), digest="0123", has_wheels=True)


def run(command: str, *, home: Path) -> subprocess.CompletedProcess[str]:
    tools = home / "bin"
    tools.mkdir(exist_ok=True)
    python = tools / f"python{'.'.join(platform.python_version_tuple()[:2])}"
    if not python.exists():
        python.symlink_to(Path(sys.executable).resolve())
    return subprocess.run(
        ["bash", "-c", command],
        env={"HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_install_command__incomplete_environment__is_rebuilt_once(tmp_path: Path) -> None:
    home = tmp_path / "a home"
    (home / ".forge").mkdir(parents=True)
    package = tiny_package()
    (home / ".forge/package.tar").write_bytes(package.content)
    command = install_command(package, cloud="aws", archive="~/.forge/package.tar")
    folder = home / ".forge/envs/0123"
    (folder / "env").mkdir(parents=True)  # an `up` that was ended midway
    done = run(command, home=home)
    assert done.returncode == 0, done.stderr
    assert list(folder.glob("env/lib/python*/site-packages/__pycache__/forge_here.*.pyc")), "compiled at once"
    asked = [str(folder / "env/bin/python"), "-c", "import forge_here; print(forge_here.WHERE)"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout == "there\n"
    (home / ".forge/package.tar").unlink()
    assert run(command, home=home).returncode == 0, "a complete environment needs no package"


def test_install_command__torn_package__leaves_no_complete_environment(tmp_path: Path) -> None:
    (tmp_path / ".forge").mkdir()
    (tmp_path / ".forge/package.tar").write_bytes(b"torn")
    done = run(install_command(tiny_package(), cloud="aws", archive="~/.forge/package.tar"), home=tmp_path)
    assert done.returncode != 0
    assert not (tmp_path / ".forge/envs/0123/complete").exists()


def test_plan_install__package__is_copied_and_named_by_digest(tmp_path: Path) -> None:
    spec = CloudSpec.model_validate({"name": "big", "provider": "aws", "gpu": "T4"}, strict=False)
    installed = plan_install(spec, folder=tmp_path)
    ((there, here),) = installed.file_mounts.items()
    assert Path(here).is_file() and Path(here).name == Path(there).name
    (command,) = installed.setup_commands
    assert there in command and "-r aws.txt" in command
    installs = [part for part in command.split("&&") if "pip install" in part]
    assert len(installs) == 4 and all("--require-hashes" in part for part in installs)
    assert Path(there).stem.removeprefix("package-") in installed.python
    named = spec.model_copy(update={"python": "/opt/forge/bin/python"})
    assert not plan_install(named, folder=tmp_path).setup_commands
    assert preview_install(named).python == "/opt/forge/bin/python"
