"""An adapter folder that peft has written (`PeftModel.save_pretrained`), read without torch.

Adapters that compute something else than forge's are refused, and so is a key of the config that is not known: an
adapter that is read half is another adapter.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import CheckpointError, printable
from forge.foreign import parse_object, read_file, safetensors_header
from forge.fs import leads_to_file

CONFIG_FILE, WEIGHTS_FILE, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_MAX_CONFIG_BYTES = 2**20
_MAX_SHOWN = 200
_MAGNITUDE = ".lora_magnitude_vector"
_PARTS = (".lora_A.weight", ".lora_B.weight", f"{_MAGNITUDE}.weight")
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "exclude_modules", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
"""Keys that say how the adapters were begun or where they are, which their tensors show."""
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which peft also changes the weights that the adapters are added to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftFolder:
    """Adapters, and the weights that are trained whole beside them."""

    folder: Path
    base: str | None
    """Folder or Hub id of the weights that they are added to."""
    rank: int
    alpha: float
    dropout: float
    use_dora: bool
    use_rslora: bool
    targets: tuple[str, ...]
    """As in `model.lora.targets`."""
    whole: tuple[str, ...]
    """Parameters that are trained whole."""


def is_peft_folder(source: str) -> bool:
    """Whether a path is that of a folder with adapters, and not of a run."""
    folder = Path(source).expanduser()
    is_run = leads_to_file(folder / "plan.json")
    return "://" not in source and not is_run and leads_to_file(folder / CONFIG_FILE)


def adapters_problem(source: str) -> str | None:
    """What is wrong with a folder where the weights of a whole model are wanted; None if it holds no adapters."""
    if not is_peft_folder(source):
        return None
    base = named_base(source)
    of = f"adapters of {base}" if base else "adapters, and names no base"
    return f"{printable(source, limit=_MAX_SHOWN)} holds {of} ({CONFIG_FILE}), and no whole model"


def named_base(source: str) -> str | None:
    """Folder or Hub id of the weights that the adapters of a folder name, for messages; None if there is none."""
    try:
        body = parse_object(read_file(Path(source).expanduser() / CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return None
    base = body.get("base_model_name_or_path")
    return printable(base, limit=_MAX_SHOWN) if isinstance(base, str) and base else None


def read_peft_folder(source: str) -> PeftFolder:
    """Read the config of an adapter folder, and the names of its tensors.

    Raises: CheckpointError if they cannot be read, or are not adapters that forge can go on with.
    """
    folder = Path(source).expanduser()
    try:
        body = parse_object(read_file(folder / CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    problem = _problem(body)
    if problem is not None:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {problem}")
    if not leads_to_file(folder / WEIGHTS_FILE):
        pickle = "adapter_model.bin"
        raise CheckpointError(
            f"{source} holds no {WEIGHTS_FILE}"
            + (
                f" but {pickle}: loading a pickle executes code, so forge refuses it. Where you trust it, load it "
                "with peft and save it by save_pretrained(FOLDER, safe_serialization=True)"
                if (folder / pickle).exists()
                else ""
            )
        )
    names = [parameter_name(name) for name in _tensor_names(folder / WEIGHTS_FILE)]
    adapters = {name.removesuffix(part) for name in names for part in _PARTS if name.endswith(part)}
    if not adapters:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds no adapters: {', '.join(names[:5]) or 'no tensors'}")
    return PeftFolder(
        folder=folder,
        base=body.get("base_model_name_or_path"),
        rank=body["r"],
        alpha=float(body["lora_alpha"]),
        dropout=float(body.get("lora_dropout", 0)),
        use_dora=bool(body.get("use_dora")),
        use_rslora=bool(body.get("use_rslora")),
        targets=_targets(body, adapted=sorted(adapters)),
        whole=tuple(name for name in names if not name.endswith(_PARTS)),
    )


def parameter_name(name: str) -> str:
    """The name of a parameter of the model, without the wrappers of peft, for a tensor of the file."""
    plain = name.removeprefix(PREFIX)
    return f"{plain}.weight" if plain.endswith(_MAGNITUDE) else plain


def _targets(body: Mapping[str, Any], *, adapted: list[str]) -> tuple[str, ...]:
    """What has an adapter: the entries of the config that match a tensor or, where others narrow them, full names.

    Args:
        adapted: the modules that have one in the file.
    """
    parameters = body.get("target_parameters") or []
    of_experts = {name.rpartition(".")[0] for name in parameters}
    linear = [name for name in adapted if not _ends(name.removesuffix(".base_layer"), of_experts)]
    entries = body.get("target_modules")
    is_narrowed = any(body.get(key) not in (None, []) for key in ("exclude_modules", "layers_to_transform"))
    if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries) and not is_narrowed:
        entries = sorted(entry for entry in entries if any(_ends(name, [entry]) for name in linear))
        return (*entries, *parameters)
    return (*linear, *parameters)


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _problem(body: Mapping[str, Any]) -> str | None:
    """What stands in the way of using adapters, by their config; None if nothing does."""
    if body.get("peft_type") != "LORA":
        return f"peft_type is {body.get('peft_type')!r}; forge goes on with LORA alone"
    rank: Any = body.get("r")
    alpha: Any = body.get("lora_alpha")
    dropout: Any = body.get("lora_dropout", 0)
    if type(rank) is not int or not 1 <= rank <= 4096:
        return f"r must be a whole number from 1 to 4096, and is {rank!r}"
    if type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        return f"lora_alpha must be a number above 0, and is {alpha!r}"
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        return f"lora_dropout must be from 0 to 1, and is {dropout!r}"
    for key in ("use_dora", "use_rslora"):
        if type(body.get(key, False)) is not bool:
            return f"{key} must be true or false, and is {body[key]!r}"
    for key in ("target_parameters", "modules_to_save"):
        values = body.get(key) or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return f"{key} must be a list of names, and is {values!r:.80}"
    if not isinstance(body.get("base_model_name_or_path"), str | None):
        return f"base_model_name_or_path must be a name, and is {body['base_model_name_or_path']!r:.80}"
    if body.get("bias", "none") != "none":
        return f"bias is {body['bias']!r}: forge trains no biases beside adapters"
    begun = body.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.startswith(_OTHER_BASE):
        return (
            f"init_lora_weights is {begun!r}, with which peft changes the weights below the adapters too; convert "
            "them by save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...)"
        )
    read = {
        "peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules",
        "target_parameters", "modules_to_save", "base_model_name_or_path", "bias", "init_lora_weights",
    }  # fmt: skip
    unknown = sorted(key for key, value in body.items() if value and key not in read | _WITHOUT_EFFECT)
    return None if not unknown else f"{unknown[0]} is {body[unknown[0]]!r:.80}, which forge's adapters do not have"


def _tensor_names(path: Path) -> list[str]:
    """Raises: CheckpointError if the file has no valid header."""
    try:
        return sorted(safetensors_header(path)[0])
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
