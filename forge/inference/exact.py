"""Compute the logits of one sequence alone in fp64, which decides where batched arithmetic cannot.

Products of matrices of other shapes round differently, so the logits of a sequence depend a little on what it is
batched with. Where the two largest are closer than that, the tokens are chosen from these logits.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from forge.errors import DivergedError, ForgeWarning
from forge.inference.loaded import LoadedModel
from forge.process import one_line

TIE = 1e-6
"""Logits closer than this in fp64 are equal, as of two equal rows of an output embedding; the smaller id wins.
Norms of transformers models compute in fp32 within it."""
_NOISE = {torch.float32: 2.0**-13, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
"""Bounds of the difference that batching makes, relative to the largest logit.

With SmolLM2-135M, 8 texts of 32 tokens alone and in one batch: at most 8.1e-7 in fp32 and 0.016 in bf16."""

_OF_DTYPE = re.compile(r"\b(?:double|float64|dtypes?|scalar type)\b", re.IGNORECASE)
"""In the messages of torch's kernels that do not compute in fp64, such as "expected scalar type Double but found
Float", "Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double"."""
_WITHOUT_FP64: WeakSet[nn.Module] = WeakSet()


def noise_bound(logits: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The largest difference between logits of a row that batching may make. Shapes: [n, V] → [n]."""
    return logits.abs().amax(dim=-1).clamp(min=1.0) * _NOISE[dtype]


def require_numbers(loaded: LoadedModel, outputs: Tensor) -> None:
    """Raises: DivergedError if an output is nan, as those of weights are that training has broken."""
    if bool(outputs.isnan().any()):
        raise DivergedError(
            f"the outputs of {loaded.name} are not numbers (nan): its training has diverged, or its weights are "
            "damaged; an earlier checkpoint may be whole (--step)"
        )


@torch.inference_mode()
def exact_logits(loaded: LoadedModel, ids: Sequence[int], *, first: int, source: Sequence[int] = ()) -> Tensor:
    """Logits for the tokens from `first` on, and for the one after the last, on the CPU.

    They are computed in fp64, or in fp32 where an operation of the model has no fp64, with one `ForgeWarning` for
    the model; either way from the sequence alone.

    Args:
        ids: a whole sequence; of an encoder-decoder what the decoder reads, with its start token.
        first: at least 1.
        source: what the encoder reads.

    Shapes: result: float64[len(ids) - first + 1, V].
    """
    if loaded.model not in _WITHOUT_FP64:
        try:
            return _logits_alone(loaded, ids, dtype=torch.float64, source=source)[first - 1 :]
        except RuntimeError as error:  # some kernels refuse fp64: fused experts, state spaces
            if not _is_of_dtype(error):
                raise
            reason = one_line(error)
    found = _logits_alone(loaded, ids, dtype=torch.float32, source=source)[first - 1 :]
    if loaded.model not in _WITHOUT_FP64:
        _WITHOUT_FP64.add(loaded.model)
        warnings.warn(
            f"{loaded.name} cannot be computed in fp64 ({reason}), so close choices of tokens are decided, and "
            "log-probabilities computed, in fp32: the same in every batch, but they may differ between machines "
            "of several kinds",
            ForgeWarning,
            stacklevel=2,
        )
    return found


def _is_of_dtype(error: RuntimeError) -> bool:
    """Whether an operation refuses a dtype; lack of memory and faults of a device are no reasons to go on."""
    return not isinstance(error, torch.OutOfMemoryError) and _OF_DTYPE.search(str(error)) is not None


def _logits_alone(loaded: LoadedModel, ids: Sequence[int], *, dtype: torch.dtype, source: Sequence[int]) -> Tensor:
    """Logits after each token. Shapes: float64[len(ids), V]."""
    tokens = torch.tensor([list(ids)], device=loaded.device)
    with converted(loaded.model, dtype=dtype):
        if source:
            encoded = torch.tensor([list(source)], device=loaded.device)
            found = loaded.model(input_ids=encoded, decoder_input_ids=tokens, use_cache=False).logits
        elif loaded.is_transformers:
            found = loaded.model(input_ids=tokens, use_cache=False).logits
        else:
            found = loaded.model(tokens)
    chosen: Tensor = found[0].double().cpu()
    return chosen


@contextmanager
def converted(model: Any, *, dtype: torch.dtype) -> Iterator[None]:
    """Let every module of a model compute in a wider dtype, by converting its own parameters while it runs.

    A layer with adapters is converted as a whole: peft reads the dtypes of its parts before they compute. What a
    module is given is converted too: T5 casts the input of a layer to the dtype that its weight has until then.
    """
    with ExitStack() as stack:
        parts: set[nn.Module] = set()
        for module in model.modules():
            if module in parts:
                continue
            if hasattr(module, "cast_input_dtype_enabled"):
                parts.update(module.modules())
                stack.enter_context(_module_converted(module, dtype=dtype, recurse=True))
            elif isinstance(module, nn.Embedding):  # a table is larger than what is looked up
                handle = module.register_forward_hook(lambda module, arguments, output: output.to(dtype))
                stack.callback(handle.remove)
            elif module._parameters:
                stack.enter_context(_module_converted(module, dtype=dtype))
        yield


@contextmanager
def _module_converted(module: nn.Module, *, dtype: torch.dtype, recurse: bool = False) -> Iterator[None]:
    held: dict[nn.Parameter, Tensor] = {}

    def convert(module: nn.Module, arguments: Any, named: Any) -> Any:
        for parameter in module.parameters(recurse=recurse):
            if parameter.is_floating_point():
                held[parameter] = parameter.data
                parameter.data = parameter.data.to(dtype)
        cast = partial(_cast, dtype=dtype)
        return tuple(map(cast, arguments)), {name: cast(value) for name, value in named.items()}

    def restore(module: nn.Module, arguments: Any, output: Any) -> None:
        for parameter, data in held.items():
            parameter.data = data
        held.clear()

    handles = (
        module.register_forward_pre_hook(convert, with_kwargs=True),
        module.register_forward_hook(restore, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast(value: Any, *, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
