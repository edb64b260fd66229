"""Everything that can go wrong and is not a bug, as one tree.

    ForgeError                 one clear message; `exit_code` says whose turn it is
    ├── JobFileError      (2)  the job file: file:line, dotted key, value, nearest valid key
    ├── PlanError         (2)  the job is well-formed but cannot be carried out; the arithmetic is in the message
    ├── DataError         (2)  the corpus, the tokenizer or the token cache
    ├── CheckpointError   (2)  a checkpoint that is missing, torn or of another model
    ├── ClusterError      (3)  Ray, its nodes, their resources
    └── RunError          (4)  the training itself: a loss that is no number, a rank that died

A message says what happened with its numbers, why it matters, and what to do. Every class survives
pickle, because errors travel between processes.
"""

from __future__ import annotations


class ForgeError(Exception):
    """The root; caught in one place only, `forge.cli.app`."""

    exit_code = 2


class JobFileError(ForgeError):
    """The job file is wrong, and where.

    Args:
        problem: one sentence, without the place.
        path: the file, or None for a value that came from the command line.
        line: 1-based line in the file, if known.
        key: dotted key, `training.zero.stage`.
        value: what stands there, as written.
        nearest: the nearest valid key or value, offered as a cure.
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
    ) -> None:
        self.problem = problem
        self.path = path
        self.line = line
        self.key = key
        self.value = value
        self.nearest = nearest
        super().__init__(self._message())

    def _message(self) -> str:
        place = self.path or "job"
        if self.line is not None:
            place += f":{self.line}"
        text = f"{place}: "
        if self.key:
            text += f"{self.key}: "
        text += self.problem
        if self.value is not None:
            text += f" (got {self.value})"
        if self.nearest:
            text += f"; did you mean {self.nearest!r}?"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        state = {k: getattr(self, k) for k in ("path", "line", "key", "value", "nearest")}
        return (_rebuild_job_file_error, (self.problem, state))


def _rebuild_job_file_error(problem: str, state: dict[str, object]) -> JobFileError:
    return JobFileError(problem, **state)  # type: ignore[arg-type]


class PlanError(ForgeError):
    """The job cannot be carried out as asked; the message holds the arithmetic."""


class DataError(ForgeError):
    """The corpus, the tokenizer or the token cache is missing, empty or broken."""


class CheckpointError(ForgeError):
    """A checkpoint is missing, torn, or belongs to another model."""


class ClusterError(ForgeError):
    """The Ray cluster cannot be reached, started, or does not hold what the run needs."""

    exit_code = 3


class RunError(ForgeError):
    """The run itself failed."""

    exit_code = 4
