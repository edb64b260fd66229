"""Shared by all benchmarks: medians with ranges, a table on stdout, figures with their machine in a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge.fs import write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Repeats of one measurement."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, form: str = ",.0f") -> str:
        """`median [lowest .. highest]`."""
        low, high = min(self.values), max(self.values)
        return f"{self.median:{form}} [{low:{form}} .. {high:{form}}]"


def benchmark_parser(doc: str | None, *, repeats: int = 5) -> argparse.ArgumentParser:
    """The options of every benchmark: `--json FILE`, `--repeats N` and `--smallest`; see `parse_options`."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument(
        "--smallest", action="store_true", help="only check that it runs: once, as small as it can be"
    )
    return parser


def parse_options(parser: argparse.ArgumentParser, *, smallest: Mapping[str, object]) -> argparse.Namespace:
    """Parse the command line.

    Args:
        smallest: values of options that `--smallest` sets, beside `repeats`.
    """
    options = parser.parse_args()
    if options.smallest:
        vars(options).update({"repeats": 1, **smallest})
    return options


def print_table(title: str, *, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip())


def write_json(path: Path | None, *, figures: Mapping[str, object]) -> None:
    """Write the figures, with the machine they were taken on; nothing without a path."""
    if path is None:
        return
    machine = {"python": platform.python_version(), "system": platform.platform(), "cpu": cpu_model()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({**figures, "machine": machine}, indent=2) + "\n")


def cpu_model() -> str:
    """The processor's name and the number of cores this process may use. Source: proc_cpuinfo(5)."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{len(os.sched_getaffinity(0))} cores of {name}"
