"""`search:` which values are tried, how they are chosen, and when a trial is given up."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from forge.config.section import Count, FieldError, Fraction, Number, Section, WholeOrAuto

METRICS = (
    "eval/loss",
    "eval/perplexity",
    "train/loss",
    "speed/tokens_per_s",
    "speed/mfu",
    "speed/step_s",
    "memory/peak_gib",
)
"""What a trial can be judged by: keys of `metrics.jsonl`."""

_KINDS = ("choice", "grid", "uniform", "loguniform", "int", "of")
_PBT_SECTIONS = ("training.optimizer.", "training.schedule.", "training.ema.")


def _read_values(value: Any) -> Any:
    # A union of what a value may be would complain once per member.
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("must be a list of at least one value, such as [1, 2, 4]")
    return tuple(value)


def _read_ends(value: Any) -> Any:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_pair or any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in value):
        raise ValueError("must be the two ends of a range, such as [1e-4, 1e-2]")
    if value[0] >= value[1]:
        raise ValueError(f"is empty: {value[0]} is not below {value[1]}")
    return tuple(value)


def _read_whole_ends(value: Any) -> Any:
    ends = _read_ends(value)
    if any(not isinstance(end, int) for end in ends):
        raise ValueError("must have whole numbers as its ends, such as [1, 8]")
    return ends


Values = Annotated[
    tuple[Any, ...],
    BeforeValidator(_read_values),
    WithJsonSchema({"type": "array", "items": {}, "minItems": 1}),
]
Ends = Annotated[
    tuple[float, float],
    BeforeValidator(_read_ends),
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}),
]
WholeEnds = Annotated[
    tuple[int, int],
    BeforeValidator(_read_whole_ends),
    WithJsonSchema({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}),
]


class ParameterSpec(Section):
    """What one key of the job may be; one of `choice`, `grid`, `uniform`, `loguniform`, `int` and `of`."""

    choice: Values | None = None
    """One of these values: `[1, 2, 4]`."""

    grid: Values | None = None
    """Each of these values, with each of those of every other `grid`; for `searcher: {kind: grid}`."""

    uniform: Ends | None = None
    """A number between these ends, each equally likely: `[0.0, 0.3]`."""

    loguniform: Ends | None = None
    """A number between these ends, each order of magnitude equally likely: `[1e-4, 1e-2]`."""

    int: WholeEnds | None = None
    """A whole number between these ends, both included: `[2, 8]`."""

    of: str | None = None
    """Not searched: it follows from another key of the job, times `times` or divided by `divided_by`; whole where
    that is exact."""

    times: Number | None = Field(None, gt=0)
    """With `of`: the factor."""

    divided_by: Number | None = Field(None, gt=0)
    """With `of`: the divisor."""

    @model_validator(mode="after")
    def _is_one(self) -> ParameterSpec:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(f"'{kind}'" for kind in given) or "none"
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; it has {found}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise FieldError("loguniform", "must lie above 0")
        factors = [self.times, self.divided_by]
        if self.of is None and any(factor is not None for factor in factors):
            raise FieldError("times" if self.times is not None else "divided_by", "belongs to 'of'", nearest="of")
        if self.of is not None and sum(factor is not None for factor in factors) != 1:
            raise FieldError("of", "needs one of 'times' and 'divided_by'")
        for kind in ("choice", "grid"):
            values = getattr(self, kind)
            if values is not None and len({repr(value) for value in values}) < len(values):
                raise FieldError(kind, "has a value twice")
        return self

    @property
    def values(self) -> tuple[Any, ...] | None:
        """Those of a `choice` or a `grid`."""
        return self.choice if self.choice is not None else self.grid

    @property
    def ends(self) -> tuple[float, float] | None:
        """Of a range."""
        return next((ends for ends in (self.uniform, self.loguniform, self.int) if ends is not None), None)

    def __str__(self) -> str:
        if self.values is not None:
            return f"one of {', '.join(str(value) for value in self.values)}"
        if self.ends is not None:
            kind = {"uniform": "", "loguniform": ", by orders of magnitude", "int": ", whole"}
            given = next(name for name in kind if getattr(self, name) is not None)
            return f"{self.ends[0]:g} to {self.ends[1]:g}{kind[given]}"
        factor = f"times {self.times:g}" if self.times is not None else f"divided by {self.divided_by:g}"
        return f"{self.of} {factor}"


class SearcherSpec(Section):
    """How the values of the next trial are chosen."""

    kind: Literal["random", "grid", "optuna"] = "optuna"
    """How the values of all trials but the first are chosen, which has the job's own, if they lie in the space.
    `random`: each for itself; `grid`: every combination once; `optuna`: Optuna's TPE (arXiv 2304.11127), which
    learns from the trials before."""

    startup_trials: int = Field(10, ge=1)
    """With `optuna`: trials that are drawn at random before it begins to learn."""

    seed: int = Field(1, ge=0, lt=2**31)
    """The same seed gives the same trials."""


class SchedulerSpec(Section):
    """When a trial is given up, or goes on from another one's state. Ray Tune's own schedulers."""

    kind: Literal["none", "asha", "median", "pbt", "pb2"] = "none"
    """`none`: every trial runs to its end; `asha`: at every rung the best `1/reduction_factor` go on (arXiv
    1810.05934); `median`: a trial worse than the median of the others at that step is stopped; `pbt`: after every
    `interval_steps` the worst go on from a copy of the best with other values (arXiv 1711.09846); `pb2`: the same,
    with values from a Gaussian process (arXiv 2002.02518)."""

    grace_steps: Count | None = Field(None, ge=1)
    """Steps that every trial may make; with `asha` also the first rung. By default the first evaluation."""

    reduction_factor: int = Field(3, ge=2)
    """With `asha`: of how many trials one goes on; each rung is so many times longer than the one before."""

    interval_steps: Count | None = Field(None, ge=1)
    """With `pbt` and `pb2`, which need it: steps between two rounds of copying."""

    quantile: Fraction = Field(0.25, gt=0, le=0.5)
    """With `pbt` and `pb2`: the share of trials that is replaced, and that is copied."""

    @model_validator(mode="after")
    def _has_interval(self) -> SchedulerSpec:
        if self.is_population and self.interval_steps is None:
            raise FieldError("interval_steps", f"is missing: {self.kind} needs it")
        return self

    @property
    def is_population(self) -> bool:
        """Whether trials take over each other's state."""
        return self.kind in ("pbt", "pb2")


class SearchSpec(Section):
    """Which values of the job's own keys are tried; each trial is a run of its own."""

    space: dict[str, ParameterSpec]
    """The keys that are searched, by their dotted path: `training.optimizer.lr: {loguniform: [1e-4, 1e-2]}`."""

    metric: str = "eval/loss"
    """What trials are judged by, a key of `metrics.jsonl`; reported at every evaluation."""

    mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""

    max_trials: Count | None = Field(None, ge=1)
    """How many trials there are; the population's size with `pbt` and `pb2`. By default 16, or the whole grid."""

    trials_at_once: WholeOrAuto = "auto"
    """`auto`: as many as the cluster has room for with the job's smallest number of workers."""

    max_hours: float | None = Field(None, gt=0)
    """No trial is begun after so many hours, and those that run are stopped, with a checkpoint."""

    max_usd: float | None = Field(None, gt=0)
    """The same when all machines together have cost this; each must tell its price."""

    searcher: SearcherSpec = SearcherSpec()
    """How values are chosen."""

    scheduler: SchedulerSpec = SchedulerSpec()
    """When trials are given up."""

    proxy: dict[str, Any] = Field(default_factory=dict)
    """Keys of the job, by their dotted path, that are other in every trial than in the job itself: a smaller model,
    fewer steps. `best.yaml` is the job itself with the values found, and says so."""

    @field_validator("metric")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in METRICS:
            raise ValueError(f"will never appear; trials report {', '.join(METRICS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SearchSpec:
        if not any(entry.of is None for entry in self.space.values()):
            raise FieldError("space", "is empty: give at least one key that is searched")
        for key, entry in self.space.items():
            self._require_fitting(key, entry)
        for key in self.proxy:
            if key in self.space:
                raise FieldError(f"proxy.{key}", "is searched: it cannot be fixed for every trial")
            if key.split(".")[0] == "search":
                raise FieldError(f"proxy.{key}", "is a key of the search itself")
        return self

    def _require_fitting(self, key: str, entry: ParameterSpec) -> None:
        where = f"space.{key}"
        if key.split(".")[0] in ("search", "name", "resources", "checkpoint", "tracking"):
            raise FieldError(where, "cannot be searched: it does not change what is learnt")
        if entry.grid is not None and self.searcher.kind != "grid":
            raise FieldError(where, "a grid needs searcher: {kind: grid}; otherwise write choice", nearest="choice")
        source = self.space.get(entry.of) if entry.of is not None else None
        if source is not None and source.of is not None:
            raise FieldError(where, f"'{entry.of}' follows from another key itself")
        if self.scheduler.is_population and not key.startswith(_PBT_SECTIONS):
            raise FieldError(
                where,
                f"{self.scheduler.kind} changes values in the middle of a trial, and only those of "
                f"{', '.join(section.rstrip('.') for section in _PBT_SECTIONS)} can be",
            )
        if self.scheduler.kind == "pb2" and entry.of is None and entry.ends is None:
            raise FieldError(where, "pb2 needs ranges: uniform, loguniform or int")
