"""Print a software bill of materials of everything that forge installs: `make sbom`.

CycloneDX 1.6 JSON, made from the lock files alone, offline: the same files give the same bytes.

Source: CycloneDX 1.6 JSON schema; package-url specification, type `pypi`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from forge.cluster.locks.lock_file import ENGINE_LOCKS, LOCKS, LockedPackage, read_lock

_FORGE = "forge-train"
_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")
"""RFC 9562's namespace for names that are URLs."""


def main() -> None:
    json.dump(bill_of_materials(), sys.stdout, indent=1)
    sys.stdout.write("\n")


def bill_of_materials() -> dict[str, Any]:
    """The bill of materials as plain values. Raises: ClusterError if a lock file cannot be read."""
    found: dict[str, LockedPackage] = {}
    scopes: dict[str, set[str]] = {}
    locks = {**LOCKS, **ENGINE_LOCKS}
    for name, path in locks.items():
        for package in read_lock(path):
            found.setdefault(_purl(package.name, package.version), package)
            scopes.setdefault(_purl(package.name, package.version), set()).add(name)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in locks.values())).hexdigest()
    forge = _purl(_FORGE, version(_FORGE))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, f'{forge}#{digest}')}",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": forge, "name": _FORGE, "version": version(_FORGE)}
        },
        "components": [_component(found[purl], purl=purl, scopes=scopes[purl]) for purl in sorted(found)],
        "dependencies": _dependencies(found, forge=forge),
    }


def _component(package: LockedPackage, *, purl: str, scopes: set[str]) -> dict[str, Any]:
    properties = [{"name": "forge:lock", "value": name} for name in sorted(scopes)]
    if package.marker:
        properties.append({"name": "forge:marker", "value": package.marker})
    return {
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        # Forge's own dependencies are always installed; the rest only on heads of a cloud.
        "scope": "required" if "forge" in scopes else "optional",
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": one} for one in package.hashes],
        "properties": properties,
    }


def _dependencies(found: Mapping[str, LockedPackage], *, forge: str) -> list[dict[str, Any]]:
    """Return what each package depends on, from the lock's notes of what each is needed by."""
    by_name: dict[str, list[str]] = {_FORGE: [forge]}
    for purl, package in found.items():
        by_name.setdefault(package.name, []).append(purl)
    needs: dict[str, set[str]] = {purl: set() for purl in [forge, *found]}
    for purl, package in found.items():
        for name in package.needed_by:
            for needing in by_name.get(name, ()):
                needs[needing].add(purl)
    return [{"ref": purl, "dependsOn": sorted(needs[purl])} for purl in sorted(needs)]


def _purl(name: str, number: str) -> str:
    return f"pkg:pypi/{name}@{number.replace('+', '%2B')}"


if __name__ == "__main__":
    main()
