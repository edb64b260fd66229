"""A search over learning rates: `forge tune` and plain Ray Tune on the same eight trials.

    python -m benchmarks.tune --json FILE

A small Llama (2 layers of 64, vocabulary 2,048, sequences of 64), 8 sequences a step, 40 steps, fp32, one worker a
trial, two trials at once. The held-out loss is reported after every 20 steps. The rates are a fixed list: all
contenders run the same trials, on the same tokens from the same initial weights, and must agree in their last
held-out losses. The total is the time of the whole command, including Ray's start and end but not the preparation
of the text; a trial's start is from its suggestion to the end of its first step.

    forge               `forge tune`; only it writes checkpoints, one at the end of every trial
    trainer             Tune with a TorchTrainer a trial, its best settings; see `benchmarks.peers.ray_tune`
    trainer_dashboard   the same with Ray's dashboard, without which runs of Ray Train may end later
    trainer_default     the same without those settings
    function            Tune with a function that trains in the trial's own process, without Ray Train

They take turns. `ratio_vs_plain_tune` counts against the fastest of the trainers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks.program import FORGE, Program, module, records_of, running, wait
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json
from forge.config.job import JobSpec
from forge.data.prepare import prepare
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.registry import family_of
from forge.plan.inputs import CorpusInfo

LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.5e-3, 2.5e-3, 4e-3, 8e-3)
LR = "training.optimizer.lr"
AT_ONCE = 2
JOB: Mapping[str, Any] = {
    "name": "tune",
    "model": {
        "architecture": "llama",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "data": {
        "source": "python-stdlib",
        "tokenizer": {"vocab_size": 2048},
        "seq_len": 64,
        "held_out": 0.002,
    },
    "training": {
        "total_steps": 40,
        "global_batch_size": 8,
        "schedule": {"kind": "cosine", "warmup": 5, "final_fraction": 0.1},
        "precision": "fp32",
        "evaluate_every": "20 steps",
    },
    "resources": {"workers": 1, "gpu": "none"},
    "tracking": {"wandb": {"mode": "disabled"}},
    "search": {
        "space": {LR: {"grid": list(LEARNING_RATES)}},
        "trials_at_once": AT_ONCE,
        "searcher": {"kind": "grid"},
    },
}
PEERS: Mapping[str, Mapping[str, Any]] = {
    "trainer": {"how": "trainer", "is_tuned": True, "has_dashboard": False},
    "trainer_dashboard": {"how": "trainer", "is_tuned": True, "has_dashboard": True},
    "trainer_default": {"how": "trainer", "is_tuned": False, "has_dashboard": True},
    "function": {"how": "function", "is_tuned": True, "has_dashboard": False},
}
TRAINERS = ("trainer", "trainer_dashboard", "trainer_default")
CONTENDERS = ("forge", *PEERS)
TOLERANCE = 1e-4
"""Of a last held-out loss. Sums in fp32 are taken in another order, which makes about 1e-6 at these rates; at four
times the highest, where training is unstable, 2e-2."""
PARTS = ("before", "trials", "after")
LIMIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One run of one contender."""

    seconds: float
    parts_s: Mapping[str, float]
    """What they were made of: before the first trial is suggested, until the last is over, and the rest."""
    starts_s: Mapping[float, float]
    """Of each trial, by its rate: from its suggestion to the end of its first step."""
    warm: frozenset[float]
    """Rates of the trials whose process an earlier one had left; of the peers, all but the first at once."""
    losses: Mapping[float, float | None]
    """The last held-out loss, by rate; None where the contender has lost it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The input of all contenders."""

    cache: Path
    """forge's, in which the tokens lie."""
    job: Path
    request: Mapping[str, Any]
    """The same for the peers."""


def main() -> None:
    """Search with every contender `--repeats` times, in turn."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS, metavar="NAME")
    options = parse_options(parser, smallest={"only": ("forge", "trainer", "function")})
    runs: dict[str, list[Search]] = {name: [] for name in CONTENDERS if name in options.only}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        work = prepare_work(Path(text))
        for _ in range(options.repeats):
            for name in runs:
                runs[name].append(measure(name, work=work))
                print(f"  {name}: {runs[name][-1].seconds:.1f} s", file=sys.stderr)
    write_json(options.json, figures=report(runs))


def prepare_work(folder: Path) -> Work:
    """Prepare tokens, initial weights, the job file and the peers' request."""
    spec = JobSpec.model_validate(JOB)
    corpus = prepare(spec.data, cache_dir=folder / "cache")
    (folder / "job.yaml").write_text(yaml.safe_dump(dict(JOB)))
    save_first_weights(spec, corpus, path=folder / "first.safetensors")
    optimizer, schedule = spec.training.optimizer, spec.training.schedule
    request = {
        "model": spec.model.config_overrides | {"model_type": spec.model.architecture},
        "vocab_size": corpus.vocab_size,
        "seq_len": corpus.seq_len,
        "corpus": corpus.folder,
        "data_seed": spec.data.seed,
        "first_weights": str(folder / "first.safetensors"),
        "learning_rates": LEARNING_RATES,
        "total_steps": spec.training.total_steps,
        "global_batch_size": spec.training.global_batch_size,
        "evaluate_every": spec.training.evaluate_every.steps,
        "warmup_steps": schedule.warmup.steps,
        "final_fraction": schedule.final_fraction,
        "weight_decay": optimizer.weight_decay,
        "betas": (optimizer.beta1, optimizer.beta2),
        "eps": optimizer.eps,
        "grad_clip": optimizer.grad_clip,
        "trials_at_once": AT_ONCE,
    }
    return Work(cache=folder / "cache", job=folder / "job.yaml", request=request)


def save_first_weights(spec: JobSpec, corpus: CorpusInfo, *, path: Path) -> None:
    """Save the initial weights that forge draws from the job's seed."""
    data = DataShape(vocab_size=corpus.vocab_size, seq_len=corpus.seq_len, eot_id=corpus.eot_id)
    options = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=spec.training.seed)
    model = family_of(spec.model).build(spec.model, data, options=options)
    save_file(model.state_dict(), path)


def measure(name: str, *, work: Work) -> Search:
    """Run one search by one contender, and delete its files."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        (folder / "cache").symlink_to(work.cache)  # `running` tells forge to look there
        if name == "forge":
            command = [FORGE, "tune", str(work.job), "--set", f"checkpoint.to={folder}/runs", "-o", "json"]
        else:
            command = module("ray_tune", {**work.request, **PEERS[name], "folder": text})
        began_s = time.time()
        with running(command, folder=folder) as program:
            deadline = time.monotonic() + LIMIT_S
            wait(lambda: False, program.process, deadline=deadline, poll_s=0.02)
            ended_s = time.time()
            require_success(name, program)
        search_of = search_of_forge if name == "forge" else search_of_peer
        return search_of(folder, began_s=began_s, ended_s=ended_s)


def require_success(name: str, program: Program) -> None:
    """Raises: RuntimeError if the program has failed, or has not ended."""
    if program.process.poll() != 0:
        how = "has not ended" if program.process.poll() is None else "has failed"
        raise RuntimeError(f"{name} {how}:\n{program.last_words()}")


def search_of_forge(folder: Path, *, began_s: float, ended_s: float) -> Search:
    """Read the times from the events of the search."""
    (journal,) = (folder / "runs").glob("*/events.jsonl")
    rates, starts_s, warm, losses = dict[int, float](), dict[float, float](), set[float](), dict[float, float]()
    times: list[float] = []
    for event in records_of(journal):
        kind = event["event"]
        times += [event["time"]] if kind in ("TrialSuggested", "TrialEnded") else []
        if kind == "TrialSuggested":
            rates[event["trial"]] = event["values"][LR]
        elif kind == "TrialStarted":
            starts_s.setdefault(rates[event["trial"]], event["seconds"])
            warm |= {rates[event["trial"]]} if event["is_warm"] else set()
        elif kind == "TrialReported":
            losses[rates[event["trial"]]] = event["value"]
    return Search(
        seconds=ended_s - began_s,
        parts_s=parts_of(began_s, times[0], times[-1], ended_s),
        starts_s=starts_s,
        warm=frozenset(warm),
        losses=losses,
    )


def search_of_peer(folder: Path, *, began_s: float, ended_s: float) -> Search:
    """Read the times from the peer's records and output."""
    records = records_of(folder / "trials.jsonl")
    suggested = {record["suggested"]: record["time"] for record in records if "suggested" in record}
    stepped = {record["stepped"]: record["time"] for record in records if "stepped" in record}
    answer = json.loads((folder / "answer").read_text().splitlines()[-1])
    return Search(
        seconds=ended_s - began_s,
        parts_s=parts_of(began_s, min(suggested.values()), records[-1]["time"], ended_s),
        starts_s={rate: stepped[rate] - suggested[rate] for rate in suggested},
        warm=frozenset(list(suggested)[AT_ONCE:]),
        losses={float(rate): loss for rate, loss in answer.items()},
    )


def parts_of(*times: float) -> dict[str, float]:
    """Return the seconds between each of four times and the next."""
    return {part: times[i + 1] - times[i] for i, part in enumerate(PARTS)}


def report(runs: Mapping[str, Sequence[Search]]) -> dict[str, Any]:
    """Print the tables. Returns: the figures.

    Raises: RuntimeError if the contenders did not do the same work.
    """
    figures: dict[str, Any] = {"loss_largest_difference": largest_difference(runs)}
    rows = []
    for name, of in runs.items():
        seconds = Measured(values=tuple(run.seconds for run in of))
        warm = Measured(values=tuple(run.starts_s[rate] for run in of for rate in run.starts_s if rate in run.warm))
        cold = Measured(
            values=tuple(run.starts_s[rate] for run in of for rate in run.starts_s if rate not in run.warm)
        )
        parts = {part: Measured(values=tuple(run.parts_s[part] for run in of)).median for part in PARTS}
        figures[name] = {
            "seconds": seconds.median,
            "parts_s": parts,
            "trial_start_s": warm.median if warm.values else None,
            "first_trial_start_s": cold.median if cold.values else None,
            "losses": of[0].losses,
            "num_lost_reports": sum(loss is None for run in of for loss in run.losses.values()),
            "all": {"seconds": seconds.values, "trial_start_s": warm.values, "first_trial_start_s": cold.values},
        }
        texts = [measured.text(".2f") if measured.values else "" for measured in (warm, cold)]
        rows.append([name, seconds.text(".1f"), " + ".join(f"{part_s:.1f}" for part_s in parts.values()), *texts])
    print_table(
        f"{len(LEARNING_RATES)} trials, {AT_ONCE} at once; median [range]",
        header=[
            "contender",
            "seconds in all",
            "before + trials + after",
            "a trial's start, s",
            "the first trials', s",
        ],
        rows=rows,
    )
    figures |= ratios_of({name: figures[name]["seconds"] for name in runs})
    rows = [["largest difference of a last loss", f"{figures['loss_largest_difference']:.1e}", f"≤ {TOLERANCE}"]]
    if "forge" in runs:
        figures["trial_start_s"] = figures["forge"]["trial_start_s"]
        start_s = figures["trial_start_s"]
        rows.append(["trial_start_s", "none was warm" if start_s is None else f"{start_s:.2f}", "≤ 3"])
    aims = {"ratio_vs_plain_tune": "≤ 0.7", "ratio_vs_function_trainable": ""}
    rows += [[key, f"{figures[key]:.3f}", aim] for key, aim in aims.items() if key in figures]
    print_table("Figures", header=["figure", "value", "aim"], rows=rows)
    return figures


def largest_difference(runs: Mapping[str, Sequence[Search]]) -> float:
    """Return the largest difference of last losses at one rate. Raises: RuntimeError if the trials differ."""
    every = [run.losses for of in runs.values() for run in of]
    if any(set(losses) != set(LEARNING_RATES) for losses in every):
        raise RuntimeError(f"not all have judged the trials {LEARNING_RATES}: {runs}")
    known = [[loss for losses in every if (loss := losses[rate]) is not None] for rate in LEARNING_RATES]
    spreads = [max(losses) - min(losses) for losses in known]
    if not max(spreads) <= TOLERANCE:
        raise RuntimeError(f"last losses differ by {max(spreads)}, more than {TOLERANCE}: {runs}")
    return max(spreads)


def ratios_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return forge's seconds ÷ the peers', for what was measured of both."""
    if "forge" not in seconds:
        return {}
    ratios = {}
    trainers = [seconds[name] for name in TRAINERS if name in seconds]
    if trainers:
        ratios["ratio_vs_plain_tune"] = seconds["forge"] / min(trainers)
    if "function" in seconds:
        ratios["ratio_vs_function_trainable"] = seconds["forge"] / seconds["function"]
    return ratios


if __name__ == "__main__":
    main()
