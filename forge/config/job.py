"""The job file. Its sections are in the order of a run, from model to tracking."""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import itemgetter

from pydantic import Field, field_validator, model_validator

from forge.config.alerts import AlertsSpec, alert_problems
from forge.config.checkpoint_path import tokenizer_of
from forge.config.classification import LabelsSpec
from forge.config.data import DataSpec, TokenizerSpec
from forge.config.evaluate import EvaluateSpec
from forge.config.metrics import check_metrics
from forge.config.model import ModelSpec
from forge.config.resources import CheckpointSpec, ResourcesSpec, TrackingSpec
from forge.config.search import SearchSpec
from forge.config.section import FieldError, FieldErrors, Section, raise_errors
from forge.config.training import TrainingSpec
from forge.data.formats.registry import FORMATS
from forge.objective.registry import OBJECTIVES, SENTINELS
from forge.user_code import is_reference

_NAME = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"


class JobSpec(Section):
    """What is trained, on which data, for how long, and on which machines."""

    name: str = Field(max_length=48, json_schema_extra={"pattern": _NAME})
    """Lower-case letters, digits and dashes; run ids start with it."""

    code: str | None = Field(None, min_length=1)
    """A folder with Python code of your own, such as `./src`, relative to the current folder. It is packed (at most
    16 MiB and 1000 files; without hidden files and `__pycache__`), kept in the run folder, and made importable in
    every process of the run, so that `training.objective`, `model.class` and `data.format` can name a class in it:
    `my_losses:Ranking`. See docs/extending.md."""

    model: ModelSpec
    """The network."""

    data: DataSpec
    """The training data."""

    training: TrainingSpec
    """What is minimised, for how long, and with which optimizer."""

    evaluate: EvaluateSpec | None = None
    """Tasks that the run is scored in after its last step."""

    checkpoint: CheckpointSpec = CheckpointSpec()
    """Durable checkpoints, and snapshots in memory."""

    resources: ResourcesSpec = ResourcesSpec()
    """Workers, GPUs and cost limits."""

    tracking: TrackingSpec = TrackingSpec()
    """Experiment tracking besides `metrics.jsonl`."""

    alerts: AlertsSpec | None = None
    """Messages when the run needs attention or is over."""

    search: SearchSpec | None = None
    """Hyperparameter search with `forge tune`: many trials instead of one run."""

    @model_validator(mode="after")
    def _sections_fit(self) -> JobSpec:
        """Check sections against each other, and fill in what one says about another."""
        errors = list(self._problems())
        try:
            self.__dict__["search"] = check_metrics(
                self.training, self.search, of_user={}, parts=[part.name for part in self.data.mixture]
            )
        except FieldErrors as error:
            errors += error.errors
        raise_errors(errors)
        if self.model.from_pretrained is not None and self.data.tokenizer.from_pretrained is None:
            # Its embeddings are of these ids. The section is frozen; this is still its construction.
            tokenizer = TokenizerSpec(
                from_pretrained=tokenizer_of(self.model.from_pretrained), add_tokens=self.data.tokenizer.add_tokens
            )
            self.__dict__["data"] = self.data.model_copy(update={"tokenizer": tokenizer})
        if self.checkpoint.keep_best is None:
            checkpoint = self.checkpoint.model_copy()  # without making it a key that the user has set
            checkpoint.__dict__["keep_best"] = 0 if self.training.early_stopping is None else 1
            self.__dict__["checkpoint"] = checkpoint
        objective = OBJECTIVES.get(self.training.objective)
        tokenizer = self.data.tokenizer
        if objective is not None and tokenizer.from_pretrained is None and not tokenizer.special_tokens:
            tokenizer = tokenizer.model_copy(update={"special_tokens": objective.special_tokens})
            self.__dict__["data"] = self.data.model_copy(update={"tokenizer": tokenizer})
        if self.data.format == "labelled" and self.data.labels.kind is None:
            labels = self.data.labels.model_copy(update={"kind": self.training.classification.kind})
            self.__dict__["data"] = self.data.model_copy(update={"labels": labels})
        return self

    @property
    def usd_limit(self) -> tuple[str, float] | None:
        """The key and value of the cost limit that is reached first; None without one."""
        limits = {"resources.max_usd": self.resources.max_usd}
        if self.search is not None:
            limits["search.max_usd"] = self.search.max_usd
        known = [(key, usd) for key, usd in limits.items() if usd is not None]
        return min(known, key=itemgetter(1), default=None)

    def _problems(self) -> Iterator[FieldError]:
        if self.search is not None and self.resources.engine != "elastic":
            yield FieldError("resources.engine", "`search` requires engine: elastic", nearest="elastic")
        if self.search is not None and self.evaluate is not None and not self.evaluate.is_in_training:
            problem = "'end' is for single runs; trials are scored at each evaluation, the best one by forge eval"
            yield FieldError("evaluate.every", problem, depends_on=("search",))
        if self.search is not None and self.resources.deadline is not None:
            problem = "is for single runs; a search ends by search.max_hours"
            yield FieldError("resources.deadline", problem, depends_on=("search",))
        if self.alerts is not None:
            is_search = self.search is not None
            yield from alert_problems(
                self.alerts,
                resources=self.resources,
                tracking=self.tracking,
                is_search=is_search,
                has_usd_limit=self.usd_limit is not None,
            )
        if self.code is None:
            problem = "names a class of your own; add the folder it is in, such as 'code: ./src'"
            for key, reference in self.user_classes.items():
                yield FieldError(key, f"{reference} {problem}", depends_on=("code",))
        if self.model.lora is not None and self.model.lora.quantize != "none" and self.training.zero.stage == 3:
            problem = "ZeRO 3 divides the weights among workers, which 4 bits do not allow; use zero.stage 0 to 2"
            yield FieldError("model.lora.quantize", problem, depends_on=("training.zero.stage",))
        if self.training.early_stopping is not None and not self.data.held_out:
            problem = f"{self.training.early_stopping.metric} is measured on held-out data, but data.held_out is 0"
            yield FieldError("training.early_stopping", problem, depends_on=("data.held_out",))
        if self.checkpoint.keep_best and not self.data.held_out:
            problem = "the best checkpoint is chosen by held-out data, but data.held_out is 0"
            yield FieldError("checkpoint.keep_best", problem, depends_on=("data.held_out",))
        tokenizer = self.data.tokenizer
        is_loaded = tokenizer.from_pretrained or self.model.is_pretrained
        if tokenizer.add_tokens and not is_loaded:
            problem = "is for a loaded tokenizer; a trained one has special_tokens"
            yield FieldError("data.tokenizer.add_tokens", problem, nearest="special_tokens")
        pretrained = next(iter(self.model.origins_of_weights), None)
        if pretrained is not None and tokenizer.from_pretrained is None:
            new = [key for key in ("train", "vocab_size") if key in tokenizer.model_fields_set]
            new = [key for key in new if getattr(tokenizer, key) != type(tokenizer).model_fields[key].default]
            problem = (
                f"is for a tokenizer trained on this corpus: the embeddings of model.{pretrained} do not "
                "know its ids; leave data.tokenizer out to use the tokenizer of the pretrained model"
            )
            yield from (FieldError(f"data.tokenizer.{key}", problem) for key in new[:1])

        yield from self._objective_problems()

    def _objective_problems(self) -> Iterator[FieldError]:
        """Yield what the objective finds wrong with the data."""
        name, tokenizer = self.training.objective, self.data.tokenizer
        objective = OBJECTIVES.get(name)
        if objective is None:
            return
        if name == "distillation" and self.training.distillation.teacher is None:
            problem = "is missing: the folder of a causal language model, a run or a checkpoint"
            yield FieldError("training.distillation.teacher", problem, depends_on=("training.objective",))
        if objective.formats and self.data.format in FORMATS and self.data.format not in objective.formats:
            fitting = " or ".join(objective.formats)
            problem = f"must be {fitting} for training.objective: {name}"
            yield FieldError("data.format", problem, depends_on=("training.objective",))
        if objective.has_reference_model:
            yield from self._reference_problems()
        if name == "classification" and self.model.class_reference is not None:
            problem = "is not possible with training.objective: classification, which trains models of transformers"
            yield FieldError("model.class", problem, depends_on=("training.objective",))
        kind, given = self.training.classification.kind, self.data.labels.kind
        if name == "classification" and given not in (None, kind):
            problem = f"must be that of training.classification.kind: {kind}; leave it out"
            yield FieldError("data.labels.kind", problem, depends_on=("training.classification.kind",))
        unread = "pair_key" if kind == "token" else "words_key"
        if name == "classification" and getattr(self.data.labels, unread) != getattr(LabelsSpec(), unread):
            problem = f"is not read with training.classification.kind: {kind}"
            yield FieldError(f"data.labels.{unread}", problem, depends_on=("training.classification.kind",))
        if kind == "regression" and self.data.labels.names is not None:
            yield FieldError("data.labels.names", "is not for kind: regression, whose labels are numbers")
        weights, names = self.training.classification.class_weights, self.data.labels.names
        if self.data.mixture and self.data.format == "labelled" and names is None and kind != "regression":
            problem = "is missing: the parts of data.mixture must number the same labels alike, so name them"
            yield FieldError("data.labels.names", problem, depends_on=("data.mixture",))
        if isinstance(weights, tuple) and names is not None and len(weights) != len(names):
            problem = f"has {len(weights)} weights for {len(names)} labels"
            yield FieldError("training.classification.class_weights", problem, depends_on=("data.labels.names",))
        missing = [token for token in objective.special_tokens if token not in tokenizer.special_tokens]
        if (
            objective.needs_special_tokens
            and tokenizer.special_tokens
            and missing
            and tokenizer.from_pretrained is None
        ):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            problem = f"lacks {', '.join(missing[:3])}{more}, which training.objective: {name} needs"
            yield FieldError("data.tokenizer.special_tokens", problem, depends_on=("training.objective",))
        if name == "span-corruption":
            yield from self._span_problems()

    def _span_problems(self) -> Iterator[FieldError]:
        """Yield that a sequence has more spans than there are sentinels, or a vocabulary no room for these."""
        count = self.training.spans.num_spans(self.data.seq_len)
        if count > len(SENTINELS):
            problem = (
                f"has {count} spans with training.spans, and T5 has {len(SENTINELS)} sentinels: lower it, or raise "
                "training.spans.mean_length"
            )
            yield FieldError("data.seq_len", problem, depends_on=("training.spans",))
        least, tokenizer = 258 + len(SENTINELS), self.data.tokenizer
        is_trained = not (tokenizer.from_pretrained or self.model.is_pretrained)
        if is_trained and tokenizer.vocab_size < least:
            problem = f"must be at least {least}: bytes, end of text, padding and {len(SENTINELS)} sentinels"
            yield FieldError("data.tokenizer.vocab_size", problem, depends_on=("training.objective",))

    def _reference_problems(self) -> Iterator[FieldError]:
        """Yield why there is no model to compare with."""
        name, lora = self.training.objective, self.model.lora
        if not self.model.is_pretrained:
            problem = (
                f"{name} compares the model with what it was before training, which must be model.from_pretrained "
                "or model.init_from; train without one with objective: orpo"
            )
            yield FieldError("training.objective", problem, depends_on=("model",))
        if lora is not None and lora.init_from is not None:
            problem = (
                f"{name} compares the model with what it was before training, which must be the model without its "
                "adapters; give the run in model.init_from, which merges them"
            )
            yield FieldError("model.lora.init_from", problem, depends_on=("training.objective",))
        if lora is None:
            return
        if self.training.dpo.reference == "stored" and lora.quantize != "none":
            problem = "must be live with model.lora.quantize: the reference is quantised too"
            yield FieldError("training.dpo.reference", problem, depends_on=("model.lora",))
        if self.training.dpo.reference == "live" and lora.modules_to_save:
            problem = "live is no reference beside model.lora.modules_to_save, whose weights change"
            yield FieldError("training.dpo.reference", problem, nearest="stored", depends_on=("model.lora",))

    @property
    def has_live_reference(self) -> bool:
        """Whether the objective asks a reference model in every step."""
        objective = OBJECTIVES.get(self.training.objective)
        has_one = objective is not None and objective.has_reference_model
        return has_one and self.training.dpo.reference == "live"

    @property
    def holds_reference(self) -> bool:
        """Whether every worker holds a reference beside the model; under adapters the model itself is one."""
        return self.has_live_reference and self.model.lora is None

    @property
    def holds_teacher(self) -> bool:
        """Whether every worker holds the teacher of a distillation."""
        spec = self.training.distillation
        return spec.teacher is not None and spec.teacher_logits == "live"

    @property
    def user_classes(self) -> dict[str, str]:
        """The keys whose value names a class in the folder of `code`: dotted key → `module:Class`."""
        given = {
            "model.class": getattr(self.model, "class", None),
            "data.format": self.data.format,
            "training.objective": self.training.objective,
        }
        return {key: value for key, value in given.items() if is_reference(value)}

    @field_validator("name")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        if not re.fullmatch(_NAME[1:-1], value):
            raise ValueError("must be lower-case letters, digits and dashes, such as 'pretrain-stdlib'")
        return value
