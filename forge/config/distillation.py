"""`training.distillation`: what a student learns from its teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from forge.config.section import Count, FieldError, Fraction, Number, Section


class DistillationSpec(Section):
    """Knowledge distillation (arXiv 1503.02531); only with `objective: distillation`."""

    teacher: str | None = Field(None, min_length=1)
    """The folder of a causal language model, a checkpoint, or a run: its best checkpoint, else its newest. It must
    have the tokenizer of the student, which is the default of `data.tokenizer`."""

    digest: str | None = Field(None, pattern="^[0-9a-f]{32}$")
    """Of the teacher's files. Filled in when a run starts, so that no run is resumed with another teacher; give it
    to refuse other files."""

    temperature: Number = Field(1.0, gt=0)
    """T: both distributions are those of the logits divided by T. The divergence is multiplied by T², so that its
    gradient has the same size at every T."""

    weight: Fraction = Field(0.5, gt=0, le=1)
    """Share of the divergence from the teacher in the loss; the rest is the cross entropy of the text."""

    top_k: Count | None = Field(None, ge=1)
    """Compare only the teacher's K most probable tokens, and all others as one; by default every token."""

    teacher_logits: Literal["live", "stored"] = "live"
    """How the teacher is asked. `live`: in every step, by every worker, which holds all of it in
    `training.precision`. `stored`: once, before training starts; its `top_k` tokens at every target are stored with
    the prepared data, 8 bytes for each, and no worker holds it."""

    @model_validator(mode="after")
    def _stores_some_tokens(self) -> DistillationSpec:
        if self.teacher_logits == "stored" and self.top_k is None:
            problem = (
                "is missing: teacher_logits: stored takes 8 bytes for each of the top_k tokens at every target, so "
                "say how many, such as 32"
            )
            raise FieldError("top_k", problem, depends_on=("teacher_logits",))
        return self
