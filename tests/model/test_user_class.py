"""Model classes of the user's own: counted on the meta device, built from a seed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from forge.code_archive import PackedCode, unpack_code
from forge.config.model import ModelSpec
from forge.errors import ModelError, UserCodeError
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.registry import family_of
from forge.user_code import use_code

MIXER = """
import torch
from torch import nn

class TinyMixer(nn.Module):
    def __init__(self, *, vocab_size, seq_len, width=8):
        super().__init__()
        self.num_layers, self.hidden_size = 1, width
        self.embedding = nn.Embedding(vocab_size, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.mix(self.embedding(input_ids))))

class Isolating(TinyMixer):
    def forward(self, input_ids, position_ids=None):
        return super().forward(input_ids)

class Failing(TinyMixer):
    def __init__(self, *, vocab_size, seq_len):
        super().__init__(vocab_size=vocab_size, seq_len=seq_len)
        self.odd = nn.Linear(3, 3)

    def forward(self, input_ids):
        return self.odd(super().forward(input_ids))

class Looking(TinyMixer):
    def forward(self, input_ids):
        hidden = self.mix(self.embedding(input_ids))
        return self.head(hidden + hidden.mean(dim=1, keepdim=True))

class Wrong(TinyMixer):
    def forward(self, input_ids):
        return self.embedding(input_ids)
"""
DATA = DataShape(vocab_size=11, seq_len=4, eot_id=0)


@pytest.fixture(autouse=True)
def code(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    packed = PackedCode(files={"my_models.py": MIXER.encode()})
    unpack_code(packed)
    use_code(packed.digest)
    yield
    use_code(None)


@pytest.mark.slow
def test_inspect__module_that_prints__does_not_disturb_the_answer() -> None:
    loud = "import os\nprint('hello')\nos.system('echo from a child')\n"
    packed = PackedCode(files={"my_models.py": (loud + MIXER).encode()})
    unpack_code(packed)
    request = {"model": spec().model_dump(mode="json"), "code": packed.digest, **dataclasses.asdict(DATA)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "forge.model.inspect"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["facts"]["class_name"] == "TinyMixer"
    assert "hello" in done.stderr
    assert "from a child" in done.stderr


def spec(**keys: object) -> ModelSpec:
    return ModelSpec.model_validate({"class": "my_models:TinyMixer"} | keys)


def test_inspect__counts_parameters_flops_and_saved_activations() -> None:
    info = family_of(spec()).inspect(spec(width=16), DATA)
    assert info.class_name == "TinyMixer"
    assert info.num_parameters == 11 * 16 + 16 * 16 + 16 + 16 * 11 + 11
    assert info.num_matmul_parameters == 16 * 16 + 16 * 11
    assert (info.num_layers, info.hidden_size, info.has_linear_head) == (1, 16, False)
    assert info.activation_bytes_per_row is not None
    # At least the inputs of both layers and of the loss.
    assert info.activation_bytes_per_row >= 4 * 4 * (16 + 16) + 12 * 4 * 11


@pytest.mark.parametrize(
    ("name", "problem"), [("TinyMixer", "TinyMixer takes no position_ids"), ("Isolating", None)]
)
def test_inspect__position_ids__tell_whether_examples_are_kept_apart(name: str, problem: str | None) -> None:
    section = spec(**{"class": f"my_models:{name}"})
    assert family_of(section).inspect(section, DATA).isolation_problem == problem


@pytest.mark.parametrize(
    ("keys", "key", "problem"),
    [
        ({"widht": 8}, "widht", "takes no argument of this name"),
        ({"width": "wide"}, "class", r"TinyMixer cannot be constructed: my_models\.py:9: TypeError"),
        ({"class": "my_models:Failing"}, "class", r"of Failing on the meta device failed: my_models\.py:26: "),
        ({"class": "my_models:Wrong"}, "class", r"must return logits \[B, T, 11\], not \[1, 4, 8\]"),
        ({"freeze": "embeding"}, "freeze", "names like it are embedding"),
    ],
)
def test_inspect__wrong_class_or_key__is_named(keys: dict[str, object], key: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        family_of(spec()).inspect(spec(**keys), DATA)
    assert caught.value.key == key


def test_inspect__class_that_does_not_exist__is_named() -> None:
    with pytest.raises(UserCodeError, match="TinyMixr"):
        family_of(spec()).inspect(spec(**{"class": "my_models:TinyMixr"}), DATA)


def test_build__same_seed__same_weights_and_frozen_as_asked() -> None:
    options = BuildOptions(dtype=torch.bfloat16, device=torch.device("cpu"), seed=3)
    section = spec(freeze="embedding")
    first = family_of(section).build(section, DATA, options=options)
    torch.rand(3)
    second = family_of(section).build(section, DATA, options=options)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(parameter.dtype == torch.bfloat16 for parameter in first.parameters())
    assert [name for name, p in first.named_parameters() if not p.requires_grad] == ["embedding.weight"]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("seq_len", [2, 5, 64])
def test_inspect__class_that_sees_later_tokens__is_found(seq_len: int) -> None:
    data = dataclasses.replace(DATA, seq_len=seq_len)
    found = [
        family_of(spec).inspect(spec, data).look_ahead_problem
        for spec in (ModelSpec.model_validate({"class": f"my_models:{name}"}) for name in ("TinyMixer", "Looking"))
    ]
    assert found == [None, "in Looking a position sees the tokens after it"]


def test_inspect__class__leaves_the_random_state_alone() -> None:
    spec = ModelSpec.model_validate({"class": "my_models:TinyMixer"})
    before = torch.get_rng_state()
    family_of(spec).inspect(spec, DATA)
    assert torch.equal(torch.get_rng_state(), before)
