"""Build forge's wheel for other machines, with the versions of its dependencies that are installed here.

Unlike `pip wheel` this packs the running files, of a checkout or an installation, and needs neither a build backend
nor a package index. Equal files give equal bytes, whose digest names the environment that is built from them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

DISTRIBUTION = "forge-train"
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


def locked_requirements() -> str:
    """All installed dependencies of forge, one `name==version` per line, sorted.

    Local version labels are dropped: torch's `+cpu` is about this machine, not the others.
    """
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    waiting = [(DISTRIBUTION, frozenset(("s3", "gcs", "azure")))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            known = distribution(name)
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        found[known.metadata["Name"].lower().replace("_", "-")] = known.version.partition("+")[0]
        for line in known.requires or ():
            needed = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *extras)]
            if needed.marker is None or any(needed.marker.evaluate(one) for one in environments):
                waiting.append((needed.name, frozenset(needed.extras)))
    del found[DISTRIBUTION]
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


def digest_of(wheel: bytes, requirements: str) -> str:
    """The name of the environment that is built from these."""
    return hashlib.blake2b(wheel + requirements.encode(), digest_size=8).hexdigest()


def _sha256(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
