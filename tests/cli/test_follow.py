from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge import api
from forge.cli.app import app
from forge.errors import ArgumentError
from forge.events import Event, RunFailed, RunFinished, SampleFailed, SampleGenerated
from forge.runtime import torch_subprocess
from tests.support.runs import make_run


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("DataError", "once that is fixed, try again: forge train --resume"),
        ("JobFileError", "once that is fixed, try again: forge train --resume"),
        ("UserCodeError", "once that is fixed, try again: forge train --resume"),
        ("DivergedError", "once that is fixed, try again: forge train --resume"),
        ("ClusterError", "\ntry again: forge train --resume"),
        ("RunError", "\ntry again: forge train --resume"),
    ],
)
def test_end_of_a_run__failure__says_whether_it_can_succeed_unchanged(
    tmp_path: Path, error: str, hint: str
) -> None:
    folder = make_run(tmp_path, endings=[RunFailed(error=error, message="the reason")])
    done = CliRunner().invoke(app, ["runs", "watch", str(folder)])
    assert hint in done.output


PROMPT = "User: what's 3 plus 3?"
SAMPLE = SampleGenerated(step=3, prompt=PROMPT, text="6")
NO_SAMPLE = SampleFailed(step=3, reason="the model generates no text")


@pytest.mark.parametrize(
    ("events", "hint"),
    [
        ([SAMPLE], f"try it: forge generate NAME --prompt {shlex.quote(PROMPT)}"),
        ([replace(SAMPLE, prompt="")], "try it: forge generate NAME"),
        ([replace(SAMPLE, prompt="a\x1b[2J")], "try it: forge generate NAME"),
        (
            [replace(SAMPLE, prompt=f"{PROMPT} → ")],
            f"try it: forge generate NAME --chat --prompt {shlex.quote(PROMPT)}",
        ),
        ([], "try it: forge generate NAME"),
        ([NO_SAMPLE], "export its weights: forge checkpoints export NAME --to NAME-weights"),
    ],
)
def test_end_of_a_run__finished__hint_fits_the_job(tmp_path: Path, events: list[Event], hint: str) -> None:
    folder = make_run(tmp_path, steps=6, endings=[*events, RunFinished(step=6)])
    done = CliRunner().invoke(app, ["runs", "watch", str(folder)])
    assert done.output.splitlines()[-1] == hint.replace("NAME", str(folder))


def test_generate__says_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"step": 3, "kind": "causal-lm", "name": "run", "has_chat_template": False, "answer_s": 2.0}
    answer |= {"answers": [{"text": "b", "finish_reason": "length"}]}
    monkeypatch.setattr(torch_subprocess, "_run", lambda *_, **__: dict(answer))
    folder = make_run(tmp_path)
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    done = CliRunner().invoke(app, ["generate", str(folder), "--prompt", "a"])
    assert done.stdout == "ab\n"
    lines = done.stderr.splitlines()
    assert lines[0] == f"importing torch and transformers, then loading the newest checkpoint of {folder.name}"
    assert lines[1].startswith("step 3: ")
    assert lines[1].endswith(" to load, 2s to answer")


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_ctrl_c__answers_so_far__message_says_that_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_subprocess, "answer_file", interrupted)
    monkeypatch.setattr(api, "evaluate", interrupted)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('"a"\n')
    options = {"generate": ["--input", str(tmp_path / "prompts.jsonl"), "-o", "answers.jsonl"], "eval": ["-t", "x"]}
    done = CliRunner().invoke(app, [command, str(tmp_path), *options[command]])
    assert done.exit_code == 130
    assert "what was answered is kept, and the same command goes on from there" in done.stderr


def test_generate__wrong_file_of_prompts_or_no_turn__refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for options, message in (
        (["--input", str(tmp_path / "none.jsonl"), "-o", "a.jsonl"], r"none\.jsonl does not exist; give a file"),
        (["--input", str(tmp_path), "-o", "a.jsonl"], r"is a folder; give a file of prompts"),
        (["-p", "a", "--workers", "2"], r"^--workers is for files of prompts"),
        (["-p", "a", "--logprobs", "2"], r"^--logprobs are printed by --output json"),
        (["--chat"], r"^--chat and --system need the user's turn"),
    ):
        done = CliRunner().invoke(app, ["generate", str(tmp_path), *options])
        assert isinstance(done.exception, ArgumentError)
        assert re.search(message, str(done.exception)) and "importing torch" not in done.stderr
