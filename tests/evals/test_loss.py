"""The loss of fixed groups against its definition, spelled out in float64."""

import numpy as np
import pytest
import torch
from oracle import ALONE, Oracle, context, oracle_set
from torch.nn import functional

from clipcluster.evals.loss import loss_of_groups
from clipcluster.evals.retrieval import retrieval


def of_one_group(images: np.ndarray, texts: np.ndarray, scale: float, bias: float | None) -> float:
    """The sum over the pairs of a group: CLIP's loss of both directions, or SigLIP's."""
    logits = scale * images @ texts.T
    if bias is not None:
        signs = 2 * np.eye(len(logits)) - 1
        return float(np.log1p(np.exp(-signs * (logits + bias))).sum())
    own = np.diag(logits)
    ways = [np.log(np.exp(logits).sum(axis)) - own for axis in (0, 1)]
    return float((ways[0] + ways[1]).sum() / 2)


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 7), (1, 1024), (9, 2)])
def test_the_loss_is_the_mean_over_the_pairs_of_all_groups(count: int, size: int, bias: float | None) -> None:
    torch.manual_seed(count)
    images, texts = (functional.normalize(torch.randn(count, 5), dim=1) for _ in range(2))
    model = Oracle(images, texts, bias)
    found = loss_of_groups(model, images, texts, ALONE, lambda: None, size)
    groups = -(-count // size)
    each = [[number for number in range(count) if number % groups == group] for group in range(groups)]
    assert max(map(len, each)) <= size
    scale = float(model.logit_scale.double().exp())
    pairs = [(images[own].double().numpy(), texts[own].double().numpy()) for own in each]
    expected = sum(of_one_group(*pair, scale, bias) for pair in pairs) / count
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_loss_of_a_set_does_not_depend_on_the_batches() -> None:
    torch.manual_seed(0)
    images, texts = (functional.normalize(torch.randn(n, 8), dim=1) for n in (20, 60))
    captions = [[f"caption {3 * image + number}" for number in range(3)] for image in range(20)]
    captions[4] = []
    model = Oracle(images, texts)
    found = {
        retrieval(model, oracle_set(captions, batch_size=size), context(size), lambda: None).metrics["loss"]
        for size in (1, 6, 20)
    }
    assert len(found) == 1
    rows = [number for number in range(20) if number != 4]
    firsts = texts[[3 * number for number in rows]]
    scale = float(model.logit_scale.double().exp())
    expected = of_one_group(images[rows].double().numpy(), firsts.double().numpy(), scale, None) / 19
    assert found.pop() == pytest.approx(expected, rel=1e-12)
