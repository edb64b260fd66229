"""Liger's kernels: what is replaced in a model, and what is said where the package is missing.

The kernels run on GPUs only; where liger-kernel is installed, its replacement of modules is real.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from torch import nn

from forge.errors import RunError
from forge.plan.speed import LIGER_MODELS
from forge.train import liger

REPLACED = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from forge.train.liger import use_liger
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
from forge.plan.speed import LIGER_MODELS
assert LIGER_MODELS <= known.keys(), LIGER_MODELS - known.keys()
for name in sorted(LIGER_MODELS):
    config = AutoConfig.for_model(name, num_hidden_layers=1, vocab_size=64, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    loss, names = type(model).forward, [one for one, _ in model.named_parameters()]
    use_liger(model)
    assert type(model).forward is loss and "forward" not in vars(model), name
    assert names == [one for one, _ in model.named_parameters()], name
    assert any("liger" in str(vars(one).get("forward", "")).lower() for one in model.modules()), name
"""


def test_use__package_missing__refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"install forge-train\[liger\] on every machine"):
        liger.use_liger(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed (forge-train[liger])")
def test_use__each_model__layers_are_replaced_and_the_loss_is_not() -> None:
    assert LIGER_MODELS
    subprocess.run([sys.executable, "-c", REPLACED], check=True, env=dict(os.environ), timeout=600)
