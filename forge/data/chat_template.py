"""A tokenizer's chat template: conversations as text, and which characters of it the assistant wrote.

transformers renders the template, in its sandbox. Where the template marks the assistant's turns itself
(`{% generation %}`), its marks count. Elsewhere a turn is what is added to the text that would ask for it
(`add_generation_prompt`), which includes the token that ends the turn: a model that never learns to end its turn
does not stop. A template that shows earlier turns differently once another follows (it drops their reasoning, say)
is rendered once for each turn, so that each is learnt as it is asked for.

Source: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
import re
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import psutil
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from forge.data.conversations import ASSISTANT, Conversation, Message
from forge.data.pairs import is_blank
from forge.data.tokenizer import TextTokenizer
from forge.data.tokenizer_files import TEMPLATE
from forge.errors import DataError
from forge.process import one_line

Turns = Literal["all", "last"] | int
"""Which turns of the assistant carry loss; a number: the last ones, so many."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ARGUMENT = "forge_argument"
_BEGUN_CALL = re.compile(r'\s*(?:<tool_call>\s*)?\{\s*"name":\s*"(?P<name>[^"]+)",\s*"(?:arguments|parameters)":')
"""The beginning of a call in the forms that `forge.serve.http.tool_calls` reads."""
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_TEXT_CHARS = 1 << 26
"""A conversation renders to less than a few times its own length; a template with a loop can write without end."""


_FAILURES = (TypeError, AttributeError, LookupError, ValueError, RecursionError, ArithmeticError, SyntaxError)
"""What a template can raise besides its own errors; a SyntaxError comes from code that Jinja makes of it."""
MAX_RENDER_S = 5.0
_MAX_CPU_S = 10.0
"""After which the kernel ends the process: a computation within one operation (3**10**9) ends at no alarm."""
_MAX_RENDER_BYTES = 2**30


class TemplateTooSlowError(Exception):
    """A template was stopped at its time limit."""


class CallFormError(ValueError):
    """A chat template writes calls of functions in a form that is not read."""


@contextmanager
def limited() -> Iterator[None]:
    """Limit the time and the memory of what a template does; only in the main thread, which receives the alarm.

    A template that does not end at the alarm ends the process, by SIGPROF.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TemplateTooSlowError

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = psutil.Process().memory_info().data + _MAX_RENDER_BYTES
    before, timer = signal.signal(signal.SIGALRM, stop), (0.0, 0.0)
    try:
        if soft == resource.RLIM_INFINITY or soft > most:
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
        timer = signal.setitimer(signal.ITIMER_REAL, MAX_RENDER_S)
        signal.setitimer(signal.ITIMER_PROF, _MAX_CPU_S)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedChat:
    """The text of a conversation, and which of it carries loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """[start, stop) in characters, in order: turns of the assistant, with the token that ends each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A template and the variables that it is rendered with."""

    source: str
    variables: Mapping[str, str]
    """The names of the special tokens, such as `bos_token`."""
    special_tokens: tuple[str, ...]

    @property
    def marks_turns(self) -> bool:
        """Whether the template says itself what the assistant wrote."""
        return _GENERATION.search(self.source) is not None

    def render(self, conversation: Conversation, *, turns: Turns) -> list[RenderedChat]:
        """Render a conversation: as one text, or one for each turn if earlier turns are shown differently then.

        Args:
            turns: which turns of the assistant carry loss; there must be as many as a number says.

        Raises: ValueError if the template refuses the conversation, or does not say where a turn ends.
        """
        try:
            with limited():
                return self._render(conversation, turns=turns)
        except (TemplateTooSlowError, MemoryError):
            raise ValueError(f"the chat template takes more than {MAX_RENDER_S:.0f} s or 1 GB for it") from None

    def render_prompt(self, conversation: Conversation) -> str:
        """Render a conversation with what asks for the assistant's next turn. Raises: ValueError as `render`."""
        try:
            with limited():
                return self._text(conversation, messages=conversation.messages, add_generation_prompt=True)
        except (TemplateTooSlowError, MemoryError):
            raise ValueError(f"the chat template takes more than {MAX_RENDER_S:.0f} s or 1 GB for it") from None

    def begun_call(self, conversation: Conversation, *, function: str) -> str:
        """What the assistant's next turn begins with if it calls a function, up to the call's arguments.

        The template renders a call with one known argument: what stands before the object of the arguments is how
        models that were trained with this template begin the call.

        Raises: ValueError as `render`; CallFormError if the template writes no call with the name before the
            arguments, as a JSON object alone or in `<tool_call>`.
        """
        asked = self.render_prompt(conversation)
        call = {"name": function, "arguments": {_ARGUMENT: 1}}
        message = {
            "role": ASSISTANT,
            "content": "",
            "tool_calls": [{"id": "call00000", "type": "function", "function": call}],
        }
        try:
            with limited():
                whole = self._text(conversation, messages=[*conversation.messages, message])
        except (TemplateTooSlowError, MemoryError):
            raise ValueError(f"the chat template takes more than {MAX_RENDER_S:.0f} s or 1 GB for it") from None
        turn = whole.removeprefix(asked)
        begun = turn[: turn.find(_ARGUMENT)].rpartition("{")[0].rstrip()
        found = _BEGUN_CALL.fullmatch(begun)
        if turn == whole or found is None or found["name"] != function:
            raise CallFormError(
                "the chat template writes no call of a function in a form that is read: <tool_call> with a JSON "
                "object, or the object alone, with the name before the arguments"
            )
        return begun

    def _render(self, conversation: Conversation, *, turns: Turns) -> list[RenderedChat]:
        messages = conversation.messages
        ends = [number for number, message in enumerate(messages, start=1) if message["role"] == ASSISTANT]
        if turns != "all":
            ends = ends[-(1 if turns == "last" else turns) :]
        whole = self._text(conversation, messages=messages)
        if self.marks_turns:
            return [self._marked(conversation, whole=whole, first=ends[0])]
        turns_shown = [self._turn(conversation, end=end) for end in ends]
        if all(whole.startswith(text[: span[1]]) for text, span in turns_shown):
            return [RenderedChat(text=whole, spans=tuple(span for _, span in turns_shown))]
        return [RenderedChat(text=text, spans=(span,)) for text, span in turns_shown]

    def _marked(self, conversation: Conversation, *, whole: str, first: int) -> RenderedChat:
        """Return what the template marks from a message on, the assistant's first that carries loss (from 1)."""
        found = self._rendered(conversation, messages=conversation.messages, return_assistant_tokens_mask=True)[1][
            0
        ]
        marks = [(start, stop) for start, stop in found if stop > start]
        if not marks:
            raise ValueError("the chat template marks nothing of the conversation as written by the assistant")
        following = [*(start for start, _ in marks[1:]), len(whole)]
        spans = [
            self._with_end(whole, mark=mark, until=until) for mark, until in zip(marks, following, strict=True)
        ]
        start = self._marks_from(conversation, whole=whole, first=first)
        spans = [span for span in spans if span[1] > start]
        if not spans:
            raise ValueError(f"the chat template marks nothing of message {first}, a turn of the assistant")
        return RenderedChat(text=whole, spans=tuple(spans))

    def _marks_from(self, conversation: Conversation, *, whole: str, first: int) -> int:
        """Return where the messages from one on begin in the text: a turn may be marked in several pieces.

        Raises: ValueError if the messages before it are shown differently.
        """
        before = conversation.messages[: first - 1]
        if not any(message["role"] == ASSISTANT for message in before):
            return 0
        asked, shown = self._asking(conversation, messages=before)
        shown = shown.rstrip()
        if whole.startswith(shown):
            return len(shown)
        start = _common_length(asked, whole)  # a template may end the whole text in a way of its own
        if start < len(shown):
            raise ValueError(
                f"the chat template shows the messages before message {first} differently once it is there, so "
                "what it marks of the turns from there on cannot be found"
            )
        return start

    def _ends(self, text: str) -> bool:
        """Whether a text ends with a special token, but for white space."""
        return text.rstrip().endswith(self.special_tokens)

    def _with_end(self, text: str, *, mark: tuple[int, int], until: int) -> tuple[int, int]:
        """Extend a marked text by the token that ends its turn, if the template has left that out.

        Args:
            until: where the next marked text begins, which may be of the same turn.

        Raises: ValueError if the turn ends, and not with a special token.
        """
        start, stop = mark
        if self._ends(text[start:stop]):
            return start, stop
        between = text[stop:until]
        end = len(between) - len(between.lstrip())
        last = next((name for name in self.special_tokens if between.startswith(name, end)), None)
        if last is not None:
            return start, stop + end + len(last)
        if until < len(text) and not any(name in between for name in self.special_tokens):
            return start, stop
        raise ValueError(
            "the chat template marks a turn of the assistant ({% generation %}) that no special token ends, so a "
            f"model would not learn to stop (what follows the mark: {between[:30]!r}); set data.chat.template to "
            "one that does"
        )

    def _turn(self, conversation: Conversation, *, end: int) -> tuple[str, tuple[int, int]]:
        """Render the first `end` messages, the last of which is the assistant's, and find that one in the text."""
        messages = conversation.messages
        shown = self._text(conversation, messages=messages[:end])
        asked, before = self._asking(conversation, messages=messages[: end - 1])
        start = _common_length(asked, shown)
        if start < len(before):
            raise ValueError(
                f"the chat template shows the messages before message {end} differently once it is there, so the "
                "text that asks for it cannot be found"
            )
        stop = len(shown.rstrip())
        last = next((name for name in self.special_tokens if shown.endswith(name, 0, stop)), None)
        if last is None:
            raise ValueError(
                "the chat template ends a turn of the assistant with no special token, so a model would not "
                f"learn to stop (it ends with {shown[max(0, stop - 30) : stop]!r}); set data.chat.template to one "
                "that does"
            )
        if is_blank(shown[start : stop - len(last)]):
            raise ValueError(f"the chat template shows nothing of message {end}, a turn of the assistant")
        return shown, (start, stop)

    def _asking(self, conversation: Conversation, *, messages: Sequence[Message]) -> tuple[str, str]:
        """Return the text that asks for the turn after some messages, and the same without the request."""
        if messages:
            asked = self._text(conversation, messages=messages, add_generation_prompt=True)
            return asked, self._text(conversation, messages=messages)
        try:
            return self._text(conversation, messages=messages, add_generation_prompt=True), ""
        except ValueError:
            raise ValueError(
                "the conversation begins with a turn of the assistant, which the chat template cannot ask for"
            ) from None

    def _text(
        self, conversation: Conversation, *, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> str:
        text: str = self._rendered(conversation, messages=messages, add_generation_prompt=add_generation_prompt)[0][
            0
        ]
        if len(text) > _MAX_TEXT_CHARS:
            raise ValueError(f"the chat template writes {len(text)} characters for one conversation")
        return text

    def _rendered(self, conversation: Conversation, *, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return render_jinja_template(
                conversations=[list(messages)],
                tools=list(conversation.tools) or None,
                chat_template=self.source,
                **options,
                **self.variables,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {one_line(error)}") from None
        except _FAILURES as error:
            raise ValueError(f"the chat template fails: {type(error).__name__}: {one_line(error)}") from None


def chat_template_of(tokenizer: TextTokenizer, *, own: str | None, key: str) -> ChatTemplate:
    """As `find_chat_template`. Raises: DataError naming the key of the job that needs one, if there is none."""
    found = find_chat_template(tokenizer, own=own)
    if found is None:
        raise DataError(
            f"{key}: conversations need a chat template, and the tokenizer has none. Set "
            "data.tokenizer.from_pretrained to the folder of a chat model, or data.chat.template to a Jinja file"
        )
    return found


def find_chat_template(tokenizer: TextTokenizer, *, own: str | None) -> ChatTemplate | None:
    """Return the chat template of a tokenizer; None if it has none.

    Args:
        own: the content of `data.chat.template`, which takes precedence; None if there is none.
    """
    config = json.loads(tokenizer.files.get("special_tokens_map.json", "{}")) | json.loads(tokenizer.config)
    source = own if own is not None else _template(tokenizer, config=config)
    if source is None:
        return None
    variables = {name: _token(config.get(name)) for name in _TOKEN_NAMES if _token(config.get(name))}
    added = json.loads(tokenizer.content)["added_tokens"]
    special = {tokenizer.eot_token, *(str(token["content"]) for token in added if token["special"])}
    return ChatTemplate(
        source=source,
        variables=variables,
        special_tokens=tuple(sorted(special, key=lambda name: (-len(name), name))),
    )


def _template(tokenizer: TextTokenizer, *, config: Mapping[str, Any]) -> str | None:
    """The template, from its own file or the tokenizer's configuration, where it may be one of several by name."""
    if TEMPLATE in tokenizer.files:
        return tokenizer.files[TEMPLATE]
    for given in (config.get("chat_template"), *_older(tokenizer)):
        if isinstance(given, str):
            return given
        if isinstance(given, list):
            named = {item.get("name"): item.get("template") for item in given if isinstance(item, Mapping)}
            if isinstance(named.get("default"), str):
                return str(named["default"])
    return None


def _older(tokenizer: TextTokenizer) -> Iterator[Any]:
    if "chat_template.json" in tokenizer.files:
        content = json.loads(tokenizer.files["chat_template.json"])
        yield content.get("chat_template") if isinstance(content, Mapping) else None


def _common_length(first: str, second: str) -> int:
    """Return the number of characters that two texts begin with in common, by bisection."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if second.startswith(first[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def _token(value: Any) -> str:
    """The name of a special token, which may be an object with its properties."""
    name = value.get("content") if isinstance(value, Mapping) else value
    return name if isinstance(name, str) else ""
