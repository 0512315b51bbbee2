"""Settings known to train badly: each with its arithmetic, and a name by which it is allowed. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from clipcluster.recipe.plan import LONG_WARMUP, Plan, shown_warmup
from clipcluster.recipe.sections.checks import CheckName
from clipcluster.recipe.sections.model import TimmImageTower
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.text import counted

Finding = tuple[CheckName, str]

WARMUP_STEPS, WARMUP_EPOCHS = 2000, 2  # more than both is long for a loss over the batch
ENOUGH_STEPS, LARGE_BATCH = 2000, 512
SLOW_BETA2 = 0.995
TEXT_SAMPLES = 1_000_000  # with fewer a text tower from scratch learns its language slowly
AUGMENTED_SAMPLES = (100_000, 10_000_000)  # between them an image tower from scratch needs strong crops
WEAK_CROP, PASSES = 0.7, 5
LR, LR_BATCH, SMALL_BATCH, LR_FACTOR = 5e-4, 512, 256, 10
# ResNets, with variants such as wide_resnet50_2, seresnext50 and resnetv2_50.
_RESNET = re.compile(r"resne[xs]?t|res2net")


def findings(recipe: Recipe, plan: Plan, samples: int) -> Iterator[Finding]:
    """The settings that are known to train badly, (name, text) each; `samples` as the sampler counts them."""
    for check in (_warmup, _steps, _beta2, _text, _augmentation, _learning_rate):
        text = check(recipe, plan, samples)
        if text is not None:
            yield text


def _contrastive(recipe: Recipe) -> bool:
    return TASKS[recipe.task].loss_over == "batch"


def _image_from_scratch(recipe: Recipe) -> bool:
    return recipe.model.weights_of("image") is None


def _warmup(recipe: Recipe, plan: Plan, samples: int) -> Finding | None:
    warmup, total, epoch = plan.warmup_steps, plan.total_steps, plan.steps_per_epoch
    text = shown_warmup(recipe, warmup)
    if warmup > LONG_WARMUP * total:
        whole = counted(total, "step")
        return "long-warmup", f"{text} is {warmup / total:.1%} of the run's {whole}; 2% to 10% is usual"
    if _contrastive(recipe) and warmup > max(WARMUP_STEPS, WARMUP_EPOCHS * epoch):
        return (
            "long-warmup",
            f"{text} is {warmup / epoch:.1f} epochs of {counted(epoch, 'step')} before optim.lr is reached; "
            f"1,000 to {WARMUP_STEPS:,} steps are usual",
        )
    return None


def _steps(recipe: Recipe, plan: Plan, samples: int) -> Finding | None:
    if plan.total_steps >= ENOUGH_STEPS or plan.batch_size < LARGE_BATCH or not _image_from_scratch(recipe):
        return None
    fitting = max(1, plan.total_samples // (2 * ENOUGH_STEPS))
    return (
        "few-steps",
        f"data.batch_size {plan.batch_size:,}: {plan.total_samples:,} samples are only "
        f"{counted(plan.total_steps, 'step')}, and an image tower from scratch needs some thousands; batches "
        f"of {fitting:,} make {2 * ENOUGH_STEPS:,} steps of the same samples",
    )


def _beta2(recipe: Recipe, plan: Plan, samples: int) -> Finding | None:
    beta2, image = recipe.optim.betas[1], recipe.model.image
    tower = image.timm if isinstance(image, TimmImageTower) else ""
    if beta2 < SLOW_BETA2 or not _contrastive(recipe) or not _RESNET.search(tower):
        return None
    return (
        "slow-beta2",
        f"optim.betas: beta2 {beta2:g} averages squared gradients over {1 / (1 - beta2):,.0f} steps, too "
        f"slow for the ResNet {tower} with a contrastive loss; 0.99 averages over 100, 0.98 over 50",
    )


def _text(recipe: Recipe, plan: Plan, samples: int) -> Finding | None:
    text = recipe.model.text
    if text is None or recipe.model.weights_of("text") or samples >= TEXT_SAMPLES:
        return None
    return (
        "text-from-scratch",
        f"model.text starts from scratch, and the training data have {samples:,} captioned samples, less "
        f"than {TEXT_SAMPLES:,}: it converges slowly; give model.text.weights",
    )


def _augmentation(recipe: Recipe, plan: Plan, samples: int) -> Finding | None:
    image, passes = recipe.data.image, plan.total_samples / samples
    fewest, most = AUGMENTED_SAMPLES
    if not (fewest <= samples < most and passes >= PASSES and image.crop_scale[0] > WEAK_CROP):
        return None
    if image.augment or image.color_jitter or not _contrastive(recipe) or not _image_from_scratch(recipe):
        return None
    return (
        "weak-augmentation",
        f"data.image.crop_scale begins at {image.crop_scale[0]:g}: an image tower from scratch sees "
        f"{samples:,} samples {passes:.0f} times, hardly changed, and memorises them; [0.4, 1.0] is "
        "usual at this size",
    )


def _learning_rate(recipe: Recipe, plan: Plan, samples: int) -> Finding | None:
    lr = plan.lr
    if lr == 0:
        return "learning-rate", "optim.lr is 0: no weight changes in the whole run"
    if recipe.optim.name != "adamw":
        return None
    batch = max(plan.batch_size, SMALL_BATCH)
    rule = LR * (batch / LR_BATCH) ** 0.5
    high, low = lr > LR_FACTOR * rule, lr * LR_FACTOR < rule and _image_from_scratch(recipe)
    if not (high or low):
        return None
    times = f"{lr / rule:.0f} times as much" if high else f"{rule / lr:.0f} times less"
    return (
        "learning-rate",
        f"optim.lr {lr:g}: for AdamW and batches of {plan.batch_size:,} the square-root rule gives {LR:g} x "
        f"sqrt({batch:,} / {LR_BATCH:,}) = {rule:.2g}; this is {times}",
    )
