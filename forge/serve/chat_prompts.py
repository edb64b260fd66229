"""Token ids of conversations, made in a process of its own: a chat template of a foreign folder is foreign code.

    python -m forge.serve.chat_prompts < (tokenizer and template, then one conversation per line) > (ids per line)

The template runs in transformers' sandbox, with limits of time and memory, which a process can only set for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from forge.data.chat_encoder import ChatEncoder
from forge.data.chat_template import MAX_RENDER_S, CallFormError, ChatTemplate
from forge.data.conversations import Conversation
from forge.data.tokenizer import TextTokenizer
from forge.environment import child_environment
from forge.process import one_line, take_stdout
from forge.units import counted

_PATIENCE_S = MAX_RENDER_S + 25.0
_MAX_TOKENS = 1 << 24
"""The model's own limit is checked by its engine."""


class LongChatError(ValueError):
    """A conversation has more tokens than are wanted."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the conversation has {counted(num_tokens, 'token')}")
        self.num_tokens = num_tokens


class ChatPrompts:
    """Encodes conversations, one at a time; usable from any thread and event loop.

    Args:
        max_tokens: the ids of a longer conversation, which may take 100 MB, stay in the process.
    """

    def __init__(self, tokenizer: TextTokenizer, *, template: ChatTemplate, max_tokens: int | None = None) -> None:
        setup = {
            "tokenizer": asdict(tokenizer),
            "template": asdict(template),
            "max_tokens": max_tokens or _MAX_TOKENS,
        }
        self._setup = json.dumps(setup)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    async def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]],
        call: str | None = None,
    ) -> list[int]:
        """Return the ids of a conversation and of what asks for the next turn of the assistant.

        Args:
            call: the function that it has to call; the ids end with what begins the call.

        Raises: ValueError if the template refuses the conversation, or takes too long for it; LongChatError;
            CallFormError if the template writes calls in a form that is not read.
        """
        line = json.dumps({"messages": list(messages), "tools": list(tools), "call": call})
        answer = await asyncio.to_thread(self._ask, line)
        if "call_error" in answer:
            raise CallFormError(answer["call_error"])
        if "error" in answer:
            raise ValueError(answer["error"])
        if "num_tokens" in answer:
            raise LongChatError(answer["num_tokens"])
        ids: list[int] = answer["ids"]
        return ids

    def start(self) -> None:
        """Start the process if it does not run."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the process; the next conversation starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # closes its pipes
                pass

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "forge.serve.chat_prompts"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=child_environment() | {"TRANSFORMERS_VERBOSITY": "error"},
            )
            _write(self._process, self._setup)
        return self._process

    def _ask(self, line: str) -> dict[str, Any]:
        with self._lock:
            process = self._running()
            timer = threading.Timer(_PATIENCE_S, process.kill)
            timer.start()
            try:
                _write(process, line)
                assert process.stdout is not None, "it is a pipe"
                written = process.stdout.readline()
            finally:
                timer.cancel()
        if not written:
            raise ValueError("the chat template ended its process, or takes too long")
        answer: dict[str, Any] = json.loads(written)
        return answer


def _write(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None, "it is a pipe"
    with contextlib.suppress(OSError):  # said by the answer that does not come
        process.stdin.write(line + "\n")
        process.stdin.flush()


def main() -> None:
    """Answer every conversation with its ids, or with the reason why it has none, until stdin is closed."""
    stdout = take_stdout()
    setup = json.loads(sys.stdin.readline())
    template = setup["template"] | {"special_tokens": tuple(setup["template"]["special_tokens"])}
    encoder = ChatEncoder(
        TextTokenizer(**setup["tokenizer"]), seq_len=_MAX_TOKENS, template=ChatTemplate(**template)
    )
    for line in sys.stdin:
        given = json.loads(line)
        try:
            found = Conversation(messages=tuple(given["messages"]), tools=tuple(given["tools"]))
            ids = encoder.prompt(found, call=given["call"])
            answer: dict[str, Any] = {"ids": ids} if len(ids) <= setup["max_tokens"] else {"num_tokens": len(ids)}
        except CallFormError as error:
            answer = {"call_error": str(error)}
        except ValueError as error:
            answer = {"error": one_line(error)}
        stdout.write(json.dumps(answer) + "\n")
        stdout.flush()


if __name__ == "__main__":
    main()
