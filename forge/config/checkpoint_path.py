"""Paths and URLs of checkpoints, which can stand where pretrained weights are named. Nothing is opened here."""

from __future__ import annotations

import re

_NAME = re.compile(r"step-\d{8,}")


def is_checkpoint(source: str) -> bool:
    """Whether a path or URL names a checkpoint, by its last part: `runs/RUN/checkpoints/step-00001000`."""
    url, _, name = source.rstrip("/").rpartition("/")
    return bool(url) and _NAME.fullmatch(name) is not None


def tokenizer_of(source: str) -> str:
    """Return the folder of the tokenizer that belongs to pretrained weights: for a checkpoint, that of its run."""
    if not is_checkpoint(source):
        return source
    checkpoints = source.rstrip("/").rpartition("/")[0]
    run, separator, _ = checkpoints.rpartition("/")
    return f"{run if separator else '.'}/tokenizer"
