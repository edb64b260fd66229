"""`model.lora.init_from`: find the run or folder, and take over what its adapters are and what they are trained on.

After this, a job names one checkpoint or adapter folder by its absolute path or URL, the weights that the adapters
are added to, and every key of the adapters, and does not depend on later checkpoints of the other run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge.checkpoint.adapter_config import AdapterConfig, adapter_config_from_record, shortest_names
from forge.checkpoint.manifest import ModelShape
from forge.checkpoint.peft_folder import PeftFolder, is_peft_folder, read_peft_folder
from forge.checkpoint.source import open_source
from forge.config.checkpoint_path import is_checkpoint, tokenizer_of
from forge.config.data import TokenizerSpec
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.lora import LoraSpec
from forge.errors import ArgumentError, CheckpointError, PlanError
from forge.fs import leads_to_file
from forge.runs.reader import read_plan
from forge.runtime.find_weights import find_weights, is_same_run

_KEY = "model.lora.init_from"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapters:
    """A checkpoint, or an adapter folder of peft."""

    source: str
    tokenizer: str | None
    base: str | None
    """Folder, Hub id or checkpoint of the weights that they are added to; None if an adapter folder names none."""
    lora: dict[str, Any]
    """Their keys, as in `model.lora`."""


def with_adapters(loaded: LoadedJob, *, resume: Path | None = None) -> LoadedJob:
    """Return a job whose `model.lora` and `model.from_pretrained` are those of the run that it goes on with.

    Args:
        resume: folder of a run that is resumed: it keeps its checkpoint of the run that the job names.

    Raises: JobFileError if there is no such run, it has no adapters, or the job gives other ones.
    """
    job, lora = loaded.job, loaded.job.model.lora
    if lora is None or lora.init_from is None:
        return loaded
    try:
        found = _find(lora.init_from, root=Path(job.checkpoint.runs), resume=resume)
    except (ArgumentError, CheckpointError, PlanError, OSError, ValueError) as error:
        raise loaded.source.error(_KEY, str(error)) from error
    if found.base is None and job.model.from_pretrained is None:
        problem = f"{found.source} does not name the weights that the adapters are added to"
        raise loaded.source.error(_KEY, f"{problem}; give them in model.from_pretrained")
    for key, value in found.lora.items():
        given = lora.scaled_alpha if key == "alpha" else getattr(lora, key)
        if key in lora.model_fields_set and key not in ("targets", "modules_to_save", "dropout") and given != value:
            raise loaded.source.error(f"model.lora.{key}", f"the adapters of {found.source} have {value}")
    return replace(loaded, job=_taken_over(job, lora, found))


def _find(name: str, *, root: Path, resume: Path | None) -> _Adapters:
    if is_peft_folder(name):
        return _of_peft(read_peft_folder(name))
    source, tokenizer = find_weights(name, root=root)
    former = read_plan(resume).job.model.adapters_from if resume is not None else None
    if former is not None and is_same_run(former, source):
        source, tokenizer = former, tokenizer_of(former)
    if not is_checkpoint(source):
        raise CheckpointError(
            f"{source} is a folder of a whole model; name a run, one of its checkpoints, or a folder of peft"
        )
    shape = open_source(source).shape
    if not shape.adapters or shape.base is None:
        raise CheckpointError(f"{source} holds no adapters; give it in model.init_from")
    lora = _keys(adapter_config_from_record(shape.adapters), shape)
    return _Adapters(source=source, tokenizer=tokenizer, base=shape.base.source, lora=lora)


def _of_peft(found: PeftFolder) -> _Adapters:
    folder = str(found.folder.absolute())
    lora = {
        "rank": found.rank,
        "alpha": found.alpha,
        "dropout": found.dropout,
        "dora": found.use_dora,
        "rslora": found.use_rslora,
        "targets": found.targets,
        "modules_to_save": found.whole,
    }
    own = leads_to_file(found.folder / "tokenizer.json")
    return _Adapters(source=folder, tokenizer=folder if own else found.base, base=found.base, lora=lora)


def _keys(config: AdapterConfig, shape: ModelShape) -> dict[str, Any]:
    whole = (name for name, one in shape.parameters.items() if one.kind == "master" and ".lora_" not in name)
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "dropout": config.dropout,
        "dora": config.use_dora,
        "rslora": config.use_rslora,
        "targets": (*shortest_names(config.modules, shape=shape), *config.parameters),
        "modules_to_save": tuple(whole),
    }


def _taken_over(job: JobSpec, lora: LoraSpec, found: _Adapters) -> JobSpec:
    own = {key: value for key, value in found.lora.items() if key not in lora.model_fields_set}
    model = job.model.model_copy(
        update={
            "lora": lora.model_copy(update={**own, "init_from": found.source}),
            "from_pretrained": job.model.from_pretrained or found.base,
        }
    )
    data = job.data
    former = (None, tokenizer_of(job.model.from_pretrained or ""))
    if found.tokenizer is not None and data.tokenizer.from_pretrained in former:
        spec = TokenizerSpec(from_pretrained=found.tokenizer, add_tokens=data.tokenizer.add_tokens)
        data = data.model_copy(update={"tokenizer": spec})
    return job.model_copy(update={"model": model, "data": data})
