"""Accuracy and loss of a classifier on images with known classes."""

from __future__ import annotations

from clipcluster.evals.classes import accuracies, class_details, classified
from clipcluster.evals.features import Context, EvaluationSet, Measured, Tick
from clipcluster.model.protocols import Classifier


def classification(model: Classifier, images: EvaluationSet, context: Context, tick: Tick) -> Measured:
    """`accuracies` over the `classified_images`, and `loss`, the mean cross-entropy without label smoothing.

    Ties go to the lower class. An image without a class is not counted. Collective; raises as `classified`.
    """
    found = classified(images, model.classify, 1.0, context, tick, "evaluate.classification")
    counts = {"loss": float(found.losses.mean()), "classified_images": float(len(found.classes))}
    return Measured({**accuracies(found), **counts}, class_details(found, images.classnames))
