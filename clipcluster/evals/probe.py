"""Classifiers on frozen features: nearest neighbours, and a linear probe. Both are scikit-learn's."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcluster.errors import UserError
from clipcluster.evals.features import Context, EvaluationSet, Measured, Tick, encode_images, from_all_ranks
from clipcluster.model.protocols import ImageEncoder

logger = logging.getLogger("clipcluster")
NEIGHBOURS, TEMPERATURE = 20, 0.07
C = 30.0
"""Inverse strength of the linear probe's L2 penalty, on features of length one."""
ITERATIONS, AT_ONCE = 500, 10  # of L-BFGS: in all, and between two looks for a request to stop
_ROWS = 4096  # test images classified between two


@dataclass(frozen=True)
class _Labelled:
    """Features (n, E) float32 of length one and classes (n,) int64 of the images that have a class."""

    features: np.ndarray
    classes: np.ndarray


def probe(model: ImageEncoder, images: EvaluationSet, context: Context, tick: Tick) -> Measured:
    """`knn_top1` and `linear_top1` over the `probe_images`: of classifiers fitted to `images.train`.

    The features are the model's embeddings. knn: 20 nearest neighbours, weighted by exp(cosine / 0.07), as
    DINO measures (Caron et al. 2021, appendix). linear: logistic regression by L-BFGS, C = 30, at most 500
    iterations. Rank 0 fits; what it finds is that of every rank. Both are NaN where a feature is not finite.
    Collective; raises UserError where a set has no classes, or the first only one.
    """
    assert images.train is not None, "a probe has a set to train on"
    train, test = (_labelled(model, own, context, tick) for own in (images.train, images))
    if len(np.unique(train.classes)) < 2:
        raise UserError(f"evaluate.probe: {images.train.folder} has one class only; a probe needs two")
    if not all(np.isfinite(own.features).all() for own in (train, test)):
        if context.world.is_main:
            logger.warning(
                "probe on %s: features are not finite, so neither classifier is fitted", images.name
            )
        count = float(len(test.classes))
        return Measured({"knn_top1": math.nan, "linear_top1": math.nan, "probe_images": count})
    found = {
        "knn_top1": _knn(train, test, context, tick),
        "linear_top1": _linear(train, test, context, tick),
        "probe_images": float(len(test.classes)),
    }
    return Measured(found)


def _labelled(model: ImageEncoder, images: EvaluationSet, context: Context, tick: Tick) -> _Labelled:
    known = encode_images(model, images, context, tick)
    classes = from_all_ranks({at: own for at, own in known.classes.items() if own >= 0}, context.world)
    if not classes:
        raise UserError(f"evaluate.probe: no image in {images.folder} has a class (KEY.cls in its shards).")
    rows = np.array(list(classes))
    return _Labelled(known.features.cpu().numpy()[rows], np.array(list(classes.values())))


def _knn(train: _Labelled, test: _Labelled, context: Context, tick: Tick) -> float:
    model = _neighbours(train) if context.world.is_main else None
    return _accuracy(model, test, context, tick)


def _neighbours(train: _Labelled) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distances: np.ndarray) -> np.ndarray:
        # Of vectors of length one the squared distance is 2 - 2 cosine.
        return np.exp(-(distances**2) / (2 * TEMPERATURE))

    count = min(NEIGHBOURS, len(train.classes))
    model = KNeighborsClassifier(count, weights=weights, algorithm="brute")
    return model.fit(train.features, train.classes)  # keeps the features, no more


def _linear(train: _Labelled, test: _Labelled, context: Context, tick: Tick) -> float:
    model = _regression() if context.world.is_main else None

    def some_iterations() -> bool:
        from sklearn.exceptions import ConvergenceWarning

        assert model is not None, "rank 0 alone fits"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of a part of the iterations
            model.fit(train.features, train.classes)
        return bool(model.n_iter_.max() < AT_ONCE)

    for _ in range(ITERATIONS // AT_ONCE):
        tick()
        if context.world.while_main(some_iterations):
            break
    else:
        if context.world.is_main:
            logger.info("the linear probe has not converged in %d iterations", ITERATIONS)
    return _accuracy(model, test, context, tick)


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=C, max_iter=AT_ONCE, warm_start=True)


def _accuracy(model: Any, test: _Labelled, context: Context, tick: Tick) -> float:
    """The fraction of images given their class; rank 0, which alone has a model, predicts rows by rows."""
    right = 0
    for start in range(0, len(test.classes), _ROWS):
        rows = slice(start, start + _ROWS)

        def some(rows: slice = rows) -> int:
            return int((model.predict(test.features[rows]) == test.classes[rows]).sum())

        tick()
        right += context.world.while_main(some)
    return right / len(test.classes)
