"""Generation and scoring for an evaluation, beside `lm-eval --model hf` on the same prompts.

    python -m benchmarks.evaluate [--model FOLDER] [--prompts 48] --json FILE

The task has the shape of a few-shot benchmark: three solved examples that all prompts begin with, then a question
of 10 to 60 words. Generated are at most 48 tokens, until an empty line; scored are four choices for each question.
Every contender runs in a process of its own on all cores, in turn with the others; start and loading do not count.

    forge      fp32, its default, and bf16; texts are verified against exact arithmetic
    lm-eval    batches of 1, 8 and 16, in fp32 and bf16

Ratios are relative to the fastest variant of lm-eval, separately for generation and scoring.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.finetune_inputs import save_base
from benchmarks.program import module, running
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json

MODEL = Path(__file__).parents[1] / ".fixtures" / "smollm2"
KINDS = ("generate", "score")
FORGE = ("forge fp32", "forge bf16")
PEERS = tuple(f"lm-eval {dtype}, batch {size}" for dtype in ("fp32", "bf16") for size in (1, 8, 16))
SHOTS, MAX_TOKENS = 3, 48
_CLOSE = 0.05
"""Difference of a log-likelihood in fp32 that counts as equal."""


def main() -> None:
    """Run every contender `--repeats` times, in turn."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a transformers model")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--only", nargs="+", choices=(*FORGE, *PEERS), default=(*FORGE, *PEERS))
    smallest = {"prompts": 2, "model": None, "only": ["forge fp32", "lm-eval fp32, batch 8"]}
    options = parse_options(parser, smallest=smallest)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        model = options.model
        if model is None:
            model = folder / "tiny"
            save_base(model, kind="sft")
        task = build_task(options.prompts)
        for repeat in range(options.repeats):
            for number, contender in enumerate(options.only):
                own = folder / f"{number}-{repeat}"
                own.mkdir()
                runs[contender].append(measure(contender, model=model, task=task, folder=own))
                print(f"  {contender}: {_seconds(runs[contender][-1])}", file=sys.stderr)
    report(runs, options=options)


def build_task(count: int) -> dict[str, Any]:
    """Prompts and pairs of real English text, the same for every contender."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    chance = random.Random(1)

    def passage(low: int, high: int) -> str:
        start = chance.randrange(len(words) - high)
        return " ".join(words[start : start + chance.randint(low, high)])

    shared = "".join(f"Question: {passage(40, 60)}\nAnswer: {passage(8, 16)}\n\n" for _ in range(SHOTS))
    prompts = [f"{shared}Question: {passage(10, 60)}\nAnswer:" for _ in range(count)]
    pairs = [(prompt, f" {passage(2, 8)}") for prompt in prompts for _ in range(4)]
    return {"shared": shared, "prompts": prompts, "pairs": pairs, "max_tokens": MAX_TOKENS, "stop": ["\n\n"]}


def measure(contender: str, *, model: Path, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one contender. Returns: seconds and answers of each kind of work."""
    name, dtype = contender.replace(",", "").split()[:2]
    size = int(contender.rpartition(" ")[2]) if name == "lm-eval" else 0
    request = {"contender": name, "model": str(model), "dtype": dtype, "batch_size": size, **task}
    (folder / "request.json").write_text(json.dumps(request))
    command = module("score_models", {"file": str(folder / "request.json")})  # too long for a command line
    with running(command, folder=folder, threads=None) as program:
        if program.process.wait():
            raise RuntimeError(program.last_words())
    found: dict[str, Any] = json.loads((folder / "answer").read_text().splitlines()[-1])
    return found


def report(runs: dict[str, list[dict[str, Any]]], *, options: Any) -> None:
    """Print the table and write the figures."""
    figures: dict[str, Any] = {"prompts": options.prompts, "repeats": options.repeats}
    seconds = {
        kind: {name: Measured(values=tuple(one[kind]["seconds"] for one in found)) for name, found in runs.items()}
        for kind in KINDS
    }
    for kind in KINDS:
        own = min(seconds[kind][name].median for name in FORGE if name in runs)
        peer = min(seconds[kind][name].median for name in PEERS if name in runs)
        figures[f"ratio_{kind}"] = peer / own
        figures[f"seconds_{kind}"] = {name: measured.median for name, measured in seconds[kind].items()}
    figures["agreement"] = agreement(runs)
    rows = [[name, *(seconds[kind][name].text(".2f") for kind in KINDS)] for name in runs]
    print_table("seconds for the task", header=["contender", *KINDS], rows=rows)
    ratios = ", ".join(f"{kind} {figures[f'ratio_{kind}']:.2f}" for kind in KINDS)
    print(f"\nratio to the fastest lm-eval: {ratios} (≥ 1.5); equal in fp32: {figures['agreement']}")
    write_json(options.json, figures=figures)


def agreement(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The share of texts and of scores that forge and lm-eval have in common in fp32."""
    peer = next((name for name in PEERS if name in runs and "fp32" in name), None)
    if peer is None or FORGE[0] not in runs:
        return {}
    own, other = runs[FORGE[0]][0], runs[peer][0]
    texts = list(zip(own["generate"]["answers"], other["generate"]["answers"], strict=True))
    scores = list(zip(own["score"]["answers"], other["score"]["answers"], strict=True))
    return {
        "texts": sum(a.strip() == b.strip() for a, b in texts) / len(texts),
        "scores": sum(abs(a - b) < _CLOSE for a, b in scores) / len(scores),
    }


def _seconds(run: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {run[kind]['seconds']:.1f} s" for kind in KINDS)


if __name__ == "__main__":
    main()
