"""The safetensors files of a `from_pretrained` folder: the location of each tensor, and digests of the files.

Tensors are read as byte ranges, so that a rank reads only its own shard. Only safetensors is accepted:
`pytorch_model.bin` is a pickle, and loading it would execute code from the folder.

Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from forge.config.checkpoint_path import is_checkpoint
from forge.errors import PlanError
from forge.foreign import MAX_INT, lfs_problem, parse_json, safetensors_header
from forge.fs import digest_file, leads_to_folder
from forge.process import one_line

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""torch's types by safetensors' names."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20
_MAX_FILES = 10_000
_MAX_DIMENSIONS = 64  # as torch
_CHUNK_BYTES = 8 * 2**20
_PIECE_NUMEL = 4 * 2**20
_MOST_NAMED = 5


class TensorReader(Protocol):
    """One tensor of pretrained weights, read by range."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def numel(self) -> int: ...

    def read_into(self, out: Tensor, *, start: int = 0) -> None:
        """Fill a flat tensor with the elements from `start` on, converted to its type.

        Raises: OSError, EOFError, CheckpointError.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The location of one tensor in its file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_into(self, out: Tensor, *, start: int = 0) -> None:
        """Fill a flat tensor with the elements from `start` on, converted to its type; a few MiB at a time.

        Raises: OSError; EOFError if the file is short.
        """
        with self.path.open("rb", buffering=0) as file:
            for first in range(0, out.numel(), _PIECE_NUMEL):
                target = out[first : first + _PIECE_NUMEL]
                is_direct = target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()
                piece = target.detach() if is_direct else torch.empty(target.numel(), dtype=self.dtype)
                file.seek(self.offset + (start + first) * self.dtype.itemsize)
                _fill(file, memoryview(piece.view(torch.uint8).numpy()))  # type: ignore[arg-type]
                if not is_direct:
                    target.copy_(piece)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The weights of one folder."""

    source: str
    """As the job names it: a folder or a hub id."""
    revision: str | None
    """The commit, for a hub id."""
    paths: tuple[Path, ...]
    tensors: Mapping[str, TensorReader]
    """By the name in the file."""
    digests: Mapping[str, str] | None = None
    """Of the content, if it is known without reading the files: of a checkpoint, whose tensors have the names of
    the model."""
    num_merged: int = 0
    """Tensors of a checkpoint to which an adapter is added."""


def open_weight_files(source: str) -> WeightFiles:
    """Find the files of a folder or hub id, and read where their tensors lie.

    Raises: PlanError if there are no safetensors files, or one is damaged.
    """
    folder = Path(source).expanduser()
    revision = None
    if not leads_to_folder(folder):
        folder = _download(source)
        revision = folder.name
    paths = tuple(folder / name for name in _file_names(folder, source))
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for path in paths:
        try:
            tensors |= open_safetensors(path)
        except PlanError as error:
            problems.append(error.problem)
    if problems:
        count = f"{len(problems)} of {len(paths)} files of {source} cannot be used: " if len(paths) > 1 else ""
        more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise PlanError(f"model.from_pretrained: {count}{'; '.join(problems[:_MOST_NAMED])}{more}")
    return WeightFiles(source=source, revision=revision, paths=paths, tensors=tensors)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Find the tensors of one file. Raises: PlanError if it is damaged, or no safetensors file."""
    try:
        pointer = lfs_problem(path)
        if pointer is not None:
            raise PlanError(f"{pointer} ({path})")
        return _read_header(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanError(f"{path} is not a whole safetensors file: {one_line(error)}") from error


def content_digests(files: WeightFiles, *, cache: Path) -> dict[str, str]:
    """Return the digest of every weight file by name; see `digest_file`. Raises: OSError."""
    if files.digests is not None:
        return dict(files.digests)
    return {path.name: digest_file(path, cache=cache) for path in files.paths}


def is_downloaded(source: str) -> bool:
    """Whether the weights of a hub id are on this machine, or those of a checkpoint can be read from it."""
    if is_checkpoint(source):
        return True
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"], local_files_only=True))
        return bool(_file_names(folder, source))
    except Exception:  # its classes differ by cause; not all of the files are here
        return False


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # its classes differ by cause: no such repository, no network, no access
        raise PlanError(f"model.from_pretrained: {source} cannot be downloaded: {error}") from error


def _file_names(folder: Path, source: str) -> Iterable[str]:
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    if (folder / _INDEX).is_file():
        pointer = lfs_problem(folder / _INDEX)
        if pointer is not None:
            raise PlanError(f"model.from_pretrained: {pointer} ({folder})")
        try:
            size = (folder / _INDEX).stat().st_size
            if size > _MAX_HEADER_BYTES:
                raise ValueError(f"it has {size} bytes")
            names = sorted(set(parse_json((folder / _INDEX).read_bytes())["weight_map"].values()))
            if len(names) > _MAX_FILES:
                raise ValueError(f"it names {len(names):,} files")
            if any(not isinstance(name, str) or name != Path(name).name for name in names):
                raise ValueError("it names files outside of the folder")
            if not names:
                raise ValueError("its weight_map is empty")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"model.from_pretrained: {folder / _INDEX} cannot be read: {one_line(error)}"
            ) from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            listed = ", ".join(missing[:_MOST_NAMED])
            more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
            raise PlanError(
                f"model.from_pretrained: {source} lacks {len(missing)} of its {len(names)} weight files, named in "
                f"{_INDEX}: {listed}{more}"
            )
        return names
    if any(folder.glob("pytorch_model*.bin*")):
        raise PlanError(
            f"model.from_pretrained: {source} holds pytorch_model.bin and no {_SINGLE}; loading a pickle executes "
            "code, so forge refuses it. Convert it where you trust it: "
            f'AutoModelForCausalLM.from_pretrained("{source}").save_pretrained("{source}-safetensors")'
        )
    packed = sorted(path.name for path in folder.glob("*.gguf"))
    if packed:
        raise PlanError(
            f"model.from_pretrained: {source} holds GGUF files ({len(packed)}, such as {packed[0]}), whose weights "
            "are packed for inference. Give the model that they were made from, or convert them with transformers: "
            "from_pretrained(FOLDER, gguf_file=FILE), then save_pretrained"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f"; it holds {len(others)} other .safetensors files, such as {others[0]}" if others else ""
    raise PlanError(f"model.from_pretrained: {source} holds neither {_SINGLE} nor {_INDEX}{found}")


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Raises: OSError; ValueError, KeyError, TypeError, RecursionError for an invalid header."""
    header, begin = safetensors_header(path)
    found: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} has the type {entry['dtype']}, which forge does not read")
        first, last = entry["data_offsets"]
        if len(entry["shape"]) > _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {len(entry['shape']):,} dimensions")
        if any(type(number) is not int or not 0 <= number < MAX_INT for number in (first, last, *entry["shape"])):
            raise ValueError(f"{name} has a shape or offsets that are not whole numbers from 0 to 2⁶³")
        tensor = StoredTensor(path=path, offset=begin + first, dtype=dtype, shape=tuple(entry["shape"]))
        if last - first != tensor.numel * dtype.itemsize:
            raise ValueError(f"{name} has {last - first} bytes, which is not what its shape takes")
        found[name] = tensor
    _check_size(found, size=path.stat().st_size)
    _check_overlap(found)
    return found


def _check_size(tensors: dict[str, StoredTensor], *, size: int) -> None:
    ends = {name: tensor.offset + tensor.numel * tensor.dtype.itemsize for name, tensor in tensors.items()}
    outside = [name for name, end in ends.items() if end > size]
    if outside:
        raise ValueError(
            f"it is cut short: {size:,} bytes instead of {max(ends.values()):,}, so that {len(outside)} of its "
            f"{len(tensors)} tensors are not whole, {outside[0]} among them"
        )


def _check_overlap(tensors: dict[str, StoredTensor]) -> None:
    by_offset = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].numel))
    for (name, one), (other, following) in pairwise(by_offset):
        if one.offset + one.numel * one.dtype.itemsize > following.offset:
            raise ValueError(f"{name} and {other} overlap")


def _fill(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise EOFError(f"{file.name} ends early")
        done += count
