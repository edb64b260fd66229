"""`data.embedding` and `training.contrastive`: texts that belong together, and how their embeddings are learnt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from forge.config.section import Count, FieldError, Number, Section


class EmbeddingSpec(Section):
    """Which fields of a record hold texts that belong together; only with `format: embedding`."""

    query: str = Field("query", min_length=1)
    """The field with the text that is searched with; `anchor` in other libraries."""

    positive: str = Field("positive", min_length=1)
    """The field with the text that should be found."""

    negative: str = Field("negative", min_length=1)
    """The field with a text, or a list of texts, that should not be found although they look alike; a record need
    not have it."""

    query_prefix: str = Field("", max_length=1000)
    """Text before every query, such as `query: `."""

    passage_prefix: str = Field("", max_length=1000)
    """Text before every positive and negative, such as `passage: `."""

    max_negatives: Count = Field(8, ge=0, le=1000)
    """Negatives of a record that are used, the first ones; the plan counts the others."""

    @model_validator(mode="after")
    def _are_three(self) -> EmbeddingSpec:
        if self.positive == self.query:
            raise FieldError("positive", "is also the query", depends_on=("query",))
        if self.negative in (self.query, self.positive):
            raise FieldError("negative", "is also the query or the positive", depends_on=("query", "positive"))
        return self


class ContrastiveSpec(Section):
    """The loss of text embeddings: the cross entropy of the positive among all texts of the step (InfoNCE, arXiv
    1807.03748; sentence-transformers' MultipleNegativesRankingLoss). Only with `objective: contrastive`."""

    pooling: Literal["mean", "cls", "last_token"] = "mean"
    """How the embedding of a text is made of the last hidden states. `mean`: their mean; `cls`: that of the first
    token, for encoders; `last_token`: that of the last one, for decoders."""

    similarity: Literal["cosine", "dot"] = "cosine"
    """How embeddings are compared."""

    temperature: Number = Field(0.05, gt=0)
    """Similarities are divided by it; 0.05 is sentence-transformers' `scale` of 20."""

    symmetric: bool = False
    """Add the cross entropy of the query among all queries for each positive, and halve the sum."""
