"""All answers that need a GPU, in one run of at most eight minutes: tests, speed, memory, recovery.

    python -m benchmarks.gpu --json FILE [--device cpu --smallest] [--only PART ...]
    python -m benchmarks.gpu --pack FOLDER

Each part is a process, in the order of their use. It gets at most its own limit, and leaves the others their least
time. FILE has every figure as soon as it is found, so a run that is cut off at any moment, or a part that fails or
hangs, keeps all answers so far. All parts but `with_ray` need only torch 2.9 or newer, transformers, DeepSpeed and
this folder. `--device cpu --smallest` runs every part with tiny models on the CPU;
what needs a GPU is listed as skipped. `--pack` puts the wheels into a folder that a machine without a package index
lacks beside torch and transformers; see docs/operations.md. Exit code 1 if a test or a part failed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.pack import pack
from benchmarks.program import FORGE, Program, running, wait
from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.process import die_with_parent

LIMIT_S = 470.0
_SMALLEST_LIMIT_S = 600.0
"""Of each part: a busy machine of two cores compiles for two minutes."""
_LEAST_S = 10.0
_MARK = "figures: "
"""Before what a part prints; other lines are of libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A generator of figures: `function` of `benchmarks.gpu_parts.module`."""

    module: str
    function: str
    limit_s: float
    least_s: float
    """What the parts before it leave it of the whole run's time."""
    device: str | None = None
    """None: that of the run."""
    needs_ray: bool = False
    """Whether it is skipped without Ray and the command `forge`."""


PARTS = (
    Part(module="speed", function="environment", limit_s=40, least_s=20),
    Part(module="training", function="reference", limit_s=60, least_s=25, device="cpu"),
    Part(module="speed", function="throughput", limit_s=90, least_s=50),
    Part(module="training", function="training", limit_s=140, least_s=60),
    Part(module="speed", function="state", limit_s=60, least_s=35),
    Part(module="speed", function="kill", limit_s=60, least_s=35),
    Part(module="speed", function="peers", limit_s=180, least_s=60),
    Part(module="speed", function="memory", limit_s=60, least_s=30),
    Part(module="options", function="options", limit_s=150, least_s=0),
    Part(module="with_ray", function="with_ray", limit_s=150, least_s=60, needs_ray=True),
)
"""In the order of their use."""


def main() -> None:
    """Run the parts one after the other, each in a process of its own."""
    parser = benchmark_parser(__doc__, repeats=1)
    names = [part.function for part in PARTS]
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=" ".join(names))
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="only collect wheels for such a machine")
    parser.add_argument("--python", default="3.12", help="with --pack: its Python (default: 3.12)")
    parser.add_argument("--run-part", nargs=2, metavar=("PART", "REQUEST"), help="internal")
    options = parse_options(parser, smallest={"limit": len(PARTS) * _SMALLEST_LIMIT_S})
    if options.run_part:
        _run_part(*options.run_part)
        return
    if options.pack:
        pack(options.pack, python=options.python)
        return
    device = options.device or ("cuda" if _has_cuda() else "cpu")
    if device == "cuda" and not _has_cuda():
        parser.error("torch finds no CUDA device: install a torch with CUDA, or pass --device cpu --smallest")
    if device == "cpu" and not options.smallest:
        parser.error("on the CPU this only checks that it runs: pass --device cpu --smallest, or use a GPU")
    show_sources_to_children()
    answers: dict[str, Any] = {"device": device}
    deadline = time.monotonic() + options.limit
    parts = [part for part in PARTS if part.function in options.only]
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as name:
        for index, part in enumerate(parts):

            def keep(answer: dict[str, Any], part: Part = part) -> None:
                answers[part.function] = answer
                write_json(options.json, figures=answers)

            later = [one for one in parts[index + 1 :] if problem_of(one) is None]
            limit_s = part_limit_s([part, *later], left_s=deadline - time.monotonic())
            if options.smallest:
                limit_s = min(_SMALLEST_LIMIT_S, deadline - time.monotonic())
            request = {"device": part.device or device, "smallest": options.smallest, "folder": name}
            keep(_answer(part, request=request, limit_s=limit_s, keep=keep))
            print_table(part.function, header=["figure", "value"], rows=list(_rows(answers[part.function])))
            sys.stdout.flush()
    if failures := [name for name, answer in answers.items() if _has_failed(answer)]:
        raise SystemExit(f"failed: {', '.join(failures)}")


def show_sources_to_children() -> None:
    """Have every process find `forge` and `benchmarks` in this folder, where they are not installed.

    Processes that a rank starts do not look in their working folder (`python -P`).
    """
    paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def part_limit_s(parts: Sequence[Part], *, left_s: float) -> float:
    """How long the first of these parts may take: its limit, or what leaves the others their least time."""
    first, *later = parts
    return min(first.limit_s, max(first.least_s, left_s - sum(part.least_s for part in later)), left_s)


def problem_of(part: Part) -> str | None:
    """Return why a part is skipped on this machine; None if it is not."""
    if part.needs_ray and importlib.util.find_spec("ray") is None:
        return "the package ray is not installed"
    if part.needs_ray and not Path(FORGE).exists():
        return f"forge is not installed: {FORGE} is missing"
    return None


def _answer(
    part: Part, *, request: Mapping[str, Any], limit_s: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run a part. Returns: its figures, with `seconds`, and `skipped` or `failed` and why.

    Args:
        keep: called with the figures so far whenever there are more.
    """
    if (problem := problem_of(part)) is not None:
        return {"skipped": problem}
    if limit_s < _LEAST_S:
        return {"skipped": "the time limit of the whole run has been reached"}
    own = Path(request["folder"]) / part.function
    own.mkdir()
    used = str(request["device"])
    command = [sys.executable, "-m", "benchmarks.gpu", "--run-part", part.function, json.dumps(request)]
    began = time.monotonic()
    with running(command, folder=own, threads=1 if used == "cpu" else None, device=used) as program:
        answer: dict[str, Any] = {}

        def collect() -> bool:
            found = _figures(own / "answer")
            if found != answer:
                answer.update(found)
                keep(answer | {"failed": "interrupted"})
            return False

        wait(collect, program.process, deadline=time.monotonic() + limit_s)
        failure = _failure(program, limit_s=limit_s)
    answer |= _figures(own / "answer")
    answer["seconds"] = round(time.monotonic() - began, 1)
    return answer if failure is None else answer | {"failed": failure}


def _figures(path: Path) -> dict[str, Any]:
    """Return what a part has printed, as far as its lines are complete."""
    text = path.read_text(errors="replace")
    figures: dict[str, Any] = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        if line.startswith(_MARK):
            figures |= json.loads(line.removeprefix(_MARK))
    return figures


def _failure(program: Program, *, limit_s: float) -> str | None:
    code = program.process.poll()
    if code is None:
        return f"stopped after its limit of {limit_s:.0f} s"
    return None if code == 0 else f"ended with exit code {code}: {program.last_words()}"


def _run_part(name: str, request: str) -> None:
    """Run one part in this process and print its figures as it makes them."""
    from benchmarks.gpu_parts.ranks import Setting

    die_with_parent(os.getppid())
    part = next(part for part in PARTS if part.function == name)
    function = getattr(importlib.import_module(f"benchmarks.gpu_parts.{part.module}"), part.function)
    for figures in function(Setting(**json.loads(request))):
        print(_MARK + json.dumps(figures), flush=True)


def _rows(answer: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten figures for the table."""
    for name, value in answer.items():
        if isinstance(value, Mapping) and "deviation" in value:
            outcome = "passed" if value["passed"] else "FAILED"
            yield prefix + name, f"{outcome}: {value['deviation']:.2g} of at most {value['tolerance']:.2g}"
        elif isinstance(value, Mapping):
            yield from _rows(value, prefix=f"{prefix}{name}, ")
        else:
            text = (
                f"{value:,.4g}"
                if isinstance(value, float)
                else str(value).splitlines()[-1]
                if value
                else str(value)
            )
            yield prefix + name, text


def _has_failed(answer: object) -> bool:
    """Whether a part, or any test in it, has failed."""
    if isinstance(answer, Mapping):
        return "failed" in answer or answer.get("passed") is False or any(map(_has_failed, answer.values()))
    return isinstance(answer, str) and answer.startswith("failed: ")


if __name__ == "__main__":
    main()
