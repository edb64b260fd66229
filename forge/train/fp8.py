"""Products of linear layers in fp8 (`training.fp8`), by torchao's `Float8Linear`.

A weight stays the bf16 parameter that it was, under its name: it is cast for each product. So master weights,
snapshots, checkpoints and exports do not know of fp8, and there is no state of scales to restore.

torchao's recipe `rowwise_with_gw_hp` gives each token and each output a scale of its own, and computes the
gradients of weights in bf16. So a token's results do not depend on the tokens beside it, and with that not on the
number of ranks or the micro-batch; with scales of a whole tensor (`tensorwise`) they would. Nor need the number of
tokens be a multiple of 16. transformer-engine would replace modules by its own, whose parameters have other names.

Source: torchao, `torchao.float8`; FP8 formats: arXiv 2209.05433.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from forge.errors import RunError
from forge.model.fp8_layers import find_fp8_layers
from forge.plan.gpus import FP8_CAPABILITY
from forge.process import one_line

_RECIPE = "rowwise_with_gw_hp"


def use_fp8(model: nn.Module, *, device: torch.device, stage: int, recomputes: bool) -> None:
    """Have the linear layers of a model compute their products in fp8; call it before `deepspeed.initialize`.

    On a CPU the products are emulated: operands are rounded to fp8 and multiplied in the precision of the model.

    Args:
        stage: of ZeRO.
        recomputes: activations are recomputed in the backward pass, so nothing is kept from the forward pass.

    Raises: RunError if torchao is missing or the GPU cannot.
    """
    if find_spec("torchao") is None:
        raise RunError(
            "training.fp8: the package torchao is not installed on this machine; install forge-train[fp8] on every "
            "machine, or set training.fp8: false"
        )
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        needed, has = (".".join(map(str, one)) for one in (FP8_CAPABILITY, found))
        name = torch.cuda.get_device_name(device)
        raise RunError(f"training.fp8 needs GPUs of compute capability {needed} or above, and {name} has {has}")
    try:
        torchao = import_module("torchao.float8")
        recipe: Any = torchao.Float8LinearConfig.from_recipe_name(_RECIPE)
    except (ImportError, AttributeError, AssertionError) as error:  # of another version
        versions = f"torchao {version('torchao')} with torch {torch.__version__}"
        raise RunError(f"training.fp8: {versions}: {one_line(error)}; install forge-train[fp8]") from error
    config = dataclasses.replace(recipe, emulate=device.type == "cpu")
    names = find_fp8_layers(model).names
    torchao.convert_to_float8_training(model, module_filter_fn=lambda _, name: name in names, config=config)
    if stage == 3 and not recomputes:
        for name in names:
            linear: Any = model.get_submodule(name)
            linear.forward = _with_weight_of_backward(linear.forward, linear)


def _with_weight_of_backward(forward: Callable[[Tensor], Tensor], linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Have the backward pass take the weight as ZeRO 3 gathers it again, instead of a view that keeps it whole.

    DeepSpeed does the same for torch's own linear layers (`LinearFunctionForZeroStage3`).
    """

    def pack(saved: Tensor) -> Tensor | None:
        weight = linear.weight
        is_weight = saved.data_ptr() == weight.data_ptr() and saved.shape == weight.shape[::-1]
        return None if is_weight else saved

    def unpack(packed: Tensor | None) -> Tensor:
        return linear.weight.detach().t() if packed is None else packed

    @functools.wraps(forward)
    def forward_with_hooks(given: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return forward(given)

    return forward_with_hooks
