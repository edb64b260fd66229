"""The tensors of an adapter folder of peft, and whether they fit a model with the adapters of a job."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from forge.checkpoint.peft_folder import WEIGHTS_FILE, parameter_name, read_peft_folder
from forge.errors import ModelError, PlanError
from forge.fs import default_cache_dir, leads_to_folder
from forge.model.adapter_names import unwrapped_name
from forge.model.pretrained import some
from forge.model.weight_files import (
    TensorReader,
    WeightFiles,
    content_digests,
    open_safetensors,
    open_weight_files,
)

_KEY = "lora.init_from"


def open_peft_folder(source: str) -> dict[str, TensorReader]:
    """Open the adapters of a folder and what is trained whole beside them, by the names of the model's parameters.

    Raises: PlanError if the file is damaged.
    """
    tensors = open_safetensors(Path(source).expanduser() / WEIGHTS_FILE)
    return {parameter_name(name): tensor for name, tensor in tensors.items()}


def require_peft_folder(source: str, model: nn.Module, *, files: WeightFiles | None) -> tuple[str, ...]:
    """Check that an adapter folder has every trained parameter of a model, and no other.

    Args:
        model: with the adapters of the job; whole, and may be on the meta device.
        files: the pretrained weights of the job; None if they are not on this machine.

    Returns: what the plan says about them.
    Raises: ModelError with the tensors that do not fit, or if the adapters belong to other weights; PlanError.
    """
    found = {name: tensor.shape for name, tensor in open_peft_folder(source).items()}
    wanted = {unwrapped_name(name): tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} has no counterpart in the job's model" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {_size(found[name])} there and {_size(wanted[name])} in the model"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    if problems:
        count = f"{len(problems)} of its tensors do not fit: " if len(problems) > 1 else ""
        raise ModelError(f"{source}: {count}{some(problems)}", key=_KEY)
    return _about_base(source, files)


def _about_base(source: str, files: WeightFiles | None) -> tuple[str, ...]:
    """Compare the weights that an adapter folder names with those of the job, where both are on this machine."""
    base = read_peft_folder(source).base
    if files is not None and base == files.source:
        return ()
    if files is None or base is None or not leads_to_folder(Path(base).expanduser()):
        named = "names no weights that its adapters are added to" if base is None else f"was trained on {base}"
        return (f"{source} {named}: not checked that those of the job are the same",)
    cache = default_cache_dir() / "digests"
    try:
        theirs, ours = (content_digests(one, cache=cache) for one in (open_weight_files(base), files))
    except OSError as error:
        raise PlanError(f"{error.filename} cannot be read: {error.strerror}") from error
    if theirs != ours:
        raise ModelError(f"the adapters are of other weights: {source} was trained on {base}", key=_KEY)
    return ()


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
