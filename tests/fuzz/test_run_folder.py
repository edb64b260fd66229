"""Mutated folders of runs and searches, opened with every command that reads one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.errors import ForgeError
from forge.events import (
    CheckpointSaved,
    CostUpdated,
    GenerationStarted,
    NodeJoined,
    RankLocation,
    RunFinished,
    SupervisorStarted,
    TrialEnded,
    TrialReported,
    TrialStarted,
    TrialSuggested,
)
from forge.plan.plan import plan_to_json
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from tests.support import checkpoints
from tests.support.fuzz import mutate_bytes, mutate_file, mutate_json_text, run_cases
from tests.support.runs import make_run, metrics
from tests.support.searches import search_plan

COMMANDS = (
    "runs list", "runs list -o json", "runs show RUN", "runs show RUN -o json", "runs logs RUN", "runs watch RUN",
    "runs stop RUN", "runs report RUN", "checkpoints list RUN", "checkpoints verify RUN",
    "checkpoints list RUN -o json", "chaos kill RUN --rank 0", "chaos kill RUN --node 0",
    "chaos kill RUN --supervisor", "chaos hang RUN --rank 0",
    "chaos notice RUN --node 0",
)  # fmt: skip


@pytest.fixture
def good(tmp_path: Path) -> list[Path]:
    """A run and a search, as forge writes them."""
    where = [RankLocation(rank=0, node="a" * 56, pid=1), RankLocation(rank=1, node="b" * 56, pid=0)]
    endings = [
        SupervisorStarted(pid=1),
        NodeJoined(node="a" * 56, host="10.0.0.1", num_slots=1, agent_pid=1),
        GenerationStarted(
            generation=1, world_size=2, device="cpu", peak_flops=1e9, peak_source="measured", seconds={"fork": 0.5},
            ranks=tuple(where),
        ),
        CheckpointSaved(step=4, folder="checkpoints/step-00000004", size_bytes=1, seconds=0.1, stall_s=0.0),
        CostUpdated(usd=1.0, usd_per_hour=2.0),
        RunFinished(step=6),
    ]  # fmt: skip
    run = make_run(tmp_path / "good", endings=endings)
    (run / "logs" / "rank-0.log").write_text("a line\n")
    (run / ".lock").write_text("1")
    write_remote_ref(run, RemoteRef(cluster="lab", folder=f"/x/{run.name}", job="j-1", events=3, steps=3))
    checkpoints.write(str(run / "checkpoints"), 4)
    record = {key: value for key, value in metrics(1).as_record().items() if value is not None}
    search = make_run(
        tmp_path / "good",
        "search-0101-000000-abcd",
        endings=[
            TrialSuggested(trial=1, values={"training.optimizer.lr": 0.001}),
            TrialStarted(trial=1, total_steps=6, seconds=1.0, is_warm=False),
            TrialReported(trial=1, step=1, value=2.0, metrics=record),
            TrialEnded(trial=1, status="finished", step=6, value=1.5),
        ],
    )
    (search / "plan.json").write_text(plan_to_json(search_plan()))
    make_run(search / "trials", "search-0101-000000-abcd-0001")
    return [run, search]


def test_run_folder__mutated__every_command_ends_in_a_clear_error_or_none(
    tmp_path: Path, good: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "cases").mkdir()
    (tmp_path / "outside").write_text("private")

    def make(folder: Path, rng: random.Random) -> None:
        source = rng.choice(good)
        run = folder / "runs" / source.name
        shutil.copytree(source, run)
        paths = [path for path in sorted(run.rglob("*")) if path.is_file() and "step-" not in str(path)]
        for _ in range(rng.choice([1, 1, 2])):
            likely = [path for path in paths if path.suffix in (".json", ".jsonl")]
            _mutate(rng.choice(rng.choice([likely, paths])), rng, outside=tmp_path / "outside")
        commands = rng.sample(COMMANDS, 4)
        (folder / "commands").write_text("\n".join(commands))

    (tmp_path / "first" / "runs").mkdir(parents=True)
    shutil.copytree(good[0], tmp_path / "first" / "runs" / good[0].name)
    (tmp_path / "first" / "commands").write_text("\n".join(COMMANDS))
    _check(tmp_path / "first")  # imports what the commands need, which counts for no case
    run_cases("run folder", make=make, check=_check, root=tmp_path / "cases")


def _check(folder: Path) -> None:
    """Run the commands of a case on its run."""
    for command in (folder / "commands").read_text().split("\n"):
        for run in (folder / "runs").iterdir():
            words = [str(run) if word == "RUN" else word for word in command.split()]
            done = CliRunner().invoke(app, [*words, *(["--runs", str(folder / "runs")])])
            if done.exception is not None and not isinstance(done.exception, (ForgeError, SystemExit)):
                raise done.exception
            if isinstance(done.exception, ForgeError):
                assert str(done.exception).strip(), command


def _mutate(path: Path, rng: random.Random, *, outside: Path) -> None:
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 2**20:
        return
    match rng.randrange(5):
        case 0:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        case 1:
            mutate_file(path, rng, outside=outside)
        case _ if path.suffix == ".jsonl":
            lines = path.read_bytes().split(b"\n")[:-1] or [b"{}"]
            for _ in range(rng.choice([1, 1, 3])):
                at = rng.randrange(len(lines))
                lines[at] = mutate_json_text(lines[at], rng)
            path.write_bytes(b"\n".join(lines) + b"\n")
        case _:
            path.write_bytes(mutate_json_text(path.read_bytes(), rng))
