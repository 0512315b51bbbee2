"""Nearest neighbours and the linear probe beside plain references."""

import dataclasses

import numpy as np
import pytest
import torch
from oracle import Oracle, context, oracle_set
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals import probe
from clipcluster.evals.features import EvaluationSet

TRAIN, TEST = 180, 60


def sets(classes: list[int], left_out: tuple[int, ...] = ()) -> EvaluationSet:
    """The first images to fit to, the others to measure on: the oracle's images are numbered by value."""

    def numbered(first: int, last: int) -> EvaluationSet:
        own = [c if first <= n < last else -1 for n, c in enumerate(classes)]
        return oracle_set([[] for _ in own], own, left_out=left_out)

    return dataclasses.replace(numbered(TRAIN, TRAIN + TEST), train=numbered(0, TRAIN))


@pytest.fixture(scope="module")
def model() -> Oracle:
    torch.manual_seed(0)
    labels = torch.arange(TRAIN + TEST) % 3
    features = functional.one_hot(labels, 8).float() + torch.randn(TRAIN + TEST, 8)
    return Oracle(functional.normalize(features, dim=1), torch.zeros(1, 8))


CLASSES = [number % 3 for number in range(TRAIN + TEST)]


def test_both_are_their_definitions(model: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_ROWS", 7)
    found = probe.probe(model, sets(CLASSES, left_out=(5, TRAIN + 1)), context(), lambda: None).metrics
    train = [number for number in range(TRAIN) if number != 5]
    test = [number for number in range(TRAIN, TRAIN + TEST) if number != TRAIN + 1]
    features, classes = model.images.double().numpy(), np.array(CLASSES)
    cosines = features[test] @ features[train].T
    votes = np.zeros((len(test), 3))
    for row, own in enumerate(cosines):
        for neighbour in np.argsort(-own)[:20]:
            votes[row, classes[train][neighbour]] += np.exp(own[neighbour] / 0.07)
    assert found["knn_top1"] == np.mean(votes.argmax(axis=1) == classes[test])
    fitted = LogisticRegression(C=30.0, max_iter=5000).fit(features[train], classes[train])
    assert found["linear_top1"] == pytest.approx(fitted.score(features[test], classes[test]), abs=1 / 59)
    assert found["probe_images"] == 59
    assert min(found["knn_top1"], found["linear_top1"]) > 0.5


def test_a_stop_is_noticed_within_the_fit(model: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ten iterations: a fit that needs more asks often."""
    monkeypatch.setattr(probe, "AT_ONCE", 2)
    images, calls = sets(CLASSES), []
    probe.probe(model, images, context(), lambda: calls.append(None))
    batches = 2 * 60
    assert len(calls) > batches + 2 + 5


@pytest.mark.parametrize("broken", [3, TRAIN + 3])
def test_of_features_that_are_not_finite_there_is_no_figure(model: Oracle, broken: int) -> None:
    images = model.images.clone()
    images[broken] = float("nan")
    found = probe.probe(Oracle(images, model.texts), sets(CLASSES), context(), lambda: None).metrics
    assert np.isnan([found["knn_top1"], found["linear_top1"]]).all()
    assert found["probe_images"] == 60


@pytest.mark.parametrize(
    ("classes", "message"),
    [([-1] * 240, "no image in data/val has a class"), ([1] * 240, "has one class only; a probe needs two")],
)
def test_what_cannot_be_fitted_is_said(model: Oracle, classes: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe.probe(model, sets(classes), context(), lambda: None)
