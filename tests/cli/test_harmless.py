"""No text from a run folder, a cluster, a model or an argument can control the terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from forge.cli import display
from forge.cli.app import app
from forge.cli.progress import ClusterScreen
from forge.cli.run_screen import TrainScreen
from forge.cli.trials_screen import TuneScreen
from forge.cluster.base import ClusterStatus, NodeProgress
from forge.errors import ForgeError
from forge.events import (
    AlertNotSent,
    CheckpointSkipped,
    Event,
    MembershipChangeStarted,
    RunFailed,
    RunStarted,
    RunStopped,
    SampleGenerated,
    TrackingDegraded,
    TrialEnded,
    TrialSuggested,
    event_to_record,
)
from tests.support.checkpoints import write
from tests.support.jobs import tiny_plan
from tests.support.runs import make_run
from tests.support.searches import SearchHistory
from tests.support.tuning import search_plan

POISON = (
    "\x1b]0;owned\x07\x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b31m\x9d0;x\x9c\x07\b\r\x7f\u202egnp.exe\u2066\u200f\u2028\x85"
)
NAME = "evil\x1b]52;c;AAAA\x07\x1b[2J\u202etxt"


def is_harmless(text: str) -> bool:
    """Whether a terminal shows the text as characters only."""
    return not any(
        unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\n\t\u200c\u200d"
        for character in text
    )


def printed_by(*arguments: str) -> str:
    """What a command prints, with the message of a ForgeError as `main` prints it."""
    done = CliRunner().invoke(app, arguments)
    text = done.output
    if isinstance(done.exception, ForgeError):
        shown = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(display, "ERR", display.HarmlessConsole(file=shown, width=200))
            display.error(str(done.exception))
        text += shown.getvalue()
    elif done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return text


class TestHarmless:
    def test_harmless__control_characters__are_replaced(self) -> None:
        assert is_harmless(display.harmless(POISON))
        assert "owned" in display.harmless(POISON)

    def test_harmless__every_code_point_of_a_terminal_s_grammar__is_replaced(self) -> None:
        controls = [chr(code) for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\n\t"]
        assert {display.harmless(character) for character in controls} == {"\N{REPLACEMENT CHARACTER}"}
        assert {display.harmless(chr(code)) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))} == {
            "\N{REPLACEMENT CHARACTER}"
        }

    @pytest.mark.parametrize(
        "text", ["déjà vu\u00a0!", "日本語\u3000", "a\tb\nc", "👩\u200d💻", "می\u200cروم", "e\u0301"]
    )
    def test_harmless__text_of_any_language__is_kept(self, text: str) -> None:
        assert display.harmless(text) == text

    def test_harmless__windows_line_ends__become_newlines(self) -> None:
        assert display.harmless("a\r\nb\r\n") == "a\nb\n"


class TestPrinting:
    @pytest.mark.parametrize("is_terminal", [True, False])
    def test_display__every_function__prints_harmless_text(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
    ) -> None:
        sent = io.StringIO()
        console = display.HarmlessConsole(
            file=sent, force_terminal=is_terminal, color_system=None, width=100, highlight=False
        )
        monkeypatch.setattr(display, "OUT", console)
        monkeypatch.setattr(display, "ERR", console)
        display.message(POISON, console=console)
        display.warning(POISON, console=console)
        display.error(POISON)
        display.next_command(POISON, purpose=POISON)
        display.heading(POISON, POISON)
        display.facts([(POISON, POISON)], console=console)
        display.table([POISON, f"#{POISON}"], [[POISON, POISON]], console=console)
        console.print(Text(POISON))
        display.print_text(POISON)
        display.print_json({POISON: POISON})
        assert is_harmless(sent.getvalue().replace("\r", ""))
        assert is_harmless(capsys.readouterr().out)
        assert sent.getvalue().count("gnp.exe") >= 10

    def test_table__cell_with_a_newline__stays_one_row(self) -> None:
        sent = io.StringIO()
        console = display.HarmlessConsole(file=sent, width=100)
        display.table(["run", "status"], [["a\nb  finished", "failed"]], console=console)
        assert len(sent.getvalue().splitlines()) == 2

    def test_error__value_of_a_secret__is_hidden(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("MINIO_SECRET_KEY", "hunter2/hunter2")
        sent = io.StringIO()
        monkeypatch.setattr(display, "ERR", display.HarmlessConsole(file=sent, width=200))
        display.error("PUT https://x/?key=hunter2%2Fhunter2 failed for hunter2/hunter2")
        assert "hunter2" not in sent.getvalue()
        assert sent.getvalue().count("***") == 2


class TestScreens:
    @pytest.mark.parametrize("width", [None, 80])
    def test_live_screens__poisoned_records__draw_harmless_text(self, width: int | None) -> None:
        events: list[Event] = [
            RunStarted(run_id=NAME, total_steps=6, resumed_from_step=0),
            MembershipChangeStarted(cause="loss", reason=POISON, generation=1, seconds_since_cause=0.0),
            TrackingDegraded(reason=POISON),
            AlertNotSent(receiver=POISON, kind=POISON, text=POISON, count=1, until=0.0, reason=POISON),
            CheckpointSkipped(folder=POISON, reason=POISON),
            TrialSuggested(trial=1, values={"data.files": POISON}),
            TrialEnded(trial=1, status="failed", step=0, value=None, reason=POISON),
        ]
        for make in (TrainScreen, TuneScreen):
            sent = io.StringIO()
            console = Console(
                file=sent, force_terminal=width is not None, width=width, height=24, color_system=None
            )
            plan = tiny_plan() if make is TrainScreen else search_plan(max_trials=3)
            with make(plan, console=console) as screen:  # type: ignore[operator]
                for event in events:
                    screen.phase(POISON)
                    screen.show({"time": 1.0} | event_to_record(event))
                    screen.show(None)
            own_codes = re.compile(r"\x1b\[\??[0-9;]*[A-Zhl]|\r")
            assert is_harmless(own_codes.sub("", sent.getvalue())), repr(sent.getvalue())
            assert "gnp.exe" in sent.getvalue()
            assert "\x1b[2J" not in sent.getvalue()

    @pytest.mark.parametrize("is_terminal", [True, False])
    def test_cluster_screen__words_of_other_machines__are_harmless(
        self, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
    ) -> None:
        sent = io.StringIO()
        console = display.HarmlessConsole(file=sent, force_terminal=is_terminal, color_system=None, width=200)
        monkeypatch.setattr(display, "ERR", console)
        with ClusterScreen() as screen:
            screen.show(NodeProgress(name=NAME, message=POISON, is_failure=True))
        assert is_harmless(re.sub(r"\x1b\[\??[0-9;]*[A-Zhl]|\r", "", sent.getvalue()))
        assert "gnp.exe" in sent.getvalue()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A failed run whose name, messages, logs and checkpoints control a terminal."""
    monkeypatch.chdir(tmp_path)
    endings = [
        MembershipChangeStarted(cause="loss", reason=POISON, generation=1, seconds_since_cause=0.0),
        SampleGenerated(step=3, prompt=POISON, text=POISON),
        RunStopped(step=3, reason=POISON),
        RunFailed(error="RunError", message=POISON),
    ]
    folder = make_run(tmp_path / "runs", NAME, endings=endings)
    (folder / "logs" / "rank-0.log").write_text(f"{POISON}\n")
    (folder / "logs" / f"{NAME}.log").write_text("x")
    write(str(folder / "checkpoints"), 10)
    broken = folder / "checkpoints" / "step-00000010" / "manifest.json"
    body = json.loads(broken.read_text())
    broken.write_text(json.dumps(body | {"format_version": POISON}))
    return folder


_COMMANDS = [
    ("runs", "list"),
    ("runs", "show", "RUN"),
    ("runs", "logs", "RUN"),
    ("runs", "logs", "RUN", "--file", POISON.replace("\x00", "")),
    ("runs", "watch", "RUN"),
    ("runs", "stop", "RUN"),
    ("runs", "report", "RUN"),
    ("runs", "show", POISON),
    ("checkpoints", "list", "RUN"),
    ("checkpoints", "verify", "RUN"),
    ("checkpoints", "list", POISON),
    ("generate", POISON),
    ("train", "--resume", "RUN"),
    ("train", POISON),
    ("plan", POISON),
    ("plan", "job.yaml", "--set", f"{POISON}={POISON}"),
    ("cluster", "status", POISON),
    ("cluster", "up", POISON),
    ("cluster", "drain", POISON, POISON),
    ("chaos", "kill", "RUN", "--rank", "0"),
    ("chaos", "replay", POISON, "--job", POISON),
    # Typer's own usage errors.
    (POISON,),
    ("runs", POISON),
    ("runs", "list", f"--{POISON}"),
    ("runs", "list", "-o", POISON),
    ("runs", "logs", "-n", POISON),
    ("checkpoints", "export", "--to", "x", "--shard-size", POISON),
    ("runs", "list", POISON),
]


@pytest.mark.parametrize("arguments", _COMMANDS, ids=lambda words: " ".join(words[:3]).replace(POISON, "POISON"))
def test_command__poisoned_names_and_messages__prints_harmless_text(run: Path, arguments: Sequence[str]) -> None:
    (run.parents[1] / "job.yaml").write_text("name: x\n")
    words = [str(run) if word == "RUN" else word for word in arguments]
    text = printed_by(*words)
    assert text.strip()
    assert is_harmless(text), repr(text)


def test_cluster_status__poisoned_nodes_and_runs__prints_harmless_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge.cli.cluster_table import show_cluster
    from forge.cluster.base import ClusterNode
    from forge.runs.nodes import RunNode

    sent = io.StringIO()
    console = display.HarmlessConsole(file=sent, width=200)
    monkeypatch.setattr(display, "OUT", console)
    monkeypatch.setattr(display, "ERR", console)
    node = ClusterNode(
        node_id=POISON, name=POISON, kind=POISON, state="alive", num_cpus=1.0, free_cpus=1.0, num_gpus=0.0
    )
    found = ClusterStatus(name="x", provider="ssh", address=POISON, nodes=(node,), runs=(POISON,), dashboard=POISON)
    show_cluster(found, runs={POISON: [RunNode(name=POISON, agent_pid=1, is_noticed=True)]})
    assert is_harmless(sent.getvalue())


def test_report__poisoned_names_and_values__html_is_escaped(tmp_path: Path) -> None:
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>" + NAME
    history = SearchHistory()
    history.record(RunStarted(run_id=attack, total_steps=6, resumed_from_step=0))
    history.run({"training.optimizer.lr": 1e-3}, [], status="failed", reason=attack)
    history.run({"training.optimizer.lr": 2e-3}, [2.0], status="finished", reason=attack)
    folder = history.write(tmp_path, search_plan(), name=NAME)
    from forge.report.search_record import write_results

    write_results(folder)
    text = (folder / "report.html").read_text()
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    ours = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)  # plotly.js
    assert "owned" not in ours and "evil" in ours
    assert is_harmless(ours), [character for character in ours if not is_harmless(character)]


def test_terminal__poisoned_run__gets_no_codes_but_ours(run: Path) -> None:
    """On a pseudo-terminal, with forge's own process."""
    for arguments in (["runs", "list"], ["runs", "show", str(run)], ["checkpoints", "verify", str(run)], [POISON]):
        leader, follower = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "forge.cli.app", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=follower,
            stderr=follower,
            env=environment,
            cwd=run.parents[1],
        )
        os.close(follower)
        content = _read_all(leader, process)
        colours = re.compile(rb"\x1b\[[0-9;]*m")
        text = colours.sub(b"", content).decode().replace("\r\n", "\n")
        assert "owned" in text or "evil" in text
        assert is_harmless(text), repr(text)


def _read_all(leader: int, process: subprocess.Popen[bytes]) -> bytes:
    content = b""
    while True:
        ready, _, _ = select.select([leader], [], [], 0.05)
        if ready:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the other end is closed
                chunk = b""
            if not chunk:
                break
            content += chunk
        elif process.poll() is not None:
            break
    process.wait()
    os.close(leader)
    return content
