"""Find the weights that a job names by a run, a checkpoint or a folder."""

from __future__ import annotations

from pathlib import Path

from forge.checkpoint.peft_folder import adapters_problem
from forge.checkpoint.source import choose_source
from forge.config.checkpoint_path import is_checkpoint, tokenizer_of
from forge.errors import CheckpointError
from forge.fs import leads_to_file
from forge.runs.checkpoints import locate
from forge.runs.remote_ref import read_remote_ref

_EXPORTED = ("config.json", "model.safetensors", "model.safetensors.index.json")


def find_weights(name: str, *, root: Path) -> tuple[str, str]:
    """Return the absolute path or URL of a checkpoint or exported folder, and the folder of its tokenizer."""
    if is_checkpoint(name):
        return _absolute(name), tokenizer_of(_absolute(name))
    problem = adapters_problem(name)
    if problem is not None:
        raise CheckpointError(f"{problem}; merge them into it with peft (merge_and_unload, save_pretrained)")
    folder = Path(name)
    is_export = any(leads_to_file(folder / file) for file in _EXPORTED)
    if "://" not in name and is_export and not (folder / "plan.json").exists():
        return _absolute(name), _absolute(name)
    found = locate(name, root=root)
    try:
        source = _absolute(choose_source(found.url))
    except CheckpointError as error:
        run = found.tokenizer.parent if found.tokenizer is not None else None
        ref = read_remote_ref(run) if run is not None else None
        if ref is None:
            raise
        raise CheckpointError(f"{error}; the run was trained on the cluster '{ref.cluster}'") from error
    return source, _absolute(str(found.tokenizer)) if found.tokenizer is not None else tokenizer_of(source)


def is_same_run(source: str | None, other: str) -> bool:
    """Whether two checkpoints are in one folder."""
    if source is None or not is_checkpoint(source) or not is_checkpoint(other):
        return False
    return source.rpartition("/")[0] == other.rpartition("/")[0]


def _absolute(source: str) -> str:
    return source if "://" in source else str(Path(source).absolute())
