"""Checkpoints of forge, DeepSpeed and torch's distributed checkpoints (DCP), of the same training state.

    python -m benchmarks.checkpoint --json FILE

A Llama of 88 M parameters, 1.06 GB of training state (fp32 weights and AdamW's moments), bf16, ZeRO 2, two ranks of
one thread each over gloo. All contenders share one engine and one process group and take turns in blocks of ten
steps: without a checkpoint, or with one at the beginning. The disk is flushed between blocks, outside all timing,
so that no contender pays for dirty pages of another; DeepSpeed thus does not pay for the pages that it leaves
unflushed. All figures are of the slowest rank.

    forge                `AsyncCheckpointer.begin`, and `settle` before the next update; flushed and committed
    deepspeed            `engine.save_checkpoint` with defaults; does not flush
    deepspeed unzipped   the same with `checkpoint: {checkpoint_serialization: false}`
    dcp process, thread  `async_save`, staged by a thread into cached (shared) memory before the update

Ratios are relative to the faster setting of each peer. DeepSpeed's other settings, tried with 0.19.8: the `fast`
writer needs an accelerator's pinned memory; `decoupled: true` refuses ZeRO 2's tensors on CPU ("Cowardly
refusing to serialize non-leaf tensor"); the `python` writer works, but was not faster;
`parallel_write` only affects pipelines, and `use_node_local_storage` the creation of folders. DeepSpeed writes
the bf16 weights beside the state (a sixth more bytes), as it always does.

Three ranks load what two have saved. forge bypasses the page cache when it writes, so its first repeat reads from
the disk, all others from memory. DeepSpeed's time is the fastest conversion by `ds_to_universal` (with its default
4 and 2 workers, with 2 and 2, or with 1 and 1) plus the load of the result. Imports and the construction of engines
are never counted.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json
from benchmarks.torchrun import run_under_torchrun

STEPS = 10
SAVE_RANKS, LOAD_RANKS = 2, 3
LONG = ("none", "forge", "deepspeed", "dcp process")
"""The contenders that make a checkpoint every ten steps; of the other settings only the stall is measured."""
AFFECTED_STEPS = 3
"""In which every contender's checkpoint is complete, even on a busy machine."""
CONVERSIONS = ((4, 2), (2, 2), (1, 1))
"""Workers that extract and that merge."""
STATE_BYTES_PER_PARAMETER = 12
MIB = 2**20


def main() -> None:
    """Save, convert, load and export, each `--repeats` times."""
    options = parse_options(benchmark_parser(__doc__), smallest={})  # a tenth of the state, and three steps
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as name:
        folder = Path(name)
        request = {"folder": name, "repeats": options.repeats, "is_small": options.smallest}
        steps = 3 if options.smallest else STEPS
        saves = run_ranks("checkpoint_saves", SAVE_RANKS, folder=folder, request=request | {"steps": steps})
        conversions = {
            workers: [convert(folder, workers) for _ in range(options.repeats)] for workers in CONVERSIONS
        }
        loads = run_ranks(
            "checkpoint_loads",
            LOAD_RANKS,
            folder=folder,
            request=request | {"universal": str(folder / "universal")},
        )
        exports = [export(folder) for _ in range(options.repeats)]
    report(saves, conversions, loads, exports, json_path=options.json)


def run_ranks(module: str, world_size: int, *, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run a program under torchrun, which writes its result to a file."""
    answer = folder / f"{module}.json"
    run_under_torchrun(module, world_size=world_size, request=request | {"answer": str(answer)}, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def convert(folder: Path, workers: tuple[int, int]) -> float:
    """Convert DeepSpeed's checkpoint to a universal one. Returns: seconds."""
    (newest,) = (folder / "deepspeed").glob("step-*")
    shutil.rmtree(folder / "universal", ignore_errors=True)
    os.sync()
    request = {
        "input": str(newest),
        "output": str(folder / "universal"),
        "extract_workers": workers[0],
        "merge_workers": workers[1],
    }
    command = [sys.executable, "-m", "benchmarks.peers.universal", json.dumps(request)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(done.stdout.splitlines()[-1])


def export(folder: Path) -> dict[str, int]:
    """Export forge's checkpoint. Returns: `growth_bytes` of peak memory above the imports, `model_bytes`."""
    to = folder / "exported"
    request = json.dumps({"url": str(folder / "forge"), "to": str(to)})
    base, _ = peak_of(["-c", "import forge.serve.export"], text="")
    peak, answer = peak_of(["-m", "forge.serve.export"], text=request)  # after lines of its progress
    shutil.rmtree(to)
    return {"growth_bytes": peak - base, "model_bytes": json.loads(answer.splitlines()[-1])["answer"]["size_bytes"]}


def peak_of(arguments: list[str], *, text: str) -> tuple[int, str]:
    """Run a Python process on a request. Returns: its peak resident bytes and its output."""
    process = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        process.stdin.write(text.encode())
        process.stdin.close()
        answer = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}")
    return usage.ru_maxrss * 1024, answer


def report(
    saves: dict[str, Any],
    conversions: dict[tuple[int, int], list[float]],
    loads: dict[str, Any],
    exports: list[dict[str, int]],
    *,
    json_path: Path | None,
) -> None:
    """Print the tables. Returns: the figures."""
    state_bytes = saves["num_parameters"] * STATE_BYTES_PER_PARAMETER
    blocks = {
        name: {key: measured([block[key] for block in of]) for key in ("stall_s", "seconds", "complete_s")}
        for name, of in saves["blocks"].items()
    }
    rates = {name: measured([repeat[name] for repeat in saves["bandwidths"]]) for name in ("forge", "dd")}
    shares = measured([repeat["forge"] / repeat["dd"] for repeat in saves["bandwidths"]])
    slowdowns = {name: slowdown(saves["blocks"], name) for name in LONG}
    within = {name: measured([slowdown_within(block["steps"]) for block in saves["blocks"][name]]) for name in LONG}
    converted = {workers: measured(seconds) for workers, seconds in conversions.items()}
    fastest = min(converted, key=lambda workers: converted[workers].median)
    loaded = {name: measured(seconds) for name, seconds in loads["seconds"].items()}
    stalls = {name: of["stall_s"].median for name, of in blocks.items()}
    growth = exports[0]["model_bytes"], measured([one["growth_bytes"] for one in exports]).median
    figures: dict[str, Any] = {
        "state_bytes": state_bytes,
        "step_s": blocks["none"]["seconds"].median / saves["steps"],
        "stall_s": stalls,
        "stall_ratio_vs_deepspeed": stalls["forge"] / min(stalls["deepspeed"], stalls["deepspeed unzipped"]),
        "stall_ratio_vs_dcp": stalls["forge"] / min(stalls["dcp process"], stalls["dcp thread"]),
        "slowdown_every_10_steps": {name: of.median for name, of in slowdowns.items()},
        "slowdown_within_blocks": {name: of.median for name, of in within.items()},
        "reshard_load_s": {
            "forge": loaded["forge"].median,
            "conversion": converted[fastest].median,
            "universal": loaded["universal"].median,
        },
        "reshard_load_ratio_vs_universal": loaded["forge"].median
        / (converted[fastest].median + loaded["universal"].median),
        "write_bandwidth_bytes_per_s": {name: rate.median for name, rate in rates.items()},
        "write_bandwidth_ratio": shares.median,
        "save_growth_bytes": saves["save_growth_bytes"],
        "load_growth_bytes": {name: max(of) for name, of in loads["growth_bytes"].items()},
        "export_growth_bytes": growth[1],
        "model_bytes": growth[0],
        "all": {
            "blocks": saves["blocks"],
            "bandwidths": saves["bandwidths"],
            "conversion_s": {f"{extract} + {merge}": s for (extract, merge), s in conversions.items()},
            "load_s": loads["seconds"],
        },
    }
    print_table(
        f"One checkpoint of {state_bytes / 1e9:.2f} GB, ZeRO 2, two ranks; median [range]",
        header=["contender", "stall (s)", "complete after (s)", "slowdown, every 10 steps", "within blocks"],
        rows=[
            [
                name,
                of["stall_s"].text(".3f"),
                of["complete_s"].text(".2f"),
                slowdowns[name].text(".3f") if name in LONG else "",
                within[name].text(".3f") if name in LONG else "",
            ]
            for name, of in blocks.items()
        ],
    )
    print_table(
        f"Loading at {LOAD_RANKS} ranks what {SAVE_RANKS} saved, seconds; median [range]",
        header=["what", "seconds"],
        rows=[
            ["forge: checksums, read, resume", loaded["forge"].text(".2f")],
            *(
                [f"ds_to_universal, {extract} + {merge} workers", of.text(".2f")]
                for (extract, merge), of in converted.items()
            ),
            ["universal load", loaded["universal"].text(".2f")],
        ],
    )
    print_table(
        "Peak memory over what was held before, all processes together",
        header=["what", "MiB", "÷ state"],
        rows=[
            *memory_rows("save", saves["save_growth_bytes"], whole=state_bytes),
            *memory_rows("load", figures["load_growth_bytes"], whole=state_bytes),
            ["export, forge (÷ model)", f"{growth[1] / MIB:,.0f}", f"{growth[1] / growth[0]:.2f}"],
        ],
    )
    rows = [
        ["stall_ratio_vs_deepspeed", f"{figures['stall_ratio_vs_deepspeed']:.3f}", "≤ 0.05"],
        ["stall_ratio_vs_dcp", f"{figures['stall_ratio_vs_dcp']:.3f}", "< 1"],
        ["slowdown_every_10_steps", slowdowns["forge"].text(".3f"), "≤ 0.03"],
        ["the same, within blocks", within["forge"].text(".3f"), "≤ 0.03"],
        ["reshard_load_ratio_vs_universal", f"{figures['reshard_load_ratio_vs_universal']:.3f}", "≤ 0.2"],
        ["write_bandwidth_ratio", shares.text(".2f"), "≥ 0.7"],
        ["forge / dd (MB/s)", f"{rates['forge'].median / 1e6:,.0f} / {rates['dd'].median / 1e6:,.0f}", ""],
        ["step without a checkpoint (s)", f"{figures['step_s']:.2f}", ""],
    ]
    print_table("Figures", header=["figure", "value", "aim"], rows=rows)
    write_json(json_path, figures=figures)


def slowdown(blocks: dict[str, list[dict[str, Any]]], name: str) -> Measured:
    """Return the seconds of blocks with a checkpoint ÷ those of the same repeat's block without, minus 1."""
    pairs = zip(blocks[name], blocks["none"], strict=True)
    return measured([block["seconds"] / without["seconds"] - 1 for block, without in pairs])


def slowdown_within(steps: list[float]) -> float:
    """Return the slowdown of a block's first steps, during which the checkpoint is written, relative to the rest.

    The load of the machine changes from block to block; this compares steps that are close in time. For a block
    without a checkpoint the result is the remaining noise.
    """
    affected = min(AFFECTED_STEPS, len(steps) // 2)
    calm_s = statistics.median(steps[affected:])
    return (sum(steps[:affected]) - affected * calm_s) / (len(steps) * calm_s)


def measured(values: list[float]) -> Measured:
    """Repeats of one measurement."""
    return Measured(values=tuple(values))


def memory_rows(what: str, growth_bytes: dict[str, float], *, whole: int) -> list[list[str]]:
    """Return a row for each contender."""
    return [
        [f"{what}, {name}", f"{grown / MIB:,.0f}", f"{grown / whole:.2f}"] for name, grown in growth_bytes.items()
    ]


if __name__ == "__main__":
    main()
