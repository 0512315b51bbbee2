"""Distillation: a step against the published losses, written out slowly in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import distill_of_ranks as cases
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from clipcluster.data.loading import stored

SIZES = (1, 3)
WORKER = Path(cases.__file__)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distill")
    command = [sys.executable, str(WORKER), str(out), *map(str, SIZES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return out


def log_softmax(values: list[Tensor]) -> list[Tensor]:
    total = sum((value.exp() for value in values[1:]), values[0].exp())
    return [value - total.log() for value in values]


def divergence(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """KL(teacher || student) of two rows of logits, term by term."""
    terms = [
        of_teacher.exp() * (of_teacher - of_student)
        for of_student, of_teacher in zip(log_softmax(student), log_softmax(teacher), strict=True)
    ]
    return sum(terms[1:], terms[0])


def contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    total, count = torch.zeros((), dtype=torch.float64), len(image)
    for queries, keys in ((image, text), (text, image)):
        for i in range(count):
            row = [scale * (queries[i] * keys[j]).sum() for j in range(count)]
            total = total - log_softmax(row)[i] / count / 2
    return total


def relational(image: Tensor, text: Tensor, scale: Tensor, taught: tuple[Tensor, Tensor], own: Any) -> Tensor:
    """L_Distill of one teacher: rows of similarities, from image to text and from text to image."""
    total, count = torch.zeros((), dtype=torch.float64), len(image)
    for student, teacher in (((image, text), taught), ((text, image), taught[::-1])):
        for i in range(count):
            mine = [scale * (student[0][i] * student[1][j]).sum() for j in range(count)]
            theirs = [own * (teacher[0][i] * teacher[1][j]).sum() for j in range(count)]
            total = total + divergence(mine, theirs) / count / 2
    return total


TeacherFeatures = tuple[tuple[Tensor, Tensor], Any]


def taught_by_models(batch: Any) -> list[TeacherFeatures]:
    found: list[TeacherFeatures] = []
    for number, (size, mean, std) in enumerate(cases.PIXELS):
        model = cases.teacher(number).eval()
        images = normalised(batch.images, mean, std)
        if number:
            images = functional.interpolate(images, (size, size), mode="bicubic", antialias=True)
        tokens = [batch.tensor(name) for name in cases.OWN_TOKENS] if number else [batch.tokens, batch.mask]
        with torch.no_grad():
            pair = model.encode_image(images), model.encode_text(*tokens)
            found.append((pair, 30.0 if number else model.logit_scale.exp()[0]))
    return found


def taught_by_stored(batch: Any, embedding: str) -> list[TeacherFeatures]:
    ends = [0, *torch.tensor(cases.WIDTHS).cumsum(0).tolist()]
    parts = [slice(*ends[number : number + 2]) for number in range(len(cases.WIDTHS))]
    image, text = batch.tensor(stored.IMAGE), batch.tensor(embedding)
    return [((image[:, part], text[:, part]), cases.SCALE) for part in parts]


def normalised(images: Tensor, mean: Any, std: Any) -> Tensor:
    # the task keeps them in float32
    centre, width = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (mean, std))
    return (images.double() / 255 - centre) / width


def length_one(features: Tensor) -> Tensor:
    return features / features.pow(2).sum(dim=1, keepdim=True).sqrt()


def reference(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a case, and its gradients by the names of the task's parameters."""
    settings, synthetic, _ = cases.CASES[name]
    weight = settings.get("weight", 1.0)
    model, batch = cases.student(), cases.batch_of_all(synthetic)
    projections = cases.projections(settings)
    image = model.encode_image(normalised(batch.images, cases.MEAN, cases.STD))
    scale = model.logit_scale.exp()[0]
    total = torch.zeros((), dtype=torch.float64)
    sets: list[Any] = [(batch.tokens, batch.mask, stored.TEXT)]
    if synthetic:
        sets.append((batch.tensor(stored.TOKENS), batch.tensor(stored.MASK), stored.SYNTHETIC_TEXT))
    for tokens, mask, embedding in sets:
        text = model.encode_text(tokens, mask)
        taught = taught_by_stored(batch, embedding) if "stored" in settings else taught_by_models(batch)
        total = total + settings.get("contrastive", 1 - weight) * contrastive(image, text, scale)
        for number, (pair, own) in enumerate(taught):
            found = weight * relational(image, text, scale, pair, own) if weight else 0.0
            sides = {"image": (image, pair[0]), "text": (text, pair[1])}
            for side, (student, teacher) in sides.items():
                weights = projections.get(f"{side}-{number}")
                mine = student if weights is None else length_one(student @ weights.T)
                if settings.get("feature_mse"):
                    found = found + settings["feature_mse"] * (mine - teacher).pow(2).mean()
                if settings.get("feature_cosine") and side == "image":
                    found = found + settings["feature_cosine"] * (1 - (mine * teacher).sum(dim=1).mean())
            total = total + found / len(taught)
    total.backward()
    gradients = {f"model.{key}": value.grad for key, value in model.named_parameters()}
    named = {f"model.teacher_projections.{key}.weight": value.grad for key, value in projections.items()}
    return total.detach(), {**gradients, **named}


@pytest.mark.parametrize("name", cases.CASES)
def test_a_step_equals_the_published_loss_in_float64(steps: Path, name: str) -> None:
    loss, gradients = reference(name)
    for size in SIZES:
        found = torch.load(steps / f"{size}-{name}.pt")
        torch.testing.assert_close(found["loss"], loss, rtol=1e-9, atol=0)
        assert found["gradients"].keys() == gradients.keys()
        for key, expected in gradients.items():
            assert (found["gradients"][key] - expected).norm() <= 1e-8 * expected.norm(), (size, key)


def test_the_metrics_are_the_parts_of_the_loss(steps: Path) -> None:
    found = torch.load(steps / "1-mixed.pt")["metrics"]
    assert set(found) == {"loss", "logit_scale", "batch_accuracy", "contrastive_loss", "distill_loss"}
    parts = 0.25 * found["contrastive_loss"] + 0.75 * found["distill_loss"]
    assert math.isclose(found["loss"], parts, rel_tol=1e-6)
    assert set(torch.load(steps / "1-published.pt")["metrics"]) == {"loss", "logit_scale", "distill_loss"}
