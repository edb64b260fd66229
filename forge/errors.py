"""The tree of errors that are not bugs of forge.

    ForgeError                 one clear message, and the exit code of the command
    ├── JobFileError      (2)  the job file is wrong: file:line, dotted key, value, nearest valid key
    ├── PlanError         (2)  the job is valid but cannot be run; the message contains the arithmetic
    │   └── ModelError    (2)  the `model:` section: what is wrong, with which key, and what would be valid
    ├── UserCodeError     (2)  the folder of `code:`, or a class in it
    ├── DataError         (2)  the corpus, tokenizer or token cache is missing or broken
    ├── ArgumentError     (2)  an argument names a run, folder or log that does not exist or cannot be used
    ├── CheckpointError   (2)  a checkpoint is missing, incomplete or of another model
    ├── ClusterError      (3)  Ray, its nodes or their resources
    └── RunError          (4)  the training failed, for example because a worker died
        └── DivergedError (4)  the loss or gradient is not finite

A message says what happened with its numbers, why it matters, and what to do. Every class survives
pickle, because errors travel between processes.
"""

from __future__ import annotations

import unicodedata


class ForgeError(Exception):
    """Base class; caught in one place only, `forge.cli.app`."""

    exit_code = 2


class JobFileError(ForgeError):
    """A problem in a job file or cluster file, with its location.

    The message is printable and of limited length, whatever the file contains; the attributes are not shortened.

    Args:
        problem: one sentence, without the location.
        path: the file; `--set` for a value from the command line; None if there is neither.
        line: 1-based line in the file, if known.
        key: dotted key, such as `training.zero.stage`.
        value: the value as written; never a secret.
        nearest: the nearest valid key or value, as a suggestion.
        others: further problems of the same file, in the order of the file.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | None = None,
        line: int | None = None,
        key: str | None = None,
        value: str | None = None,
        nearest: str | None = None,
        others: tuple[JobFileError, ...] = (),
    ) -> None:
        self.problem = problem
        self.path = path
        self.line = line
        self.key = key
        self.value = value
        self.nearest = nearest
        self.others = others
        # With the problem as the only argument, the default pickling of exceptions restores the rest from __dict__.
        super().__init__(problem)

    def __str__(self) -> str:
        if not self.others:
            return self._line()
        listed = self.others[: _MOST_LISTED - 1]
        lines = [self._line(), _counted(len(self.others)), *(f"  {other._line()}" for other in listed)]
        if unlisted := len(self.others) - len(listed):
            lines.append(f"  and {unlisted} more")
        return "\n".join(lines)

    def _line(self) -> str:
        text = f"{self._place()}: {printable(self.problem, limit=400)}"
        if self.value is not None and self.path != "--set":
            text += f" (got {printable(self.value, limit=60)})"
        if self.nearest:
            text += f"; did you mean '{printable(self.nearest, limit=80)}'?"
        return text

    def _place(self) -> str:
        key = printable(self.key or "", limit=120)
        if self.path == "--set":
            value = "" if self.value is None else printable(self.value, limit=60)
            return "--set " + (f"{key}={value}" if key and value else key or value)
        place = printable(self.path or "job", limit=1000)
        if self.line is not None:
            place += f":{self.line}"
        return f"{place}: {key}" if key else place


_MOST_LISTED = 10
"""Number of problems shown per file; the rest is shown once these are fixed."""


def printable(text: str, *, limit: int) -> str:
    """Return `text` on one line, shortened to `limit` characters, then with control characters escaped."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


_JOINERS = "\u200c\u200d"
"""Zero-width (non-)joiners: invisible format characters that Persian, Indic scripts and emoji need."""


def harmless(text: str) -> str:
    """Replace the characters that could control a terminal or reorder text.

    These are C0 and C1 controls except newline and tab, bidirectional marks and overrides, other invisible format
    characters, line separators and unpaired surrogates.

    A Windows line end becomes a newline.
    """
    if text.isprintable():
        return text
    return "".join(map(_harmless_character, text.replace("\r\n", "\n")))


def _harmless_character(character: str) -> str:
    if character.isprintable() or character in "\n\t" or character in _JOINERS:
        return character
    is_control = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "\N{REPLACEMENT CHARACTER}" if is_control else character


def _counted(num_others: int) -> str:
    return f"and {num_others} more problem{'s' if num_others > 1 else ''}:"


class PlanError(ForgeError):
    """The job cannot be run as requested; the message contains the arithmetic.

    Args:
        job_key: dotted key of the job that is to blame, if it is one.
    """

    def __init__(self, problem: str, *, job_key: str | None = None) -> None:
        super().__init__(f"{job_key}: {problem}" if job_key else problem)
        self.problem, self.job_key = problem, job_key


class ModelError(PlanError):
    """A `model:` section that cannot be built, with the key to blame.

    Args:
        key: below `model`; None for the section as a whole.
        more_keys: further keys that each have the same problem.
        suspects: keys of which any one may be the cause, with `key`.
        choices: valid values or keys, for a suggestion.
    """

    def __init__(
        self,
        problem: str,
        *,
        key: str | None = None,
        more_keys: tuple[str, ...] = (),
        suspects: tuple[str, ...] = (),
        choices: tuple[str, ...] = (),
    ) -> None:
        super().__init__(f"model.{key}: {problem}" if key else problem)
        self.problem, self.key, self.choices = problem, key, choices
        self.more_keys, self.suspects = more_keys, suspects


class UserCodeError(ForgeError):
    """The code folder of a job cannot be packed, or a class in it cannot be used; the message names the file."""


class DataError(ForgeError):
    """The corpus, tokenizer or token cache is missing, empty or broken."""


class CheckpointError(ForgeError):
    """A checkpoint is missing, incomplete, or of another model."""


class ArgumentError(ForgeError):
    """A run, folder or log that the command line or the job names does not exist or cannot be used."""


class ClusterError(ForgeError):
    """The Ray cluster cannot be reached or started, or lacks resources that the run needs."""

    exit_code = 3


class RunError(ForgeError):
    """The run itself failed."""

    exit_code = 4


class DivergedError(RunError):
    """The loss or the gradient is not finite."""


class ForgeWarning(UserWarning):
    """What a model does otherwise than documented; commands print it (`runtime.forwarded_warnings`)."""
