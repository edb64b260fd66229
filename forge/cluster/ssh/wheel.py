"""Build forge's wheel for other machines, with what pip may install beside it: locked versions with hashes.

Unlike `pip wheel` this packs the running files, of a checkout or an installation, and needs neither a build backend
nor a package index. Equal files give equal bytes, whose digest names the environment that is built from them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from dataclasses import dataclass, replace
from importlib.metadata import distribution, version
from pathlib import Path

from forge.cluster.locks.lock_file import SOURCE_ONLY, LockedPackage, base_lock, read_lock
from forge.errors import ClusterError, printable

DISTRIBUTION = "forge-train"
_EQUAL = ("ray", "torch")
"""Packages whose version must be equal on all machines, this one included."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip file can store."""


def wheel_name() -> str:
    """The wheel's file name. Source: PyPA's binary distribution format, file name convention."""
    return f"{DISTRIBUTION.replace('-', '_')}-{distribution(DISTRIBUTION).version}-py3-none-any.whl"


def build_wheel() -> bytes:
    """Build forge's wheel. Source: PyPA's binary distribution format, version 1.0."""
    known = distribution(DISTRIBUTION)
    root = Path(__file__).parents[2]
    files = {
        f"forge/{path.relative_to(root)}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = f"{DISTRIBUTION.replace('-', '_')}-{known.version}.dist-info"
    files[f"{info}/METADATA"] = (known.read_text("METADATA") or "").encode()
    files[f"{info}/entry_points.txt"] = (known.read_text("entry_points.txt") or "").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: forge\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_sha256(content)},{len(content)}\n" for name, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, date_time=_EPOCH), content, zipfile.ZIP_DEFLATED)
    return target.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What pip installs beside forge's wheel, in two steps; each line has the hashes of the allowed files."""

    wheels: str
    """Installed from wheels alone, so that nothing is built with tools that no hash covers."""
    sources: str = ""
    """Built from source, without build isolation, after the wheels."""

    @classmethod
    def locked(cls) -> Requirements:
        """The lock file of forge. Raises: ClusterError if Ray or torch have another version on this machine."""
        packages = read_lock(base_lock())
        versions = {package.name: package.version for package in packages}
        for name in _EQUAL:
            here = version(name).partition("+")[0]
            if here != versions.get(name):
                raise ClusterError(
                    f"{name} is {here} on this machine and {versions.get(name)} in forge's lock file, from which "
                    f"it is installed on the others, and must be equal: pip install {name}=={versions.get(name)} "
                    "here, or give wheels: (a folder with wheels of your versions) or python: in the cluster file"
                )
        wheels = [package for package in packages if package.name not in SOURCE_ONLY]
        sources = [package for package in packages if package.name in SOURCE_ONLY]
        return cls(wheels="".join(map(_line, wheels)), sources="".join(map(_line, sources)))

    @classmethod
    def of_folder(cls, folder: Path) -> Requirements:
        """Every wheel in a folder, with its own hash.

        Raises: ClusterError if the folder has two versions of a package, or lacks Ray or torch in this machine's.
        """
        found: dict[str, tuple[str, list[str]]] = {}
        for path in sorted(folder.glob("*.whl")):
            name, number = _name_and_version(path)
            known, hashes = found.setdefault(name, (number, []))
            if known != number:
                raise ClusterError(f"wheels: {folder} has {name} in two versions, {known} and {number}; keep one")
            hashes.append(file_sha256(path))
        found.pop(DISTRIBUTION, None)  # forge's own wheel is built here
        for name in _EQUAL:
            here = version(name).partition("+")[0]
            if name not in found or found[name][0].partition("+")[0] != here:
                raise ClusterError(
                    f"wheels: {folder} needs a wheel of {name} {here}, this machine's version, and has "
                    f"{found[name][0] if name in found else 'none'}"
                )
        packages = (
            LockedPackage(name=name, version=number, hashes=tuple(hashes))
            for name, (number, hashes) in found.items()
        )
        return cls(wheels="".join(map(_line, packages)))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(package: LockedPackage) -> str:
    return replace(package, needed_by=()).to_text()


def _name_and_version(path: Path) -> tuple[str, str]:
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        name, number, _, _ = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        raise ClusterError(f"wheels: {printable(str(error), limit=200)}") from None
    return str(name), str(number)


def digest_of(wheel: bytes, requirements: Requirements) -> str:
    """The name of the environment that is built from these."""
    text = f"{requirements.wheels}\0{requirements.sources}"
    return hashlib.blake2b(wheel + text.encode(), digest_size=8).hexdigest()


def _sha256(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
