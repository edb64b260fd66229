"""Collect the wheels that a GPU machine without a package index lacks, beside torch with CUDA."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = "deepspeed"
"""Has no wheel in the index: one is built here, without operators, which forge does not use."""
WHEELS = (
    "hjson",
    "msgpack",
    "py-cpuinfo",
    "einops",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "xxhash",
    "psutil",
    "pyyaml",
    "transformers",  # forge needs 5.23; what it needs itself beyond that of 5.17 follows
    "tokenizers",
    "regex",
    "safetensors",
    "huggingface-hub",
    "httpx2",
    "httpcore2",
    "truststore",
)
"""What DeepSpeed and forge's training import beyond torch's dependencies and those of an older transformers."""
FP8 = "torchao==0.18.0"
"""In a folder of its own: where torch is older than 2.11 it keeps transformers from being imported."""
_PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64")


def pack(folder: Path, *, python: str) -> None:
    """Download or build the wheels into `folder`, at the versions of constraints.txt.

    Args:
        python: version of Python on the other machine, as `3.12`.

    Raises: SystemExit if a wheel cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pins = pinned()
    target = [f"--platform={name}" for name in _PLATFORMS] + [f"--python-version={python}", "--implementation=cp"]
    _pip(
        "download", "--no-deps", "--only-binary=:all:", *target, "-d", str(folder), *(pins[name] for name in WHEELS)
    )
    fp8 = folder / "fp8"
    _pip("download", "--no-deps", "--only-binary=:all:", *target, "-d", str(fp8), FP8)
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), pins[SOURCE])
    wheels = list(folder.rglob("*.whl"))
    size = sum(path.stat().st_size for path in wheels)
    print(f"{len(wheels)} wheels of {size / 2**20:.1f} MiB are in {folder}. On the GPU machine:")
    print(f"  python3 -m pip install --no-index --no-deps --target /tmp/site {folder}/*.whl")
    print(f"and, if its torch is 2.11 or newer, {fp8}/*.whl in the same command, for fp8. Then:")
    print("  PYTHONPATH=/tmp/site python3 -m benchmarks.gpu --json gpu.json")


def pinned() -> dict[str, str]:
    """Return `name==version` of every package in constraints.txt, by its normalised name. Source: PEP 503."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("#")[0].strip() for line in lines if "==" in line.partition("#")[0]]
    return {re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower(): pin for pin in pins}


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], check=False)
    if done.returncode:
        raise SystemExit(f"pip {arguments[0]} failed with exit code {done.returncode}; see above")
