"""Report facts about a host before forge is installed on it, in any Python there.

    python3 - FOLDER VERSION [PYTHON] < script

prints one line of JSON. The script is this file and, in place of its import, `forge.limits`: see `probe_script`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from forge.limits import usable_cpus, usable_memory_bytes

PRINT_VERSIONS = """
import json, platform
from importlib import metadata
found = {"python": platform.python_version()}
for name in ("forge-train", "ray", "torch"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def main() -> None:
    folder, version = Path(sys.argv[1]).expanduser(), sys.argv[2]
    given = str(Path(sys.argv[3]).expanduser()) if len(sys.argv) > 3 else None
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    python = given or shutil.which("python" + version) or sys.executable
    versions = versions_of(python)
    found, gpu_problem = list_gpus()
    facts = {
        "time": time.time(),
        "folder": str(folder),
        "free_bytes": shutil.disk_usage(str(existing)).free,
        "is_writable": os.access(str(existing), os.W_OK),
        "memory_bytes": usable_memory_bytes(),
        "num_cpus": usable_cpus(),
        "gpus": found,
        "gpu_problem": gpu_problem,
        "python": python,
        "version": versions.pop("python", ""),
        "versions": versions,
    }
    sys.stdout.write(json.dumps(facts) + "\n")


def versions_of(python: str) -> dict[str, str]:
    """The versions of a Python and of the packages that must be equal in a cluster; empty if it does not run."""
    try:
        command = [python, "-c", PRINT_VERSIONS]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=True)
        return dict(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def list_gpus() -> tuple[list[list[str]], str]:
    """Name, memory in MiB and driver of each GPU; and the error of a driver that is installed but does not work."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False)
    except FileNotFoundError:
        return [], ""
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi did not answer within 30 s"
    except OSError as error:
        return [], f"nvidia-smi: {error.strerror}"
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    if "No devices were found" in lines:
        return [], ""
    if done.returncode:
        return [], lines[-1] if lines else f"nvidia-smi ended with {done.returncode}"
    return [[part.strip() for part in line.rsplit(",", 2)] for line in lines], ""


if __name__ == "__main__":
    main()
