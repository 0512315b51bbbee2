"""Zero-shot classification on models whose every similarity is known."""

import pytest
import torch
from oracle import Oracle, context, oracle_set
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals import zero_shot as zero_shot_module
from clipcluster.evals.zero_shot import class_vectors, zero_shot

# Class c in template t is caption number 10 t + c.
TEMPLATES = ["sight {c}", "drawing 1{c}"]


def measure(
    model: Oracle, classes: list[int], names: int, templates: list[str] = TEMPLATES
) -> dict[str, float]:
    images = oracle_set(
        [[] for _ in classes],
        classes,
        classnames=[str(number) for number in range(names)],
        templates=templates,
    )
    return zero_shot(model, images, context(3), lambda: None).metrics


@pytest.mark.parametrize("at_once", [zero_shot_module.PROMPTS, 4, 1])
def test_class_vectors_are_normalised_means_of_normalised_templates(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_shot_module, "PROMPTS", at_once)
    torch.manual_seed(0)
    texts = functional.normalize(torch.randn(20, 6), dim=1)
    images = oracle_set([[]], [0], classnames=["0", "1", "2"], templates=TEMPLATES)
    found = class_vectors(Oracle(torch.eye(6), texts), images, context(2), lambda: None)
    torch.testing.assert_close(found, functional.normalize((texts[:3] + texts[10:13]) / 2, dim=1))


def test_top_1_and_top_5() -> None:
    # Every image likes class 0 best, then 1, and so on.
    falling = functional.normalize(torch.arange(8, 0, -1).float(), dim=0)
    found = measure(
        Oracle(falling.expand(10, 8), torch.eye(8).repeat(3, 1)), [0, 0, 1, 4, 5, 7, -1], 8, ["sight {c}"]
    )
    assert found == {
        "zero_shot_top1": pytest.approx(2 / 6),
        "zero_shot_top5": pytest.approx(4 / 6),
        "zero_shot_mean_per_class": pytest.approx(1 / 5),  # of the classes 0, 1, 4, 5 and 7
        "zero_shot_images": 6,
    }


def test_top_5_is_left_out_below_five_classes() -> None:
    model = Oracle(torch.eye(4), torch.eye(4).repeat(5, 1))
    assert "zero_shot_top5" not in measure(model, [0, 1, 2, 3], 4, ["sight {c}"])
    model = Oracle(torch.eye(5), torch.eye(5).repeat(4, 1))
    assert measure(model, [0, 1, 2, 3, 4], 5, ["sight {c}"])["zero_shot_top5"] == 1


def test_a_collapsed_model_scores_as_chance_does() -> None:
    same = functional.normalize(torch.ones(100, 16), dim=1)
    found = measure(Oracle(same, same), [number % 10 for number in range(50)], 10)
    assert found["zero_shot_top1"] == pytest.approx(0.1)
    assert found["zero_shot_top5"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("classes", "beside", "message"),
    [
        ([0], {"templates": TEMPLATES}, r"data/val has no classnames\.txt"),
        ([0], {"classnames": ["0"]}, r"data/val has no zeroshot_classification_templates\.txt"),
        ([0], {"classnames": ["0"], "templates": ["a photo 0"]}, r"no \{c\} for the class name: 'a photo 0'"),
        (
            [2],
            {"classnames": ["0", "1"], "templates": TEMPLATES},
            r"there are 2 classes \(0 to 1\)",
        ),
        ([-1], {"classnames": ["0"], "templates": TEMPLATES}, r"no image in data/val has a class"),
    ],
)
def test_what_is_missing_is_said(classes: list[int], beside: dict[str, list[str]], message: str) -> None:
    images = oracle_set([[] for _ in classes], classes, **beside)
    with pytest.raises(UserError, match=message):
        zero_shot(Oracle(torch.eye(20), torch.eye(20)), images, context(), lambda: None)
