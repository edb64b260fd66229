"""What built-in objectives are built with, in tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forge.config.training import TrainingSpec
from forge.data.tokenizer import train_tokenizer
from forge.objective.base import ObjectiveContext
from forge.objective.registry import OBJECTIVES
from forge.plan.inputs import LabelsInfo

TEXT = ("the quick brown fox jumps over the lazy dog; " * 20, "pack my box with five dozen liquor jugs. " * 20)
SPECIAL = ("[MASK]", "[PAD]", "[CLS]", "[SEP]")


def write_tokenizer(folder: Path, *, vocab_size: int = 300, special_tokens: Sequence[str] = SPECIAL) -> None:
    """Write a byte-level BPE with every special token that an objective may need."""
    tokenizer = train_tokenizer(TEXT, vocab_size=vocab_size, special_tokens=special_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.content)
    (folder / "tokenizer_config.json").write_text(tokenizer.config)


def context_of(folder: Path, **training: Any) -> ObjectiveContext:
    """A context whose tokenizer is written into the folder."""
    name = training.get("objective", "causal-lm")
    write_tokenizer(
        folder, special_tokens=OBJECTIVES[name].special_tokens if name == "span-corruption" else SPECIAL
    )
    return ObjectiveContext(
        training=TrainingSpec.model_validate({"total_steps": 1, **training}),
        tokenizer=folder,
        has_positionwise_head=True,
        labels=LabelsInfo(names=("bad", "good"), train_counts=(1, 1), held_out_counts=(1, 1), num_train=2),
    )
