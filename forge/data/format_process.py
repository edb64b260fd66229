"""Prepare examples in a subprocess: with a format of the user's own, or with a chat template.

    python -P -m forge.data.format_process < request.json

User code may import torch, print, or end its process, and a chat template may take memory and time without end; the
client that prepares the data must do none of these. What user code prints goes to stderr. The answers on stdout are
lines of JSON: the progress, then the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge.config.data import DataSpec
from forge.data.cache_index import CacheIndex, read_index, write_index
from forge.data.prepare_examples import write_examples
from forge.data.sources.build import SampleSize
from forge.data.tokenizer import TextTokenizer
from forge.errors import DataError, UserCodeError
from forge.process import die_with_parent, ending, take_stdout
from forge.user_code import use_code

_ERRORS = {"DataError": DataError, "UserCodeError": UserCodeError}


def write_examples_in_process(
    spec: DataSpec,
    *,
    folder: Path,
    digest: str,
    tokenizer: TextTokenizer,
    code_digest: str | None,
    report: Callable[[int, int, int], None],
    sample: SampleSize | None = None,
) -> CacheIndex:
    """As `write_examples`.

    Args:
        code_digest: of the code that the format is in; None for a built-in one.

    Raises: DataError, UserCodeError, OSError.
    """
    request = {
        "parent": os.getpid(),
        "code": code_digest,
        "spec": spec.model_dump(mode="json"),
        "folder": str(folder),
        "digest": digest,
        "tokenizer": asdict(tokenizer),
        "sample": asdict(sample) if sample is not None else None,
    }
    command = [sys.executable, "-P", "-m", "forge.data.format_process"]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdin is not None and process.stdout is not None
    try:
        with process.stdin, process.stdout:
            _send(process.stdin.fileno(), json.dumps(request).encode())
            process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                if "progress" in answer:
                    report(*answer["progress"])
                elif "error" in answer:
                    raise _ERRORS[answer["error"]["class"]](answer["error"]["message"])
                elif "os_error" in answer:
                    raise OSError(*answer["os_error"])
                else:
                    return read_index(folder)
        code = process.wait()
        if code == -signal.SIGPROF:
            raise DataError("the chat template does not end: it computes for ever in one operation, for one record")
        raise DataError(f"data.format {spec.format} ended its process ({ending(code)}); see its output")
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Write the examples of one request and their index."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    answers = take_stdout()
    request = json.load(sys.stdin)
    die_with_parent(request["parent"])
    folder = Path(request["folder"])

    def answer(**content: Any) -> None:
        _send(answers.fileno(), json.dumps(content).encode() + b"\n")

    try:
        use_code(request["code"])
        index = write_examples(
            DataSpec.model_validate_json(json.dumps(request["spec"])),
            folder=folder,
            digest=request["digest"],
            tokenizer=TextTokenizer(**request["tokenizer"]),
            report=lambda *counts: answer(progress=counts),
            sample=SampleSize(**request["sample"]) if request["sample"] is not None else None,
        )
        write_index(folder, index=index)
    except (DataError, UserCodeError) as error:
        answer(error={"class": type(error).__name__, "message": str(error)})
    except OSError as error:
        answer(os_error=[error.errno, error.strerror or str(error), error.filename])
    else:
        answer(done=True)


def _send(handle: int, content: bytes) -> None:
    """Write all of it; nothing if the reader has ended."""
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(handle, rest) :]
    except BrokenPipeError:
        return


if __name__ == "__main__":
    main()
