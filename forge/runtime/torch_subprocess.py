"""Commands that need torch, run in a subprocess, so that the CLI never imports it: generation, export, and the
outputs of a reference model or a teacher that are stored with prepared data.

Request and answer are JSON; an error is answered with its class and message and raised again here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from forge.cluster.local.ray_cluster import find_local, require_private_token
from forge.cluster.local.ray_process import session_members
from forge.cluster.registry import find_cluster
from forge.code_archive import require_trusted
from forge.errors import RunError
from forge.process import ending
from forge.runs.reader import error_named, read_plan

_ANSWERS, _NO_ANSWER = "forge.runtime.answer_process", "the model cannot answer"

OnBytes = Callable[[int, int], None]
"""Called with the bytes, or whatever is counted, that are done and those in all."""
_STOP_S = 20.0
_WHY: dict[int, str] = {
    signal.SIGKILL: ", as the kernel does when memory is used up; give it more, or a smaller model",
    signal.SIGPROF: ": a template took more than 10 s of CPU time",
}
"""What the signal that ended a process most likely means."""


def answer_prompts(
    config: Mapping[str, Any], records: Sequence[Any], *, on_message: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Answer prompts with the model of a run or a folder.

    Args:
        config: the fields of `forge.inference.answer_request.AnswerConfig`.
        records: prompts as of `forge.inference.answer`.
        on_message: called with what the model does otherwise than documented.

    Returns: `answers`, `name`, `kind`, `step`, `digest`, `has_chat_template`, `answer_s`, and `load_s`: to import
        torch and load the model.
    Raises: CheckpointError if a run has no intact checkpoint; UserCodeError if it brings code that was never used
        on this machine; ArgumentError, DataError; RunError if the process failed.
    """
    _require_trusted(config)
    began = time.monotonic()
    request = {"config": dict(config), "records": list(records), "parent": os.getpid()}
    answer = _run(_ANSWERS, request=request, what=_NO_ANSWER, on_message=on_message)
    return answer | {"load_s": time.monotonic() - began - answer.get("answer_s", 0.0)}


def answer_file(
    config: Mapping[str, Any],
    *,
    source: Path,
    output: Path,
    num_workers: int | None = None,
    cluster: str | None = None,
    on_progress: OnBytes | None = None,
    on_message: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Answer all prompts of a JSONL file; started again after a stop, it computes what is missing.

    Args:
        output: a new JSONL file with an answer for each prompt, in order.
        num_workers: answer with so many workers of Ray; None: in one process, without Ray; with a cluster: as many
            as it has CPUs or GPUs.
        cluster: name or file of a cluster; None: this machine.
        on_progress: called with the prompts (on Ray the shards of prompts) that are answered and those in all.
        on_message: called when the model is loaded, with what happens to workers and the cluster, and with warnings
            about the model.

    Returns: `num_answers`, `num_reused` and `answer_s`.
    Raises: as `answer_prompts`.
    """
    _require_trusted(config)
    request: dict[str, Any] = {"config": dict(config), "input": str(source), "output": str(output)}
    if num_workers is not None or cluster is not None:
        local = find_local() if cluster is not None else None
        is_elsewhere = cluster is not None and not find_cluster(cluster).shares_files
        request |= {"num_workers": num_workers, "cluster": cluster if is_elsewhere else None}
        request["address"] = None if local is None or is_elsewhere else local.address
        return run_driver(
            "forge.evaluate.answer_map",
            request=request,
            what=_NO_ANSWER,
            on_progress=on_progress,
            on_message=on_message,
        )
    request["parent"] = os.getpid()
    return _run(_ANSWERS, request=request, what=_NO_ANSWER, on_progress=on_progress, on_message=on_message)


def _require_trusted(config: Mapping[str, Any]) -> None:
    folder = Path(config["source"])
    if (folder / "plan.json").is_file():
        plan = read_plan(folder)
        if plan.code is not None:
            require_trusted(plan.code.digest, run_folder=folder)


def export_weights(*, on_progress: OnBytes | None = None, **request: Any) -> dict[str, Any]:
    """Write a folder of weights; the other arguments are the fields of `forge.serve.export.ExportRequest`.

    Args:
        on_progress: called with the bytes that are written and those of all weights, twice a second at most.

    Returns: `folder`, `step`, `num_parameters`, `size_bytes`, `num_files`, `is_transformers`, `auto_class`.
    Raises: CheckpointError if there is no such checkpoint; ArgumentError if the folder cannot be written;
        RunError if the process failed.
    """
    what = "cannot export the weights"
    return _run("forge.serve.export", request=request, what=what, on_progress=on_progress)


def stored_outputs(*, on_progress: OnBytes | None = None, **request: Any) -> dict[str, Any]:
    """Compute what a model says about prepared data; arguments are the fields of `OutputsRequest`.

    Args:
        on_progress: called with the examples that are done and those in all, twice a second at most.

    Returns: `corpus`: `folder` and `digest` of the corpus with them; None as the request's `only_if_computed` says.
    Raises: DataError, CheckpointError, PlanError; RunError if the process failed.
    """
    what = f"cannot compute the outputs of the {'reference model' if request['top_k'] is None else 'teacher'}"
    request["parent"] = os.getpid()
    return _run("forge.train.stored_outputs", request=request, what=what, on_progress=on_progress)


def run_driver(
    module: str,
    *,
    request: dict[str, Any],
    what: str,
    on_progress: OnBytes | None = None,
    on_message: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Have a module that drives a shard map answer a request; Ctrl-C stops it and leaves what is done.

    Args:
        module: with `forge.runtime.shard_process.answer_request` as its main function.
        what: begins the message if the process fails: `cannot evaluate`.
        on_message: called with what happens meanwhile, such as a lost worker.

    Raises: the error that it reports; RunError if the process failed.
    """
    require_private_token()  # the driver imports Ray at once, which reads the mode then
    request["parent"] = os.getpid()
    return _run(module, request=request, what=what, on_progress=on_progress, on_message=on_message, is_driver=True)


def _run(
    module: str,
    *arguments: str,
    request: dict[str, Any],
    what: str,
    on_progress: OnBytes | None = None,
    on_message: Callable[[str], None] | None = None,
    is_driver: bool = False,
) -> dict[str, Any]:
    """Send a request to a module and return its answer, the last line of its stdout.

    Args:
        is_driver: it starts a session of its own, and is asked to stop if this process is interrupted.
    """
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", "-m", module, *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["start_new_session"] = is_driver
    last = ""
    with tempfile.TemporaryFile() as errors, subprocess.Popen(command, stderr=errors, env=quiet, **pipes) as child:
        assert child.stdin is not None and child.stdout is not None, "both are pipes"
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(json.dumps(request))
        try:
            for last in child.stdout:
                progress, message = _progress(last), _message(last)
                if progress is not None and on_progress is not None:
                    on_progress(*progress)
                if message is not None and on_message is not None:
                    on_message(message)
            code = child.wait()
        except BaseException:
            if is_driver:
                _stop(child)
            raise
        finally:
            if is_driver:
                _end_session(child.pid)
        errors.seek(0)
        stderr = errors.read().decode(errors="replace")
    try:
        answer = json.loads(last)
    except ValueError:
        answer = {}
    if "error" in answer:
        raise error_named(answer["error"]["class"], message=answer["error"]["message"])
    if "answer" not in answer:
        raise RunError(f"{what}: {_why_ended(code, stderr=stderr)}")
    found: dict[str, Any] = answer["answer"]
    return found


def _why_ended(code: int, *, stderr: str) -> str:
    """Why a process has ended without an answer: by a signal, or with its last words."""
    if code < 0:
        return f"its process was ended by {ending(code)}{_WHY.get(-code, '')}"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"its process ended with {ending(code)}"


def _stop(driver: subprocess.Popen[str]) -> None:
    """Ask a driver to stop; end it if it does not."""
    driver.terminate()
    try:
        driver.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        driver.kill()


def _end_session(leader: int) -> None:
    """End what a driver that was killed has left: Ray's own processes, which would retry for a minute."""
    for process in session_members(leader):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _message(line: str) -> str | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(line)["message"])
    return None


def _progress(line: str) -> tuple[int, int] | None:
    """The two numbers of a line of progress; None for other lines."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        done, total = json.loads(line)["progress"]
        return int(done), int(total)
    return None
