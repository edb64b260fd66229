"""Mutated checkpoints, listed, verified, read and exported."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import zlib
from pathlib import Path

from forge.checkpoint.manifest import MANIFEST
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import find_checkpoint
from forge.foreign import read_file
from forge.runs.checkpoints import entries
from forge.serve.export import ExportRequest, export
from tests.support import checkpoints
from tests.support.fuzz import mutate_bytes, mutate_file, mutate_json, mutate_json_text, run_cases

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10,
    "auto_map": {"AutoConfig": "conf.Config"}, "attn_implementation": "org/repo", "rope_parameters": {"type": "x"},
    "trust_remote_code": True, "quantization_config": {"quant_method": "x"}, "eos_token_id": [0, 5], "dtype": "x",
}  # fmt: skip
"""A transformers config with keys that decide what code is loaded."""


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

    shutil.copytree(tmp_path / "good", tmp_path / "first" / "checkpoints")
    _check(tmp_path / "first")  # what is loaded at the first use counts for no case
    run_cases("checkpoint", make=make, check=_check, root=tmp_path / "cases")


def _check(folder: Path) -> None:
    storage = open_storage(str(folder / "checkpoints"))
    list(entries(str(folder / "checkpoints"), with_checksums=True))
    found = find_checkpoint(storage, on_skip=lambda name, why: None)
    if found is not None:
        for name in found.shape.parameters:
            interval = found.value_interval(name)
            if interval.kind != "base":
                found.read([(interval, memoryview(bytearray(interval.size_bytes)))])
    export(ExportRequest(url=str(folder / "checkpoints"), to=str(folder / "exported"), dtype="fp32"))


def _mutate(step: Path, rng: random.Random, *, outside: Path) -> None:
    path = rng.choice(sorted(step.iterdir()))
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 2**20:
        return
    match rng.randrange(6):
        case 0:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        case 1:
            mutate_file(path, rng, outside=outside)
        case 2:
            path.rename(path.with_name(rng.choice(["x", path.name + "2", path.name.upper()])))
        case 3 if path.name.startswith("state-"):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                state = json.loads(path.read_bytes()) | {"config": mutate_json(CONFIG, rng)}
                path.write_text(json.dumps(state))
                _sign(step)
        case _ if path.suffix == ".json":
            path.write_bytes(mutate_json_text(path.read_bytes(), rng))
            if rng.random() < 0.9:
                _sign(step)


def _sign(step: Path) -> None:
    """Make the checksums right again: they are no secrets, and only a reader's own checks remain."""
    try:
        manifest = json.loads(read_file(step / MANIFEST, max_bytes=2**20))
        state = read_file(next(step.glob("state-*.json")), max_bytes=2**20)
        manifest["state"] |= {"size_bytes": len(state), "crc32": zlib.crc32(state)}
    except (StopIteration, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    else:
        manifest = manifest if isinstance(manifest, dict) else {}
        body = {key: value for key, value in manifest.items() if key != "crc32"}
        blank = b'{"crc32": "00000000", ' + json.dumps(body).encode()[1:]
        (step / MANIFEST).write_bytes(blank[:11] + f"{zlib.crc32(blank):08x}".encode() + blank[19:])
