"""The log-probabilities of a reference model: exact, computed once, and not lost by a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from forge.data.cache_index import Column, read_index
from forge.data.example_store import ExampleRows
from forge.data.further_columns import FurtherColumns, Values, add_columns, done_parts, find_columns, record_type
from forge.data.prepare import open_rows
from forge.data.rows import IGNORED
from forge.errors import CheckpointError, DataError
from forge.objective.pairs import REFERENCE_LOG_PROBS
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from forge.serve.export import ExportRequest, export
from forge.train.stored_outputs import OutputsRequest, corpus_with_outputs
from tests.support.examples import pair_corpus
from tests.support.ranks import run_ranks
from tests.train.test_preference import LORA, plan_of
from tests.train.test_pretrained import save_first_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    save_first_weights(folder, "fp32")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusInfo:
    return pair_corpus(tmp_path / "data" / "pairs-0")


def request_of(corpus: CorpusInfo, base: Path, **changes: Any) -> OutputsRequest:
    request = OutputsRequest(
        parent=os.getpid(), model={"from_pretrained": str(base)}, precision="fp32", seed=1, uses_gpu=False,
        corpus={name: None if value != value else value for name, value in vars_of(corpus).items()},
        has_linear_head=True, keeps_examples_apart=True,
    )  # fmt: skip
    return replace(request, **changes)


def vars_of(corpus: CorpusInfo) -> dict[str, Any]:
    return {name: getattr(corpus, name) for name in CorpusInfo.__dataclass_fields__}


def stored(corpus: CorpusInfo) -> ExampleRows:
    return ExampleRows(folder=Path(corpus.folder), index=read_index(Path(corpus.folder)), split="train")


def test_reference__any_way_to_run_the_model__has_the_values_of_transformers(
    corpus: CorpusInfo, base: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert corpus_with_outputs(request_of(corpus, base, only_if_computed=True)) is None
    found = corpus_with_outputs(request_of(corpus, base))
    assert found is not None and found.digest != corpus.digest
    rows = stored(found)
    for number in range(rows.num_stored):
        example = rows.example(number)
        expected = np.zeros(len(example["tokens"]))
        for part in (1, 2):
            mine = example["part"] == part
            with torch.no_grad():
                tokens = torch.from_numpy(example["tokens"][mine].astype(np.int64))[None]
                log_probs = model(tokens).logits[0].log_softmax(-1)
            targets = example["targets"][mine]
            values = log_probs[torch.arange(len(targets)), torch.from_numpy(targets.clip(0).astype(np.int64))]
            expected[mine] = np.where(targets != IGNORED, values.numpy(), 0)
        np.testing.assert_allclose(example[REFERENCE_LOG_PROBS], expected, rtol=1e-4, atol=1e-5)
    own = stored(corpus).example(3)
    assert all((rows.example(3)[name] == own[name]).all() for name in own)
    again = corpus_with_outputs(request_of(corpus, base, only_if_computed=True))
    assert again == found
    other = corpus_with_outputs(request_of(corpus, base, precision="bf16", keeps_examples_apart=False))
    assert other is not None and other.digest != found.digest
    close = stored(other).example(5)[REFERENCE_LOG_PROBS]
    np.testing.assert_allclose(close, rows.example(5)[REFERENCE_LOG_PROBS], atol=0.05)


def test_reference__other_weights_or_keys__are_computed_again(
    corpus: CorpusInfo, base: Path, tmp_path: Path
) -> None:
    first = corpus_with_outputs(request_of(corpus, base))
    adapted = {"from_pretrained": str(base), "lora": LORA}
    assert corpus_with_outputs(request_of(corpus, base, model=adapted, only_if_computed=True)) == first
    changed = {"from_pretrained": str(base), "rms_norm_eps": 0.1}
    assert corpus_with_outputs(request_of(corpus, base, model=changed, only_if_computed=True)) is None
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    moved = {"from_pretrained": str(tmp_path / "other")}
    assert corpus_with_outputs(request_of(corpus, base, model=moved, only_if_computed=True)) is None


def test_add_columns__stopped_in_the_middle__goes_on_with_the_part_after_the_last_whole_one(
    corpus: CorpusInfo,
) -> None:
    layout = (Column(name="scores", dtype="<f4", shape=()), Column(name="pairs", dtype="<i4", shape=(2,)))
    column = FurtherColumns(columns=layout, digest="c" * 32, corpus=corpus)
    rows, begun = stored(corpus), []

    def compute(first: int, *, fails_at: int | None) -> Iterator[Values]:
        begun.append(first)
        for number in range(first, rows.num_stored):
            if number == fails_at:
                raise KeyboardInterrupt
            values = np.zeros(len(rows.example(number)["tokens"]), dtype=record_type(layout))
            values["scores"], values["pairs"] = number, [number, -number]
            yield values

    ticks = iter(range(10**6))
    add = {"part_is_due": lambda: next(ticks) % 10 == 9}
    with pytest.raises(KeyboardInterrupt):
        add_columns(column, compute=lambda first: compute(first, fails_at=37), **add)
    parts = column.folder.with_name(f".{column.folder.name}.parts")
    assert find_columns(column) is None and len(done_parts(parts)) == 3
    damaged = done_parts(parts)[2]
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\1")
    found = add_columns(column, compute=lambda first: compute(first, fails_at=None), **add)
    assert begun == [0, 20] and not parts.exists()
    whole = stored(found)
    assert all((whole.example(i)["scores"] == i).all() for i in range(whole.num_stored))
    assert all((whole.example(i)["pairs"] == [i, -i]).all() for i in range(whole.num_stored))
    add_columns(column, compute=lambda first: compute(first, fails_at=0), **add)  # it is there
    with pytest.raises(DataError, match="values of 0 examples"):
        add_columns(replace(column, digest="d" * 32), compute=lambda first: iter(()), **add)


@pytest.mark.slow
def test_main__killed_while_it_computes__goes_on_when_it_is_started_again(
    corpus: CorpusInfo, base: Path, tmp_path: Path
) -> None:
    request = {name: getattr(request_of(corpus, base), name) for name in OutputsRequest.__dataclass_fields__}
    script = (
        "import forge.train.stored_outputs as r, forge.train.output_readers as o, time\n"
        "r._PART_S = 0.0; r.BATCH_TOKENS = {'cpu': 1}; whole = o.as_rows\n"
        "def slow(*a, **k):\n    time.sleep(0.05); return whole(*a, **k)\n"
        "o.as_rows = slow; r.main()"
    )

    def start(command: list[str]) -> subprocess.Popen[str]:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None
        with child.stdin:
            child.stdin.write(json.dumps(request))
        return child

    parts = tmp_path / "data"
    with start([sys.executable, "-c", script]) as child:
        deadline = time.monotonic() + 60
        while len(list(parts.glob(".*.parts/*.bin"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    num_done = len(list(parts.glob(".*.parts/*.bin")))
    with start([sys.executable, "-P", "-m", "forge.train.stored_outputs"]) as child:
        lines = [json.loads(line) for line in child.stdout or () if line.startswith("{")]
    assert num_done >= 3 and lines[0]["progress"][0] >= 3 and lines[0]["progress"][1] == 80
    assert lines[-1]["answer"]["corpus"]["folder"] and not list(parts.glob(".*.parts"))


@pytest.mark.slow
def test_train__reference_held_beside__has_the_curve_of_the_stored_one_and_must_not_change(
    corpus: CorpusInfo, base: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "base"
    shutil.copytree(base, copied)
    with_column = corpus_with_outputs(request_of(corpus, copied))
    assert with_column is not None

    def plan(facts: CorpusInfo, reference: str) -> Plan:
        return plan_of(
            facts, stage=1, model={"from_pretrained": str(copied)}, training__objective="dpo",
            training__dpo={"beta": 0.5, "reference": reference}, training__optimizer={"lr": 0.01},
        )  # fmt: skip

    stored = run_ranks(plan(with_column, "stored"), tmp_path / "stored", world_size=2)
    live = run_ranks(plan(corpus, "live"), tmp_path / "live", world_size=2, stop_after=3)
    assert stored.losses[0] == pytest.approx(np.log(2), rel=1e-5)
    assert live.losses == pytest.approx(stored.losses[:3], rel=1e-5)
    export(ExportRequest(url=str(tmp_path / "live"), to=str(tmp_path / "out")))
    file = next(copied.glob("*.safetensors"))
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{file.name} of .*, which frozen parameters or the reference"):
        run_ranks(plan(corpus, "live"), tmp_path / "live", world_size=1)
    shutil.rmtree(copied)
    export(ExportRequest(url=str(tmp_path / "live"), to=str(tmp_path / "again")))  # needs no reference
    exported = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "again")]
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


def test_train__stored_reference__begins_at_the_loss_of_no_difference_at_any_world_size(
    corpus: CorpusInfo, base: Path, tmp_path: Path
) -> None:
    found = corpus_with_outputs(request_of(corpus, base))
    assert found is not None

    def plan(stage: int) -> Plan:
        return plan_of(
            found, stage=stage, model={"from_pretrained": str(base)}, training__objective="dpo",
            training__dpo={"beta": 0.5},
        )  # fmt: skip

    alone = run_ranks(plan(0), tmp_path / "alone", world_size=1)
    assert alone.losses[0] == pytest.approx(np.log(2), rel=1e-5) and alone.losses[-1] < 0.69
    split = run_ranks(plan(3), tmp_path / "split", world_size=2, stop_after=3)
    rest = run_ranks(plan(1), tmp_path / "split", world_size=3)
    assert split.losses + rest.losses == pytest.approx(alone.losses, rel=1e-4)
    train, _ = open_rows(found)
    assert REFERENCE_LOG_PROBS in train.read(np.arange(1))
