"""Training from a saved folder: the same curve as from the same weights drawn from a seed, at any world size and
stage, and never the whole model in one rank's memory."""

from __future__ import annotations

import asyncio
import ctypes
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forge.config.model import ModelSpec
from forge.elastic.workers.fork_client import start_fork_server
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.objective.causal_lm import CausalLm
from forge.plan.inputs import CorpusFiles
from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.train.process_group import join_process_group
from tests.support.jobs import SEQ_LEN, VOCAB, synthetic_corpus, tiny_job, tiny_plan
from tests.support.ranks import on_ranks, run_ranks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def save_first_weights(folder: Path, precision: str) -> None:
    """Those that a run of the tiny job would draw from its seed."""
    job = tiny_job()
    options = BuildOptions(dtype=DTYPES[precision], device=torch.device("cpu"), seed=job.training.seed)
    model: Any = TransformersFamily().build(
        job.model, DataShape(vocab_size=VOCAB, seq_len=SEQ_LEN, eot_id=0), options=options
    )
    model.save_pretrained(folder, max_shard_size="20KB")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(("stage", "world_size", "precision"), [(0, 1, "fp32"), (1, 2, "bf16"), (3, 2, "bf16")])
def test_train__from_a_folder__has_the_losses_of_the_weights_in_it(
    tmp_path: Path, corpus: Any, stage: int, world_size: int, precision: str
) -> None:
    changes: dict[str, Any] = {"training__zero": {"stage": stage}, "training__precision": precision}
    drawn = run_ranks(tiny_plan(corpus, **changes), tmp_path / "drawn", world_size=world_size)
    save_first_weights(tmp_path / "base", precision)
    plan = tiny_plan(corpus, model={"from_pretrained": str(tmp_path / "base")}, **changes)
    loaded = run_ranks(plan, tmp_path / "loaded", world_size=world_size)
    assert loaded.losses == drawn.losses


@pytest.mark.slow
def test_fork_server__relative_folder_and_another_current_one__finds_it(
    tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_first_weights(tmp_path / "base", "fp32")
    monkeypatch.chdir(tmp_path)
    files = CorpusFiles(patterns=(), num_sampled=0, folder=str(tmp_path))
    plan = replace(tiny_plan(corpus, model={"from_pretrained": "base"}), files=files)
    monkeypatch.chdir("/")  # as in Ray's processes
    server = start_fork_server(plan_to_json(plan), log=tmp_path / "log")
    try:
        message = asyncio.run(asyncio.wait_for(server.receive(), timeout=120))
        assert message is not None and "ready" in message, (tmp_path / "log").read_text()
        (process,) = [
            child for child in psutil.Process().children() if "forge.elastic.workers.fork_server" in child.cmdline()
        ]
        assert Path(process.cwd()) == tmp_path.resolve()
    finally:
        server.kill()


@pytest.mark.slow
def test_fork_server__folder_that_is_gone__is_ready_and_the_ranks_report_it(tmp_path: Path, corpus: Any) -> None:
    save_first_weights(tmp_path / "base", "fp32")
    plan = tiny_plan(corpus, model={"from_pretrained": str(tmp_path / "base")})
    shutil.rmtree(tmp_path / "base")
    server = start_fork_server(plan_to_json(plan), log=tmp_path / "log")
    try:
        message = asyncio.run(asyncio.wait_for(server.receive(), timeout=120))
        assert message is not None and "ready" in message, (tmp_path / "log").read_text()
    finally:
        server.kill()


def test_train__from_a_folder_and_resumed_at_another_size__goes_on(tmp_path: Path, corpus: Any) -> None:
    save_first_weights(tmp_path / "base", "bf16")
    plan = tiny_plan(corpus, model={"from_pretrained": str(tmp_path / "base")}, training__zero={"stage": 3})
    whole = run_ranks(plan, tmp_path / "whole", world_size=2)
    run_ranks(plan, tmp_path / "run", world_size=1, stop_after=3)
    rest = run_ranks(plan, tmp_path / "run", world_size=2)
    assert [metrics.step for metrics in rest.steps] == [4, 5, 6]
    assert rest.losses == pytest.approx(whole.losses[3:], rel=2e-2)


SIZES = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip
LARGE_VOCAB = 8192


def peaks_of(rank: int, plan_json: str, folder: str, world_size: int) -> dict[str, int]:
    """Bytes of resident memory that building the model, and then loading its weights, took at most."""
    from forge.model.families.base import ModelFamily
    from forge.train import engine as engine_module

    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: give freed memory back, which glibc would keep
    plan: Plan = plan_from_json(plan_json)
    spec, data = ModelSpec(from_pretrained=folder), DataShape(vocab_size=LARGE_VOCAB, seq_len=16, eot_id=0)
    join_process_group(device=torch.device("cpu"))
    family: ModelFamily = TransformersFamily()
    family.import_classes(spec, data)  # the code itself takes memory, which is not the model's
    peaks: dict[str, int] = {}

    def build(*arguments: Any, **named: Any) -> Any:
        return measured("build", lambda: TransformersFamily().build(*arguments, **named))

    def measured(what: str, action: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        answer = action()
        peaks[what] = _status("VmHWM") - before
        return answer

    engine_module.family_of = lambda spec: SimpleNamespace(build=build, open_pretrained=family.open_pretrained)  # type: ignore[assignment, return-value]
    engine = engine_module.build_engine(
        spec, plan.job.training, deepspeed_config=plan.for_world_size(world_size).deepspeed,
        data=DataShape(vocab_size=LARGE_VOCAB, seq_len=16, eot_id=0), objective=CausalLm(),
        device=torch.device("cpu"), has_linear_head=True,
        skip_init=True,
    )  # fmt: skip
    weights = family.open_pretrained(spec, data)
    measured("load", lambda: engine.state.load_weights(weights))
    return peaks


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.slow
def test_build__under_zero_3__no_rank_holds_more_than_its_share_and_the_largest_layer(tmp_path: Path) -> None:
    world_size = 4
    config = AutoConfig.for_model("llama", **SIZES, vocab_size=LARGE_VOCAB)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    whole = sum(p.numel() * 2 for p in model.parameters())
    largest = max(sum(p.numel() * 2 for p in m.parameters(recurse=False)) for m in model.modules())
    plan = tiny_plan(training__zero={"stage": 3})
    slack = 32 * 2**20  # pieces of a file and of messages between ranks
    assert whole > slack + largest + whole // world_size, "otherwise the bounds would prove nothing"
    for peaks in on_ranks(peaks_of, plan_to_json(plan), str(tmp_path), world_size, world_size=world_size):
        assert peaks["build"] < whole // world_size + largest + slack
        assert peaks["load"] < largest + slack
