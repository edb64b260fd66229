"""Generated texts depend on their prompt alone: not on the batch, the order, or what else is generated."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import MixtralConfig, MixtralForCausalLM

from forge.errors import ArgumentError, ForgeWarning
from forge.inference.exact import exact_logits
from forge.inference.generate import generate
from forge.inference.loaded import Dtype, LoadedModel, load
from forge.inference.sampling import Generation, SamplingParams
from forge.inference.sequences import Chooser
from tests.inference.conftest import TEXTS

NUM_PROMPTS = 8


def prompts(*, shared: str = "") -> list[str]:
    chosen = random.Random(5)
    words = " ".join(TEXTS).split()
    return [shared + " ".join(chosen.choices(words, k=chosen.randint(1, 12))) for _ in range(NUM_PROMPTS)]


def texts_of(
    loaded: LoadedModel,
    asked: list[str],
    sampling: SamplingParams,
    *,
    order: list[int] | None = None,
    batch_tokens: int | None = None,
) -> list[Generation]:
    """The texts in the order of the prompts, when they are generated in another one."""
    order = order or list(range(len(asked)))
    made = list(generate(loaded, [asked[at] for at in order], sampling, batch_tokens=batch_tokens))
    return sorted(made, key=lambda one: (order[one.index], one.number))


def ids_of(found: list[Generation]) -> list[tuple[int, ...]]:
    return [one.token_ids for one in found]


def greedy_alone(loaded: LoadedModel, prompt: str, *, max_tokens: int) -> tuple[int, ...]:
    """What exact arithmetic writes, token by token."""
    ids = loaded.encode(prompt)
    start = len(ids)
    while len(ids) < start + max_tokens:
        ids.append(int(exact_logits(loaded, ids, first=len(ids))[-1].argmax()))
        if ids[-1] in loaded.end_ids:
            break
    return tuple(ids[start:])


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exact_logits__adapters__are_those_of_the_whole_model_in_fp64(
    llama_folder: Path, dtype: Dtype, use_dora: bool
) -> None:
    loaded = load(llama_folder, dtype=dtype, device="cpu")
    adapters = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=use_dora)
    model = inject_adapter_in_model(adapters, loaded.model).eval()
    ids = loaded.encode(TEXTS[0])
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found = exact_logits(replace(loaded, model=model), ids, first=1)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        expected = model.double()(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_exact_logits__experts_without_fp64__are_those_of_the_sequence_alone(llama_folder: Path) -> None:
    loaded = load(llama_folder, dtype="fp32", device="cpu")
    config = MixtralConfig(
        vocab_size=loaded.text_tokenizer.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model, ids = MixtralForCausalLM(config).eval(), loaded.encode(TEXTS[0])
    with pytest.warns(ForgeWarning, match=r"cannot be computed in fp64 \(Expected mat_a to be Float32"):
        found = exact_logits(replace(loaded, model=model), ids, first=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForgeWarning)  # it is said once
        assert torch.equal(exact_logits(replace(loaded, model=model), ids, first=1), found)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory, of dtype float64"), None],
    ids=["memory of the device", "memory of the machine"],
)
def test_exact_logits__no_memory_for_fp64__is_no_reason_for_fp32(
    llama_folder: Path, error: RuntimeError | None
) -> None:
    loaded = load(llama_folder, dtype="fp32", device="cpu")

    def refuse(module: object, arguments: object) -> None:
        if error is not None:
            raise error
        torch.empty(2**50)

    loaded.model.lm_head.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match=r"out of memory|can't allocate memory"):
        exact_logits(loaded, loaded.encode(TEXTS[0]), first=1)


@pytest.mark.parametrize(
    ("dtype", "shared"),
    [
        ("fp32", ""),
        ("bf16", TEXTS[1] * 2),
        pytest.param("fp32", TEXTS[1] * 2, marks=pytest.mark.slow),
        pytest.param("bf16", "", marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16, shared beginning", "fp32, shared beginning", "bf16"],
)
def test_generate__greedy__same_at_every_batch_and_order(llama_folder: Path, dtype: Dtype, shared: str) -> None:
    loaded = load(llama_folder, dtype=dtype, device="cpu")
    asked, sampling = prompts(shared=shared), SamplingParams(max_tokens=10)
    if dtype == "fp32":
        expected = [greedy_alone(loaded, prompt, max_tokens=10) for prompt in asked]
    else:  # the text of each prompt alone
        expected = [ids_of(list(generate(loaded, [prompt], sampling)))[0] for prompt in asked]
    assert len({len(ids) for ids in expected}) > 1 or len(set(expected)) > NUM_PROMPTS // 2, "the texts differ"
    for batch_tokens in (1, 200, None):
        order = list(range(NUM_PROMPTS))
        random.Random(batch_tokens).shuffle(order)
        found = texts_of(loaded, asked, sampling, order=order, batch_tokens=batch_tokens)
        assert ids_of(found) == expected, f"batch_tokens {batch_tokens}"


def test_generate__half_of_the_prompts__same_texts(llama: LoadedModel) -> None:
    asked, sampling = prompts(), SamplingParams(max_tokens=12)
    whole = ids_of(texts_of(llama, asked, sampling))
    halves = [ids_of(texts_of(llama, asked[part::2], sampling)) for part in (0, 1)]
    assert [halves[at % 2][at // 2] for at in range(NUM_PROMPTS)] == whole


def test_correct__text_with_a_wrong_token__is_cut_there(llama: LoadedModel) -> None:
    asked, sampling = prompts()[0], SamplingParams(max_tokens=8)
    right = greedy_alone(llama, asked, max_tokens=8)
    chooser = Chooser(llama, sampling)
    text = chooser.text(index=0, number=0, prompt=llama.encode(asked))
    text.ids, text.is_close = [*right[:3], (right[3] + 1) % 250 + 1, *right[4:]], True
    assert chooser.correct(text)
    assert tuple(text.ids) == right[:4]
    assert not text.is_close


def test_generate__sampling__depends_on_seed_and_prompt_alone(llama: LoadedModel) -> None:
    asked = prompts()
    sampling = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, top_k=50, seed=3, n=2)
    whole = ids_of(texts_of(llama, asked, sampling))
    assert (
        ids_of(texts_of(llama, asked, sampling, order=list(reversed(range(NUM_PROMPTS))), batch_tokens=100))
        == whole
    )
    assert len(whole) == 2 * NUM_PROMPTS
    assert whole[0] != whole[1], "the texts of one prompt differ"
    other = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, top_k=50, seed=4, n=2)
    assert ids_of(texts_of(llama, asked, other)) != whole


def test_generate__stop_string__ends_before_it(llama: LoadedModel) -> None:
    free = next(generate(llama, [prompts()[1]], SamplingParams(max_tokens=20)))
    stop = free.text[5:7]
    made = next(generate(llama, [prompts()[1]], SamplingParams(max_tokens=20, stop=("\0", stop))))
    assert made.text == free.text[: free.text.index(stop)]
    assert made.finish_reason == "stop"


def test_generate__token_that_ends__is_not_in_the_text(llama: LoadedModel) -> None:
    free = next(generate(llama, [prompts()[2]], SamplingParams(max_tokens=20)))
    end = free.token_ids[4]
    made = next(generate(llama, [prompts()[2]], SamplingParams(max_tokens=20, stop_ids=(end,))))
    count = free.token_ids.index(end)
    assert made.token_ids == free.token_ids[: count + 1]
    assert made.text == llama.decode(list(free.token_ids[:count]))
    assert made.finish_reason == "stop"


def test_generate__logprobs__are_those_of_the_sequence(llama: LoadedModel) -> None:
    made = next(generate(llama, [prompts()[3]], SamplingParams(max_tokens=6, logprobs=3)))
    whole = [*llama.encode(prompts()[3]), *made.token_ids]
    with torch.inference_mode():
        shares = llama.model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
    assert made.logprobs is not None
    start = len(whole) - len(made.token_ids)
    for at, one in enumerate(made.logprobs):
        assert one.token_id == made.token_ids[at]
        assert one.logprob == pytest.approx(float(shares[start + at - 1, one.token_id]), abs=1e-4)
        assert one.top[0] == pytest.approx((one.token_id, one.logprob)), "greedy decoding takes the likeliest"
        assert len(one.top) == 3


def test_generate__prompt_longer_than_the_model__keeps_its_end(llama: LoadedModel) -> None:
    assert llama.max_positions is not None
    made = next(generate(llama, [" ".join(TEXTS * 30)], SamplingParams(max_tokens=20, ignore_end=True)))
    assert made.cut_tokens > 0
    assert made.prompt_tokens + made.completion_tokens == llama.max_positions


def test_generate__beams__are_those_of_transformers(llama: LoadedModel) -> None:
    made = list(generate(llama, prompts()[:2], SamplingParams(max_tokens=8, num_beams=4, n=2)))
    assert [(one.index, one.number) for one in made] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ids = torch.tensor([llama.encode(prompts()[0])])
    expected = llama.model.generate(
        ids, max_new_tokens=8, num_beams=4, do_sample=False, eos_token_id=llama.end_ids[0], pad_token_id=0
    )
    assert made[0].token_ids == tuple(expected[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": ("",)}, "stop"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams"),
        ({"n": 2}, "n larger than 1"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_sampling_params__value_out_of_range__is_named(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        SamplingParams(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("able", "expected"), [({"avx512_bf16": True}, torch.bfloat16), ({"avx512_f": True}, torch.float32)]
)
def test_bf16_weights_are_computed_in_bf16_where_the_cpu_can(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert next(load(llama_folder, dtype=None, device="cpu").model.parameters()).dtype == expected
