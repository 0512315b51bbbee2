"""Accuracy and loss of classifiers whose every logit is known."""

import pytest
import torch
from oracle import context, oracle_set
from torch import Tensor, nn
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals.classification import classification
from clipcluster.evals.suite import Suite


class Known(nn.Module):
    """Gives image i row i of `logits` (n, C)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def classify(self, images: Tensor) -> Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def measure(logits: Tensor, classes: list[int], **keys: object) -> dict[str, float]:
    images = oracle_set([[] for _ in classes], classes, **keys)
    with torch.no_grad():
        return dict(classification(Known(logits), images, context(), lambda: None))


def test_accuracies_and_loss_are_those_of_the_images_with_a_class() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(11, 8), [0, 1, 2, 3, 4, 5, 6, 7, 0, -1, 1]
    found = measure(logits, classes, left_out=[2])
    rows = [number for number in range(11) if number != 2 and classes[number] >= 0]
    labels = torch.tensor(classes)[rows]
    order = logits[rows].argsort(dim=1, descending=True)
    assert found["classified_images"] == len(rows) == 9
    assert found["top1"] == pytest.approx((order[:, 0] == labels).double().mean().item())
    assert found["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits[rows].double(), labels).item())


def test_a_collapsed_model_scores_as_chance_does_and_few_classes_have_no_top_5() -> None:
    found = measure(torch.ones(20, 4), [number % 4 for number in range(20)])
    assert found["top1"] == pytest.approx(0.25)
    assert "top5" not in found


def test_a_class_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data/val has an image of class 4, and the model 4 classes \(0 to 3\)"
    ):
        measure(torch.ones(9, 4), [0, 1, 2, 3, 0, 1, 2, 3, 4])
    with pytest.raises(UserError, match="no image in data/val has a class"):
        measure(torch.ones(2, 4), [-1, -1])
    with pytest.raises(UserError, match="no image in data/val has a class"):
        measure(torch.ones(2, 4), [0, 1], left_out=[0, 1])


def test_raw_weights_are_measured_beside_the_averaged_ones() -> None:
    from contextlib import contextmanager

    model = Known(torch.eye(6))
    raw, averaged = model.logits.data, torch.eye(6).roll(1, 0)

    @contextmanager
    def applied():
        model.logits.data = averaged
        yield
        model.logits.data = raw

    images = oracle_set([[] for _ in range(6)], list(range(6)))
    suite = Suite([("classification", images)], context())
    results = suite.run(model, averaged=applied)
    assert results["val/top1"] == 0.0
    assert results["val/raw_top1"] == 1.0
    assert {"val/raw_top5", "val/raw_loss", "val/classified_images"} < set(results)
    assert "val/raw_classified_images" not in results
    assert "val/raw_top1" not in suite.run(model)
