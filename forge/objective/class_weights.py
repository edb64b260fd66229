"""Weights of the labels in the loss of a classifier. Pure."""

from __future__ import annotations

from forge.config.classification import ClassificationSpec
from forge.plan.inputs import LabelsInfo


def weights_of(spec: ClassificationSpec, labels: LabelsInfo) -> tuple[float, ...] | None:
    """Return the weight of each label, None without any.

    Balanced weights are `n / (K · n_k)` of a label that n_k of n training labels are, as in scikit-learn; of
    several labels at once `(n - n_k) / n_k`, as in the documentation of torch's `BCEWithLogitsLoss`. A label
    without any training example counts as one that has one.
    """
    if spec.class_weights == "none":
        return None
    if spec.class_weights != "balanced":
        return spec.class_weights
    counts = [max(1, count) for count in labels.train_counts]
    if spec.kind == "multi":
        return tuple(max(1, labels.num_train - count) / count for count in counts)
    return tuple(labels.num_train / (len(counts) * count) for count in counts)
