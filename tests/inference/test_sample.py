"""The sample at the end of a run, for every kind of model that an objective trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from forge.data.formats.base import Example
from forge.data.rows import IGNORED
from forge.data.tokenizer import TextTokenizer, train_tokenizer
from forge.errors import ArgumentError
from forge.inference.answer import Answerer
from forge.inference.answer_request import AnswerConfig
from forge.inference.sample import shown_answer
from forge.objective.registry import OBJECTIVES, SENTINELS
from forge.plan.inputs import CorpusInfo
from tests.inference.conftest import TEXTS, write_model
from tests.support.examples import example_corpus
from tests.support.jobs import tiny_job

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
QUESTION, GOOD, BAD = "the old town", " runs to the sea", " print(value)"
TOKEN_LIMIT = {"max_tokens": 4, "temperature": 0.0}


@pytest.fixture(scope="module")
def bert_tokenizer() -> TextTokenizer:
    return train_tokenizer(TEXTS, vocab_size=300, special_tokens=SPECIAL)


@pytest.fixture(scope="module")
def t5_tokenizer() -> TextTokenizer:
    return train_tokenizer(TEXTS, vocab_size=400, special_tokens=("[PAD]", *SENTINELS), adds_end=True)


def bert(cls: Any, folder: Path, tokenizer: TextTokenizer, **keys: Any) -> Answerer:
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=1, initializer_range=0.5, **keys,
    )  # fmt: skip
    return Answerer(AnswerConfig(source=str(write_model(folder / "model", cls(config), tokenizer))))


def t5(folder: Path, tokenizer: TextTokenizer) -> Answerer:
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=tokenizer.vocab_size, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, pad_token_id=1,
        eos_token_id=tokenizer.eot_id, decoder_start_token_id=1, initializer_factor=5.0,
    )  # fmt: skip
    source = write_model(folder / "model", T5ForConditionalGeneration(config), tokenizer)
    return Answerer(AnswerConfig(source=str(source), sampling=TOKEN_LIMIT))


def corpus_of(answerer: Answerer, folder: Path, texts: Sequence[Sequence[str]]) -> CorpusInfo:
    """Prepare examples with these parts; the first tenth, at least one, is held out."""
    examples = []
    for parts in texts:
        ids = [answerer.loaded.tokenizer.encode(part, add_special_tokens=False).ids for part in parts]
        part = np.repeat(np.arange(1, len(ids) + 1), [len(one) for one in ids])
        tokens = np.concatenate(ids)
        arrays = {"tokens": tokens, "targets": tokens.copy(), "part": part}
        examples.append(Example(arrays=arrays, weight=1.0))
    vocab_size = answerer.loaded.text_tokenizer.vocab_size
    return example_corpus(
        folder / "corpus", examples, packing="none", digest="sample", seq_len=64, vocab_size=vocab_size
    )


def shown(answerer: Answerer, corpus: CorpusInfo, *, objective: str) -> tuple[str, str]:
    job = tiny_job()
    data = job.data.model_copy(update={"source": None, "format": OBJECTIVES[objective].formats[0]})
    training = job.training.model_copy(update={"objective": objective})
    job = job.model_copy(update={"data": data, "training": training})
    return shown_answer(answerer, corpus=corpus, job=job, tokenizer=Path(answerer.config.source))


def test_sample__reward__is_that_of_both_answers(bert_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    answerer = bert(BertForSequenceClassification, tmp_path, bert_tokenizer, num_labels=1)
    answerer.loaded = replace(answerer.loaded, kind="reward")
    sides = [answerer.loaded.tokenizer.encode(QUESTION + end, add_special_tokens=False).ids for end in (GOOD, BAD)]
    question = len(answerer.loaded.tokenizer.encode(QUESTION, add_special_tokens=False).ids)
    arrays: dict[str, Any] = {"tokens": [], "targets": [], "part": []}
    for part, ids in enumerate(sides, start=1):
        arrays["tokens"].append(ids[:-1])
        arrays["targets"].append([IGNORED] * (question - 1) + ids[question:])
        arrays["part"].append([part] * (len(ids) - 1))
    example = Example(arrays={name: np.concatenate(values) for name, values in arrays.items()}, weight=1.0)
    corpus = example_corpus(
        tmp_path / "corpus", [example] * 10, packing="examples", digest="pairs", seq_len=64, vocab_size=300
    )
    prompt, text = shown(answerer, corpus, objective="reward")
    with torch.inference_mode():
        good, bad = (float(answerer.loaded.model(torch.tensor([ids])).logits[0, 0]) for ids in sides)
    assert prompt == f"{QUESTION} → "
    assert text == f"{good:.4g} for the preferred answer, {bad:.4g} for the other"


def test_sample__contrastive__is_the_nearest_text(bert_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    answerer = bert(BertModel, tmp_path, bert_tokenizer)
    words = ["model", "river", "value", "items", "trains", "old", "sea", "data", "return", "print"]
    texts = [(word, f"{word}{word} again", "wrong") for word in words * 3]
    corpus = corpus_of(answerer, tmp_path, texts)
    prompt, text = shown(answerer, corpus, objective="contrastive")
    vectors = [np.array(one["embedding"]) for one in answerer(["model", *(passage for _, passage, _ in texts[:3])])]
    scores = [float(vectors[0] @ vector) for vector in vectors[1:]]
    nearest, rank = texts[int(np.argmax(scores))][1], sum(score >= scores[0] for score in scores)
    assert prompt == "model → " and text.startswith(f"{nearest} (nearest of 3 texts; the one that belongs to it")
    assert ("number" in text) == (rank > 1)


def test_sample__masked_lm__fills_a_gap(bert_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    answerer = bert(BertForMaskedLM, tmp_path, bert_tokenizer)
    corpus = corpus_of(answerer, tmp_path, [(TEXTS[1][:40],)] * 10)
    prompt, text = shown(answerer, corpus, objective="masked-lm")
    assert prompt.count("[MASK]") == 1 and prompt.endswith(" → ")
    tokenizer = answerer.loaded.tokenizer
    plain = tokenizer.encode(TEXTS[1][:40])
    middle = [at for at, special in enumerate(plain.special_tokens_mask) if not special]
    at = middle[len(middle) // 2]
    ids = torch.tensor([plain.ids])
    ids[0, at] = tokenizer.token_to_id("[MASK]")
    with torch.inference_mode():
        expected = int(answerer.loaded.model(ids).logits[0, at].argmax())
    assert text == tokenizer.decode([expected]).strip()
    filled = answerer([prompt.removesuffix(" → ")])[0]["masks"]
    assert [len(mask) for mask in filled] == [5], "what the run suggests to try"


@pytest.mark.parametrize("objective", ["seq2seq", "span-corruption"])
def test_sample__encoder_decoder__is_what_it_writes(
    t5_tokenizer: TextTokenizer, tmp_path: Path, objective: str
) -> None:
    answerer = t5(tmp_path, t5_tokenizer)
    corpus = corpus_of(answerer, tmp_path, [(QUESTION,)] * 10)
    prompt, text = shown(answerer, corpus, objective=objective)
    gap = "<extra_id_0>" if objective == "span-corruption" else ""
    assert prompt == f"{QUESTION}{gap} → "
    tokenizer = answerer.loaded.tokenizer
    ids = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    ids += [tokenizer.token_to_id(gap)] * bool(gap) + [t5_tokenizer.eot_id]
    expected = answerer.loaded.model.generate(
        torch.tensor([ids]), max_new_tokens=4, do_sample=False, decoder_start_token_id=1
    )[0, 1:]
    assert text == answerer.loaded.decode(expected.tolist())


@pytest.mark.parametrize("kind", ["single", "token", "regression"])
def test_sample__classifier__is_the_label_or_the_number(
    bert_tokenizer: TextTokenizer, tmp_path: Path, kind: str
) -> None:
    cls = BertForTokenClassification if kind == "token" else BertForSequenceClassification
    keys: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    answerer = bert(
        cls, tmp_path, bert_tokenizer, **(keys if kind == "regression" else {"id2label": {0: "no", 1: "yes"}})
    )
    corpus = corpus_of(answerer, tmp_path, [(QUESTION,)] * 10)
    prompt, text = shown(answerer, corpus, objective="classification")
    [answer] = answerer([QUESTION])
    assert prompt == f"{QUESTION} → "
    if kind == "regression":
        assert text == f"{answer['value']:.4g}"
    elif kind == "token":
        assert text == " ".join(answer["labels"]) and len(text.split()) == 3
    else:
        assert text == f"{answer['label']} ({answer['probabilities'][answer['label']]:.0%})"


@pytest.mark.parametrize("objective", ["causal-lm", "distillation", "chat", "dpo", "orpo"])
def test_sample__causal_lm__continues_the_text_or_answers_the_turn(
    llama_folder: Path, tmp_path: Path, objective: str
) -> None:
    answerer = Answerer(AnswerConfig(source=str(llama_folder), sampling=TOKEN_LIMIT))
    end = "<|endoftext|>"
    tokenizer = answerer.loaded.tokenizer
    tokenizer.encode_special_tokens = False
    asked = tokenizer.encode(f"user: {QUESTION}{end}assistant: ", add_special_tokens=False).ids
    plain = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = True
    is_turn = objective in ("chat", "dpo", "orpo")
    ids = [*asked, 40, 41] if is_turn else plain
    targets = np.array([*ids[1:], IGNORED])
    targets[: len(asked) - 1 if is_turn else 0] = IGNORED
    arrays = {"tokens": np.array(ids), "targets": targets}
    corpus = example_corpus(
        tmp_path / "corpus", [Example(arrays=arrays, weight=1.0)] * 10, packing="examples", digest="one",
        seq_len=len(ids), vocab_size=300,
    )  # fmt: skip
    prompt, text = shown(answerer, corpus, objective=objective)
    [expected] = answerer([{"ids": asked} if is_turn else QUESTION])
    assert text == expected["text"]
    assert prompt == (f"user: {QUESTION} → " if is_turn else QUESTION) or prompt == f"{QUESTION} → "


def test_sample__nothing_held_out__is_said(bert_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    answerer = bert(BertModel, tmp_path, bert_tokenizer)
    corpus = corpus_of(answerer, tmp_path, [("a", "b")] * 9)
    with pytest.raises(ArgumentError, match="no data are held out"):
        shown(answerer, corpus, objective="contrastive")


def test_sample__tests__cover_every_objective() -> None:
    tested = {"reward", "contrastive", "masked-lm", "seq2seq", "span-corruption", "classification"}
    tested |= {"causal-lm", "distillation", "chat", "dpo", "orpo"}
    assert set(OBJECTIVES) - tested == {"ipo"}  # the same class and format as dpo
