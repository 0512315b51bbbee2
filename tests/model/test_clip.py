"""The model, its loss and its task in one process."""

import math

import pytest
import torch
from tiny_model import SIZE, Ranks, Tokens, image_section, text_section, tiny_batch, tiny_clip, tiny_recipe
from torch.nn import functional

from clipcluster.model.clip import build_clip
from clipcluster.model.losses import contrastive
from clipcluster.model.task import ContrastiveTask

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def test_features_have_length_one() -> None:
    clip, batch = tiny_clip().eval(), tiny_batch(3)
    image = clip.encode_image(torch.randn(3, 3, SIZE, SIZE))
    text = clip.encode_text(batch.tokens, batch.mask)
    for features in (image, text):
        assert features.shape == (3, 8)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_the_scale_starts_as_told_and_stays_below_its_bound() -> None:
    clip = tiny_clip(logit_scale={"init": 20.0, "max": 30.0})
    assert clip.logit_scale.exp().item() == pytest.approx(20)
    clip.clamp_logit_scale()
    assert clip.logit_scale.exp().item() == pytest.approx(20)
    with torch.no_grad():
        clip.logit_scale.fill_(9.0)
    clip.clamp_logit_scale()
    assert clip.logit_scale.exp().item() == pytest.approx(30)


def test_projections_have_no_bias_and_keep_the_variance() -> None:
    clip = tiny_clip(embed_dim=512)
    assert clip.image_projection.bias is None
    assert clip.image_projection.weight.std().item() == pytest.approx(clip.image.width**-0.5, rel=0.02)
    assert clip.text_projection.weight.std().item() == pytest.approx(clip.text.width**-0.5, rel=0.05)


def test_the_same_seed_gives_the_same_model() -> None:
    first, same, other = (tiny_clip(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["text_projection.weight"], other["text_projection.weight"])


def test_a_checkpoint_needs_no_starting_weights() -> None:
    recipe = tiny_recipe(image=image_section(weights="/no/such/file.pth"))
    clip = build_clip(recipe, Tokens(), starting_weights=False)
    assert clip.load_state_dict(tiny_clip().state_dict()).missing_keys == []


def test_a_scale_without_dimensions_is_read() -> None:
    """Other programs, and checkpoints before format 2, hold it so."""
    state = tiny_clip(seed=1).state_dict()
    clip = tiny_clip()
    assert clip.logit_scale.shape == (1,)
    clip.load_state_dict(state | {"logit_scale": torch.tensor(3.0)})
    assert clip.logit_scale.tolist() == [3.0]


def test_the_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    image, text = (functional.normalize(torch.randn(5, 7), dim=1) for _ in range(2))
    scale = torch.tensor(12.0)
    logits = scale * image @ text.T
    expected = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    loss, accuracy = contrastive(image, text, scale, Ranks())
    torch.testing.assert_close(loss, expected)
    assert accuracy == (logits.argmax(1) == torch.arange(5)).float().mean()


def test_equal_features_lose_the_logarithm_of_the_batch() -> None:
    same = functional.normalize(torch.ones(6, 4), dim=1)
    loss, _ = contrastive(same, same, torch.tensor(100.0), Ranks())
    assert loss.item() == pytest.approx(math.log(6), rel=1e-5)


def test_the_model_sees_normalised_pixels() -> None:
    clip, batch = tiny_clip().eval(), tiny_batch(4)
    pixels = (batch.images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    image, text = clip.encode_image(pixels.float()), clip.encode_text(batch.tokens, batch.mask)
    expected, _ = contrastive(image, text, clip.logit_scale.exp().squeeze(), Ranks())
    torch.testing.assert_close(ContrastiveTask(clip, MEAN, STD, Ranks()).report(batch).loss, expected)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_loss_is_float32_whatever_autocast_does(precision: torch.dtype) -> None:
    task = ContrastiveTask(tiny_clip(), MEAN, STD, Ranks())
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        report = task.report(tiny_batch(6))
    assert report.loss.dtype == torch.float32
    assert set(report.metrics) == {"loss", "logit_scale", "batch_accuracy"}
    assert not any(value.requires_grad for value in report.metrics.values())
    report.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())


@pytest.mark.parametrize("image", ["test_vit", "resnet10t", "convnextv2_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize("text", ["gpt2", "bert", "roberta"])
def test_every_parameter_gets_a_gradient(image: str, text: str) -> None:
    # A parameter without one would keep DDP waiting, or be moved by weight decay alone.
    clip = tiny_clip(image=image_section(image), text=text_section(text))
    ContrastiveTask(clip, MEAN, STD, Ranks()).report(tiny_batch(4)).loss.backward()
    assert [name for name, p in clip.named_parameters() if p.grad is None] == []


def test_a_few_steps_learn_the_batch() -> None:
    task, batch = ContrastiveTask(tiny_clip(), MEAN, STD, Ranks()), tiny_batch(8)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        report = task.report(batch)
        report.loss.backward()
        optimizer.step()
        task.after_step()
        losses.append(report.loss.item())
    assert losses[-1] < 0.2 < losses[0]
