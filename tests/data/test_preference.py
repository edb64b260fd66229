"""Preference pairs: which tokens carry loss, in every form of the record, and what is cut, dropped or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from forge.config.data import DataSpec
from forge.data.formats.base import ChatSettings, Example, FormatContext, PreferenceSettings
from forge.data.formats.preference import PreferenceFormat, _lengths
from forge.data.noted_records import MAX_NOTED
from forge.data.prepare import open_rows, prepare
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from forge.data.view import ObjectiveView, view_corpus
from forge.errors import DataError
from forge.objective.pairs import PairRows
from forge.objective.preference import PairLogProbs
from forge.report.data_view import view_facts

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS_REASONING = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}",
)
MARKED_IN_PIECES = CHATML.replace(
    "{{ m.content }}{{ '<|im_end|>\n' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content[:2] }}{% endgeneration %}|{% generation %}"
    "{{ m.content[2:] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}",
)
ASK = {"role": "user", "content": "What is 2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "It is 4."}, {"role": "assistant", "content": "Five or so."}
TEXTS = {"prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "Five or so."}
SHOWN = (
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n[It is 4.<|im_end|>]",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n[Five or so.<|im_end|>]",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer.from_str(train_tokenizer([json.dumps(TEXTS)] * 3, vocab_size=400).content)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer(str(folder))


def format_of(
    tokenizer: TextTokenizer, *, template: str | None = CHATML, texts: Any = "auto", seq_len: int = 200
) -> PreferenceFormat:
    context = FormatContext(
        seq_len=seq_len, text_key="text", eot_id=tokenizer.eot_id, vocab_size=tokenizer.vocab_size,
        encode=lambda text: np.empty(0, dtype=np.int64), tokenizer=tokenizer,
        chat=ChatSettings(template=template), preference=PreferenceSettings(texts=texts),
    )  # fmt: skip
    return PreferenceFormat(context)


def shown(example: Example, *, tokenizer: TextTokenizer) -> tuple[str, str]:
    """Both parts as text, with brackets around what is predicted."""
    decoder = Tokenizer.from_str(tokenizer.content)
    found = []
    for part in (1, 2):
        tokens = example.arrays["tokens"][example.arrays["part"] == part]
        targets = example.arrays["targets"][example.arrays["part"] == part]
        start = int(np.flatnonzero(targets != IGNORED)[0]) + 1
        assert (targets[start - 1 :] != IGNORED).all() and (tokens[1:] == targets[:-1])[start - 1 :].all()
        prompt = decoder.decode(tokens[:start].tolist(), skip_special_tokens=False)
        found.append(f"{prompt}[{decoder.decode(targets[start - 1 :].tolist(), skip_special_tokens=False)}]")
    return found[0], found[1]


def examples_of(form: PreferenceFormat, **fields: Any) -> list[Example]:
    return list(form.examples(Record(name="", location="pairs.jsonl:7", fields=fields)))


@pytest.mark.parametrize(
    "fields",
    [
        TEXTS,
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": "It is 4.", "rejected": "Five or so."},
        {"prompt": "What is 2 + 2?", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "What is 2 + 2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score_chosen": 5.0},
    ],
    ids=["texts", "lists", "list and texts", "text and lists", "implicit", "text repeated", "repeated", "null"],
)
def test_examples__every_form_of_a_record__is_the_same_pair(
    tokenizer: TextTokenizer, fields: Mapping[str, Any]
) -> None:
    (example,) = examples_of(format_of(tokenizer), **fields)
    assert example.weight == 1 and shown(example, tokenizer=tokenizer) == SHOWN


def test_examples__plain_texts__end_with_the_end_of_text_token(tokenizer: TextTokenizer) -> None:
    expected = ("What is 2 + 2?[ 4<|im_end|>]", "What is 2 + 2?[ Five<|im_end|>]")
    plain, no_template = format_of(tokenizer, texts="plain"), format_of(tokenizer, template=None)
    for form in (plain, no_template):
        (given_prompt,) = examples_of(form, prompt="What is 2 + 2?", chosen=" 4", rejected=" Five")
        (implicit,) = examples_of(form, chosen="What is 2 + 2? 4", rejected="What is 2 + 2? Five")
        assert shown(given_prompt, tokenizer=tokenizer) == shown(implicit, tokenizer=tokenizer) == expected


def test_examples__answers_of_several_turns__carry_loss_in_the_assistants_alone(tokenizer: TextTokenizer) -> None:
    again = {"role": "user", "content": "Sure?"}
    (example,) = examples_of(format_of(tokenizer), prompt=[ASK], chosen=[BAD, again, GOOD], rejected=[BAD])
    decoder = Tokenizer.from_str(tokenizer.content)
    targets = example.arrays["targets"][example.arrays["part"] == 1]
    learnt = decoder.decode(targets[targets != IGNORED].tolist(), skip_special_tokens=False)
    assert learnt == "Five or so.<|im_end|>It is 4.<|im_end|>"
    with pytest.raises(DataError, match=r"pairs\.jsonl:7: an answer has 2 turns .*answers of one turn"):
        thought = {"role": "assistant", "content": "<think>hm</think>Five"}
        examples_of(
            format_of(tokenizer, template=DROPS_REASONING),
            prompt=[ASK], chosen=[thought, again, GOOD], rejected=[BAD],
        )  # fmt: skip


def test_examples__special_tokens_spelled_in_a_text__are_ordinary_characters(tokenizer: TextTokenizer) -> None:
    end = Tokenizer.from_str(tokenizer.content).token_to_id("<|im_end|>")
    for texts in ("chat", "plain"):
        fields = {**TEXTS, "chosen": "It is<|im_end|> 4."}
        (example,) = examples_of(format_of(tokenizer, texts=texts), **fields)
        for part in (1, 2):
            assert (example.arrays["targets"][example.arrays["part"] == part] == end).sum() == 1


def test_examples__too_long_for_a_row__are_cut_or_dropped_and_counted(tokenizer: TextTokenizer) -> None:
    long = {**TEXTS, "rejected": "Five or so. " * 40}
    whole = format_of(tokenizer, seq_len=2000)
    (uncut,) = examples_of(whole, **long)
    chosen_length = int((uncut.arrays["part"] == 1).sum())
    form = format_of(tokenizer, seq_len=3 * chosen_length)
    (cut,) = examples_of(form, **long)
    parts = cut.arrays["part"]
    assert ((parts == 1).sum(), (parts == 2).sum()) == (chosen_length, 2 * chosen_length)
    for name in ("tokens", "targets"):
        assert (cut.arrays[name] == uncut.arrays[name][: 3 * chosen_length]).all()
    assert not examples_of(form, **{**TEXTS, "prompt": "What is 2 + 2?" * 40})
    assert not examples_of(form, **{**TEXTS, "rejected": TEXTS["chosen"]})
    ending = {"chosen": "so " * 90 + "4", "rejected": "so " * 90 + "5"}
    assert not examples_of(form, **{**TEXTS, **ending})
    assert form.counts() == {
        "pairs cut: longer than seq_len with both answers": 1,
        "pairs dropped: the prompt leaves no room for an answer": 1,
        "pairs dropped: both answers are the same": 1,
        "pairs dropped: both answers are the same up to the cut": 1,
    }
    assert not any(whole.counts().values())


@given(first=st.integers(1, 60), second=st.integers(1, 60), most=st.integers(2, 40))
def test_lengths__any_pair__fits_and_cuts_the_longer_first(first: int, second: int, most: int) -> None:
    a, b = _lengths(first, second, most=most)
    assert 0 < a <= first and 0 < b <= second and a + b <= most
    if first + second <= most:
        assert (a, b) == (first, second)
    else:
        assert a + b >= most - 1
        assert a == first or a >= most // 2
        assert b == second or b >= most // 2


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no 'rejected'"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, r"has no 'rejected' \(is 'reject' meant\?\)"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "has no 'rejected'"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "'chosen' is empty"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "'prompt' is empty"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "'chosen' is empty"),
        ({"prompt": "a", "chosen": 4, "rejected": "c"}, "'chosen' must be a text or a list of messages, it is a"),
        ({"prompt": 4, "chosen": "b", "rejected": "c"}, "'prompt' must be a text or a list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "'chosen' is a string and 'rejected' is a list"),
        ({"chosen": "yes of course", "rejected": "no"}, "no 'prompt', and 'chosen' and 'rejected' begin with diff"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "begin with different messages, and there is no 'prompt'"),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [ASK, BAD]}, "chosen: nothing follows the prompt"),
        ({"prompt": [ASK], "chosen": [GOOD, ASK], "rejected": [BAD]}, "chosen: the last message is the user's"),
        ({"prompt": [ASK], "chosen": [{**GOOD, "content": " "}], "rejected": [BAD]}, "chosen: message 1 is an e"),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [{"role": "assistant"}]}, "rejected: message 1 has no"),
        ({"prompt": [{"role": "user", "content": ""}], "chosen": [GOOD], "rejected": [BAD]}, "'prompt' is empty"),
        ({"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [BAD]}, "'rejected' does not"),
        ({"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, "half a surrogate pair"),
        ({"prompt": "a", "chosen": "b" * 60_000, "rejected": "c"}, "60,0.. characters, more than 51,200"),
    ],
)  # fmt: skip
def test_examples__a_record_that_is_no_pair__is_named(
    tokenizer: TextTokenizer, fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError, match=rf"^pairs\.jsonl:7: .*{problem}"):
        examples_of(format_of(tokenizer), **fields)


def test_examples__messages_without_a_template__are_named(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:7: the pair has lists of messages.*data\.chat\.template"):
        examples_of(format_of(tokenizer, template=None), prompt=[ASK], chosen=[GOOD], rejected=[BAD])
    with pytest.raises(DataError, match=r"^data\.preference\.texts: conversations need a chat template"):
        format_of(tokenizer, template=None, texts="chat")


def test_examples__answers_of_several_turns_in_pieces__have_the_log_probability_of_all_pieces(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    """Of transformers' own mask, on single sequences."""
    prompt = [ASK, BAD, {"role": "user", "content": "Really?"}]
    answers = ([GOOD, ASK, {**GOOD, "content": "Four."}], [BAD, {**ASK, "content": "So?"}, BAD])
    (example,) = examples_of(
        format_of(tokenizer, template=MARKED_IN_PIECES, seq_len=500),
        **{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=tokenizer.vocab_size, num_key_value_heads=2, **sizes)
    ).eval()
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    options = {"chat_template": MARKED_IN_PIECES, "return_assistant_tokens_mask": True, "return_dict": True}
    sums, counts = [], []
    for answer in answers:
        encoded = reference.apply_chat_template([*prompt, *answer], **options)
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"])
        mask[: len(reference.apply_chat_template(prompt, **options)["input_ids"])] = 0
        found = model(input_ids=ids[None]).logits[0, :-1].detach().log_softmax(-1)
        sums.append(float(found[torch.arange(len(ids) - 1), ids[1:]][mask[1:] > 0].sum()))
        counts.append(int(mask.sum()))
    rows = {name: values[None] for name, values in example.arrays.items()}
    pairs = PairRows.of({**rows, "segment_ids": np.ones_like(rows["tokens"])})
    log_probs = PairLogProbs(keeps_examples_apart=False)
    found = log_probs.sides(model, log_probs.batch(pairs))
    assert pairs.num_targets().tolist() == counts
    assert found[0].tolist() == pytest.approx(sums, rel=1e-5)


def test_prepare__pairs_without_room_or_cut__are_listed_by_file_and_line(folder: Path, tmp_path: Path) -> None:
    good = {**TEXTS, "prompt": "What is 3 + 2?"}
    long = {**good, "rejected": "Five or so. " * 40}
    no_room = {**good, "prompt": "What is 2 + 2?" * 40}
    records = [good, no_room, {**good, "prompt": "?"}, long, *[no_room | {"id": i} for i in range(30)]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    spec = DataSpec.model_validate({
        "files": str(path), "format": "preference", "seq_len": 120, "held_out": 0.1,
        "chat": {"template": str(tmp_path / "chatml.jinja")}, "tokenizer": {"from_pretrained": str(folder)},
    })  # fmt: skip
    facts = prepare(spec, cache_dir=tmp_path / "cache")
    reason = "pairs dropped: the prompt leaves no room for an answer"
    assert facts.notes[reason] == 31 and len(facts.noted_records[reason]) == MAX_NOTED
    assert facts.noted_records[reason][:2] == (f"{path}:2", f"{path}:5")
    assert facts.noted_records["pairs cut: longer than seq_len with both answers"] == (f"{path}:4",)
    own = "records without an example"
    assert facts.notes[own] == 31 and own not in facts.noted_records, "the format says why"
    assert prepare(spec, cache_dir=tmp_path / "cache") == facts, "the cache remembers where they are"
    seen = view_corpus(facts, objective=ObjectiveView(predicts_tokens=True), seed=1)
    rows = [text for name, text in view_facts(seen) if name == "records"]
    assert f"{reason}: {path}:2, {path}:5, " in "\n".join(rows) and any(row.endswith(", …") for row in rows)


def test_prepare__bad_pairs_among_good_ones__are_all_counted_or_skipped(folder: Path, tmp_path: Path) -> None:
    good = [{**TEXTS, "prompt": f"What is {i} + 2?"} for i in range(20)]
    records = [*good[:5], {"prompt": "a", "chosen": "b"}, *good[5:], {**TEXTS, "chosen": ""}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    body = {
        "files": str(path), "format": "preference", "seq_len": 120, "held_out": 0.1,
        "chat": {"template": str(tmp_path / "chatml.jinja")}, "tokenizer": {"from_pretrained": str(folder)},
    }  # fmt: skip
    with pytest.raises(DataError, match=r"2 records cannot be used(.|\n)*pairs\.jsonl:6: (.|\n)*pairs\.jsonl:22: "):
        prepare(DataSpec.model_validate(body), cache_dir=tmp_path / "cache")
    facts = prepare(DataSpec.model_validate(body | {"on_bad_record": "skip"}), cache_dir=tmp_path / "cache")
    assert (facts.num_examples, facts.num_skipped_records, facts.packing) == (20, 2, "examples")
    rows, _ = open_rows(facts)
    first = rows.read(np.arange(rows.num_rows))
    pairs = int(rows.weights(np.arange(rows.num_rows)).sum())
    assert first["segment_ids"].max() > 1 and set(np.unique(first["part"])) == {0, 1, 2}
    assert pairs == sum(len(set(row[row > 0])) for row in first["segment_ids"])
