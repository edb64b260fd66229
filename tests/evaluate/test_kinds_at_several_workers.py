"""Masked tokens, labels, vectors and translations are scored on several machines as on one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from forge.cluster.local.ray_cluster import add_node, kill_node, start_head_alone, stop_local
from forge.evaluate.client import EvaluateOptions, evaluate_models
from tests.support.serving import write_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
_BERT = BertConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=128, initializer_range=0.3, id2label={0: "bad", 1: "good", 2: "odd"},
)  # fmt: skip
_T5 = T5Config(
    vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=2, eos_token_id=0,
    decoder_start_token_id=2,
)  # fmt: skip
_WORDS = ("fox", "dog", "jug", "box", "river", "train", "sea", "town")
_KINDS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "masked": (
        lambda: BertForMaskedLM(_BERT),
        "kind: log-likelihood\ntarget: text\nmetrics: {perplexity: {}, bits_per_byte: {}}\n",
    ),
    "labels": (
        lambda: BertForSequenceClassification(_BERT),
        "kind: classify\nprompt: text\ntarget: label\nlabel_kind: single\n"
        "metrics: {accuracy: {}, f1: {average: [macro, micro]}, matthews: {}}\n",
    ),
    "vectors": (
        lambda: BertModel(_BERT),
        "kind: embed\nprompt: query\ntarget: text\nmetrics: {mrr: {}, recall_at_k: {k: [1, 10]}, ndcg: {k: 10}}\n",
    ),
    "translations": (
        lambda: T5ForConditionalGeneration(_T5),
        "kind: generate\nprompt: query\ntarget: text\nsampling: {max_tokens: 8}\nmetrics: {bleu: {}, chrf: {}}\n",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights for each kind of task, tasks and their data: texts of many lengths."""
    folder = tmp_path_factory.mktemp("kinds")
    records = [
        {
            "text": f"the {_WORDS[number % 8]} {number} " + " ".join(_WORDS[: number % 7]),
            "query": f"a {_WORDS[number % 8]} or {number % 9}",
            "label": ("bad", "good", "odd")[number % 3],
        }
        for number in range(90)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, (build, text) in _KINDS.items():
        write_model(folder / name, build)
        (folder / f"{name}.yaml").write_text(f"name: {name}\ndata: {{files: {folder / 'data.jsonl'}}}\n{text}")
    return folder


@pytest.fixture
def cluster() -> Iterator[None]:
    start_head_alone()
    yield
    stop_local()


def test_evaluate__each_kind__scores_of_three_machines_with_one_killed_are_those_of_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    nodes = [add_node()]

    def scores(name: str, *, num_workers: int, killed: list[str]) -> tuple[Any, bytes]:
        monkeypatch.setenv("FORGE_CACHE", str(tmp_path / f"cache-{num_workers}"))

        def on_progress(done: int, total: int) -> None:
            if len(nodes) > 1 and not killed and 0 < done < total:
                killed.append(name)
                kill_node(nodes.pop())
                nodes.append(add_node())

        options = EvaluateOptions(num_workers=num_workers)
        found = evaluate_models(
            [folder / name],
            [folder / f"{name}.yaml"],
            options=options,
            on_message=lambda _: None,
            on_progress=on_progress,
        )
        [model] = found.models
        [score] = model.scores
        assert score.num_examples == 90
        return score.values, (model.folder / score.examples).read_bytes()

    alone = {name: scores(name, num_workers=1, killed=[]) for name in _KINDS}
    nodes += [add_node(), add_node()]
    killed: list[str] = []
    assert {name: scores(name, num_workers=3, killed=killed) for name in _KINDS} == alone
    assert killed
