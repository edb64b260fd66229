"""Models other than causal language models on Ray Serve: masks are filled, and translations for nobody end."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from forge.inference.loaded import load
from forge.inference.masked import fill_masks, masked_ids
from forge.runtime.servers import find_server
from tests.support.command import wait_for
from tests.support.serving import serving, write_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
_BERT = BertConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64,
)  # fmt: skip
_T5 = T5Config(
    vocab_size=300, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, pad_token_id=2, eos_token_id=0,
    decoder_start_token_id=2,
)  # fmt: skip


def post(url: str, route: str, *, timeout_s: float = 120, **body: Any) -> httpx.Response:
    asked = {"model": "tiny", **body}
    return httpx.post(f"{url}/v1/{route}", json=asked, trust_env=False, timeout=timeout_s)


def replica() -> psutil.Process:
    """The process of the server's only replica."""
    children = psutil.Process(find_server("test").record["pid"]).children(recursive=True)
    [found] = [process for process in children if "ServeReplica" in " ".join(process.cmdline())]
    return found


def used_s(process: psutil.Process) -> float:
    """CPU time of a process."""
    times = process.cpu_times()
    return float(times.user + times.system)


def test_fill_mask__two_replicas__fill_as_the_model_does(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "bert", lambda: BertForMaskedLM(_BERT))
    loaded = load(folder)
    texts = ["the [MASK] fox", "[MASK] my [MASK]"]
    expected = fill_masks(loaded, [masked_ids(loaded, text) for text in texts], num_candidates=3)
    with serving(tmp_path / "state", source=folder, min_replicas=2, max_replicas=2) as url:
        for _ in range(8):  # each replica gets some
            found = post(url, "fill-mask", input=texts, top_k=3).json()["data"]
            for each, masks in zip(found, expected, strict=True):
                assert [[one["token_id"] for one in mask] for mask in each["masks"]] == [
                    [one.token_id for one in mask] for mask in masks
                ]
                shares = [one["probability"] for mask in each["masks"] for one in mask]
                assert shares == pytest.approx([asdict(one)["probability"] for mask in masks for one in mask])
        refused = post(url, "fill-mask", input="no mask")
        assert refused.status_code == 400 and "the text has no [MASK]" in refused.json()["error"]["message"]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_translate__client_goes_away__its_replica_stops_working_on_it(tmp_path: Path, num_beams: int) -> None:
    folder = write_model(tmp_path / "t5", lambda: T5ForConditionalGeneration(_T5))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with serving(tmp_path / "state", source=folder) as url:
        assert post(url, "translate", input="dog", max_tokens=3, num_beams=num_beams).status_code == 200
        working = replica()
        before = used_s(working)
        with pytest.raises(httpx.ReadTimeout):  # of hours of work
            post(
                url, "translate", input=["the quick fox"] * 60, max_tokens=100_000, num_beams=num_beams, timeout_s=3
            )
        assert used_s(working) - before > 0.5, "it has begun"
        wait_for(lambda: find_server("test").record["running"] == 0, timeout_s=30)

        def is_idle() -> bool:
            since = used_s(working)
            time.sleep(2.0)
            return used_s(working) - since < 0.2

        wait_for(is_idle, timeout_s=30)
        assert replica().pid == working.pid
        assert post(url, "translate", input="dog", max_tokens=3, num_beams=num_beams).status_code == 200
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert 'forge_requests_cut_total{reason="client"} 1.0' in metrics
