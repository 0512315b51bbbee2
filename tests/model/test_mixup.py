"""Mixup and cutmix equal timm's for the same draws, whatever the ranks and micro-batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup as TimmMixup
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy

from clipcluster.data.loading.batch import Batch
from clipcluster.model.classify import ClassifyTask
from clipcluster.model.mixup import Mixer, draw, swapped
from clipcluster.model.task import Task
from clipcluster.recipe.sections.data import Mixup

SIDE, CLASSES = 20, 5
SETTINGS = [
    Mixup(),
    Mixup(alpha=0.0),
    Mixup(cutmix=0.0),
    Mixup(alpha=0.3, cutmix=0.5, probability=0.6, switch=0.3),
]


def images(size: int) -> torch.Tensor:
    return torch.randn(size, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_draw_mixes_as_timm_does(settings: Mixup) -> None:
    """timm mixes sample i with n - 1 - i: the same pairs, laid out so, and its generator seeded alike."""
    theirs = TimmMixup(
        settings.alpha, settings.cutmix, prob=settings.probability, switch_prob=settings.switch
    )
    size, kinds = 8, set()
    order = [*range(0, size, 2), *range(size - 1, 0, -2)]
    for seed in range(60):
        np.random.seed([seed, 1])
        expected = images(size)[order]
        lam = theirs._mix_batch(expected)
        mixer = Mixer(settings, seed=0)
        mix = draw(settings, np.random.RandomState([seed, 1]), SIDE, SIDE)
        mixer.mixes = lambda *_, mix=mix: [mix] * size  # type: ignore[method-assign]
        found, own = mixer(images(size), batch=0, slot=0)
        assert torch.equal(found[order], expected)
        assert torch.equal(own, torch.full((size,), lam))
        kinds.add("none" if lam == 1 else "mixup" if mix.box is None else "cutmix")
    assert kinds >= {"mixup"} if settings.alpha else {"cutmix"}
    assert ("none" in kinds) == (settings.probability < 1)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_parts_of_a_batch_mix_as_the_whole(mode: str) -> None:
    mixer = Mixer(Mixup(mode=mode), seed=3)
    whole, own = mixer(images(12), batch=7, slot=0)
    for cuts in ([0, 6, 12], [0, 4, 8, 12], [0, 2, 10, 12]):
        parts = [mixer(images(12)[a:b], batch=7, slot=a) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat([part for part, _ in parts]), whole)
        assert torch.equal(torch.cat([weight for _, weight in parts]), own)
    draws = {"batch": 1, "pair": 6, "elem": 12}[mode]
    assert len(set(mixer.mixes(7, range(12), SIDE, SIDE))) == draws
    assert not torch.equal(mixer(images(12), batch=8, slot=0)[0], whole)
    assert not torch.equal(Mixer(Mixup(mode=mode), seed=4)(images(12), batch=7, slot=0)[0], whole)


def test_a_cut_pair_is_refused() -> None:
    mixer = Mixer(Mixup(), seed=0)
    with pytest.raises(ValueError, match="3 samples from slot 0 on are not whole pairs"):
        mixer(images(3), 0, 0)
    with pytest.raises(ValueError, match="4 samples from slot 5 on"):
        mixer(images(4), 0, 5)


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3 * SIDE * SIDE, CLASSES)

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(pixels.flatten(1))


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_the_loss_is_timms_soft_target_cross_entropy(mode: str) -> None:
    torch.manual_seed(0)
    model, mixer = Linear().double(), Mixer(Mixup(mode=mode), seed=1)
    task = ClassifyTask(model, (0.5,) * 3, (0.25,) * 3, label_smoothing=0.1, mixer=mixer).double()
    pixels = (images(8) * 40 + 128).clamp(0, 255).to(torch.uint8)
    classes = torch.arange(8) % CLASSES
    batch = Batch(4, pixels, None, None, classes, [(slot, "shard", str(slot)) for slot in range(8)])
    report = task(Task.report, batch)
    mixed, own = mixer((pixels.double() / 255 - 0.5) / 0.25, 4, 0)
    one_hot = torch.nn.functional.one_hot(classes, CLASSES).double()
    smooth = 0.9 * one_hot + 0.1 / CLASSES
    target = own[:, None] * smooth + (1 - own[:, None]) * swapped(smooth)
    torch.testing.assert_close(report.loss, SoftTargetCrossEntropy()(model.classify(mixed), target))
    if mode == "batch":  # timm's own targets, of pairs laid out as timm has them
        order = [0, 2, 4, 6, 7, 5, 3, 1]
        expected = mixup_target(classes[order], CLASSES, lam=float(own[0]), smoothing=0.1)
        torch.testing.assert_close(target[order].float(), expected)
    parts = torch.stack([task(Task.report, part).loss for part in batch.micro_batches(4)])
    torch.testing.assert_close(parts.mean(), report.loss)
