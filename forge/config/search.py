"""`search:` which values are tried, how they are chosen, and which trials are stopped early."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from forge.config.section import Count, FieldError, Fraction, Number, Section, WholeOrAuto, raise_errors
from forge.objective.registry import Direction

_KINDS = ("choice", "grid", "uniform", "loguniform", "int", "of")
_MAX_VALUES = 1000
_PBT_SECTIONS = ("training.optimizer.", "training.schedule.", "training.ema.")


def _read_values(value: Any) -> Any:
    # A union type would report one error per member.
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("must be a list of at least one value, such as [1, 2, 4]")
    if len(value) > _MAX_VALUES:
        raise ValueError(f"must have at most {_MAX_VALUES} values; give a range instead")
    return tuple(value)


def _read_ends(value: Any) -> Any:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_pair or any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in value):
        raise ValueError("must be the two bounds of a range, such as [1e-4, 1e-2]")
    if value[0] >= value[1]:
        raise ValueError(f"is empty: {value[0]} is not below {value[1]}")
    return tuple(value)


def _read_whole_ends(value: Any) -> Any:
    ends = _read_ends(value)
    if any(not isinstance(end, int) for end in ends):
        raise ValueError("must have whole numbers as bounds, such as [1, 8]")
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
    """Values to try for one key of the job: one of `choice`, `grid`, `uniform`, `loguniform`, `int` and `of`."""

    choice: Values | None = None
    """One of these values: `[1, 2, 4]`. Ray Tune's `choice`."""

    grid: Values | None = None
    """Every one of these values, combined with every value of each other `grid`; requires `searcher: {kind: grid}`.
    Ray Tune's `grid_search`."""

    uniform: Ends | None = None
    """A number between these bounds, uniformly distributed: `[0.0, 0.3]`."""

    loguniform: Ends | None = None
    """A number between these bounds with a uniformly distributed logarithm: `[1e-4, 1e-2]`."""

    int: WholeEnds | None = None
    """A whole number between these bounds, both included: `[2, 8]`."""

    of: str | None = None
    """Not searched, but computed from another key of the job: times `times`, or divided by `divided_by`; a whole
    number if the other key is one and the result is exact."""

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
            raise FieldError("loguniform", "must be greater than 0")
        factors = [self.times, self.divided_by]
        if self.of is None and any(factor is not None for factor in factors):
            raise FieldError("times" if self.times is not None else "divided_by", "is only for 'of'", nearest="of")
        if self.of is not None and sum(factor is not None for factor in factors) != 1:
            raise FieldError("of", "requires one of 'times' and 'divided_by'", depends_on=("times", "divided_by"))
        for kind in ("choice", "grid"):
            values = getattr(self, kind)
            if values is not None and len({repr(value) for value in values}) < len(values):
                raise FieldError(kind, "contains a value twice")
        return self

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values of a `choice` or a `grid`; None otherwise."""
        return self.choice if self.choice is not None else self.grid

    @property
    def ends(self) -> tuple[float, float] | None:
        """The bounds of a range; None otherwise."""
        return next((ends for ends in (self.uniform, self.loguniform, self.int) if ends is not None), None)

    def __str__(self) -> str:
        if self.values is not None:
            return f"one of {', '.join(str(value) for value in self.values)}"
        if self.ends is not None:
            kind = {"uniform": "", "loguniform": ", log-uniform", "int": ", whole numbers"}
            given = next(name for name in kind if getattr(self, name) is not None)
            return f"{self.ends[0]:g} to {self.ends[1]:g}{kind[given]}"
        factor = f"times {self.times:g}" if self.times is not None else f"divided by {self.divided_by:g}"
        return f"{self.of} {factor}"


class SearcherSpec(Section):
    """How the values of the next trial are chosen. Ray Tune calls this a search algorithm."""

    kind: Literal["random", "grid", "optuna"] = "optuna"
    """`random`: independent samples; `grid`: every combination once; `optuna`: Optuna's TPE sampler (arXiv
    2304.11127), which learns from earlier trials. The first trial has the job's own values if they are in the
    space."""

    startup_trials: int = Field(10, ge=1)
    """With `optuna`: random trials before TPE starts to learn. Optuna's `n_startup_trials`, and its default."""

    seed: int = Field(1, ge=0, lt=2**31)
    """Seed of the sampler: the same seed gives the same trials."""


class SchedulerSpec(Section):
    """When a trial is stopped early, or continues from another trial's state: Ray Tune's trial schedulers."""

    kind: Literal["none", "asha", "median", "pbt", "pb2"] = "none"
    """`none`: every trial runs to its end; `asha`: at every rung the best `1/reduction_factor` of the trials
    continue (arXiv 1810.05934); `median`: a trial worse than the median of the others at the same step is stopped;
    `pbt`: every `interval_steps` the worst trials continue from a copy of the best with other values (arXiv
    1711.09846); `pb2`: as `pbt`, with values from a Gaussian process (arXiv 2002.02518)."""

    grace_steps: Count | None = Field(None, ge=1)
    """Steps before a trial can be stopped, and the first rung of `asha`; by default the first evaluation. Ray
    Tune's `grace_period`."""

    reduction_factor: int = Field(3, ge=2)
    """With `asha`: one in this many trials continues at each rung, and each rung is this many times longer."""

    interval_steps: Count | None = Field(None, ge=1)
    """Required by `pbt` and `pb2`: steps between two rounds of copying. Ray Tune's `perturbation_interval`."""

    quantile: Fraction = Field(0.25, gt=0, le=0.5)
    """With `pbt` and `pb2`: share of the trials replaced, and share copied. Ray Tune's `quantile_fraction`."""

    @model_validator(mode="after")
    def _has_interval(self) -> SchedulerSpec:
        if self.is_population and self.interval_steps is None:
            raise FieldError("interval_steps", f"is missing: {self.kind} requires it")
        return self

    @property
    def is_population(self) -> bool:
        """Whether trials copy each other's state."""
        return self.kind in ("pbt", "pb2")


class SearchSpec(Section):
    """A hyperparameter search over keys of the job; each trial is a separate run."""

    space: dict[str, ParameterSpec]
    """The searched keys with their values, by dotted key: `training.optimizer.lr: {loguniform: [1e-4, 1e-2]}`."""

    metric: str = "eval/loss"
    """The metric that trials are compared by, a key of `metrics.jsonl`; it is reported at every evaluation.
    `eval/NAME` and `train/NAME` for every metric that the objective reports, or one of forge's own: `eval/loss`,
    `train/loss`, `speed/tokens_per_s`, `speed/mfu`, `speed/step_s`, `memory/peak_gib`. `evaluate/TASK/METRIC` for a
    task of `evaluate` with `every: evaluation`, such as `evaluate/support/accuracy`."""

    mode: Direction | None = None
    """`min`: smaller values of the metric are better; `max`: larger ones. By default the metric's own direction:
    that of the objective's `metric_directions` or of the task's metric; `min` for losses, times and memory, `max`
    for `speed/tokens_per_s` and `speed/mfu`."""

    max_trials: Count | None = Field(None, ge=1, le=10**6)
    """Number of trials; the size of the population with `pbt` and `pb2`. By default 16, or the whole grid."""

    trials_at_once: WholeOrAuto = "auto"
    """Trials that run in parallel. `auto`: as many as fit on the cluster at the minimum of `resources.workers`."""

    max_hours: float | None = Field(None, gt=0)
    """Time limit in hours: then no further trial starts, and running trials stop with a checkpoint."""

    max_usd: float | None = Field(None, gt=0)
    """Cost limit in USD for all machines together, enforced likewise; the price of every machine must be known."""

    searcher: SearcherSpec = SearcherSpec()
    """How the values are chosen."""

    scheduler: SchedulerSpec = SchedulerSpec()
    """When trials are stopped early."""

    proxy: dict[str, Any] = Field(default_factory=dict)
    """Values, by dotted key, that replace those of the job in every trial, to make trials cheaper: a smaller model,
    fewer steps. `best.yaml` is the job without them, with the values found, and says so."""

    @property
    def direction(self) -> Direction:
        """The mode, which is set in every plan."""
        assert self.mode is not None, f"the direction of {self.metric} is known only from a plan"
        return self.mode

    @model_validator(mode="after")
    def _consistent(self) -> SearchSpec:
        errors: list[FieldError] = []
        if not any(entry.of is None for entry in self.space.values()):
            errors.append(FieldError("space", "is empty: give at least one key to search"))
        for key, entry in self.space.items():
            problem = self._problem_of(key, entry)
            errors += [problem] if problem is not None else []
        for key in self.proxy:
            if key in self.space:
                problem = FieldError(f"proxy.{key}", "is also in search.space: a searched key cannot be fixed")
                errors.append(problem)
            if key.split(".")[0] == "search":
                errors.append(FieldError(f"proxy.{key}", "is a key of the search, not of a trial"))
        raise_errors(errors)
        return self

    def _problem_of(self, key: str, entry: ParameterSpec) -> FieldError | None:
        where = f"space.{key}"
        if key.split(".")[0] in ("search", "name", "resources", "checkpoint", "tracking", "alerts"):
            return FieldError(where, "cannot be searched: it does not affect the result of the training")
        if entry.grid is not None and self.searcher.kind != "grid":
            problem = "grid requires searcher: {kind: grid}; otherwise use choice"
            return FieldError(where, problem, nearest="choice", depends_on=("searcher.kind",))
        source = self.space.get(entry.of) if entry.of is not None else None
        if source is not None and source.of is not None:
            return FieldError(where, f"'{entry.of}' is itself computed from another key")
        if self.scheduler.is_population and not key.startswith(_PBT_SECTIONS):
            sections = ", ".join(section.rstrip(".") for section in _PBT_SECTIONS)
            return FieldError(
                where,
                f"{self.scheduler.kind} changes values during a trial, which is possible only for keys of "
                f"{sections}",
            )
        if self.scheduler.kind == "pb2" and entry.of is None and entry.ends is None:
            return FieldError(where, "pb2 requires ranges: uniform, loguniform or int")
        return None
