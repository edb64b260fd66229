"""The built-in objectives, by the name that `training.objective` gives them.

A new objective is one file in this folder and one entry here. The configuration reads the names and metrics from
this table, so the module imports no torch: `forge.objective.build` imports the class where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Direction = Literal["min", "max"]
"""Whether smaller or larger values of a metric are better."""

AutoClass = Literal[
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModel",
]
"""The classes of transformers by which a model of an architecture is built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredObjective:
    """What is known about a built-in objective before it is imported."""

    reference: str
    """`module:Class` of an `Objective`."""
    metrics: Mapping[str, Direction]
    """Every metric besides the loss; the class's `metric_directions`."""
    predicts_tokens: bool
    """Whether every target must be a token id."""
    auto_class: AutoClass = "AutoModelForCausalLM"
    """What the model is."""
    formats: tuple[str, ...] = ()
    """Values of `data.format` with the examples that it learns from, the usual one first; empty: any."""
    special_tokens: tuple[str, ...] = ()
    """What a tokenizer that is trained on the corpus has besides the end-of-text token."""
    needs_special_tokens: bool = True
    """Whether every tokenizer must have them."""
    show: str | None = None
    """`module:function` that gives an example as a step sees it, where the objective changes the stored one, as by
    masks: `show(arrays, *, seed, training, tokenizer)`, without torch. The plan shows the result."""
    num_labels: int | None = None
    """Outputs of the head of a sequence or token classifier, where the objective fixes their number."""
    has_reference_model: bool = False
    """Whether it compares the model with what it was before training."""
    has_head_at_targets: bool = False
    """Whether a linear output head is computed at the positions with a target alone."""
    separates_examples: bool = False
    """Whether it takes the examples of a packed row apart, so that the model need not keep them apart."""


NUMBER_METRICS = frozenset({"mse", "r2"})
"""Metrics of `classification` that only `kind: regression` reports; the others, only the other kinds."""

_ROUTER: dict[str, Direction] = {"router_aux_loss": "min"}
"""Of a mixture of experts with `output_router_logits`."""

_CAUSAL_LM = RegisteredObjective(
    reference="forge.objective.causal_lm:CausalLm",
    metrics={"perplexity": "min", **_ROUTER},
    predicts_tokens=True,
    formats=("text", "chat"),
)

_PAIR_METRICS: dict[str, Direction] = {
    "rewards_chosen": "max",
    "rewards_rejected": "min",
    "rewards_margin": "max",
    "accuracy": "max",
}

_DPO = RegisteredObjective(
    reference="forge.objective.preference:Dpo",
    metrics={**_PAIR_METRICS, **_ROUTER},
    predicts_tokens=True,
    formats=("preference",),
    separates_examples=True,
    has_reference_model=True,
    has_head_at_targets=True,
)

SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
"""The special tokens of T5 that stand for spans, in the order of the spans."""

_SEQ2SEQ = RegisteredObjective(
    reference="forge.objective.seq2seq:Seq2Seq",
    metrics={"perplexity": "min", "accuracy": "max", **_ROUTER, "router_z_loss": "min"},
    predicts_tokens=True,
    formats=("pair",),
    auto_class="AutoModelForSeq2SeqLM",
    special_tokens=("[PAD]",),
    separates_examples=True,
)

OBJECTIVES: dict[str, RegisteredObjective] = {
    "causal-lm": _CAUSAL_LM,
    "chat": replace(_CAUSAL_LM, formats=("chat",)),  # the next token, where the format has targets
    "masked-lm": RegisteredObjective(
        reference="forge.objective.masked_lm:MaskedLm",
        metrics={"perplexity": "min", "accuracy": "max"},
        predicts_tokens=True,
        formats=("text",),
        auto_class="AutoModelForMaskedLM",
        special_tokens=("[MASK]",),
        show="forge.objective.masking:show_masks",
        separates_examples=True,
    ),
    "dpo": _DPO,
    "ipo": _DPO,  # with another default of training.dpo.loss
    "orpo": replace(
        _DPO,
        reference="forge.objective.preference:Orpo",
        metrics={**_DPO.metrics, "nll": "min", "log_odds": "max"},
        has_reference_model=False,
    ),
    "reward": RegisteredObjective(
        reference="forge.objective.reward:Reward",
        metrics={**_PAIR_METRICS, **_ROUTER},
        predicts_tokens=True,
        formats=("preference",),
        auto_class="AutoModelForSequenceClassification",
        num_labels=1,
        separates_examples=True,
    ),
    "classification": RegisteredObjective(
        reference="forge.objective.classification:Classification",
        metrics={"accuracy": "max", "f1": "max", "mse": "min", "r2": "max", **_ROUTER},
        predicts_tokens=False,
        formats=("labelled",),
        auto_class="AutoModelForSequenceClassification",
        special_tokens=("[PAD]", "[CLS]", "[SEP]"),
        needs_special_tokens=False,
        separates_examples=True,
    ),
    "seq2seq": _SEQ2SEQ,
    "span-corruption": replace(
        _SEQ2SEQ,
        reference="forge.objective.span_corruption:SpanCorruption",
        formats=("text",),
        special_tokens=("[PAD]", *SENTINELS),
        show="forge.objective.spans:show_spans",
    ),
    "distillation": replace(
        _CAUSAL_LM,
        reference="forge.objective.distillation:Distillation",
        metrics={
            "cross_entropy": "min",
            "divergence": "min",
            "agreement": "max",
            "perplexity": "min",
            **_ROUTER,
        },
    ),
    "contrastive": RegisteredObjective(
        reference="forge.objective.contrastive:Contrastive",
        metrics={"accuracy": "max", "mrr": "max", **_ROUTER},
        predicts_tokens=True,
        formats=("embedding",),
        auto_class="AutoModel",
        separates_examples=True,
    ),
}


def auto_class_of(objective: str) -> AutoClass:
    """The class of transformers that a model is built by; of a user's own objective, a causal language model's."""
    return OBJECTIVES[objective].auto_class if objective in OBJECTIVES else "AutoModelForCausalLM"


def num_labels_of(objective: str) -> int | None:
    """The number of outputs that an objective fixes; None if it does not."""
    return OBJECTIVES[objective].num_labels if objective in OBJECTIVES else None
