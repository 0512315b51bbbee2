"""The learning rates of a recipe, resolved from its global batch. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from clipcluster.errors import UserError
from clipcluster.recipe.sections.optim import LearningRate, PerBatch
from clipcluster.recipe.sections.recipe import Recipe


@dataclass(frozen=True)
class PeakRates:
    """The peak of the schedule, and the learning rates of parts of the model as multiples of it.

    peak: the learning rate of `optim.lr` after the warm-up. image, text, logit_scale: factors of the
    schedule's learning rate for the parameters of these parts.
    """

    peak: float
    image: float
    text: float
    logit_scale: float


def rates(recipe: Recipe) -> PeakRates:
    """The learning rates of a recipe.

    Raises:
        UserError: min_lr is not below the peak, or a part has a learning rate of its own and the peak is 0.
    """
    optim = recipe.optim
    peak = _resolved(recipe, optim.lr)
    if optim.min_lr and optim.min_lr >= peak:
        raise UserError(
            f"optim.min_lr {optim.min_lr:g} is not below optim.lr {_shown(recipe, optim.lr)}; set it lower"
        )
    factors = {}
    for name, given in _own(recipe).items():
        if given is not None and peak == 0:
            raise UserError(
                f"optim.lr is 0 and optim.{name}.lr is {_shown(recipe, given)}: the rates of parts are "
                "multiples of optim.lr, so set it above 0"
            )
        factors[name] = 1.0 if given is None else _resolved(recipe, given) / peak
    return PeakRates(peak, **factors)


def describe_rates(recipe: Recipe) -> str:
    """The learning rates with their arithmetic: ``0.008 = 0.0005 x 4,096 / 256; image tower 0.001``."""
    names = {"image": "image tower", "text": "text tower", "logit_scale": "logit scale"}
    parts = [_shown(recipe, recipe.optim.lr)]
    parts += [
        f"{names[part]} {_shown(recipe, given)}" for part, given in _own(recipe).items() if given is not None
    ]
    return "; ".join(parts)


def _own(recipe: Recipe) -> dict[str, LearningRate | None]:
    optim = recipe.optim
    return {"image": optim.image.lr, "text": optim.text.lr, "logit_scale": optim.logit_scale.lr}


def _resolved(recipe: Recipe, given: LearningRate) -> float:
    return given.at(recipe.data.batch_size) if isinstance(given, PerBatch) else given


def _shown(recipe: Recipe, given: LearningRate) -> str:
    text = f"{_resolved(recipe, given):.6g}"
    return f"{text} = {given.arithmetic(recipe.data.batch_size)}" if isinstance(given, PerBatch) else text
