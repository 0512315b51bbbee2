"""The losses against slow, plain references in float64, on one process and on three, and against OpenCLIP."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from losses_of_ranks import BATCH, CASES, answer, features, open_clip_losses, theirs
from pydantic import ValidationError
from tiny_model import tiny_clip, tiny_recipe

from clipcluster.model.losses import contrastive, siglip
from clipcluster.model.task import build_contrastive
from clipcluster.recipe.sections.loss import Loss
from clipcluster.runtime.world import World

SIZE = 3
ALONE = World(0, 1, 0, torch.device("cpu"))
WORKER = Path(__file__).with_name("losses_of_ranks.py")


def plain_clip(given: dict[str, torch.Tensor], smoothing: float) -> torch.Tensor:
    """Figure 3 of Radford et al., pair by pair, with smoothed targets."""
    total = torch.zeros((), dtype=torch.float64)
    for one, other in (("image", "text"), ("text", "image")):
        for i in range(BATCH):
            logits = [given["scale"] * (given[one][i] * given[other][j]).sum() for j in range(BATCH)]
            normaliser = sum(logit.exp() for logit in logits)
            for j, logit in enumerate(logits):
                target = (1 - smoothing) * (i == j) + smoothing / BATCH
                total = total - target * (logit.exp() / normaliser).log()
    return total / (2 * BATCH)


def plain_siglip(given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Algorithm 1 of Zhai et al., pair by pair."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(BATCH):
        for j in range(BATCH):
            logit = given["scale"] * (given["image"][i] * given["text"][j]).sum() + given["bias"]
            sign = 1.0 if i == j else -1.0
            total = total + (1 + (-sign * logit).exp()).log()
    return total / BATCH


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """What the references give by case."""
    found = {}
    for case, options in CASES.items():
        given = features()
        smoothing = float(options.get("label_smoothing", 0.0))
        loss = plain_siglip(given) if case.startswith("siglip") else plain_clip(given, smoothing)
        loss.backward()
        gradients = {name: value.grad for name, value in given.items() if value.grad is not None}
        similarities = given["image"].detach() @ given["text"].detach().T
        right = (similarities.argmax(dim=1) == torch.arange(BATCH)).float().mean()
        found[case] = {"loss": loss.detach(), "accuracy": right, "gradients": gradients}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each of three ranks found by case."""
    out = tmp_path_factory.mktemp("losses")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out), str(SIZE)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in range(SIZE)]


def joined(ranks: list[dict[str, dict[str, Any]]], case: str) -> dict[str, Any]:
    """The ranks' answers as one: means, and rows in the order of ranks, scaled as DDP's mean scales them."""
    found = [answers[case] for answers in ranks]
    gradients = {}
    for name in found[0]["gradients"]:
        parts = [one["gradients"][name] for one in found]
        gradients[name] = torch.cat(parts) / SIZE if parts[0].ndim else torch.stack(parts).mean()
    means = {
        name: torch.stack([one[name] for one in found]).mean()
        for name in ("loss", "accuracy")
        if name in found[0]
    }
    return {**means, "gradients": gradients}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-12, atol=0)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert (found["gradients"][name] - gradient).norm() <= 1e-12 * gradient.norm(), name
    if "accuracy" in found and "accuracy" in expected:
        assert found["accuracy"] == pytest.approx(float(expected["accuracy"]))


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_a_plain_reference(
    expected: dict[str, Any], ranks: list[dict[str, Any]], case: str
) -> None:
    assert 0 < expected[case]["accuracy"] < 1
    assert_equal(answer(case, ALONE), expected[case])
    assert_equal(joined(ranks, case), expected[case])


@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_losses_equal_those_of_openclip(
    expected: dict[str, Any], ranks: list[dict[str, Any]], case: str
) -> None:
    module = open_clip_losses()
    if module is None:
        pytest.skip("open_clip is not installed")
    assert_equal(theirs(case, module, ALONE), expected[case])
    for own in ranks:
        assert_equal(own[case], own[f"open_clip {case}"])


def test_no_more_logits_are_kept_than_a_chunk_has() -> None:
    """Neither for the backward pass; in one piece all of them are."""
    whole = BATCH * BATCH
    largest = {}
    for case in CASES:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, sizes=sizes: (sizes.append(value.numel()), value)[1], lambda value: value
        ):
            answer(case, ALONE)
        largest[case] = max(sizes)
    assert largest["clip"] == largest["clip-smoothed"] == whole
    assert largest["clip-smoothed-chunks"] < whole / 2
    assert largest["siglip"] == largest["siglip-chunks"] < whole / 2


def test_chunks_of_any_size_give_the_same_in_float32() -> None:
    given = features(dtype=torch.float32)
    image, text, scale, bias = given.values()
    for chunk in (None, 1, 5, BATCH, 100):
        loss, right = contrastive(image, text, scale, ALONE, chunk=chunk)
        torch.testing.assert_close(loss, contrastive(image, text, scale, ALONE)[0], rtol=1e-6, atol=0)
        assert loss.dtype == torch.float32
        loss, also = siglip(image, text, scale, bias, ALONE, chunk=chunk)
        torch.testing.assert_close(loss, siglip(image, text, scale, bias, ALONE)[0], rtol=1e-6, atol=0)
        assert right == pytest.approx(float(also))


def test_a_bias_belongs_to_siglip() -> None:
    def task_of(loss: dict[str, Any], bias: dict[str, float] | None, clip: Any = None) -> Any:
        recipe = tiny_recipe(logit_bias=bias, logit_scale={"init": 10.0, "max": None})
        recipe.loss = Loss(**loss)
        return build_contrastive(recipe, clip or tiny_clip(logit_bias=bias), ALONE)

    task = task_of({"name": "siglip", "chunk": 2}, {})
    given = features(dtype=torch.float32)
    report = task.loss({"image": given["image"], "text": given["text"]})
    assert task.model.logit_bias.shape == (1,)
    assert set(report.metrics) == {"loss", "logit_scale", "logit_bias", "batch_accuracy"}
    assert float(report.metrics["logit_bias"]) == -10
    report.loss.backward()
    assert task.model.logit_bias.grad.item() < 0  # too many pairs are said not to belong together
    with pytest.raises(ValidationError, match=r"label_smoothing: not defined for loss\.name siglip"):
        Loss(name="siglip", label_smoothing=0.1)
    # A model made with siglip trains on with clip, its bias fixed.
    assert not task_of({}, None, tiny_clip(logit_bias={})).model.logit_bias.requires_grad


def test_the_scale_has_no_bound_where_the_recipe_says_so() -> None:
    bounded = tiny_clip()
    free = tiny_clip(logit_bias={}, logit_scale={"init": 117.3, "max": None})
    for clip in (bounded, free):
        with torch.no_grad():
            clip.logit_scale.fill_(math.log(117.3))
        clip.clamp_logit_scale()
    assert bounded.logit_scale.exp().item() == pytest.approx(100)
    assert free.logit_scale.exp().item() == pytest.approx(117.3)
    state = {
        name: value.squeeze() if name.startswith("logit") else value
        for name, value in free.state_dict().items()
    }
    free.load_state_dict(state)  # as other programs hold scale and bias, without a dimension
