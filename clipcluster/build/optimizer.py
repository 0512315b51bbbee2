"""The optimizer and the schedule of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from clipcluster.errors import UserError
from clipcluster.model.layer_decay import layer_scales
from clipcluster.recipe.plan import Plan
from clipcluster.recipe.rates import rates
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.train.optimizer import Hyperparameters, Optimizer, decaying
from clipcluster.train.schedule import Schedule, learning_rate, weight_decay
from clipcluster.train.timm_optimizers import timm_optimizer, trains_matrices

FALLBACK = "fallback_list"  # in optim.args; timm's name for it


def build_optimizer(recipe: Recipe, model: nn.Module, total_steps: int) -> Optimizer:
    """The optimizer over the parameters of a model that train. Raises UserError as `try_optimizer`."""
    optim, end = recipe.optim, recipe.optim.weight_decay_end
    return Optimizer(
        model,
        lr=rates(recipe).peak,
        betas=optim.betas,
        eps=optim.eps,
        name=optim.name,
        args=_arguments(recipe),
        hyperparameters=hyperparameters(recipe, model),
        decay_at=lambda step, start: (
            weight_decay(step, start=start, end=end, total=total_steps)
            if end is not None and start > 0  # a tower without weight decay never gets any
            else start
        ),
    )


def try_optimizer(recipe: Recipe, model: nn.Module) -> None:
    """Check the optimizer of a recipe without allocating its state.

    Raises UserError for an optimizer that is unknown or cannot be used, arguments that it does not take,
    patterns that match no parameter, and keys for a part that the model does not have.
    """
    hyperparameters(recipe, model)
    if recipe.optim.name != "adamw":
        timm_optimizer(recipe.optim.name, _arguments(recipe), rates(recipe).peak)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """`optim.args` without `fallback_list`, which is no argument of the optimizer's class."""
    args = dict(recipe.optim.args)
    if _has_fallback(recipe):
        args.pop(FALLBACK, None)
    return args


def build_schedule(recipe: Recipe, plan: Plan) -> Schedule:
    """From the step to the learning rate."""
    return partial(
        learning_rate,
        peak=plan.lr,
        warmup=plan.warmup_steps,
        total=plan.total_steps,
        name=recipe.optim.schedule,
        minimum=recipe.optim.min_lr,
        cooldown=plan.cooldown_steps,
    )


def hyperparameters(recipe: Recipe, model: nn.Module) -> dict[str, Hyperparameters]:
    """The hyperparameters of each parameter of a model, by name. Raises UserError as `try_optimizer`."""
    optim, factors, decays = recipe.optim, rates(recipe), decaying(model, recipe.optim.no_decay)
    names = [name for name, _ in model.named_parameters()]
    _check_patterns("optim.no_decay", optim.no_decay, names)
    for key, section in (("image", optim.image), ("text", optim.text), ("logit_scale", optim.logit_scale)):
        if section != type(section)() and key not in map(part_of, names):
            raise UserError(f"optim.{key} has no effect: the model of task {recipe.task} has no such part")
    fallback, scales = _fallback(recipe, model, names), _layer_scales(recipe, model)
    found = {}
    for name in names:
        part = part_of(name)
        own = getattr(optim, part).weight_decay if part in ("image", "text") else None
        decay = optim.weight_decay if own is None else own
        found[name] = Hyperparameters(
            lr_factor=(getattr(factors, part) if part else 1.0) * scales.get(name, 1.0),
            weight_decay=decay if name in decays else None,
            fallback=name in fallback,
        )
    return found


def _layer_scales(recipe: Recipe, model: nn.Module) -> dict[str, float]:
    """Parameter name -> its factor by layer, in towers with `layer_decay`; not for projections and heads."""
    found = {}
    for part, own in (("image", recipe.optim.image), ("text", recipe.optim.text)):
        if own.layer_decay is None:
            continue
        groups = getattr(own, "layer_ids", "blocks") == "groups"
        try:
            scales = layer_scales(getattr(model, part), own.layer_decay, groups=groups)
        except UserError as error:
            raise UserError(f"optim.{part}.{error}") from None
        found.update({f"{part}.{name}": scale for name, scale in scales.items()})
    return found


def part_of(name: str) -> str | None:
    """The section of `optim` that a parameter belongs to: image, text or logit_scale; None for a head."""
    parts = {"image": "image", "text": "text", "logit": "logit_scale"}
    return next((part for start, part in parts.items() if name.startswith(start)), None)


def _fallback(recipe: Recipe, model: nn.Module, names: Sequence[str]) -> set[str]:
    """The matrices that AdamW trains with an optimizer of Muon's family: embeddings, and those listed."""
    optim = recipe.optim
    if not _has_fallback(recipe):
        return set()
    patterns = optim.args.get(FALLBACK, ())
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"optim.args.{FALLBACK} should be a list of patterns of parameter names")
    _check_patterns(f"optim.args.{FALLBACK}", patterns, names)
    embeddings = {
        f"{owner}.{name}"
        for owner, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }
    listed = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return embeddings | listed


def _has_fallback(recipe: Recipe) -> bool:
    return recipe.optim.name != "adamw" and trains_matrices(recipe.optim.name)


def _check_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = f"{', '.join(names[:3])}, … (* fits any text)"
            raise UserError(f"{key}: {pattern!r} fits no parameter; their names are {shown}")
