"""Read forge's checkpoints with numpy alone; the format is described in docs/checkpoint-format.md."""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
         "I8": "i1", "U8": "u1", "BOOL": "?", "F8_E4M3": "u1", "F8_E5M2": "u1"}  # fmt: skip


def load(folder):
    """Return a checkpoint's state, and its intervals by name and kind. Raises: an error if it does not verify."""
    text = (folder / "manifest.json").read_bytes()
    manifest, held = json.loads(text), {}
    if manifest["format_version"] != 3 or text[11:19] != b"%08x" % zlib.crc32(text[:11] + b"0" * 8 + text[19:]):
        raise ValueError("manifest.json is not of format version 3, or does not match its checksum")
    for file in [manifest["state"], *manifest["parts"]]:
        data, end = np.memmap(folder / Path(file["name"]).name, mode="r"), file.get("data_start")
        if (data.size, zlib.crc32(data)) != (file["size_bytes"], file["crc32"]):
            raise ValueError(f"{file['name']} does not match its size or checksum")
        for kind, name, start, stop, dtype in file.get("intervals", ()):
            begin, end = end, end + (stop - start) * np.dtype(TYPES[dtype]).itemsize
            held.setdefault((name, kind), []).append((start, stop, dtype, data[begin:end].view(TYPES[dtype])))
    return json.loads((folder / Path(manifest["state"]["name"]).name).read_bytes()), held


def read(folder, name, kind="master"):
    """Return a whole tensor of one checkpoint; BF16, which numpy does not have, as float32; F8 as bits."""
    state, held = load(Path(folder))
    name = state["tied"].get(name, name)
    pieces = sorted(held.get((name, kind), ()), key=lambda piece: piece[0])
    shape = state["parameters"].get(name, {}).get("shape", ())
    if not pieces or [0, *(p[1] for p in pieces)] != [*(p[0] for p in pieces), np.prod(shape, dtype=int)]:
        raise ValueError(f"{folder} does not contain all of {name} as {kind}; base: {state.get('base')}")
    flat = np.concatenate([piece[3] for piece in pieces])
    return ((flat.astype("<u4") << 16).view("<f4") if pieces[0][2] == "BF16" else flat).reshape(shape)


def main(checkpoints, name=None, kind="master", out=None):
    for folder in sorted(Path(checkpoints).glob("step-*"), reverse=True) or [Path(checkpoints)]:
        try:
            state, held = load(folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            sys.stderr.write(f"{folder.name} is skipped: {error}\n")
            continue
        if name is not None:
            return np.save(out or f"{name}.npy", read(folder, name, kind))
        return sys.stdout.writelines(f"{n} {state['parameters'][n]['shape']} {k}\n" for n, k in sorted(held))
    raise ValueError(f"{checkpoints} contains no checkpoint that verifies")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError, TypeError) as error:
        sys.stderr.write(f"{error}\nusage: read_checkpoint.py CHECKPOINTS [NAME [KIND [OUT.npy]]]\n")
        sys.exit(2)
