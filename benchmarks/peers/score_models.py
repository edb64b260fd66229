"""Generation and scoring for an evaluation, by forge or by `lm-eval --model hf`.

    python -m benchmarks.peers.score_models '{"file": FILE}'

The file has the contender, the model and the task as JSON. Prints one JSON line: seconds of each kind of work
without loading the model, and what came out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Load the model, then do both kinds of work."""
    request = json.loads(Path(json.loads(sys.argv[1])["file"]).read_text())
    generate, score = _forge(request) if request["contender"] == "forge" else _lm_eval(request)
    found: dict[str, Any] = {}
    for name, work, inputs in (
        ("generate", generate, request["prompts"]),
        ("score", score, [tuple(pair) for pair in request["pairs"]]),
    ):
        work(inputs[:2])
        began = time.perf_counter()
        answers = work(inputs)
        found[name] = {"seconds": time.perf_counter() - began, "answers": answers}
    print(json.dumps(found))


Work = Callable[[list[Any]], list[Any]]


def _forge(request: dict[str, Any]) -> tuple[Work, Work]:
    from forge.inference.generate import generate
    from forge.inference.loaded import load
    from forge.inference.sampling import SamplingParams
    from forge.inference.score import log_likelihoods

    loaded = load(request["model"], dtype=request["dtype"], device="cpu")
    sampling = SamplingParams(max_tokens=request["max_tokens"], stop=tuple(request["stop"]))

    def texts(prompts: list[str]) -> list[str]:
        found = sorted(generate(loaded, prompts, sampling), key=lambda one: one.index)
        return [one.text for one in found]

    def scores(pairs: list[tuple[str, str]]) -> list[float]:
        return [one.total for one in log_likelihoods(loaded, pairs, shared=request["shared"])]

    return texts, scores


def _lm_eval(request: dict[str, Any]) -> tuple[Work, Work]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    dtype = {"fp32": "float32", "bf16": "bfloat16"}[request["dtype"]]
    model = HFLM(pretrained=request["model"], dtype=dtype, batch_size=request["batch_size"], device="cpu")
    options = {"until": request["stop"], "max_gen_toks": request["max_tokens"], "do_sample": False}

    def asked(kind: Any, arguments: list[Any]) -> list[Any]:
        return [
            Instance(request_type=kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)
        ]

    def texts(prompts: list[str]) -> list[str]:
        found = model.generate_until(asked("generate_until", [(one, dict(options)) for one in prompts]))
        return list(found)

    def scores(pairs: list[tuple[str, str]]) -> list[float]:
        return [float(one[0]) for one in model.loglikelihood(asked("loglikelihood", list(pairs)))]

    return texts, scores


if __name__ == "__main__":
    main()
