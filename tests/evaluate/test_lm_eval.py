"""The harness of lm-eval scores an exported folder as forge's own metrics and log-likelihoods do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.config.load import load_task_text
from forge.errors import RunError
from forge.evaluate.bootstrap import score_metric
from forge.evaluate.lm_eval import LmEvalOptions, run_lm_eval
from forge.evaluate.metrics.base import ScoredExample
from forge.evaluate.metrics.build import build_metrics
from forge.evaluate.task import Task, build_task

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # two starts of the harness

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "to", "the", "old", "red", "house"]
TASKS = {
    "quiz": """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: options
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """\
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
}
OWN = {
    "quiz": "kind: multiple-choice\nprompt: question\nchoices: options\ntarget: right\n"
    "metrics: [accuracy, normalized_accuracy]\n",
    "texts": "kind: log-likelihood\ntarget: text\nmetrics: {bits_per_byte: , perplexity: {unit: byte}}\n",
}


def tiny_model(folder: Path) -> Path:
    """A folder of transformers with a small Llama of random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("a, folder=with signs")
    tiny_model(found / "model")
    records = [
        {
            "question": " ".join(WORDS[at : at + 5]),
            "options": [WORDS[at], f"{WORDS[at + 1]} and {WORDS[3]}", f"no {WORDS[5]}"],
            "right": at % 3,
            "text": " ".join(WORDS[at:] * (at + 1)),
        }
        for at in range(12)
    ]
    (found / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return found


def scored(task: Task, model: Path) -> list[ScoredExample]:
    """What forge makes of the model's log-likelihoods."""
    from forge.inference.loaded import load
    from forge.inference.score import log_likelihoods, text_log_likelihoods

    loaded = load(model)
    found = []
    for example in task.examples().examples:
        if task.spec.kind == "log-likelihood":
            (text,) = text_log_likelihoods(loaded, example.choices)
            totals, counts = (text.total,), (text.num_tokens,)
        else:
            pairs = [(example.prompt, continuation) for continuation in example.continuations]
            scores = log_likelihoods(loaded, pairs)
            totals, counts = tuple(one.total for one in scores), tuple(one.num_tokens for one in scores)
        best = example.choices[max(range(len(totals)), key=totals.__getitem__)]
        found.append(
            ScoredExample(
                prediction=best,
                target=example.target,
                choices=example.choices,
                log_likelihoods=totals,
                num_tokens=counts,
            )
        )
    return found


def test_run_lm_eval__local_task_files__score_as_forge_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    paths = []
    for name, text in TASKS.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(text.replace("DATA", json.dumps(str(folder / "data.jsonl"))))
    options = LmEvalOptions(device="cpu", batch_size=4)
    found = run_lm_eval(folder / "model", tasks=list(map(str, paths)), options=options)
    theirs = {f"{score.task}/{score.metric}": score for score in found}
    ours: dict[str, float] = {}
    for name, text in OWN.items():
        given = f"name: {name}\ndata: {{files: {json.dumps(str(folder / 'data.jsonl'))}}}\n{text}"
        task = build_task(load_task_text(given, path="task.yaml"))
        examples = scored(task, folder / "model")
        for metric in build_metrics(task.spec.metrics, examples=examples).values():
            for value, score in score_metric(metric, examples, num_resamples=2).items():
                ours[f"{name}/{value}"] = score.value
    assert theirs["quiz/acc"].value == ours["quiz/accuracy"]
    assert theirs["quiz/acc_norm"].value == ours["quiz/normalized_accuracy"]
    assert theirs["texts/bits_per_byte"].value == pytest.approx(ours["texts/bits_per_byte"], rel=1e-5)
    assert theirs["texts/byte_perplexity"].value == pytest.approx(ours["texts/byte_perplexity"], rel=1e-5)
    assert theirs["quiz/acc"].num_examples == 12 and theirs["quiz/acc"].direction == "max"
    assert theirs["quiz/acc"].stderr > 0 and theirs["texts/bits_per_byte"].direction == "min"


def test_run_lm_eval__task_that_cannot_run__is_an_error_with_the_last_lines(folder: Path, tmp_path: Path) -> None:
    task = tmp_path / "broken.yaml"
    task.write_text("task: broken\ndataset_path: no_such_dataset_anywhere\noutput_type: multiple_choice\n")
    with pytest.raises(RunError, match=r"lm-eval ended with exit code 1: \S.*; its last lines:\n  "):
        run_lm_eval(folder / "model", tasks=[str(task)], options=LmEvalOptions(device="cpu"))
