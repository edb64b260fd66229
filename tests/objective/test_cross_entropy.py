"""The chunked loss is the plain loss, and never holds the logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from forge.objective import cross_entropy
from forge.objective.base import IGNORED, ObjectiveModule
from forge.objective.causal_lm import CausalLm
from forge.objective.cross_entropy import ChunkedCrossEntropy

VOCAB = 97


def tiny_model(
    architecture: str = "llama", *, dtype: torch.dtype = torch.float32, **keys: object
) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    config = AutoConfig.for_model(architecture, **(sizes | {"vocab_size": VOCAB} | keys))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[2] = IGNORED
    targets[0, 3] = IGNORED
    return {"tokens": tokens[:, :-1].contiguous(), "targets": targets}


def loss_and_gradients(model: PreTrainedModel, *, chunked: bool) -> tuple[Tensor, dict[str, Tensor]]:
    module = module_of(copy.deepcopy(model), chunked=chunked)
    loss = module(batch())
    (loss * 0.37).backward()
    return loss.detach(), {n: p.grad.float() for n, p in module.named_parameters() if p.grad is not None}


def module_of(model: PreTrainedModel, *, chunked: bool) -> ObjectiveModule:
    objective = CausalLm()
    if chunked:
        objective.use_chunks(model)
    return ObjectiveModule(model, objective=objective)


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("phi", {})],
)
def test_in_fp32_loss_and_every_gradient_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, architecture: str, keys: dict[str, object]
) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_LOGITS, "cpu", 16 * VOCAB)  # several chunks, the last one short
    model = tiny_model(architecture, **keys)
    plain_loss, plain = loss_and_gradients(model, chunked=False)
    chunked_loss, chunked = loss_and_gradients(model, chunked=True)
    torch.testing.assert_close(chunked_loss, plain_loss)
    assert plain.keys() == chunked.keys()
    for name in plain:
        torch.testing.assert_close(chunked[name], plain[name], msg=name)


def test_in_bf16_it_is_as_close_to_fp32_as_the_plain_loss_is() -> None:
    exact_loss, exact = loss_and_gradients(tiny_model().bfloat16().float(), chunked=False)
    low = tiny_model(dtype=torch.float32).bfloat16()
    plain_loss, plain = loss_and_gradients(low, chunked=False)
    chunked_loss, chunked = loss_and_gradients(low, chunked=True)
    assert abs(chunked_loss - exact_loss) <= max(2 * abs(plain_loss - exact_loss), 2**-8 * exact_loss)

    def distance(gradients: dict[str, Tensor]) -> float:
        return sum(float((gradients[n] - exact[n]).norm() / exact[n].norm()) for n in exact)

    assert distance(chunked) <= 1.1 * distance(plain)


def test_gradients_pass_gradcheck() -> None:
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 10, IGNORED, 5, 5, 2])
    # The sums are in fp32 whatever the inputs are, hence the tolerances.
    assert torch.autograd.gradcheck(
        lambda h, w, b: ChunkedCrossEntropy.apply(h, w, b, targets),
        (hidden, weight, bias),
        eps=1e-2,
        atol=2e-2,
        rtol=2e-2,
    )


def test_a_batch_that_is_all_padding_has_no_loss_and_no_gradient() -> None:
    module = module_of(tiny_model(), chunked=True)
    tokens = batch()["tokens"]
    loss = module({"tokens": tokens, "targets": torch.full_like(tokens, IGNORED)})
    loss.backward()
    assert loss == 0
    assert module.result["loss"].weight == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in module.parameters() if p.grad is not None)


def test_it_holds_a_chunk_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_LOGITS, "cpu", 16 * 4096)
    largest = 0
    linear = torch.nn.functional.linear

    def watched(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal largest
        out = linear(hidden, weight, bias)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(cross_entropy.F, "linear", watched)
    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    ChunkedCrossEntropy.apply(hidden, weight, None, torch.zeros(512, dtype=torch.int64)).backward()
    assert largest == 16 * 4096


def test_frozen_head__gives_the_same_hidden_gradient_and_none_of_its_own() -> None:
    trained, frozen = tiny_model(), tiny_model()
    frozen.lm_head.weight.requires_grad_(False)
    _, expected = loss_and_gradients(trained, chunked=True)
    _, found = loss_and_gradients(frozen, chunked=True)
    assert set(expected) - set(found) == {"model.lm_head.weight"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)
