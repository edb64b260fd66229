"""The engine: exact texts whatever else runs, limits, cancellation and failure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
)

from forge.errors import ArgumentError, DivergedError
from forge.inference.adapters import load_adapters
from forge.inference.drafts import Drafts
from forge.inference.lanes import Lane, divide
from forge.inference.model_step import PackedModel
from forge.inference.sampling import SamplingParams
from forge.inference.schedule import PlannedStep
from forge.inference.traced_step import TracedStep
from forge.serve.engine import ServingEngine
from forge.serve.packed_linear import pack_linears
from forge.serve.request import (
    EngineError,
    EngineOptions,
    EngineRequest,
    QueueFullError,
    TokenEvent,
)

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "initializer_range": 0.3,
}
LLAMA = LlamaConfig(**SIZES)
END = 256


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def tiny(config: PretrainedConfig, **changed: Any) -> Any:
    """What `forge.inference.loaded.load` gives, of a model with random weights."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    facts = {"model": model, "tokenizer": byte_tokenizer(), "end_ids": (END,), "max_positions": 512}
    facts["digest"] = "0"
    return SimpleNamespace(**facts | changed)


@dataclass
class Answer:
    """The events of one text."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float | None] = field(default_factory=list)
    last: TokenEvent | None = None


async def ask(engine: ServingEngine, name: str, prompt: Sequence[int], **sampling: Any) -> Answer:
    answer = Answer()
    request = EngineRequest(request_id=name, prompt=prompt, sampling=SamplingParams(**sampling))
    async for event in engine.submit(request):
        answer.ids.append(event.token_id)
        answer.text += event.text
        answer.logprobs.append(event.logprob)
        answer.last = event
    return answer


def prompts(number: int, *, longest: int = 200) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest, (number,), generator=generator).tolist()
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def reference(model: Any, prompt: list[int], *, max_tokens: int) -> list[int]:
    """Greedy tokens of transformers' `generate`."""
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return list(found[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny(LLAMA)


@pytest.fixture(scope="module")
def engine(loaded: Any) -> Iterator[ServingEngine]:
    engine = ServingEngine(loaded)
    yield engine
    engine.close()


FAMILIES = {
    "llama": (LLAMA, True),
    "gpt2": (GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, eos_token_id=256, pad_token_id=256), True),
    "mistral-window": (MistralConfig(**SIZES, sliding_window=16), True),
    "gemma2-softcap": (Gemma2Config(**SIZES, sliding_window=16), False),
    "mamba": (
        MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=256),
        False,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_texts_of_every_family_equal_those_of_transformers(name: str) -> None:
    config, is_packed = FAMILIES[name]
    given = prompts(4, longest=100) if name != "mamba" else [[5, 6, 7]]
    expected = [reference(tiny(config).model, prompt, max_tokens=12) for prompt in given]
    engine = ServingEngine(tiny(config), options=EngineOptions(step_tokens=64))

    async def run() -> list[Answer]:
        return await asyncio.gather(
            *(ask(engine, str(number), prompt, max_tokens=12) for number, prompt in enumerate(given))
        )

    answers = asyncio.run(run())
    stats = engine.stats()
    engine.close()
    assert stats.is_packed == is_packed, stats.reason
    assert [answer.ids for answer in answers] == expected


def peft_folder(folder: Path, *, seed: int) -> Path:
    """Adapters with random weights, as peft writes them."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(tiny(LLAMA).model, settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "separate"])
def test_texts_of_several_adapters_in_one_batch_equal_those_of_peft(
    tmp_path: Path, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_packed:
        monkeypatch.setattr("forge.inference.model_step._KNOWN_LAYERS", set())
    folders = {name: peft_folder(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))}
    engine = ServingEngine(tiny(LLAMA), adapters={name: load_adapters(folder) for name, folder in folders.items()})
    names = [None, "first", "second", "first"]
    given = prompts(len(names), longest=60)

    async def run() -> list[list[int]]:
        sampling = SamplingParams(max_tokens=12)
        streams = [
            engine.submit(EngineRequest(request_id=str(at), prompt=prompt, sampling=sampling, adapter=name))
            for at, (prompt, name) in enumerate(zip(given, names, strict=True))
        ]
        return [[event.token_id async for event in stream] for stream in streams]

    answers = asyncio.run(run())
    with pytest.raises(ArgumentError, match="those of this model are first, second"):
        engine.submit(EngineRequest(request_id="x", prompt=[1], sampling=SamplingParams(), adapter="third"))
    is_really_packed = engine.stats().is_packed
    engine.close()
    assert is_really_packed == is_packed
    for prompt, name, ids in zip(given, names, answers, strict=True):
        model = tiny(LLAMA).model if name is None else PeftModel.from_pretrained(tiny(LLAMA).model, folders[name])
        assert ids == reference(model, prompt, max_tokens=12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r 0"),
        ({"bias": "all"}, "bias all"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    folder = peft_folder(tmp_path, seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ArgumentError, match=message):
        load_adapters(folder)


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, seed=1)
    with pytest.raises(ArgumentError, match="no linear layer"):
        ServingEngine(tiny(LlamaConfig(**SIZES | {"hidden_size": 64})), adapters={"a": load_adapters(folder)})
    with pytest.raises(ArgumentError, match="other weights"):
        ServingEngine(tiny(LLAMA), adapters={"a": replace(load_adapters(folder), base_digest="1")})


def test_a_model_of_the_users_own_is_served() -> None:
    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(257, 257)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = self.table(ids)
            return rows

    torch.manual_seed(1)
    model = Bigram()
    engine = ServingEngine(tiny(LLAMA, model=model))
    answer = asyncio.run(ask(engine, "a", [1, 2], max_tokens=5, ignore_end=True))
    engine.close()
    table = model.table.weight.argmax(dim=-1).tolist()
    assert all(table[before] == after for before, after in pairwise([2, *answer.ids]))


def test_served_log_probabilities_equal_those_of_a_forward_pass(loaded: Any, engine: ServingEngine) -> None:
    given = prompts(6)

    async def run() -> list[Answer]:
        sampling = {"max_tokens": 20, "temperature": 1.0, "logprobs": 3, "ignore_end": True}
        return await asyncio.gather(
            *(ask(engine, str(number), prompt, seed=number, **sampling) for number, prompt in enumerate(given))
        )

    plain = tiny(LLAMA).model
    for prompt, answer in zip(given, asyncio.run(run()), strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1]
        known = logits.log_softmax(dim=-1)
        expected = known.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert torch.tensor(answer.logprobs) == pytest.approx(expected, abs=1e-4)
        assert answer.last is not None
        best = known[-1].topk(3)
        assert [token for token, _ in answer.last.top_logprobs] == best.indices.tolist()


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.5, "min_p": 0.01, "repetition_penalty": 1.2},
]
NUM_TEXTS = 16


def text_of(engine: ServingEngine, number: int) -> Any:
    """Ask for the text of a number: some prompts begin alike, and each kind of sampling occurs."""
    given = prompts(12)
    prompt = given[number] if number < len(given) else [*given[number - 12], 1, 2, 3]
    return ask(
        engine,
        str(number),
        prompt,
        seed=number,
        max_tokens=12 + number,
        ignore_end=True,
        **KINDS[number % len(KINDS)],
    )


@pytest.fixture(scope="module")
def texts_alone(engine: ServingEngine) -> list[list[int]]:
    async def run() -> list[list[int]]:
        return [(await text_of(engine, number)).ids for number in range(NUM_TEXTS)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(),
        EngineOptions(max_rows=3, step_tokens=64, prefix_tokens=0),
        EngineOptions(cache_tokens=768, step_tokens=128),  # too small for all at once: some are preempted
    ],
    ids=["roomy", "few-rows", "small-cache"],
)
def test_a_seeded_text_is_the_same_whatever_else_runs(texts_alone: list[list[int]], options: EngineOptions) -> None:
    order = sorted(range(NUM_TEXTS), key=lambda number: number * 7 % NUM_TEXTS)

    busy = ServingEngine(tiny(LLAMA), options=options)

    async def run() -> list[Answer]:
        return list(await asyncio.gather(*(text_of(busy, number) for number in order)))

    answers = asyncio.run(run())
    stats = busy.stats()
    busy.close()
    assert [answer.ids for answer in answers] == [texts_alone[number] for number in order]
    assert (stats.num_preemptions > 0) == (options.cache_tokens == 768)
    assert stats.num_completion_tokens == sum(map(len, texts_alone))
    assert (stats.running, stats.waiting, stats.used_tokens) == (0, 0, 0)


def test_texts_of_two_lanes_have_the_bits_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads = torch.get_num_threads()
    found: list[list[Answer]] = []
    num_lanes: list[int] = []

    def counted(step: PlannedStep, *, pad: int) -> list[Lane]:
        num_lanes.append(len(divide(step, pad=pad)))
        return divide(step, pad=pad)

    monkeypatch.setattr("forge.inference.model_step.divide", counted)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            engine = ServingEngine(tiny(LLAMA), options=EngineOptions(max_rows=12, step_tokens=128))

            async def run(engine: ServingEngine = engine) -> list[Answer]:
                sampling = {"max_tokens": 20, "temperature": 1.0, "seed": 3, "logprobs": 1, "ignore_end": True}
                given = enumerate(prompts(NUM_TEXTS))
                return await asyncio.gather(*(ask(engine, str(number), one, **sampling) for number, one in given))

            found.append(asyncio.run(run()))
            engine.close()
            assert torch.get_num_threads() == threads
            assert (2 in num_lanes) == (threads == 2)
    finally:
        torch.set_num_threads(num_threads)
    for one, two in zip(*found, strict=True):
        assert (one.ids, one.logprobs) == (two.ids, two.logprobs)


def test_a_prompt_that_begins_like_an_earlier_one_is_not_computed_again(engine: ServingEngine) -> None:
    prompt = [*range(200), 5]
    first = asyncio.run(ask(engine, "a", prompt, max_tokens=5))
    second = asyncio.run(ask(engine, "b", prompt, max_tokens=5))
    assert first.last is not None
    assert second.last is not None
    assert (first.last.cached_tokens, second.last.cached_tokens) == (0, 192)
    assert second.ids == first.ids


def test_n_texts_of_one_prompt_differ_and_are_counted(engine: ServingEngine) -> None:
    async def run() -> dict[int, list[TokenEvent]]:
        sampling = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8, ignore_end=True)
        found: dict[int, list[TokenEvent]] = {}
        request = EngineRequest(request_id="n", prompt=[3] * 100, sampling=sampling)
        async for event in engine.submit(request):
            found.setdefault(event.index, []).append(event)
        return found

    found = asyncio.run(run())
    assert sorted(found) == [0, 1, 2]
    assert len({tuple(event.token_id for event in events) for events in found.values()}) == 3
    assert all(
        events[-1].completion_tokens == 8 and events[-1].finish_reason == "length" for events in found.values()
    )
    assert found[2][-1].cached_tokens == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.3, "seed": 5}, {"repetition_penalty": 1.3, "logprobs": 2}, {"stop": ("a",)}],
)
def test_a_text_that_guesses_is_the_same_and_takes_fewer_steps(
    dtype: torch.dtype, sampling: dict[str, Any]
) -> None:
    found = []
    for may_draft in (True, False):
        model = tiny(LLAMA).model.to(dtype)
        engine = ServingEngine(tiny(LLAMA, model=model), options=EngineOptions(may_draft=may_draft))
        wanted = {"max_tokens": 90, "ignore_end": True, **sampling}
        answers = [asyncio.run(ask(engine, "one", prompt, **wanted)) for prompt in (prompts(1)[0], [1, 2] * 40)]
        stats = engine.stats()
        engine.close()
        found.append([(one.ids, one.text, one.logprobs, one.last) for one in answers])
        assert stats.num_drafted >= stats.num_accepted
        assert bool(stats.num_drafted) == may_draft
        if not sampling:
            assert bool(stats.num_accepted) == may_draft
    assert found[0] == found[1]


def test_a_guess_ends_at_the_last_token_and_repeats_what_repeats() -> None:
    drafts = Drafts()
    assert drafts.guess([5], limit=9) == drafts.guess([5, 6], limit=9) == ()
    assert drafts.guess([5, 6, 7, 8, 5, 6], limit=9) == (7, 8, 5)
    drafts.checked(3, right=3)
    assert drafts.guess([5, 6, 7, 8, 5, 6, 7], limit=9) == (8, 5, 6, 7, 8, 5, 6)
    assert drafts.guess([5, 6, 7, 8, 5, 6, 7, 8], limit=1) == (5,)
    drafts.checked(1, right=0)
    assert drafts.guess([5, 6, 7, 8, 5, 6, 7, 8, 9], limit=9) == ()
    assert drafts.guess([5, 6, 7, 8, 5, 6, 7, 8, 9, 9, 9], limit=9) == (9, 9, 9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_traced_step_has_the_bits_of_the_modules(name: str, dtype: torch.dtype) -> None:
    packed = PackedModel(tiny(FAMILIES[name][0]).model.to(dtype))
    modules = PackedModel(packed._model)
    assert packed.tune(pack_linears(packed._model)) is None
    for count in (1, 2, 6, 9):
        assert torch.equal(packed._alone_and_among(count), modules._alone_and_among(count)), count


def test_a_model_whose_code_depends_on_values_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(LLAMA).model
    forward = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: forward(x) if x.sum() < 1e9 else x)
    assert "depends on values" in (PackedModel(model).tune([]) or "")


def test_a_trace_of_other_logits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TracedStep, "__call__", lambda self, inputs, layout: torch.zeros(1, 4, 257))
    packed = PackedModel(tiny(LLAMA).model)
    assert packed.tune([]) == "a trace gives other logits"
    assert packed._traced is None


def test_a_text_ends_at_a_stop_string_that_spans_tokens(engine: ServingEngine) -> None:
    whole = asyncio.run(ask(engine, "a", [8, 9], max_tokens=60, temperature=1.0, ignore_end=True)).text
    stop = whole[20:24]
    answer = asyncio.run(ask(engine, "b", [8, 9], max_tokens=60, temperature=1.0, ignore_end=True, stop=(stop,)))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.last is not None
    assert (answer.last.finish_reason, answer.last.stopped_by) == ("stop", stop)


def test_texts_end_at_the_end_token_and_at_the_longest_length(loaded: Any, engine: ServingEngine) -> None:
    first = asyncio.run(ask(engine, "a", [1] * 510, max_tokens=100, ignore_end=True))
    assert first.last is not None
    assert (len(first.ids), first.last.finish_reason) == (2, "length")
    ended = asyncio.run(ask(engine, "b", [1] * 5, max_tokens=100, stop_ids=tuple(range(257))))
    assert ended.last is not None
    assert (len(ended.ids), ended.last.finish_reason, ended.text) == (1, "stop", "")


def test_wrong_prompts_are_refused_at_once(engine: ServingEngine) -> None:
    for prompt, message in (
        ([], "no tokens"),
        ([1] * 512, "512 tokens"),
        ([257], "vocabulary"),
        ([-1], "vocabulary"),
    ):
        with pytest.raises(ArgumentError, match=message):
            asyncio.run(ask(engine, "a", prompt))
    with pytest.raises(ArgumentError, match="beam"):
        asyncio.run(ask(engine, "a", [1], num_beams=2))


def test_a_full_queue_refuses_requests_and_a_cancelled_text_makes_room() -> None:
    engine = ServingEngine(tiny(LLAMA), options=EngineOptions(max_rows=1, max_waiting=2))

    async def run() -> None:
        long: dict[str, Any] = {"max_tokens": 400, "ignore_end": True}

        def request(name: str) -> EngineRequest:
            return EngineRequest(request_id=name, prompt=[1, 2, 3], sampling=SamplingParams(**long))

        running = engine.submit(request("running"))
        await anext(running)  # it has the only row now
        waiting = [engine.submit(request(str(number))) for number in range(2)]
        with pytest.raises(QueueFullError) as refused:
            engine.submit(request("more"))
        assert refused.value.retry_after_s >= 1
        with pytest.raises(ArgumentError, match="id running"):
            engine.submit(request("running"))
        await running.aclose()
        engine.cancel("1")
        assert (await anext(waiting[0])).finish_reason is None
        assert (await anext(waiting[1])).finish_reason == "cancelled"
        engine.cancel("0")
        async for event in waiting[0]:
            last = event
        assert last.finish_reason == "cancelled"
        assert last.completion_tokens < 400

    asyncio.run(run())
    stats = engine.stats()
    engine.close()
    assert (stats.running, stats.waiting, stats.num_cancelled, stats.num_finished) == (0, 0, 3, 0)


@pytest.mark.parametrize("is_greedy", [True, False])
def test_logits_that_are_no_numbers_fail_their_own_request_alone(is_greedy: bool) -> None:
    loaded = tiny(LLAMA)
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[7] = float("nan")
    sampling: dict[str, Any] = {"max_tokens": 20, **({} if is_greedy else {"temperature": 1.0, "n": 2})}
    others: dict[str, Any] = {"max_tokens": 20, "temperature": 0.7, "seed": 3}

    async def run(engine: ServingEngine) -> None:
        alone = await ask(engine, "alone", [1, 2, 3], **others)
        found = await asyncio.gather(
            *(ask(engine, f"good-{number}", [1, 2, 3], **others) for number in range(3)),
            ask(engine, "bad", [1, 7, 3], **sampling),
            return_exceptions=True,
        )
        assert isinstance(found[-1], DivergedError) and "after 3 tokens" in str(found[-1])
        assert [one.ids for one in found[:-1] if isinstance(one, Answer)] == [alone.ids] * 3
        assert (await ask(engine, "after", [1, 2, 3], **others)).ids == alone.ids
        assert engine.stats().running == engine.stats().waiting == 0

    engine = ServingEngine(loaded)
    try:
        asyncio.run(run(engine))
    finally:
        engine.close()


def test_a_failure_of_the_model_fails_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ServingEngine(tiny(LLAMA))

    async def run() -> None:
        long = SamplingParams(max_tokens=500, ignore_end=True)
        streams = [
            engine.submit(EngineRequest(request_id=str(number), prompt=[1], sampling=long)) for number in range(3)
        ]
        await anext(streams[0])
        monkeypatch.setattr(engine._model, "logits", lambda step: len(step))
        for stream in streams:
            with pytest.raises(EngineError, match="the engine failed: TypeError"):
                async for _ in stream:
                    pass
        with pytest.raises(EngineError, match="the engine failed"):
            engine.submit(EngineRequest(request_id="after", prompt=[1], sampling=long))

    asyncio.run(run())
    assert not engine.stats().is_healthy
    assert "TypeError" in str(engine.stats().error)
    engine.close()
