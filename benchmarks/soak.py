"""Run the slow tests group by group and append a dated table of passes to `benchmarks/RESULTS.md`.

    python -m benchmarks.soak [--only GROUP ...] [--results FILE]

Each group is one pytest process with its own time limit, so a group that hangs or crashes is one row of the table
and hides no other. `make soak` runs them all; expect the better part of an hour on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.report import cpu_model

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADING = "## Soak runs"
_FUZZ_S = 240
"""Time for each kind of mutated input, where `make test` takes ten seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Slow tests that share one concern: a name for the table and pytest's arguments."""

    name: str
    tests: tuple[str, ...]
    limit_s: float = 1800.0


GROUPS = (
    Group(
        name="AWS in a box",
        tests=(
            "tests/hosts/test_aws.py",
            "tests/cluster/test_cloud_prices.py",
            "tests/cluster/test_firewall.py",
            "tests/cluster/test_move.py",
        ),
    ),
    Group(
        name="ssh hosts",
        tests=(
            "tests/hosts/test_ssh.py",
            "tests/hosts/test_hosts.py",
            "tests/hosts/test_links.py",
            "tests/hosts/test_models_on_ssh.py",
        ),
    ),
    Group(name="network partition", tests=("tests/hosts/test_partition.py",)),
    Group(name="runs sharing a cluster", tests=("tests/elastic/test_sharing.py",)),
    Group(
        name="faults",
        tests=(
            "tests/elastic/test_faults.py",
            "tests/elastic/test_soak.py",
            "tests/elastic/test_late_commit.py",
            "tests/elastic/test_deadline_machines.py",
            "tests/elastic/test_straggler_run.py",
            "tests/elastic/test_lora.py",
            "tests/elastic/test_layout_faults.py",
            "tests/elastic/test_task_scores.py",
        ),
    ),
    Group(name="membership histories", tests=("tests/elastic/test_histories.py", "tests/elastic/test_replicas.py")),
    Group(name="fork server", tests=("tests/elastic/test_fork_server.py",)),
    Group(
        name="Kubernetes pods",
        tests=(
            "tests/cluster/test_training_on_pods.py",
            "tests/cluster/test_kubectl.py",
            "tests/cluster/test_kubernetes.py",
        ),
    ),
    Group(name="budget", tests=("tests/runtime/test_budget_run.py",)),
    Group(name="searches", tests=("tests/elastic/test_tune.py", "tests/search")),
    Group(name="remote runs", tests=("tests/remote",)),
    Group(name="evaluation", tests=("tests/evaluate",)),
    Group(
        name="end to end",
        tests=("tests/runtime", "tests/examples", "--ignore=tests/runtime/test_budget_run.py"),
    ),
    Group(name="trackers, reports and replays", tests=("tests/runs", "tests/report", "tests/ui", "tests/chaos")),
    Group(name="benchmarks", tests=("tests/benchmarks/test_benchmarks_run.py",)),
    # Skipped where forge serve --engine vllm has not made vLLM's environment.
    Group(name="vLLM", tests=("tests/serve/vllm",)),
    # For FORGE_FUZZ_SECONDS per kind of input.
    Group(name="fuzzing", tests=("tests/fuzz", "-mslow or not slow"), limit_s=8 * _FUZZ_S + 1800.0),
    Group(
        name="training and checkpoints",
        tests=(
            "tests/train",
            "tests/checkpoint",
            "tests/data",
            "tests/cli",
            "tests/config",
            "tests/serve",
            "--ignore=tests/serve/vllm",
            "tests/inference",
            "tests/model",
            "tests/objective",
            "tests/plan",
            "tests/test_user_code.py",
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """How one group ended."""

    group: Group
    passed: int
    failed: tuple[str, ...]
    skipped: int
    seconds: float

    @property
    def is_clean(self) -> bool:
        return not self.failed and self.passed > 0


def main() -> int:
    """Returns: 0 if every group passed, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [group.name for group in GROUPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="GROUP", help=", ".join(names))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page to append the table to")
    options = parser.parse_args()
    results = []
    for group in GROUPS:
        if group.name in options.only:
            results.append(run_group(group, limit_s=group.limit_s))
            print(table_row(results[-1]), flush=True)
    append_table(options.results, table(results))
    return 0 if all(result.is_clean for result in results) else 1


def run_group(group: Group, *, limit_s: float) -> GroupResult:
    """Run one group in a pytest process; a group past its limit is killed and counts as failed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="forge-soak-") as name:
        report = Path(name) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow", "-p", "no:cacheprovider", "--timeout=1500"]
        try:
            command += [f"--junit-xml={report}", *group.tests]
            environment = {"FORGE_FUZZ_SECONDS": str(_FUZZ_S)} | os.environ
            done = subprocess.run(command, env=environment, check=False, timeout=limit_s)
            problem = None if done.returncode in (0, 1) else f"pytest ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit_s:.0f} s"
        return read_report(report, group=group, problem=problem, seconds=time.monotonic() - began)


def read_report(report: Path, *, group: Group, problem: str | None, seconds: float) -> GroupResult:
    """Count a JUnit file's cases; `problem` is an additional failure of the whole group."""
    outcomes: Counter[str] = Counter()
    failed = [] if problem is None else [problem]
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(str(case.get("name")))
        else:
            outcomes["skipped" if "skipped" in kinds else "passed"] += 1
    return GroupResult(
        group=group, passed=outcomes["passed"], failed=tuple(failed), skipped=outcomes["skipped"], seconds=seconds
    )


def table(results: Sequence[GroupResult]) -> str:
    """Today's table in Markdown, with the commit and the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    today = datetime.date.today().isoformat()
    rows = [table_row(result) for result in results]
    return "\n".join(
        [
            f"{today}, `make soak` at {commit.stdout.strip() or 'an unknown commit'}, {cpu_model()}:",
            "",
            "| group | passed | failed | skipped | minutes |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def table_row(result: GroupResult) -> str:
    """One group's line; failed tests are named."""
    failed = ", ".join(f"`{name}`" for name in result.failed) or "0"
    has_run = result.is_clean or result.failed
    passed = str(result.passed) if has_run else "0 (no slow test ran)"
    return f"| {result.group.name} | {passed} | {failed} | {result.skipped} | {result.seconds / 60:.1f} |"


def append_table(page: Path, text: str) -> None:
    """Insert the table below the heading `Soak runs`, newest first; add the heading if it is missing."""
    content = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    if HEADING not in content:
        content = f"{content.rstrip()}\n\n{HEADING}\n"
    before, after = content.split(HEADING, 1)
    page.write_text(f"{before}{HEADING}\n\n{text}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
