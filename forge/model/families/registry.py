"""Choose the model family of a `model:` section; a new family is a file in this folder and a line here."""

from __future__ import annotations

from forge.config.model import ModelSpec
from forge.model.families.base import ModelFamily
from forge.model.families.transformers_family import TransformersFamily
from forge.model.families.user_class import UserClassFamily


def family_of(spec: ModelSpec) -> ModelFamily:
    """The family that builds and counts the model of a `model:` section."""
    return TransformersFamily() if spec.class_reference is None else UserClassFamily()
