"""Everything that can go wrong and is not a bug, as one tree.

    ForgeError                 one clear message; `exit_code` says whose turn it is
    ├── JobFileError      (2)  the job file: file:line, dotted key, value, nearest valid key
    ├── PlanError         (2)  the job is well-formed but cannot be carried out; the arithmetic is in the message
    ├── UserCodeError     (2)  the folder of `code:`, or a class in it
    ├── DataError         (2)  the corpus, the tokenizer or the token cache
    ├── ArgumentError     (2)  the command line names a run, a folder or a log that is not there or not usable
    ├── CheckpointError   (2)  a checkpoint that is missing, torn or of another model
    ├── ClusterError      (3)  Ray, its nodes, their resources
    └── RunError          (4)  the training itself: a rank that died
        └── DivergedError (4)  a loss that is no number

A message says what happened with its numbers, why it matters, and what to do. Every class survives
pickle, because errors travel between processes.
"""

from __future__ import annotations


class ForgeError(Exception):
    """The root; caught in one place only, `forge.cli.app`."""

    exit_code = 2


class JobFileError(ForgeError):
    """The job file is wrong, and where.

    The message is printable and of bounded length, whatever the file holds; the attributes are whole.

    Args:
        problem: one sentence, without the place.
        path: the file; `--set` for a value from the command line; None if there is neither.
        line: 1-based line in the file, if known.
        key: dotted key, `training.zero.stage`.
        value: what stands there, as written. Never a secret.
        nearest: the nearest valid key or value, offered as a cure.
        others: what else is wrong with the same job, in the order of the file.
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
        # With the problem as the only argument, Exception's own pickling restores the rest from __dict__.
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
"""Problems shown of one job; who mends ten reads the next ten."""


def printable(text: str, *, limit: int) -> str:
    """`text` on one line, without a character that could move a terminal's cursor, at most `limit` long."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _counted(num_others: int) -> str:
    return f"and {num_others} more problem{'s' if num_others > 1 else ''}:"


class PlanError(ForgeError):
    """The job cannot be carried out as asked; the message holds the arithmetic."""


class UserCodeError(ForgeError):
    """The code folder of a job cannot be packed, or a class in it cannot be used; the message names the file."""


class DataError(ForgeError):
    """The corpus, the tokenizer or the token cache is missing, empty or broken."""


class CheckpointError(ForgeError):
    """A checkpoint is missing, torn, or belongs to another model."""


class ArgumentError(ForgeError):
    """What the command line or the job names, a run, a folder, a log, is not there or cannot be used."""


class ClusterError(ForgeError):
    """The Ray cluster cannot be reached, started, or does not hold what the run needs."""

    exit_code = 3


class RunError(ForgeError):
    """The run itself failed."""

    exit_code = 4


class DivergedError(RunError):
    """The loss or the gradient is no number any more."""
