"""Check the lock files and what is installed, without a network: `make audit`.

1. Every locked package has one version and hashes.
2. What is installed here is what is locked.
3. The installed files are those that their wheels had: sizes and hashes of each package's RECORD.
4. With `--advisories`, no locked or installed version is affected by a known advisory. It takes a file with a list
   of records in the OSV format, or a folder with one record in each file.

What could not be checked is said. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from forge.cluster.locks.lock_file import ENGINE_LOCKS, LOCKS, LockedPackage, read_lock
from forge.errors import ArgumentError, ForgeError, printable

_MAX_BYTES = 256 * 2**20


@dataclass(slots=True, kw_only=True)
class AuditReport:
    """What an audit has found."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """What could not be checked, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advisory:
    """A known weakness of some versions of a package."""

    id: str
    package: str
    summary: str
    ranges: tuple[tuple[str, str | None], ...]
    """Versions from the first on and below the second; None: no fixed version is known."""

    def affects(self, number: str) -> bool:
        """Whether a version is affected; an unreadable version counts as affected."""
        try:
            here = Version(number)
            return any(
                Version(first or "0") <= here and (fixed is None or here < Version(fixed))
                for first, fixed in self.ranges
            )
        except InvalidVersion:
            return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m forge.cluster.locks.audit")
    parser.add_argument("--advisories", type=Path, help="a file or folder in the OSV format")
    parser.add_argument("--no-files", action="store_true", help="do not read the installed files")
    options = parser.parse_args()
    try:
        report = audit(advisories=options.advisories, reads_files=not options.no_files)
    except ForgeError as error:
        sys.exit(f"audit: {error}")
    marks = (("ok", report.checked), ("not checked", report.unchecked), ("WRONG", report.problems))
    sys.stdout.write("".join(f"{mark}: {line}\n" for mark, lines in marks for line in lines))
    sys.exit(1 if report.problems else 0)


def audit(*, advisories: Path | None = None, reads_files: bool = True) -> AuditReport:
    """Run all checks. Raises: ClusterError, ArgumentError if a lock file or the advisories cannot be read."""
    report = AuditReport()
    locked = {name: read_lock(path) for name, path in {**LOCKS, **ENGINE_LOCKS}.items()}
    num_packages = sum(map(len, locked.values()))
    num_hashes = sum(len(one.hashes) for packages in locked.values() for one in packages)
    report.checked.append(f"{num_packages} locked packages have one version each, and {num_hashes} hashes together")
    installed = _check_installed(locked["forge"], report)
    if reads_files:
        _check_files(installed, report)
    else:
        report.unchecked.append("the installed files, as asked")
    if advisories is None:
        report.unchecked.append(
            "known advisories: forge ships none; give a collection in the OSV format with --advisories"
        )
        return report
    everything = {(one.name, one.version) for packages in locked.values() for one in packages}
    others = {(_plain(one.metadata["Name"] or ""), one.version) for one in distributions()}
    _check_advisories(everything | others, read_advisories(advisories), report, source=advisories)
    return report


def read_advisories(path: Path) -> tuple[str, list[Advisory]]:
    """Read advisories. Returns: the newest date in them, and the advisories.

    Raises: ArgumentError if they cannot be read.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    records: list[Any] = []
    try:
        for file in files:
            if file.stat().st_size > _MAX_BYTES:
                raise ValueError("is larger than 256 MiB")
            body = json.loads(file.read_bytes())
            records += body if isinstance(body, list) else [body]
        found = [advisory for record in records for advisory in _advisories(record)]
        newest = max((str(record["modified"])[:10] for record in records), default="")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArgumentError(f"the advisories {path} cannot be read: {printable(str(error), limit=200)}") from None
    return newest, found


def _advisories(record: Mapping[str, Any]) -> Iterator[Advisory]:
    """Read one record. Source: Open Source Vulnerability format 1.6."""
    for affected in record["affected"]:
        if affected["package"]["ecosystem"] != "PyPI" or "withdrawn" in record:
            continue
        ranges: list[tuple[str, str | None]] = []
        for one in affected.get("ranges", ()):
            if one["type"] != "ECOSYSTEM":
                continue
            first: str | None = None
            for event in one["events"]:
                if "introduced" in event:
                    first = str(event["introduced"])
                elif first is not None and "fixed" in event:
                    ranges.append((first, str(event["fixed"])))
                    first = None
            if first is not None:
                ranges.append((first, None))
        yield Advisory(
            id=str(record["id"]),
            package=_plain(str(affected["package"]["name"])),
            summary=str(record.get("summary", "")),
            ranges=tuple(ranges),
        )


def _check_installed(locked: Sequence[LockedPackage], report: AuditReport) -> list[Distribution]:
    """Compare versions. Returns: the installed ones of the locked packages."""
    found, num_absent = [], 0
    for package in locked:
        try:
            one = distribution(package.name)
        except PackageNotFoundError:
            num_absent += 1  # of another platform, or an extra
            continue
        found.append(one)
        here = one.version.partition("+")[0]
        if here != package.version:
            report.problems.append(f"{package.name} is {here} here, and {package.version} in the lock")
    report.checked.append(f"{len(found)} of {len(locked)} locked packages are installed here; {num_absent} are not")
    known = {package.name for package in locked}
    extra = sorted({_plain(one.metadata["Name"] or "") for one in distributions()} - known)
    report.unchecked.append(f"{len(extra)} installed packages that no machine gets from forge: {', '.join(extra)}")
    return found


def _check_files(installed: Sequence[Distribution], report: AuditReport) -> None:
    num_files = num_launchers = 0
    for one in installed:
        # `Distribution.files` leaves out files that are missing, from Python 3.12 on or with importlib_metadata.
        record = one.read_text("RECORD")
        if record is None:
            report.unchecked.append(f"the files of {one.metadata['Name']}: it has no RECORD")
            continue
        for name, recorded, *_ in csv.reader(record.splitlines()):
            if not recorded:  # the RECORD itself, and compiled code
                continue
            if name.startswith("../"):  # in `bin`, with the environment's own path in it
                num_launchers += 1
                continue
            method, _, wanted = recorded.partition("=")
            path = Path(str(one.locate_file(name)))
            if not path.is_file():
                report.problems.append(f"{one.metadata['Name']}: {path} is missing")
                continue
            num_files += 1
            with path.open("rb") as content:
                digest = hashlib.file_digest(content, method).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != wanted:
                report.problems.append(f"{one.metadata['Name']}: {path} is not the file that was installed")
    report.checked.append(f"{num_files} installed files are compared with their packages' own records")
    report.unchecked.append(f"{num_launchers} launchers in bin, which pip writes for this environment")
    report.unchecked.append("whether those records are the publishers': pip keeps no hash of the file it installed")


def _check_advisories(
    packages: set[tuple[str, str]], known: tuple[str, list[Advisory]], report: AuditReport, *, source: Path
) -> None:
    newest, advisories = known
    for name, number in sorted(packages):
        for advisory in advisories:
            if advisory.package == name and advisory.affects(number):
                fixed = [last for _, last in advisory.ranges if last]
                remedy = f"fixed in {', '.join(fixed)}" if fixed else "no fixed version is known"
                report.problems.append(f"{name} {number}: {advisory.id}: {advisory.summary} ({remedy})")
    report.checked.append(f"{len(packages)} packages against {len(advisories)} advisories of {source.name}")
    report.unchecked.append(
        f"advisories published after {newest or 'an unknown date'} or not in {source.name}: give a newer and "
        "larger collection with --advisories"
    )


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
