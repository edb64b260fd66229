"""Resolve the lock files again: `make lock`, after a change of pyproject.toml or constraints.txt.

uv resolves for every platform and all supported versions of Python at once, with the hash of every file. What Ray's
launcher needs on a head is resolved for each cloud, in versions that fit forge's own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from forge.cluster.locks.lock_file import LOCKS, base_lock, lock_path, read_lock

_CLOUD_SDKS = {
    "aws": ("boto3",),
    "gcp": ("google-api-python-client", "google-auth"),
    "azure": (
        *("azure-cli-core", "azure-common", "azure-identity", "azure-mgmt-compute", "azure-mgmt-network"),
        *("azure-mgmt-resource", "msrestazure"),
    ),
}
"""Source: Ray documentation, "Launching Ray Clusters"."""
_EXTRAS = ("s3", "gcs", "azure", "mlflow", "tensorboard", "serve", "eval")
_OLDEST_PYTHON = "3.11"
_OLDEST_PYTHON_OF_UV = "3.8"
"""uv, and a pip that works on another environment, run in the image's own Python, where 3.11 is missing."""


def main() -> None:
    """Write every lock file."""
    root = Path(__file__).parents[3]
    constraints = ("--constraint", str(root / "constraints.txt"))
    extras = [word for extra in _EXTRAS for word in ("--extra", extra)]
    _compile(str(root / "pyproject.toml"), *extras, *constraints, to=base_lock())
    for name, requirements in {**_CLOUD_SDKS, "uv": ("pip", "uv")}.items():
        source = lock_path(name).with_suffix(".in")
        source.write_text("\n".join(requirements) + "\n")
        python = _OLDEST_PYTHON_OF_UV if name == "uv" else _OLDEST_PYTHON
        base = () if name == "uv" else ("--constraint", str(base_lock()))
        _compile(str(source), *constraints, *base, to=lock_path(name), python=python)
        source.unlink()
    for path in LOCKS.values():
        path.write_text("".join(one.to_text() for one in read_lock(path)))


def _compile(source: str, *options: str, to: Path, python: str = _OLDEST_PYTHON) -> None:
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header"]
    command += ["--no-emit-index-url", "--upgrade", "--python-version", python, source, *options]
    subprocess.run([*command, "--output-file", str(to)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
