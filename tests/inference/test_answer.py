"""Answers to prompts as JSON, by models of every kind, and to files of prompts that may be interrupted."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from forge.data.tokenizer import TextTokenizer, train_tokenizer
from forge.errors import ArgumentError, DataError
from forge.inference.answer import Answerer
from forge.inference.answer_request import AnswerConfig, check_record
from forge.inference.encode import classify
from forge.inference.exact import exact_logits
from forge.inference.identity import vocabulary_of
from forge.inference.rows import widen_products
from forge.inference.sequences import Chooser
from forge.runtime import answer_files, answer_process
from forge.runtime.answer_files import count_records, shard_folder
from forge.runtime.shard_files import ShardFiles
from tests.inference.conftest import TEXTS, write_model
from tests.support.jobs import tiny_plan
from tests.support.runs import make_run

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def bert_tokenizer() -> TextTokenizer:
    return train_tokenizer(TEXTS, vocab_size=300, special_tokens=("[PAD]", "[CLS]", "[SEP]"))


def bert_config(tokenizer: TextTokenizer, **keys: Any) -> BertConfig:
    torch.manual_seed(2)
    return BertConfig(vocab_size=tokenizer.vocab_size, pad_token_id=1, initializer_range=0.5, **SIZES, **keys)


@pytest.fixture(scope="module")
def answerer(llama_folder: Path) -> Answerer:
    return Answerer(AnswerConfig(source=str(llama_folder), sampling=GREEDY))


def test_answer__conversation__is_the_text_of_the_template(llama_folder: Path, answerer: Answerer) -> None:
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "the river"}]
    chat = Answerer(AnswerConfig(source=str(llama_folder), chat=True, system="Be kind", sampling=GREEDY))
    rendered = "system: Be kind<|endoftext|>user: the river<|endoftext|>assistant: "
    ids = answerer.loaded.tokenizer
    ids.encode_special_tokens = False
    whole = ids.encode(rendered, add_special_tokens=False).ids
    ids.encode_special_tokens = True
    found = [
        *answerer([{"messages": messages}, {"ids": whole, "id": 7}]),
        *chat(["the river", {"messages": messages[1:]}]),
    ]
    assert found[1].pop("id") == 7
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0]["prompt_tokens"] == len(whole)


def test_answer__end_of_text_in_a_message__does_not_end_the_turn(answerer: Answerer) -> None:
    asked = [{"messages": [{"role": "user", "content": text}]} for text in ("a", "a<|endoftext|>b")]
    ids = [answerer._prompt(one, number=0) for one in asked]
    end = answerer.loaded.text_tokenizer.eot_id
    assert ids[0].count(end) == ids[1].count(end) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice"),
        (b'{"prompt": "a", "id": NaN}', "JSON has no NaN"),
        (b'{"prompt": "a", "id": [1e999]}', "the number 1e999 is too large"),
        (b'"a\xff"', "byte 3 of the line, 0xff, is not UTF-8"),
        (b'"\\ud800"', "the text has half of a surrogate pair"),
    ],
)
def test_count_records__line_that_has_no_clear_meaning__is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(b'\xef\xbb\xbf"a"\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"prompts\.jsonl:3: {problem}"):
        count_records(tmp_path / "prompts.jsonl", model=str(tmp_path))


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (3, "a string or an object"),
        ({"promt": "a"}, "unknown key 'promt'"),
        ({}, "give one of prompt"),
        ({"prompt": "a", "text": "b"}, "give one of prompt"),
        ({"text": ["a"]}, "'text' must be a string"),
        ({"ids": [1, True]}, "'ids' must be a list"),
        ({"prompt": 3}, "'prompt' must be"),
        ({"messages": []}, "'messages' has no messages"),
        ({"prompt": [1]}, "message 1 must be an object"),
        ({"prompt": "a", "tools": 3}, "'tools' must be a list"),
    ],
)
def test_check_record__wrong_prompt__says_why(record: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_record(record)


def test_answer__impossible_prompt_or_sampling__says_why(llama_folder: Path, answerer: Answerer) -> None:
    with pytest.raises(DataError, match=r"prompt 2: .* ids, from 0 on"):
        answerer(["a", {"ids": [10**6]}])
    with pytest.raises(ArgumentError, match="unknown key 'top_q'"):
        Answerer(AnswerConfig(source=str(llama_folder), sampling={"top_q": 1}))
    with pytest.raises(ArgumentError, match="temperature: expected float, found str 'hot'"):
        Answerer(AnswerConfig(source=str(llama_folder), sampling={"temperature": "hot"}))


def test_answer__classifier__gives_labels_with_probabilities(bert_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    config = bert_config(bert_tokenizer, id2label={0: "no", 1: "yes", 2: "maybe"})
    model = BertForSequenceClassification(config).eval()
    write_model(tmp_path / "bert", model, bert_tokenizer)
    answerer = Answerer(AnswerConfig(source=str(tmp_path / "bert")))
    texts = [*TEXTS, "a", {"text": TEXTS[0], "pair": TEXTS[1]}]
    found = answerer(texts)
    assert found == [answer for text in reversed(texts) for answer in answerer([text])][::-1]
    encoded = answerer.loaded.tokenizer.encode(TEXTS[0])
    with torch.inference_mode():
        expected = model(torch.tensor([encoded.ids])).logits[0].softmax(dim=-1)
    assert list(found[0]["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert found[0]["label"] == max(found[0]["probabilities"], key=found[0]["probabilities"].get)
    with pytest.raises(
        ArgumentError, match=r"classification model, which writes no text: leave out num_beams \(--be"
    ):
        Answerer(AnswerConfig(source=str(tmp_path / "bert"), sampling={"num_beams": 1}))
    with pytest.raises(ArgumentError, match="is a classification model, which has no conversations"):
        Answerer(AnswerConfig(source=str(tmp_path / "bert"), chat=True))


def test_answer__masked_language_model__gives_tokens_for_each_mask(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, special_tokens=("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
    folder = write_model(tmp_path / "bert", BertForMaskedLM(bert_config(tokenizer)).eval(), tokenizer)
    answerer = Answerer(AnswerConfig(source=str(folder), sampling={"top_k": 2}))
    answers = answerer(["the [MASK] town", {"text": "[MASK] [MASK]", "id": 3}])
    assert [[len(mask) for mask in one["masks"]] for one in answers] == [[2], [2, 2]]
    assert answers[1]["id"] == 3 and set(answers[0]["masks"][0][0]) == {"token", "token_id", "probability"}
    ids = answerer.loaded.tokenizer.token_to_id("[MASK]")
    assert answerer([{"ids": [ids]}])[0]["masks"]
    assert [len(mask) for mask in Answerer(AnswerConfig(source=str(folder)))(["[MASK]"])[0]["masks"]] == [5]
    for wrong in ("the town", {"ids": [ids + 1]}, {"messages": [{"role": "user", "content": "[MASK]"}]}):
        with pytest.raises(
            DataError, match=r"prompt 2: (the text has no \[MASK\]|a masked language model has no conv)"
        ):
            answerer(["[MASK]", wrong])
    with pytest.raises(ArgumentError, match=r"which fills masks: leave out seed \(--seed\), temperature \(--temp"):
        Answerer(AnswerConfig(source=str(folder), sampling={"top_k": 2, "temperature": 1.0, "seed": 1}))


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"top_p": 0.5, "temperature": 0.0}, r"top_p \(--top-p\)"),
        ({"min_p": 0.1, "top_k": 5, "num_beams": 2}, r"top_k \(--top-k\), min_p \(--min-p\)"),
        ({"length_penalty": 2.0}, "length_penalty is of beam search"),
    ],
)
def test_answer__sampling_without_effect__is_refused_by_name(
    llama_folder: Path, sampling: dict[str, Any], named: str
) -> None:
    with pytest.raises(ArgumentError, match=named):
        Answerer(AnswerConfig(source=str(llama_folder), sampling=sampling))
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "temperature": 0.0}
    assert Answerer(AnswerConfig(source=str(llama_folder), sampling=neutral)).sampling.temperature == 0


def test_answer__prompt_with_fields_that_are_not_read__is_named(answerer: Answerer) -> None:
    for wrong, problem in (
        ({"prompt": "a", "pair": "b"}, "no 'pair'"),
        ({"prompt": "a", "tools": [{}]}, "'tools'"),
    ):
        with pytest.raises(DataError, match=f"prompt 1: .*{problem}"):
            answerer([wrong])


def test_answer__encoder__gives_embeddings_of_length_1(bert_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_model(tmp_path / "bert", BertModel(bert_config(bert_tokenizer)), bert_tokenizer)
    answerer = Answerer(AnswerConfig(source=str(tmp_path / "bert")))
    found = answerer([*TEXTS, "a"])
    assert [sum(value**2 for value in one["embedding"]) for one in found] == pytest.approx([1.0] * 4, abs=1e-5)
    assert answerer(["a"])[0] == found[3]
    with pytest.raises(ArgumentError, match="only a classifier gives labels"):
        classify(answerer.loaded, ["a"])


def test_answer__encoder_decoder__is_what_transformers_writes(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, special_tokens=("[PAD]",), adds_end=True)
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=tokenizer.vocab_size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        pad_token_id=1, eos_token_id=tokenizer.eot_id, decoder_start_token_id=1, initializer_factor=5.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    write_model(tmp_path / "t5", model, tokenizer)
    answerer = Answerer(AnswerConfig(source=str(tmp_path / "t5"), sampling={"max_tokens": 8}))
    asked = [*TEXTS, "a", "the old town"]
    for text, found in zip(asked, answerer(asked), strict=True):
        ids = torch.tensor(
            [[*answerer.loaded.tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.eot_id]]
        )
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 1:].tolist()
        assert found["text"] == answerer.loaded.decode(expected)
    source = answerer.loaded.encode("a")
    exact = exact_logits(answerer.loaded, [1, 5, 7], first=1, source=source)
    single = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[1, 5, 7]])).logits[0]
    torch.testing.assert_close(exact, single.double(), rtol=0, atol=1e-4)
    beams = Answerer(AnswerConfig(source=str(tmp_path / "t5"), sampling={"max_tokens": 8, "num_beams": 3}))
    ids = torch.tensor([answerer.loaded.encode("a")])
    expected = model.generate(ids, max_new_tokens=8, num_beams=3)[0, 1:].tolist()
    assert beams(["a"])[0]["text"] == answerer.loaded.decode(expected)


def run_process(monkeypatch: pytest.MonkeyPatch, request: dict[str, Any]) -> dict[str, Any]:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request | {"parent": 0})))
    monkeypatch.setattr(answer_process, "take_stdout", lambda: _Kept(shown))
    monkeypatch.setattr(answer_process, "die_with_parent", lambda parent: None)  # it would be this process
    answer_process.main()
    found: dict[str, Any] = json.loads(shown.getvalue().splitlines()[-1])
    return found


class _Kept:
    """A stream that can be read after it was closed."""

    def __init__(self, stream: io.StringIO) -> None:
        self.write, self.flush = stream.write, stream.flush

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_answer_file__stopped_and_started_again__has_the_answers_of_a_whole_run(
    llama_folder: Path, answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_files, "RECORDS_PER_SHARD", 3)
    prompts: list[Any] = ["the", {"prompt": "a", "id": "x"}, "river", "old", {"text": "town"}, "b", "c"]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(map(json.dumps, prompts)) + "\n\n")
    request = {
        "config": {"source": str(llama_folder), "sampling": GREEDY},
        "input": str(source),
        "output": str(output),
    }
    count = 0

    def fail_at_the_second_shard(self: Answerer, inputs: list[Any], **_: Any) -> list[Any]:
        nonlocal count
        count += 1
        if count == 2:
            raise ArgumentError("stopped")
        return called(self, inputs)

    called = Answerer.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "__call__", fail_at_the_second_shard)
        assert run_process(monkeypatch, request) == {"error": {"class": "ArgumentError", "message": "stopped"}}
    assert not output.exists()
    found = run_process(monkeypatch, request)["answer"]
    assert (found["num_answers"], found["num_reused"]) == (7, 3)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    expected = answerer(prompts)
    assert lines == [{"index": index, **answer} for index, answer in enumerate(expected)]
    assert lines[1]["id"] == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]
    again = run_process(monkeypatch, request)
    assert "exists; name another file" in again["error"]["message"]


def test_answer_file__all_answers_are_stored__is_written_without_loading_the_model(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('"the"\n"a"\n')
    config = {"source": str(llama_folder), "sampling": GREEDY}
    request = {"config": config, "input": str(source), "output": str(output)}

    def store() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(answer_process, "join_shards", _stop)
            assert run_process(monkeypatch, request)["error"]["message"] == "stopped"
        assert not output.exists()

    store()
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "__init__", _stop)
        other = request | {"config": config | {"sampling": GREEDY | {"max_tokens": 5}}}
        assert run_process(monkeypatch, other)["error"]["message"] == "stopped", (
            "other sampling: the model is loaded"
        )
        found = run_process(monkeypatch, request)["answer"]
    assert (found["num_answers"], found["num_reused"]) == (2, 2)
    assert [json.loads(line)["index"] for line in output.read_text().splitlines()] == [0, 1]
    assert not shard_folder(output).exists()
    output.unlink()
    store()
    source.write_text('"the"\n"b"\n')
    assert run_process(monkeypatch, request)["answer"]["num_reused"] == 0, "of another prompt"


def _stop(*_: object, **__: object) -> None:
    raise ArgumentError("stopped")


def test_answer_file__another_process_answers_it__is_refused_and_the_folder_keeps_its_mode(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('"a"\n')
    config = {"source": str(llama_folder), "sampling": GREEDY}
    request = {"config": config, "input": str(source), "output": str(output)}
    with ShardFiles(folder=shard_folder(output), digest="").locked():
        assert "another process computes the results" in run_process(monkeypatch, request)["error"]["message"]
    assert run_process(monkeypatch, request)["answer"]["num_answers"] == 1
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "prompts.jsonl"}


def test_answer_file__line_that_is_no_prompt__is_named_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.jsonl").write_text('"a"\n{"promt": 3}\n')
    request = {
        "config": {"source": "/none"},
        "input": str(tmp_path / "prompts.jsonl"),
        "output": str(tmp_path / "answers.jsonl"),
    }
    found = run_process(monkeypatch, request)["error"]
    assert found["class"] == "DataError"
    assert "prompts.jsonl:2: unknown key 'promt'" in found["message"]


def test_answer_file__id_beyond_the_vocabulary__is_named_before_the_model_is_loaded(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answerer, "__init__", _stop)
    (tmp_path / "prompts.jsonl").write_text('"a"\n{"ids": [1, 2]}\n{"ids": [1, 99999]}\n')
    request = {
        "config": {"source": str(llama_folder)},
        "input": str(tmp_path / "prompts.jsonl"),
        "output": str(tmp_path / "answers.jsonl"),
    }
    found = run_process(monkeypatch, request)["error"]
    size = vocabulary_of(llama_folder)
    assert (
        found["class"] == "DataError"
        and f"prompts.jsonl:3: 'ids' has 99999, and the model's vocabulary has {size}" in found["message"]
    )
    run = make_run(tmp_path)
    assert vocabulary_of(run) == tiny_plan().corpus.vocab_size


def test_chooser__close_choice__is_noticed(answerer: Answerer) -> None:
    chooser = Chooser(answerer.loaded, answerer.sampling)
    texts = [chooser.text(index=index, number=0, prompt=[1]) for index in range(2)]
    logits = torch.zeros(2, 10)
    logits[0, 3], logits[0, 4] = 5.0, 5.0 - 1e-5
    logits[1, 3], logits[1, 4] = 5.0, 4.0
    assert chooser.choose(logits, texts) == [3, 3]
    assert [text.is_close for text in texts] == [True, False]


@pytest.mark.parametrize("num_outputs", [1, 2, 3, 7])
def test_widen_products__few_outputs__rows_are_equal_at_every_place(num_outputs: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(100, num_outputs)
    expected = layer(torch.ones(100))
    widen_products(torch.nn.Sequential(layer))
    for num_rows in (1, 2, 3, 8, 16):
        found = layer(torch.ones(num_rows, 100))
        assert found.shape == (num_rows, num_outputs)
        assert all(torch.equal(row, found[0]) for row in found)
        torch.testing.assert_close(found[0], expected)
