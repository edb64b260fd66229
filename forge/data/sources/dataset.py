"""The files of a data set in the layout of the Hugging Face hub: a local folder, or a repository of the hub.

Which files belong to which split is decided as the library `datasets` decides it: by `configs` in the head of the
README.md if it has some, or else by names (`data/train-00000-of-00002.parquet`, a folder `train/`, `train.jsonl`).
The files themselves are read like those of `data.files`; code in a data set is never executed.

Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits, datasets-manual-configuration
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.config.data import DataSpec
from forge.config.yaml_reader import compose
from forge.data.sources.listing import Matched, Skipped, SourceFile, list_files
from forge.data.sources.path_glob import matching_paths
from forge.environment import looked_in
from forge.errors import DataError, JobFileError, printable
from forge.fs import leads_to_folder

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARDED = re.compile(r"data/([^/]+?)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_BORDER = r"[-._ 0-9]"
_KINDS = ("parquet", "jsonl", "json", "csv", "tsv", "txt")
"""Endings of files with records; where a data set has several kinds equally often, the first of these is read."""
_KIND = re.compile(rf"\.({'|'.join(_KINDS)}|ndjson|jsonlines|pq)(?:\.(?:gz|bz2|xz|zst|lz4))?$", re.IGNORECASE)
_SAME_KIND = {"ndjson": "jsonl", "jsonlines": "jsonl", "pq": "parquet"}
_NO_RECORDS = {"dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json", "config.json"}
_MAX_README_BYTES = 1 << 22
_MAX_NAMES = 20

_Patterns = Mapping[str, Sequence[str]]
"""Patterns of files by split."""


def list_dataset(spec: DataSpec) -> Matched:
    """List the files of `data.split`; those of the other splits are skipped.

    Raises: DataError if there is no such data set, subset or split, or no file of it can be read.
    """
    name = spec.dataset or ""
    try:
        root = _root_of(spec)
        listed = list_files([f"{root}/**"], within=None if "://" in root else _places(root))[0]
    except DataError as error:
        raise DataError(str(error).replace("data.files: ", "data.dataset: ", 1)) from None
    files = {file.name: file for file in listed.files}
    patterns = _configured(spec, readme=files.get("README.md"))
    splits = _by_patterns(files, patterns, name=name) if patterns else _by_names(_with_records(files))
    if not any(splits.values()):
        raise DataError(f"data.dataset: {printable(name, limit=300)} {_nothing_to_read(files)}")
    wanted = _split_named(spec.split, splits)
    if wanted is None:
        known = ", ".join(printable(split, limit=80) for split in list(splits)[:_MAX_NAMES])
        raise DataError(
            f"data.split: {printable(name, limit=300)} has no split {spec.split!r:.100}; its splits: {known}"
        )
    chosen = splits[wanted]
    skipped = [*listed.skipped, *_skipped(files, splits=splits, wanted=wanted)]
    shown = f"{name}, split {wanted}" + (f", subset {spec.subset}" if spec.subset else "")
    return Matched(
        pattern=shown,
        files=tuple(files[one] for one in sorted(chosen)),
        skipped=tuple(sorted(skipped, key=lambda one: one.path)),
    )


def _root_of(spec: DataSpec) -> str:
    """The folder, or the URL of the repository. Raises: DataError if the name can be neither."""
    name = spec.dataset or ""
    if leads_to_folder(Path(name)):
        if spec.revision is not None:
            raise DataError(f"data.revision: is for data sets of the hub, but {name} is a folder")
        return name.rstrip("/")
    if name.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(name):
        raise DataError(
            f"data.dataset: {printable(name, limit=300)} is no folder{looked_in(Path(name))} and no name on the hub"
        )
    return f"hf://datasets/{name}" + (f"@{spec.revision}" if spec.revision else "")


def _places(root: str) -> tuple[str, ...]:
    """Where the links of a folder may lead: into it or, from a snapshot of the hub's cache, to its files."""
    real = Path(root).resolve()
    return (str(real), *[str(real.parent.parent / "blobs")] * (real.parent.name == "snapshots"))


def _configured(spec: DataSpec, *, readme: SourceFile | None) -> _Patterns | None:
    """The patterns of `data.subset` that the README.md gives; None if it gives none.

    Raises: DataError for a subset that it lacks, none where it has several, or `configs` that cannot be read.
    """
    configs = _configs(readme) if readme is not None else []
    by_name = {config.name: config for config in configs}
    name = spec.subset
    if name is None and len(configs) > 1:
        name = next((config.name for config in configs if config.is_default or config.name == "default"), None)
    elif name is None and configs:
        name = configs[0].name
    if name in by_name:
        return by_name[name].patterns
    if not configs and name is None:
        return None
    known = ", ".join(printable(config.name, limit=80) for config in configs[:_MAX_NAMES]) or "none"
    problem = f"has no subset {name!r:.100}" if name is not None else "has several subsets; set data.subset"
    raise DataError(f"data.subset: {printable(spec.dataset or '', limit=300)} {problem}; its subsets: {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Config:
    """One entry of `configs` in a README.md."""

    name: str
    is_default: bool
    patterns: _Patterns
    """Empty if it names no files; then names decide."""


def _configs(readme: SourceFile) -> list[_Config]:
    try:
        with readme.fs.open(readme.path, "rb") as file:
            text = file.read(_MAX_README_BYTES).decode(errors="replace")
        block = _configs_block(text)
        found = compose(block, path=readme.shown, errors=[]).plain(is_written=True)["configs"] if block else []
        return [_config(entry) for entry in found]
    except (OSError, JobFileError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"data.dataset: the `configs` in {readme.shown} cannot be read: {error!s:.300}") from None


def _configs_block(text: str) -> str:
    """The key `configs` of the YAML at the head of a README.md, without the others."""
    head = re.match(r"\ufeff?---\r?\n(.*?)\n---", text, re.DOTALL)
    block = re.search(r"^configs:[^\n]*(?:\n(?:[ \-#][^\n]*)?)*", head[1], re.MULTILINE) if head else None
    return block[0] if block else ""


def _config(entry: Mapping[str, Any]) -> _Config:
    folder = str(entry.get("data_dir") or "").strip("/.")
    given = entry.get("data_files")
    if given is None:
        patterns: dict[str, Sequence[str]] = {}
    elif isinstance(given, Mapping):
        patterns = {str(split): _strings(paths) for split, paths in given.items()}
    elif isinstance(given, list) and given and isinstance(given[0], Mapping):
        patterns = {str(one["split"]): _strings(one["path"]) for one in given}
    else:
        patterns = {"train": _strings(given)}
    below = {split: [f"{folder}/{path}" if folder else path for path in paths] for split, paths in patterns.items()}
    is_default = entry.get("default") is True
    return _Config(name=str(entry["config_name"]), is_default=is_default, patterns=below)


def _strings(value: Any) -> list[str]:
    return [str(one).removeprefix("./") for one in (value if isinstance(value, list) else [value])]


def _by_patterns(files: Mapping[str, SourceFile], patterns: _Patterns, *, name: str) -> dict[str, list[str]]:
    paths = list(files)
    try:
        return {split: matching_paths(given, paths) for split, given in patterns.items()}
    except ValueError as error:
        problem = f"the `configs` in its README.md cannot be used: {error}"
        raise DataError(f"data.dataset: {printable(name, limit=300)}: {problem}") from None


def _with_records(files: Mapping[str, SourceFile]) -> list[str]:
    """The names of the files with records, all of one kind, which most of them have."""
    kinds = {}
    for name in files:
        kind = _KIND.search(name)
        if kind and name.rpartition("/")[2] not in _NO_RECORDS:
            kinds[name] = _SAME_KIND.get(kind[1].lower(), kind[1].lower())
    if not kinds:
        return []
    counts = Counter(kinds.values())
    most = max(counts, key=lambda kind: (counts[kind], -_KINDS.index(kind)))
    return [name for name, kind in kinds.items() if kind == most]


def _by_names(names: Sequence[str]) -> dict[str, list[str]]:
    """Files by split: shards first, then names of folders, then of files; without any, all are `train`."""
    sharded: dict[str, list[str]] = {}
    for name in names:
        if shard := _SHARDED.fullmatch(name):
            sharded.setdefault(shard[1], []).append(name)
    if sharded:
        return dict(sorted(sharded.items()))
    for is_folder in (True, False):
        found = {
            split: [name for name in names if _is_named(name, words, is_folder=is_folder)]
            for split, words in _KEYWORDS.items()
        }
        if any(found.values()):
            return {split: members for split, members in found.items() if members}
    return {"train": list(names)}


def _is_named(name: str, words: Sequence[str], *, is_folder: bool) -> bool:
    """Whether a folder of a path, or its last part, has one of some words by itself."""
    *folders, last = name.split("/")
    word = re.compile(rf"(?:^|{_BORDER})(?:{'|'.join(words)})(?:$|{_BORDER})")
    return any(word.search(part) for part in (folders if is_folder else [last]))


def _split_named(name: str, splits: Mapping[str, Sequence[str]]) -> str | None:
    """The split of this name, or of one that means the same (`dev`: `validation`)."""
    if splits.get(name):
        return name
    same = next((words for words in _KEYWORDS.values() if name in words), ())
    return next((split for split in splits if split in same and splits[split]), None)


def _skipped(
    files: Mapping[str, SourceFile], *, splits: Mapping[str, Sequence[str]], wanted: str
) -> Iterator[Skipped]:
    chosen = set(splits[wanted])
    split_of: dict[str, str] = {}
    for split, members in splits.items():
        for name in members:
            split_of.setdefault(name, split)
    for name, file in files.items():
        if name in chosen:
            continue
        other = split_of.get(name)
        reason = f"a file of the split {printable(other, limit=80)}" if other else "a file without a split"
        yield Skipped(path=file.path, reason=reason)


def _nothing_to_read(files: Mapping[str, SourceFile]) -> str:
    names = {name.rpartition("/")[2] for name in files}
    if any(name.endswith(".arrow") for name in names):
        return (
            "was written by `save_to_disk` of datasets; convert it: "
            "datasets.load_from_disk(FOLDER)['train'].to_parquet(FILE)"
        )
    if any(name.endswith(".py") for name in names):
        return (
            "is made by a script, and forge runs no code of data sets; use one of its revisions in Parquet "
            "(data.revision: refs/convert/parquet)"
        )
    return f"has no file of the kinds {', '.join(_KINDS)}"
