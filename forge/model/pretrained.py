"""Read any range of the weights of `from_pretrained`, by the parameter names of the trained model.

The names in the files may be older than the model class. transformers' conversion rules rename them, and join some
tensors into one (experts of a mixture). A renamed tensor is read by range; a joined one is assembled whole, one at
a time. So a rank holds at most its own shard and one tensor.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from forge.errors import ModelError
from forge.model.grown_tensor import GrownTensor
from forge.model.weight_files import TensorReader, WeightFiles

_MOST_NAMED = 5
_PIECE_NUMEL = 2**20
_PACKED_SUFFIXES = (
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv"),
    *(".absmax", ".quant_map", ".SCB", ".weight_format", ".quant_state.bitsandbytes__nf4"),
    *(".quant_state.bitsandbytes__fp4", "_proj_blocks", "_proj_scales"),
)
"""Ends of the names of tensors beside quantised weights, by the libraries that write them."""


@dataclass(slots=True, kw_only=True)
class _Joined:
    """Several tensors of the files that are converted together to one or more tensors of the model."""

    target: str
    converter: WeightConverter
    parts: list[tuple[str, str]] = field(default_factory=list)
    """Name in the file, and the pattern of the converter that it matched."""


class PretrainedWeights:
    """The tensors of a folder under the names of a model.

    Attributes:
        unused: names in the files that the model does not have.
        absent: parameters of the model that are not in the files, and need not be.
        grown: parameters with a row for each token that have more rows than in the files.
    """

    def __init__(
        self,
        files: WeightFiles,
        model: Any,
        *,
        is_required: Callable[[str], bool] = lambda name: True,
        may_grow: bool = False,
    ) -> None:
        """Args:
        files: the safetensors files of the folder.
        model: the model on the meta device; the names of one that is none of transformers are those in the files.
        is_required: whether the files must have a parameter of the model, by its name.
        may_grow: whether what has a row for each token of the model's vocabulary may have fewer in the files; the
            missing rows are the mean of those there.

        Raises: ModelError naming weights that are missing or of another shape.
        """
        self.files, self._model = files, model
        self._is_required = is_required
        self.absent: tuple[str, ...] = ()
        self._plain: dict[str, TensorReader] = {}
        self._joined: dict[str, _Joined] = {}
        self._last: tuple[str, dict[str, Tensor]] | None = None
        """The most recently joined tensors."""
        self.unused: tuple[str, ...] = ()
        self._grown: dict[str, GrownTensor] = {}
        self._may_grow = may_grow
        self._copies: dict[str, str] = {}
        """Further names of tied parameters that the files have too → the first name."""
        self._map_names()
        self._resolve_ties()
        self._check_shapes()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of the model."""
        return tuple(name for name, _ in self._model.named_parameters())

    @property
    def grown(self) -> tuple[str, ...]:
        return tuple(self._grown)

    def __contains__(self, name: str) -> bool:
        return name in self._plain or name in self._joined

    @torch.no_grad()
    def read_into(self, name: str, out: Tensor, *, start: int = 0) -> None:
        """Fill a flat tensor with a parameter's elements from `start` on, converted to its type.

        Raises: OSError, EOFError.
        """
        if name in self._grown:
            self._grown[name].read_into(out, start=start)
        elif name in self._plain:
            self._plain[name].read_into(out, start=start)
        else:
            whole = self._make(self._joined[name], load=_read_whole)[name]
            out.copy_(whole.reshape(-1)[start : start + out.numel()])

    def _map_names(self) -> None:
        expected = self._model.state_dict()
        is_plain = not isinstance(self._model, PreTrainedModel)  # a class of the user's own
        rules = [] if is_plain else get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = "" if is_plain else self._model.base_model_prefix
        rename = partial(rename_source_key, base_model_prefix=prefix, meta_state_dict=expected)
        unused = []
        for key in sorted(self.files.tensors, key=dot_natural_key):
            name, pattern = (key, None) if is_plain else rename(key, renamings, converters)
            is_own = self.files.digests is not None  # a checkpoint has the names of the model
            if key in expected and (is_own or name not in expected):
                name, pattern = key, None
            if name not in expected:
                unused.append(key)
            elif pattern is None:
                self._plain[name] = self.files.tensors[key]
            else:
                rule = by_pattern[pattern]
                group = self._joined.get(name) or _Joined(target=name, converter=rule)
                group.parts.append((key, pattern))
                for target in rule.target_patterns:
                    self._joined[name.replace(rule.target_patterns[0], target)] = group
        ignored = () if is_plain else self._model._keys_to_ignore_on_load_unexpected or ()
        self.unused = tuple(key for key in unused if not any(re.search(pattern, key) for pattern in ignored))

    def _resolve_ties(self) -> None:
        """Map the first name of every tied parameter to the tensor, which may be stored under any of its names."""
        first: dict[int, str] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            known = first.setdefault(id(parameter), name)
            if known != name and known in self._plain and name in self._plain:
                self._copies[name] = known
            if known not in self and name in self:
                if name in self._plain:
                    self._plain[known] = self._plain[name]
                else:
                    self._joined[known] = self._joined[name]

    def require_equal_ties(self, *, key: str) -> None:
        """Raises: ModelError about `key` if the files have two tensors for one parameter, and they differ; OSError,
        EOFError.
        """
        for further, name in self._copies.items():
            if not _are_equal(self._plain[further], self._plain[name]):
                raise ModelError(
                    f"{further} and {name} differ in {self.files.source}, and the model has one weight for both; "
                    "set model.tie_word_embeddings: false to keep both",
                    key=key,
                )

    def _check_shapes(self) -> None:
        absent, wrong, quantised = [], [], []
        for name, parameter in self._model.named_parameters():
            shape = self._shape_of(name)
            if shape is None:
                absent.append(name)
            elif parameter.is_floating_point() and (found := self._quantised_type_of(name)) is not None:
                quantised.append(f"{name} ({str(found).removeprefix('torch.')})")
            elif self._has_fewer_rows(name, shape, wanted=tuple(parameter.shape)):
                self._grown[name] = GrownTensor(stored=self._plain[name], num_rows=parameter.shape[0])
            elif shape != tuple(parameter.shape):
                wrong.append(f"{name} is {_times(shape)} there and {_times(tuple(parameter.shape))} in the model")
        self.absent = tuple(absent)
        missing = [name for name in absent if self._is_required(name)]
        packed = [key for key in self.unused if key.endswith(_PACKED_SUFFIXES)]
        if packed and (missing or quantised):
            raise ModelError(
                f"{self.files.source} holds {len(packed)} tensors of quantised weights (GPTQ, AWQ, bitsandbytes or "
                f"the like): {some(packed)}. Give the model that they were quantised from, or save it dequantised",
                key="from_pretrained",
            )
        if missing:
            raise ModelError(self._about_missing(missing), key="from_pretrained")
        if quantised:
            raise ModelError(
                f"{self.files.source} holds weights that are not plain floating point: {some(quantised)}; their "
                "scales are not read. Give the model that they were quantised from, or save them dequantised",
                key="from_pretrained",
            )
        if wrong:
            raise ModelError(
                f"{self.files.source} has {len(wrong)} other shapes: {some(wrong)}", key="from_pretrained"
            )

    def _about_missing(self, missing: Sequence[str]) -> str:
        """Describe weights that the files must have, and unknown tensors beside them."""
        name = type(self._model).__name__
        others = f"{len(self.unused)} that it does not have, {self.unused[0]} among them" if self.unused else ""
        if others and 2 * len(missing) > sum(1 for _ in self._model.parameters()):
            return (
                f"the weights of {self.files.source} are of another architecture than its config.json: they lack "
                f"{len(missing)} that a {name} needs, {some(missing)}; they have {others}"
            )
        count = f"{len(missing)} weights, " if len(missing) > _MOST_NAMED else ""
        problem = f"{self.files.source} lacks {count}{some(missing)}: a {name} needs every weight"
        return f"{problem}. It has {others}" if others else problem

    def _has_fewer_rows(self, name: str, shape: tuple[int, ...], *, wanted: tuple[int, ...]) -> bool:
        """Whether a tensor of the files lacks only rows of tokens, and the model may have more."""
        if not self._may_grow or name not in self._plain or not shape or shape[1:] != wanted[1:]:
            return False
        return 0 < shape[0] < wanted[0] and wanted[0] == int(self._model.config.get_text_config().vocab_size)

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        if name in self._plain:
            return self._plain[name].shape
        if name not in self._joined:
            return None
        made = self._make(self._joined[name], load=_on_meta)
        return tuple(made[name].shape) if name in made else None

    def _quantised_type_of(self, name: str) -> torch.dtype | None:
        parts = [self._plain[name]] if name in self._plain else []
        if not parts:
            parts = [self.files.tensors[key] for key, _ in self._joined[name].parts]
        wrong = (part.dtype for part in parts if not part.dtype.is_floating_point or part.dtype.itemsize < 2)
        return next(wrong, None)

    def _make(self, group: _Joined, *, load: Callable[[TensorReader], Tensor]) -> dict[str, Tensor]:
        if load is _read_whole and self._last is not None and self._last[0] == group.target:
            return self._last[1]
        self._last = None
        converter = copy.deepcopy(group.converter)
        for key, pattern in group.parts:
            converter.add_tensor(group.target, key, pattern, partial(load, self.files.tensors[key]))
        made = converter.convert(group.target, model=self._model, config=self._model.config)
        made = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        if load is _read_whole:
            self._last = group.target, made
        return made


def _read_whole(stored: TensorReader) -> Tensor:
    flat = torch.empty(stored.numel, dtype=stored.dtype)
    stored.read_into(flat)
    return flat.view(stored.shape)


def _on_meta(stored: TensorReader) -> Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def some(names: Sequence[str]) -> str:
    """List at most five names, and the number of the rest."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _are_equal(first: TensorReader, second: TensorReader) -> bool:
    """Whether two tensors of files are the same; a few MiB at a time. Raises: OSError, EOFError."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    for start in range(0, first.numel, _PIECE_NUMEL):
        pieces = [torch.empty(min(_PIECE_NUMEL, first.numel - start), dtype=first.dtype) for _ in range(2)]
        first.read_into(pieces[0], start=start)
        second.read_into(pieces[1], start=start)
        if not torch.equal(*pieces):
            return False
    return True


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"
