"""`training.schedule:` the learning rate by step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from forge.config.section import Count, FieldError, Fraction, Number, Section, TrainLength, raise_errors
from forge.units import Length

_ONLY_FOR = {"power": "polynomial", "timescale": "inverse-sqrt", "decay": "wsd", "decay_shape": "wsd"}
_DEFAULTS = {"power": 1.0, "decay": Length(percent=20.0), "decay_shape": "1-sqrt"}


class ScheduleSpec(Section):
    """The learning rate; it depends on the step only, never on the number of workers."""

    kind: Literal["cosine", "linear", "polynomial", "inverse-sqrt", "wsd", "constant"] = "cosine"
    """Shape after the warm-up. `cosine`, `linear` and `polynomial` decay until the last step; `inverse-sqrt` falls
    with the square root of the step (arXiv 1706.03762); `wsd`, warmup-stable-decay, stays at the peak and decays at
    the end (arXiv 2404.06395); `constant` stays."""

    warmup: TrainLength = Length(steps=0)
    """Steps over which the learning rate rises linearly from 0 to `optimizer.lr`: a number of steps, a share of the
    training such as `3%`, or predicted tokens such as `2M tokens`; shares and tokens are rounded up to whole
    steps."""

    final_fraction: Fraction = Field(0.1, ge=0, le=1)
    """Learning rate of the last step as a share of `optimizer.lr`; ignored by `constant` and `inverse-sqrt`."""

    power: Number | None = Field(None, gt=0)
    """With `polynomial`: the exponent; 1 by default, which is `linear`. transformers' `power`."""

    timescale: Count | None = Field(None, ge=1)
    """With `inverse-sqrt`: after the warm-up w the rate is `lr · √(timescale / (step - w + timescale))`. By default
    w, or 10,000 without a warm-up. transformers' `timescale`."""

    decay: TrainLength | None = None
    """With `wsd`: length of the decay at the end, written like `warmup`; 20% by default."""

    decay_shape: Literal["1-sqrt", "linear", "cosine"] | None = None
    """With `wsd`: shape of the decay; `1-sqrt` by default, the best in arXiv 2405.18392. transformers'
    `decay_type`."""

    @model_validator(mode="after")
    def _fits_kind(self) -> ScheduleSpec:
        raise_errors(
            [
                FieldError(key, f"is only for kind: {kind}", depends_on=("kind",))
                for key, kind in _ONLY_FOR.items()
                if kind != self.kind and getattr(self, key) is not None
            ]
        )
        for key, default in _DEFAULTS.items():
            if self.kind == _ONLY_FOR[key] and getattr(self, key) is None:
                self.__dict__[key] = default  # not marked as set, so that a dumped job does not contain it
        return self
