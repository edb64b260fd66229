"""Mutated checkpoints, verified and read."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path

from forge.checkpoint.manifest import MANIFEST
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import find_checkpoint
from forge.runs.checkpoints import entries
from tests.support import checkpoints
from tests.support.fuzz import mutate_bytes, mutate_file, mutate_json_text, run_cases


def test_checkpoint__mutated__ends_in_a_clear_error_or_none(tmp_path: Path) -> None:
    (tmp_path / "cases").mkdir()
    (tmp_path / "outside").write_text("private")
    for step in (4, 8):
        checkpoints.write(str(tmp_path / "good"), step)

    def make(folder: Path, rng: random.Random) -> None:
        shutil.copytree(tmp_path / "good", folder / "checkpoints")
        step = folder / "checkpoints" / rng.choice(["step-00000004", "step-00000008"])
        for _ in range(rng.choice([1, 1, 2])):
            _mutate(step, rng, outside=tmp_path / "outside")

    run_cases("checkpoint", make=make, check=_check, root=tmp_path / "cases")


def _check(folder: Path) -> None:
    storage = open_storage(str(folder / "checkpoints"))
    list(entries(str(folder / "checkpoints"), with_checksums=True))
    found = find_checkpoint(storage, on_skip=lambda name, why: None)
    if found is not None:
        for name in found.shape.parameters:
            interval = found.value_interval(name)
            found.read([(interval, memoryview(bytearray(interval.size_bytes)))])


def _mutate(step: Path, rng: random.Random, *, outside: Path) -> None:
    path = rng.choice(sorted(step.iterdir()))
    if not path.is_file() or path.is_symlink():
        return
    match rng.randrange(6):
        case 0:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        case 1:
            mutate_file(path, rng, outside=outside)
        case 2:
            path.rename(path.with_name(rng.choice(["x", path.name + "2", path.name.upper()])))
        case _ if path.suffix == ".json":
            path.write_bytes(mutate_json_text(path.read_bytes(), rng))
            if rng.random() < 0.9:
                _sign(step)


def _sign(step: Path) -> None:
    """Make the checksums right again: they are no secrets, and only a reader's own checks remain."""
    try:
        manifest = json.loads((step / MANIFEST).read_text())
        state = next(step.glob("state-*.json")).read_bytes()
        manifest["state"] |= {"size_bytes": len(state), "crc32": zlib.crc32(state)}
    except (StopIteration, OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    else:
        manifest = manifest if isinstance(manifest, dict) else {}
        body = {key: value for key, value in manifest.items() if key != "crc32"}
        blank = b'{"crc32": "00000000", ' + json.dumps(body).encode()[1:]
        (step / MANIFEST).write_bytes(blank[:11] + f"{zlib.crc32(blank):08x}".encode() + blank[19:])
