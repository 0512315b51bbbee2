"""Accuracy and loss of classifiers whose every logit is known."""

import pytest
import torch
from oracle import context, oracle_set
from torch import Tensor, nn
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals.classification import classification
from clipcluster.evals.features import EXAMPLES
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
        return classification(Known(logits), images, context(), lambda: None).metrics


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
    each = [(order[labels == own, 0] == own).double().mean().item() for own in labels.unique()]
    assert found["mean_per_class"] == pytest.approx(sum(each) / len(each))
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits[rows].double(), labels).item())


def test_a_collapsed_model_scores_as_chance_does_and_few_classes_have_no_top_5() -> None:
    found = measure(torch.ones(20, 4), [number % 4 for number in range(20)])
    assert found["top1"] == pytest.approx(0.25)
    assert "top5" not in found


def test_a_class_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data/val has an image of class 4, and there are 4 classes \(0 to 3\)"
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
    results = suite.run(model, averaged=applied).metrics
    assert results["val/top1"] == 0.0
    assert results["val/raw_top1"] == 1.0
    expected = {"val/raw_top5", "val/raw_mean_per_class", "val/raw_loss", "val/classified_images"}
    assert expected < set(results)
    assert "val/raw_classified_images" not in results
    assert "val/raw_top1" not in suite.run(model).metrics


def test_the_details_name_worst_classes_confusions_and_confident_errors() -> None:
    """40 classes with two images each; of class c >= 30 one image, of class 0 both, are taken for another."""
    labels = [number // 2 for number in range(80)]
    logits = functional.one_hot(torch.tensor(labels), 40).float()
    wrong = {0: 7, 1: 7, **{2 * own: own - 1 for own in range(30, 40)}}
    for number, given in wrong.items():
        logits[number] = 0
        logits[number, given] = 2 + number / 100
    names = [f"class {own}" for own in range(30)]
    images = oracle_set([[] for _ in labels], labels, batch_size=7, classnames=names)
    with torch.no_grad():
        found = classification(Known(logits), images, context(), lambda: None).details
    assert len(found["classes"]) == EXAMPLES
    assert found["classes"][0] == {"class": 0, "name": "class 0", "images": 2, "top1": 0.0}
    assert found["classes"][1] == {"class": 30, "name": "30", "images": 2, "top1": 0.5}
    assert [own["class"] for own in found["classes"][11:]] == list(range(1, 14))
    assert found["confused"][0] == {
        "class": 0,
        "name": "class 0",
        "as": 7,
        "as_name": "class 7",
        "images": 2,
    }
    assert [(own["class"], own["as"], own["images"]) for own in found["confused"][1:]] == [
        (own, own - 1, 1) for own in range(30, 40)
    ]
    errors = found["confident_errors"]
    assert [own["key"] for own in errors] == [f"{number:04d}" for number in sorted(wrong, reverse=True)]
    probability = logits[78].softmax(dim=0)[38].item()
    assert errors[0] == {
        "shard": "00000.tar",
        "key": "0078",
        "class": 39,
        "name": "39",
        "as": 38,
        "as_name": "38",
        "score": pytest.approx(probability, abs=1e-4),
    }
