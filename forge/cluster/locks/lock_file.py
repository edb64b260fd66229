"""The lock files: every package that forge installs on other machines, in one version, with its files' hashes.

`forge.txt` has forge's own dependencies; `aws.txt`, `gcp.txt` and `azure.txt` what Ray's launcher needs on a head
besides, in versions that fit; `uv.txt` has uv, which fetches Python where an image lacks the right one. pip takes
a file only if its hash is in the list (`--require-hashes`), wherever it was downloaded from. The files name no
package index. `make lock` writes them, `make sbom` and `make audit` read them. `vllm-cpu.txt` and `vllm-cuda.txt`
have vLLM for the environment that `forge serve` makes for it, in versions that do not fit beside forge's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from forge.errors import ClusterError

_FOLDER = Path(__file__).parent
LOCKS: Mapping[str, Path] = {name: _FOLDER / f"{name}.txt" for name in ("forge", "aws", "gcp", "azure", "uv")}
ENGINE_LOCKS: Mapping[str, Path] = {name: _FOLDER / f"{name}.txt" for name in ("vllm-cpu", "vllm-cuda")}
"""Of vLLM's environments, by their names: for CPython 3.11 on x86-64 Linux."""
SOURCE_ONLY = frozenset({"deepspeed"})
"""Packages that are published as source only: built with the locked setuptools, after their dependencies."""
_PIN = re.compile(r"([a-z0-9][a-z0-9._-]*)==([A-Za-z0-9.!+-]+)(?:\s*;\s*(.+?))?")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedPackage:
    """One package of a lock file."""

    name: str
    """Normalised as PyPA does: lower case, dashes."""
    version: str
    hashes: tuple[str, ...]
    """SHA-256 of each file that may be installed, in hex."""
    marker: str = ""
    """The environments that need it, as in PEP 508; empty: all."""
    needed_by: tuple[str, ...] = ()

    def to_text(self) -> str:
        """Its lines in a lock file."""
        marker = f" ; {self.marker}" if self.marker else ""
        lines = [f"{self.name}=={self.version}{marker}", *(f"    --hash=sha256:{one}" for one in self.hashes)]
        via = f"    # via {', '.join(self.needed_by)}\n" if self.needed_by else ""
        return " \\\n".join(lines) + "\n" + via


def base_lock() -> Path:
    """The lock file of forge's own dependencies."""
    return LOCKS["forge"]


def lock_path(name: str) -> Path:
    """A lock file by its name."""
    return LOCKS[name]


def read_lock(path: Path) -> list[LockedPackage]:
    """Read a lock file. Raises: ClusterError if a package is not pinned, or has no hash."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ClusterError(f"the lock file {path} cannot be read: {error.strerror}; install forge again") from None
    return [_package(block, path=path) for block in _blocks(text)]


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield the lines of each package: its first line is not indented."""
    block: list[str] = []
    for line in text.splitlines():
        if line and not line[0].isspace() and not line.startswith("#"):
            if block:
                yield block
            block = []
        if line.strip():
            block.append(line)
    if block:
        yield block


def _package(lines: list[str], *, path: Path) -> LockedPackage:
    pin = _PIN.fullmatch(lines[0].removesuffix("\\").strip())
    hashes = tuple(found[1] for line in lines[1:] if (found := _HASH.search(line)))
    if pin is None or not hashes:
        raise ClusterError(f"{path.name}: '{lines[0].strip()}' is not one version with hashes; run make lock")
    # After the hashes: "# via a, b", or "# via" with one name on each further line.
    comments = [line.strip().removeprefix("#").strip().removeprefix("via") for line in lines if "#" in line]
    names = [name.strip() for comment in comments for name in comment.split(",")]
    via = sorted({_plain(name) for name in names if name and not name.startswith(("-c", "-r"))})
    return LockedPackage(
        name=_plain(pin[1]), version=pin[2], hashes=hashes, marker=pin[3] or "", needed_by=tuple(via)
    )


def _plain(name: str) -> str:
    """Normalise a name. Source: PyPA, "Names and normalization"."""
    return re.sub(r"[-_.]+", "-", name.partition(" ")[0]).lower()
