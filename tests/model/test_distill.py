"""Distillation: a step against the published loss, written out slowly in float64."""

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


def loss_of_pairs(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    of_image: Tensor,
    of_text: Tensor,
    contrastive: float,
    weight: float,
) -> Tensor:
    """L_Total of one batch: rows of similarities, from image to text and from text to image."""
    total, count, start = torch.zeros((), dtype=torch.float64), len(image), 0
    for queries, keys in ((image, text), (text, image)):
        for i in range(count):
            row = [scale * (queries[i] * keys[j]).sum() for j in range(count)]
            total = total - contrastive * log_softmax(row)[i] / count / 2
    for width in cases.WIDTHS:
        part = slice(start, start + width)
        start += width
        for student, teacher in (((image, text), (of_image, of_text)), ((text, image), (of_text, of_image))):
            for i in range(count):
                mine = [scale * (student[0][i] * student[1][j]).sum() for j in range(count)]
                theirs = [
                    cases.SCALE * (teacher[0][i, part] * teacher[1][j, part]).sum() for j in range(count)
                ]
                total = total + weight * divergence(mine, theirs) / count / len(cases.WIDTHS) / 2
    return total


def reference(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    settings, synthetic, _ = cases.CASES[name]
    weight = settings.get("weight", 1.0)
    contrastive = settings.get("contrastive", 1 - weight)
    model, batch = cases.student(), cases.batch_of_all(synthetic)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (cases.MEAN, cases.STD))
    image = model.encode_image((batch.images.double() / 255 - mean) / std)
    scale = model.logit_scale.exp()[0]
    assert float(scale.detach()) == pytest.approx(1 / 0.07)
    total = torch.zeros((), dtype=torch.float64)
    sets: list[Any] = [(batch.tokens, batch.mask, stored.TEXT)]
    if synthetic:
        sets.append((batch.tensor(stored.TOKENS), batch.tensor(stored.MASK), stored.SYNTHETIC_TEXT))
    for tokens, mask, embedding in sets:
        text = model.encode_text(tokens, mask)
        teachers = batch.tensor(stored.IMAGE), batch.tensor(embedding)
        total = total + loss_of_pairs(image, text, scale, *teachers, contrastive, weight)
    total.backward()
    return total.detach(), {f"model.{key}": value.grad for key, value in model.named_parameters()}


@pytest.mark.parametrize("name", cases.CASES)
def test_a_step_equals_the_published_loss_in_float64(steps: Path, name: str) -> None:
    loss, gradients = reference(name)
    for size in SIZES:
        found = torch.load(steps / f"{size}-{name}.pt")
        torch.testing.assert_close(found["loss"], loss, rtol=1e-6, atol=0)
        assert found["gradients"].keys() == gradients.keys()
        for key, expected in gradients.items():
            assert (found["gradients"][key] - expected).norm() <= 1e-6 * expected.norm(), (size, key)


def test_the_metrics_are_the_parts_of_the_loss(steps: Path) -> None:
    found = torch.load(steps / "1-mixed.pt")["metrics"]
    assert set(found) == {"loss", "logit_scale", "batch_accuracy", "contrastive_loss", "distill_loss"}
    parts = 0.25 * found["contrastive_loss"] + 0.75 * found["distill_loss"]
    assert math.isclose(found["loss"], parts, rel_tol=1e-6)
    assert set(torch.load(steps / "1-published.pt")["metrics"]) == {"loss", "logit_scale", "distill_loss"}
