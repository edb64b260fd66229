"""Find the layers that `model.lora.targets` names.

peft leaves out silently what it cannot match. Here every entry must match, and an entry that names something
without a matrix to adapt is refused with the reason.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forge.config.lora import ALL_LINEAR, LoraSpec
from forge.errors import ModelError

_LINEAR = (nn.Linear, Conv1D)
_TARGETS, _SAVED = "lora.targets", "lora.modules_to_save"
_WHOLE = "is trained whole"
_EXPERT_DIMENSIONS = 3
_MOST_NAMED = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTargets:
    """What an adapter is put on, by full names."""

    modules: tuple[str, ...]
    """Linear layers."""
    parameters: tuple[str, ...]
    """Weights of all experts of a layer in one tensor."""
    trained: tuple[str, ...]
    """Parameters that are trained whole."""
    notes: tuple[str, ...] = ()
    """What the plan says about layers that an entry matches and that get no adapter."""


def find_targets(model: nn.Module, spec: LoraSpec, *, absent: Collection[str]) -> AdapterTargets:
    """Find the layers to adapt in a model without adapters.

    Args:
        model: may be on the meta device.
        absent: parameters that are not in the pretrained weights; they are trained whole.

    Raises: ModelError for an entry that matches nothing, or nothing that can be adapted.
    """
    saved = [name for entry in spec.modules_to_save for name in _saved(model, entry)]
    trained = tuple(dict.fromkeys([*saved, *absent]))
    found = _Candidates.of(model, trained=trained)
    chosen: set[str] = set()
    notes: list[str] = []
    wrong = [entry for entry in spec.targets if entry != ALL_LINEAR and not found.chosen_by(entry)]
    if wrong:
        count = f"{len(wrong)} of {len(spec.targets)} entries ({_listed(wrong)}): " if len(wrong) > 1 else ""
        raise ModelError(count + found.problem(wrong[0]), key=_TARGETS)
    for entry in spec.targets:
        if entry == ALL_LINEAR:
            chosen.update(found.all_linear)
            notes += found.about_all_linear()
            continue
        chosen.update(found.chosen_by(entry))
        notes += found.about_skipped(entry)
    if not chosen:
        raise ModelError("the model has no linear layer to adapt", key=_TARGETS)
    parameters = tuple(name for name in found.experts if name in chosen)
    _require_possible(spec, parameters)
    return AdapterTargets(
        modules=tuple(name for name in found.linear if name in chosen),
        parameters=parameters,
        trained=trained,
        notes=tuple(notes),
    )


def require_dropout_by_sample(spec: LoraSpec, *, attention: str) -> None:
    """Raises: ModelError if rows of a batch are joined, so that dropout cannot be drawn for each of them."""
    if spec.dropout and attention.startswith("flash"):
        problem = f"is drawn for each row, and {attention} joins the rows of a batch; use attn_implementation: sdpa"
        raise ModelError(problem, key="lora.dropout")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """The layers of a model, by whether they can have an adapter."""

    linear: tuple[str, ...]
    all_linear: tuple[str, ...]
    """Without the output head."""
    experts: tuple[str, ...]
    others: Mapping[str, str]
    """Modules with parameters of their own that get no adapter → why."""

    @classmethod
    def of(cls, model: nn.Module, *, trained: Collection[str]) -> _Candidates:
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        linear, all_linear, experts, others = [], [], [], {}
        for name, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if any(f"{name}.{leaf}" in trained for leaf in own):
                others[name] = _WHOLE
            elif isinstance(module, _LINEAR) and id(module.weight) in embeddings:
                others[name] = "shares its weight with the embedding, which a merged adapter would change too"
            elif isinstance(module, _LINEAR):
                linear.append(name)
                all_linear += [name] * (module is not head)
            elif stacked := [leaf for leaf, value in own.items() if value.ndim == _EXPERT_DIMENSIONS]:
                experts += [f"{name}.{leaf}" for leaf in stacked]
            elif own:
                others[name] = f"is of the class {type(module).__name__}; adapters are for linear layers"
        return cls(linear=tuple(linear), all_linear=tuple(all_linear), experts=tuple(experts), others=others)

    def chosen_by(self, entry: str) -> list[str]:
        """The layers and experts that an entry matches."""
        return [name for name in (*self.linear, *self.experts) if _selects(entry, name)]

    def problem(self, entry: str) -> str:
        """Say why an entry gives no layer, and which names would."""
        refused = [name for name in self.others if _selects(entry, name)]
        names = _last_names([*self.linear, *self.experts])
        if refused:
            why = self.others[refused[0]]
            whole = "" if why == _WHOLE else "; to train it whole, name it in lora.modules_to_save"
            return f"{refused[0]} {why}; the layers that can be adapted are {_listed(names)}{whole}"
        near = difflib.get_close_matches(entry.replace("*", ""), names, n=1, cutoff=0.4)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{entry!r} matches no layer{guess}; the layers that can be adapted are {_listed(names)}"

    def about_skipped(self, entry: str) -> list[str]:
        """Say which layers an entry matches and leaves as they are."""
        kinds = Counter(self.others[name] for name in self.others if _selects(entry, name))
        return [
            f"model.lora.targets: {entry} also matches {count} module(s) without an adapter: each {why}"
            for why, count in sorted(kinds.items())
        ]

    def about_all_linear(self) -> list[str]:
        """Say what `all-linear` leaves out."""
        if not self.experts:
            return []
        names = ", ".join(_last_names(self.experts))
        return [f"model.lora.targets: all-linear leaves out the experts, which are no linear layers: {names}"]


def _selects(entry: str, name: str) -> bool:
    """Whether an entry matches the end of a dotted name, or of a name above it."""
    return any(fnmatchcase(name, pattern) for pattern in (entry, f"*.{entry}", f"{entry}.*", f"*.{entry}.*"))


def _saved(model: nn.Module, entry: str) -> Iterable[str]:
    """The parameters of the modules that an entry of `modules_to_save` names."""
    names = [name for name, _ in model.named_parameters()]
    aliases = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = [name for name in names if _selects(entry, name)]
    if not found:
        tied = [name for name in aliases if _selects(entry, name)]
        if tied:
            raise ModelError(f"{tied[0]} is tied to another parameter; name that one", key=_SAVED)
        modules = _last_names(name.rpartition(".")[0] for name in names)
        near = difflib.get_close_matches(entry.replace("*", ""), modules, n=3, cutoff=0.4)
        raise ModelError(f"{entry!r} matches no module; there are {_listed(near or modules)}", key=_SAVED)
    return found


def _require_possible(spec: LoraSpec, parameters: Sequence[str]) -> None:
    """Raises: ModelError for options that peft does not have for experts in one tensor."""
    given = [name for name, value in (("dropout", spec.dropout), ("dora", spec.dora)) if value]
    if parameters and given:
        raise ModelError(
            f"is not possible for experts in one tensor ({parameters[0]}): peft adds the adapter to the weight",
            key=f"lora.{given[0]}",
        )


def _last_names(names: Iterable[str]) -> list[str]:
    """The distinct last parts of dotted names."""
    return sorted({name.rpartition(".")[2] for name in names})


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
