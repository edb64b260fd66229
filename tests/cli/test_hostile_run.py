"""A run folder that was made to do harm, opened with every command: nothing of it is executed, and nothing outside
of it is read, written or signalled."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from forge import api
from forge.cli.app import app
from forge.code_archive import ARCHIVE, TRUST, PackedCode, has_code, unpack_code
from forge.config.dump import dump_job
from forge.errors import ArgumentError, ForgeError
from forge.plan.inputs import CodeInfo
from forge.plan.plan import plan_from_json, plan_to_json
from forge.runs.create import reopen_run
from forge.runtime import torch_subprocess
from forge.runtime.torch_subprocess import answer_prompts
from tests.support import checkpoints
from tests.support.fuzz import watched
from tests.support.jobs import tiny_job, tiny_plan
from tests.support.runs import make_run

COMMANDS = (
    "runs list --runs ROOT", "runs list --runs ROOT -o json", "runs show RUN", "runs show RUN -o json",
    "runs logs RUN", "runs logs RUN --file ../../outside", "runs watch RUN", "runs stop RUN", "runs report RUN",
    "checkpoints list RUN", "checkpoints verify RUN", "generate RUN --prompt x", "train --resume RUN",
    "tune --resume RUN", "chaos kill RUN --rank 0", "chaos kill RUN --node 0", "chaos kill RUN --supervisor",
    "chaos hang RUN --rank 0", "chaos notice --node 0 RUN", "runs tag RUN a", "runs note RUN a",
    "runs list --all", "runs delete RUN --yes",
)  # fmt: skip
MODULES = ("torch", "transformers", "ray", "json", "random", "queue", "forge", "my_code", "conf", "sitecustomize")
SECRET = "the content of a private file"


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORGE_STATE", "FORGE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.delenv(TRUST, raising=False)
    (tmp_path / "outside.log").write_text(SECRET)
    (tmp_path / "outside.json").write_text(json.dumps({"private": SECRET}))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a valid checkpoint, full of modules that shadow others; the commands are given from inside it."""
    folder = make_run(tmp_path / "runs")
    checkpoints.write(str(folder / "checkpoints"), 4)
    (folder / "job.yaml").write_text(dump_job(tiny_job()))
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.chdir(folder)
    return folder


def _forge(command: str, run: Path) -> Result:
    """Run a command in this process. Raises: what is not an error with a message."""
    words = [{"RUN": str(run), "ROOT": str(run.parent)}.get(word, word) for word in command.split()]
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, (ForgeError, SystemExit)):
        raise done.exception
    return done


def _with_code(run: Path, tmp_path: Path) -> str:
    """Give the run code of its own, as if it had been packed elsewhere. Returns: its digest."""
    code = PackedCode(files={"my_code.py": f"open({str(tmp_path / 'executed')!r}, 'w')\n".encode()})
    (run / ARCHIVE).write_bytes(code.to_tar())
    job = tiny_job(code="./src")
    info = CodeInfo(digest=code.digest, num_files=1, size_bytes=code.size_bytes)
    (run / "plan.json").write_text(plan_to_json(replace(tiny_plan(), job=job, code=info)))
    (run / "job.yaml").write_text(dump_job(job))
    return code.digest


def _link_records(run: Path, tmp_path: Path) -> None:
    for name in ("events.jsonl", "metrics.jsonl", ".lock", "remote.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "outside.json")


def _link_plan(run: Path, tmp_path: Path) -> None:
    (run / "plan.json").rename(tmp_path / "plan.json")
    (run / "plan.json").symlink_to(tmp_path / "plan.json")


def _link_logs(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "logs")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rank-0.log").write_text(SECRET)
    (run / "logs").symlink_to(tmp_path / "elsewhere")


def _link_log(run: Path, tmp_path: Path) -> None:
    (run / "logs" / "rank-0.log").symlink_to(tmp_path / "outside.log")


def _link_results(run: Path, tmp_path: Path) -> None:
    for name in ("report.html", "best.yaml", "checkpoints-2", "wandb"):
        (run / name).symlink_to(tmp_path / "outside.log")


def _block(run: Path, tmp_path: Path) -> None:
    for name in ("events.jsonl", "metrics.jsonl", "remote.json", "logs/rank-0.log", ".lock", "job.yaml"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)


def _huge(run: Path, tmp_path: Path) -> None:
    for name in ("events.jsonl", "metrics.jsonl", "logs/rank-0.log"):
        with (run / name).open("ab") as file:
            file.truncate(2**42)


def _loader_arguments(run: Path, tmp_path: Path) -> None:
    (run / "hf").mkdir()
    (run / "hf" / "conf.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    auto_map = {"AutoConfig": "conf.Config", "AutoModelForCausalLM": "conf.Model"}
    (run / "hf" / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": auto_map}))
    plan = json.loads((run / "plan.json").read_text())
    plan["job"]["model"] = {"from_pretrained": str(run / "hf"), "trust_remote_code": True}
    (run / "plan.json").write_text(json.dumps(plan))


def _own_code(run: Path, tmp_path: Path) -> None:
    _with_code(run, tmp_path)


def _changed_job(run: Path, tmp_path: Path) -> None:
    """The job file names a code folder inside the run folder, which its plan does not know."""
    (run / "src").mkdir()
    (run / "src" / "my_code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    job = tiny_job(code=str(run / "src"), training__objective="my_code:Objective")
    (run / "job.yaml").write_text(dump_job(job))


ATTACKS: tuple[Callable[[Path, Path], None], ...] = (
    _link_records, _link_plan, _link_logs, _link_log, _link_results, _block, _huge, _loader_arguments, _own_code,
    _changed_job,
)  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_every_command__hostile_run_folder__executes_and_touches_nothing(
    tmp_path: Path, run: Path, attack: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes all checks would start a process, which is not done here: see the tests below."""

    def would_start(*_: Any, **__: Any) -> None:
        raise ArgumentError("a process would be started")

    monkeypatch.setattr(torch_subprocess, "_run", would_start)
    monkeypatch.setattr(api, "start", would_start)
    attack(run, tmp_path)
    before = _state_of(tmp_path, without=run)
    for command in COMMANDS:
        with watched(run):
            done = _forge(command, run)
        assert SECRET not in done.output, command
    assert not (tmp_path / "executed").exists()
    assert _state_of(tmp_path, without=run) == before


@pytest.mark.parametrize("attack", [_link_results, _link_log, _link_logs], ids=lambda attack: attack.__name__)
def test_resume__links_that_lead_out__is_refused(
    tmp_path: Path, run: Path, attack: Callable[[Path, Path], None]
) -> None:
    attack(run, tmp_path)
    with pytest.raises(ArgumentError, match="is a link that leads out of the folder"):
        reopen_run(run, plan_from_json((run / "plan.json").read_text()))


def test_resume__links_that_wandb_leaves__is_fine(tmp_path: Path, run: Path) -> None:
    logs = run / "wandb" / "offline-run-20261128_120523-tiny" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "cache" / "core-debug.log")
    (run / "wandb" / "latest-run").symlink_to(logs.parent.name)
    reopen_run(run, plan_from_json((run / "plan.json").read_text()))
    (logs / "debug.log").symlink_to(tmp_path / "cache" / "core-debug.log")
    with pytest.raises(ArgumentError, match=r"debug\.log is a link that leads out of the folder"):
        reopen_run(run, plan_from_json((run / "plan.json").read_text()))


def test_generate__code_of_the_run__only_if_it_is_known_or_named(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = _with_code(run, tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(torch_subprocess, "_run", lambda module, *_, **__: asked.append(module) or {})
    with pytest.raises(ForgeError, match=f"brings code of its own, .* run the command again with {TRUST}={digest}"):
        answer_prompts({"source": str(run)}, ["x"])
    assert not has_code(digest)
    monkeypatch.setenv(TRUST, "0" * 32)
    with pytest.raises(ForgeError, match="brings code of its own"):
        answer_prompts({"source": str(run)}, ["x"])
    assert asked == []
    monkeypatch.setenv(TRUST, digest)
    answer_prompts({"source": str(run)}, ["x"])
    monkeypatch.delenv(TRUST)
    unpack_code(PackedCode(files={"my_code.py": f"open({str(tmp_path / 'executed')!r}, 'w')\n".encode()}))
    answer_prompts({"source": str(run)}, ["x"])
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("attack", "problem"),
    [(_own_code, "brings code of its own"), (_changed_job, "and the plan of the run has none"),
     (_loader_arguments, "trust_remote_code"), (_block, "cannot be read"),
     (_link_plan, "it is a link"), (_huge, "cannot be read")],
)  # fmt: skip
def test_resume__hostile_run_folder__is_refused_before_anything_starts(
    tmp_path: Path, run: Path, attack: Callable[[Path, Path], None], problem: str
) -> None:
    attack(run, tmp_path)
    with watched(run):
        done = _forge("train --resume RUN", run)
    assert isinstance(done.exception, ForgeError)
    assert problem in str(done.exception)


def test_runs_list__one_bad_folder__is_named_and_the_others_are_listed(tmp_path: Path, run: Path) -> None:
    bad = make_run(tmp_path / "runs", "bad-0101-000000-abcd")
    (bad / "plan.json").write_text("[" * 100_000)
    for command in ("runs list --runs ROOT", "runs list --runs ROOT -o json"):
        done = _forge(command, run)
        assert done.exit_code == 0
        assert run.name in done.stdout and bad.name not in done.stdout
        assert re.search("bad-0101-000000-abcd was skipped: the plan of .* cannot be read: not a plan", done.stderr)


def _state_of(root: Path, *, without: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, locks and caches of Python left out."""
    index = {root / "FORGE_STATE" / name for name in ("runs.json", "runs.lock")}  # a command notes what it opened
    found = [path for path in root.rglob("*") if path not in index and path.is_file()]
    paths = [path for path in found if not path.is_relative_to(without)]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("name", ["a" * 300, "/a" * 3000, "é" * 200])
@pytest.mark.parametrize("command", ["checkpoints list NAME", "checkpoints export NAME --to out", "runs show NAME"])
def test_every_command__name_longer_than_any_path__is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = _forge(command.replace("NAME", name), tmp_path)
    assert isinstance(done.exception, ForgeError)


@pytest.mark.parametrize("key", ["code", "data.dataset", "model.from_pretrained", "model.init_from"])
def test_plan__path_longer_than_any__is_an_error_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.txt").write_text("words\n" * 200)
    body = {
        "name": "long", "model": {"architecture": "llama"}, "data": {"files": "a.txt", "seq_len": 8},
        "training": {"total_steps": 1, "global_batch_size": 1, "optimizer": {"lr": 1e-3}},
    }  # fmt: skip
    section, _, name = key.rpartition(".")
    part: dict[str, Any] = {name: "a" * 300}
    if section == "data.tokenizer":
        part = {"files": "a.txt", "tokenizer": part}
    body |= part if not section else {section.partition(".")[0]: part}
    (tmp_path / "job.yaml").write_text(json.dumps(body))
    with pytest.raises(ForgeError, match=r"a{50}"):
        api.plan_job(api.load_job(tmp_path / "job.yaml"))
