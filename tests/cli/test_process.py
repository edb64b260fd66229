"""`forge` as a process: exit codes, one message on stderr, pipes, narrow terminals, what it imports."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forge.events import RunFailed, RunFinished
from tests.support.command import environment, forge, wait_for
from tests.support.runs import make_run

ESCAPE = "\x1b"


@pytest.fixture
def env(home: Path) -> dict[str, str]:
    return environment(home, FORGE_CACHE=os.environ["FORGE_CACHE"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "absent.yaml"], 2, r"absent.yaml: .*(no such file|does not exist)"),
        (["plan", "job.yaml", "--set", "training.total_stepz=1"], 2, r"total_stepz.*did you mean 'total_steps'"),
        (["plan", "job.yaml", "--set", "training.total_steps=many"], 2, r"total_steps"),
        (
            ["plan", "job.yaml", "--set", "resources.workers=9"],
            2,
            r"a global batch of 8 sequences cannot feed 9 workers",
        ),
        (["plan", "job.yaml", "--set", "data.seq_len=2.5"], 2, r"seq_len"),
        (["train", "job.yaml", "--set", "data.files=nothing/*.txt"], 2, r"nothing/\*\.txt"),
        (
            ["train", "job.yaml", "--set", "checkpoint.to=job.yaml/runs"],
            2,
            r"cannot write the run .*Not a directory",
        ),
        (["train", "--resume", "nobody"], 2, r"no run 'nobody' under runs"),
        (["runs", "show", "nobody"], 2, r"no run 'nobody' under runs"),
        (["runs", "watch", "broken"], 4, r"a rank died"),
        (["runs", "watch", "ended"], 4, r"died without recording why"),
        (["generate", "broken"], 2, r"broken has no checkpoint in"),
        (["cluster", "up", "--port", "99999"], 2, r"'--port': .* 65535"),
        (["nonsense"], 2, r"No such command 'nonsense'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors__wrong_input__one_message_and_exit_code(
    home: Path, env: dict[str, str], arguments: list[str], code: int, message: str
) -> None:
    make_run(home / "runs", "broken", steps=0, endings=[RunFailed(error="RunError", message="a rank died")])
    make_run(home / "runs", "ended")
    (home / "runs" / "ended" / "plan.json").touch()
    done = forge(*arguments, cwd=home, env=env)
    assert done.returncode == code
    assert re.search(message, done.stderr, re.IGNORECASE), done.stderr
    assert len(re.findall(r"^error:|^Error:", done.stderr, re.MULTILINE | re.IGNORECASE)) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert sorted(path.name for path in home.iterdir() if path.name != "state") == ["corpus", "job.yaml", "runs"]
    assert sorted(path.name for path in (home / "runs").iterdir()) == ["broken", "ended"]


@pytest.mark.parametrize(
    "arguments", [["runs", "list"], ["runs", "show", "done"], ["plan", "job.yaml"], ["cluster", "status"]]
)
def test_output__pipe__no_escape_codes(home: Path, env: dict[str, str], arguments: list[str]) -> None:
    make_run(home / "runs", "done", endings=[RunFinished(step=3)])
    done = forge(*arguments, cwd=home, env=env)
    assert done.returncode == 0
    assert ESCAPE not in done.stdout + done.stderr


def on_terminal(arguments: list[str], *, cwd: Path, env: dict[str, str], columns: int = 80) -> tuple[int, str]:
    """Run forge on a terminal of that width. Returns: exit code, and what the terminal was sent."""
    ours, theirs = pty.openpty()
    env = env | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "10"}
    process = subprocess.Popen(
        [sys.executable, "-m", "forge.cli.app", *arguments], cwd=cwd, env=env,
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    sent = read_to_the_end(ours)
    return process.wait(), sent.decode()


def read_to_the_end(terminal: int) -> bytes:
    sent = b""
    while True:
        try:
            sent += os.read(terminal, 4096)
        except OSError:  # the last writer has closed it
            os.close(terminal)
            return sent


def test_output__terminal__colours_unless_no_color(home: Path, env: dict[str, str]) -> None:
    make_run(home / "runs", "broken", endings=[RunFailed(error="RunError", message="a rank died")])
    code, coloured = on_terminal(["runs", "watch", "broken"], cwd=home, env=env)
    assert code == 4
    assert f"{ESCAPE}[1;31merror:" in coloured
    _, plain = on_terminal(["runs", "watch", "broken"], cwd=home, env=env | {"NO_COLOR": "1"})
    assert not re.search(ESCAPE + r"\[[0-9;]*3[0-9]", plain)
    assert "error:" in plain


@pytest.mark.parametrize("columns", [40, 1])
@pytest.mark.parametrize("words", ["runs list", "runs show done", "plan job.yaml", "doctor"])
def test_output__narrow_terminal__does_not_fail(home: Path, env: dict[str, str], words: str, columns: int) -> None:
    make_run(home / "runs", "done", steps=50, endings=[RunFinished(step=50)])
    code, sent = on_terminal(words.split(), cwd=home, env=env, columns=columns)
    assert code == 0
    assert "Traceback" not in sent


@pytest.mark.parametrize("num_runs", [3, 300])
def test_output__reader_closes_the_pipe__no_traceback(home: Path, env: dict[str, str], num_runs: int) -> None:
    plan = (make_run(home / "runs", "first") / "plan.json").read_text()
    for number in range(1, num_runs):
        folder = home / "runs" / f"run-{number:03}-with-a-name-that-is-long-enough-to-fill-the-buffer-of-a-pipe"
        folder.mkdir()
        (folder / "plan.json").write_text(plan)
    line = f"{sys.executable} -m forge.cli.app runs list -o json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=home, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "["
    assert done.stdout.splitlines()[1] in ("0", "141")
    assert done.stderr == ""


def test_output__closed_pipe__exits_141(home: Path, env: dict[str, str]) -> None:
    make_run(home / "runs", "done")
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "forge.cli.app", "runs", "list"],
        cwd=home, env=env, stdout=writer, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writer)
    assert process.returncode == 141
    assert b"Traceback" not in process.stderr
    assert b"BrokenPipe" not in process.stderr


def test_train__sigterm__ends_the_command_and_leaves_the_run(home: Path, env: dict[str, str]) -> None:
    folder = make_run(home / "runs", "busy", steps=5)
    follow = (
        "import os, sys; from pathlib import Path; from forge.cli.follow import follow_run, past_of; "
        "from forge.runs.reader import read_plan; from forge.runtime.driver_process import LocalRun; "
        "folder = Path(sys.argv[1]); run = LocalRun(folder=folder, pid=os.getppid()); "
        "follow_run(run, read_plan(folder), past=past_of(folder))"
    )
    with holding_lock(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", follow, str(folder)], cwd=home, env=env, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        wait_for(lambda: handles_sigterm(process.pid))
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "the run continues" in said and f"forge runs watch {folder}" in said


def handles_sigterm(pid: int) -> bool:
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_watch__signal__leaves_the_run_and_restores_the_terminal(
    home: Path, env: dict[str, str], number: int, code: int
) -> None:
    folder = make_run(home / "runs", "busy", steps=5)
    with holding_lock(folder):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "forge.cli.app", "runs", "watch", "busy"],
            cwd=home, env=env | {"TERM": "xterm-256color", "COLUMNS": "40", "LINES": "10"},
            stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        sent = b""
        while b"starting" not in sent:
            sent += os.read(ours, 4096)
        process.send_signal(number)
        sent += read_to_the_end(ours)
        assert process.wait() == code
    assert b"Traceback" not in sent
    hidden, shown = sent.rfind(b"\x1b[?25l"), sent.rfind(b"\x1b[?25h")
    assert 0 <= hidden < shown


@contextmanager
def holding_lock(folder: Path) -> Iterator[None]:
    """Hold a run's lock in a process that leads its own session, as a run's driver does."""
    code = (
        "import fcntl, os, sys, time\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.write(str(os.getpid())); lock.flush()\n"
        "print(flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-P", "-c", code, str(folder / ".lock")]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert driver.stdout is not None
        driver.stdout.readline()
        yield
    finally:
        driver.kill()
        driver.wait()


def modules_after(code: str, *, cwd: Path, env: dict[str, str]) -> set[str]:
    """What a fresh interpreter has imported once it has run `code`."""
    script = f"import sys\n{code}\nsys.stderr.write('MODULES ' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True, check=True
    )
    return set(done.stderr.rpartition("MODULES ")[2].split())


HEAVY = {"torch", "deepspeed", "transformers"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import forge; assert forge.__all__", HEAVY | {"ray", "rich", "pydantic", "typer", "yaml"}),
        ("import forge.cli.app", HEAVY | {"ray", "rich", "pydantic", "yaml"}),
        ("run('--help')", HEAVY | {"ray", "rich", "pydantic", "yaml"}),
        ("run('runs', 'list')", HEAVY | {"ray"}),
        ("run('runs', 'show', 'done')", HEAVY | {"ray"}),
        ("run('plan', 'job.yaml')", HEAVY | {"ray"}),
        ("run('schema', 'job')", HEAVY | {"ray"}),
        ("run('cluster', 'status')", HEAVY | {"ray"}),
        ("run('doctor')", HEAVY | {"ray"}),
        (
            "import forge; forge.train_job, forge.tune_job, forge.plan_job('job.yaml')",
            HEAVY | {"ray", "rich", "typer"},
        ),
    ],
)
def test_imports__client__nothing_heavy(home: Path, env: dict[str, str], code: str, absent: set[str]) -> None:
    make_run(home / "runs", "done", endings=[RunFinished(step=3)])
    run = "def run(*words):\n import forge.cli.app\n forge.cli.app.app(list(words), standalone_mode=False)\n"
    assert not modules_after(run + code, cwd=home, env=env) & absent


def test_forge__unknown_name__attribute_error() -> None:
    import forge

    assert set(forge.__all__) <= set(dir(forge))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        forge.nonsense  # noqa: B018


def test_train__ctrl_c_during_preparation__exits_130(home: Path, env: dict[str, str]) -> None:
    for number in range(400):
        (home / "corpus" / f"more-{number}.txt").write_text(f"word{number} " * 20_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "forge.cli.app", "train", "job.yaml"],
        cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert next(lines) == "looking at the corpus\n"
    assert any(line == "reading the corpus\n" for line in lines)
    assert wait_for(lambda: process.stderr.readline().startswith("training the tokenizer"))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert not (home / "runs").exists()
