"""The stages of a run: the recipe's `freeze`, applied to the layers of the model's towers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipcluster.build.data import open_sources
from clipcluster.build.model import build_model
from clipcluster.errors import UserError
from clipcluster.model.layers import Layer, layers_of
from clipcluster.model.weights import some
from clipcluster.recipe.plan import plan
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.stages import Freezing
from clipcluster.train.optimizer import StageRate
from clipcluster.train.stages import Stage, counts_of

NAMED_LAYERS = 40  # in a message
RatesByName = Mapping[str, StageRate | None]


@dataclass(frozen=True)
class Tower:
    """A tower of a model, `image` or `text`; `prefix` begins the names of its parameters in the model."""

    name: str
    module: nn.Module
    prefix: str

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers with parameters, from the first to the last."""
        return [layer for layer in layers_of(self.module) if layer.parameters]

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name in the tower, without those that the tower itself holds fixed."""
        named = self.module.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def frozen_layers(self, freezing: Freezing) -> set[str]:
        """The names of the parameters in frozen layers; UserError where the tower has fewer layers."""
        count = len(self.layers)
        if freezing.layers is not None and freezing.layers > count:
            names = some([layer.name for layer in self.layers], NAMED_LAYERS)
            raise UserError(f"{freezing}: the {self.name} tower has {count} layers: {names}")
        trained = count if freezing.layers is None else freezing.layers
        return {name for layer in self.layers[: count - trained] for name in layer.parameters}

    def norms(self) -> set[str]:
        """The names of the parameters of norms."""
        owners = {name: self.module.get_submodule(name.rpartition(".")[0]) for name in self.parameters}
        return {name for name, owner in owners.items() if "norm" in type(owner).__name__.lower()}

    def eval_modules(self, frozen: set[str], *, moving_statistics: bool) -> frozenset[str]:
        """The modules in evaluation mode: those all of whose parameters are in frozen layers.

        A module without parameters (dropout, drop path) has the mode of the module around it. With
        `moving_statistics` batch norms stay in training mode.
        """
        every, fixed = Counter[str](), Counter[str]()
        for name, _ in self.module.named_parameters():
            parts = name.split(".")
            around = [".".join(parts[:depth]) for depth in range(len(parts))]
            every.update(around)
            fixed.update(around if name in frozen else ())
        found: dict[str, bool] = {}
        for name, module in self.module.named_modules():
            outer = found.get(name.rpartition(".")[0], False)
            found[name] = every[name] == fixed[name] if every[name] else outer
            if moving_statistics and isinstance(module, _BatchNorm):
                found[name] = False
        return frozenset(f"{self.prefix}{name}".rstrip(".") for name, whole in found.items() if whole)


def build_stages(model: nn.Module, freezings: Sequence[Freezing]) -> list[Stage]:
    """The stages of the recipe's `freeze`; without entries a single one, in which everything trains.

    Raises UserError where the model has no such tower or it has fewer layers, and for an entry that changes
    nothing.
    """
    by_tower = [
        list(_of_tower(tower, [freezing for freezing in freezings if freezing.tower == tower.name]))
        for tower in _towers(model, freezings)
    ]
    stages = []
    for start in sorted({0, *(freezing.step for freezing in freezings)}):
        rates: dict[str, StageRate | None] = {}
        eval_modules: frozenset[str] = frozenset()
        for of_tower in by_tower:
            begun = [(own_rates, modules) for step, own_rates, modules in of_tower if step <= start]
            if begun:
                rates.update(begun[-1][0])
                eval_modules |= begun[-1][1]
        stages.append(Stage(start, partial(_rate_of, rates), eval_modules))
    return stages


def _rate_of(rates: RatesByName, name: str) -> StageRate | None:
    """The rate of a parameter; one that belongs to no frozen tower trains at the schedule's."""
    return rates.get(name, StageRate())


def _towers(model: nn.Module, freezings: Sequence[Freezing]) -> Iterator[Tower]:
    names = {id(module): name for name, module in model.named_modules()}
    for first in {freezing.tower: freezing for freezing in reversed(freezings)}.values():
        module = getattr(model, first.tower, None)
        if not isinstance(module, nn.Module):
            raise UserError(f"{first}: {type(model).__name__} has no {first.tower} tower")
        yield Tower(first.tower, module, f"{names[id(module)]}.")


def _of_tower(tower: Tower, own: Sequence[Freezing]) -> Iterator[tuple[int, RatesByName, frozenset[str]]]:
    """Each entry of a tower: its step, the rates of the tower's parameters, the modules in evaluation mode.

    Rates are by names in the model. What begins to train has the entry's; what trained before keeps its own.
    """
    everything = dict.fromkeys(tower.parameters, StageRate())
    before: tuple[RatesByName, frozenset[str]] = everything, frozenset()
    rates: RatesByName = everything if own[0].step else dict.fromkeys(tower.parameters)
    for freezing in own:
        layers = tower.frozen_layers(freezing)
        frozen = layers - tower.norms() if freezing.norms_train else layers
        begins = StageRate(freezing.lr_scale, freezing.step, freezing.warmup)
        rates = {name: None if name in frozen else rates[name] or begins for name in rates}
        after = rates, tower.eval_modules(layers, moving_statistics=freezing.moving_statistics)
        if after == before:
            sizes = {name: parameter.numel() for name, parameter in tower.parameters.items()}
            train = sum(size for name, size in sizes.items() if rates[name])
            raise UserError(
                f"{freezing} changes nothing: {train:,} of the {sum(sizes.values()):,} parameters of the "
                f"{tower.name} tower train with it as before"
            )
        before = after
        yield freezing.step, {tower.prefix + name: rate for name, rate in rates.items()}, after[1]


def check_loaded(model: Any, stage: Stage) -> None:
    """UserError for a first stage that freezes parameters which no weight file has: they would stay random.

    `model.starting_weights` lists what the files have.
    """
    frozen = {name for name, _ in model.named_parameters() if stage.rate_of(name) is None}
    frozen |= {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if path in stage.eval_modules
        for name, _ in module.named_buffers(recurse=False)
    }
    for tower in sorted({name.partition(".")[0] for name in frozen}):
        own = {name for name in frozen if name.startswith(f"{tower}.")}
        brought = [coverage for coverage in model.starting_weights if coverage.tower in (tower, "model")]
        missing = [key for coverage in brought for key in coverage.missing]
        random = sorted(name for name in own if any(f".{name}".endswith(f".{key}") for key in missing))
        if not brought:
            raise UserError(
                f"freeze: the {tower} tower begins frozen without starting weights: it would stay random. "
                f"Set model.{tower}.weights, or let it train first."
            )
        if random:
            raise UserError(
                f"freeze: the {tower} tower begins frozen, and its weights lack {some(random)}, which would "
                f"stay random. Name weights that have them, or let their layers train first."
            )


def try_stages(recipe: Recipe, assets: Path | None, world_size: int = 1) -> list[str]:
    """Build the stages of a recipe for its model with its starting weights. Returns a line for each.

    Raises UserError as `build_stages`, `check_loaded`, building and reading do.
    """
    sources = open_sources(recipe, assets)
    model = build_model(recipe, sources.tokenizer, assets)
    stages = build_stages(model, plan(recipe, sources.sampler.samples, world_size).freezings)
    check_loaded(model, stages[0])
    return [str(counts_of(model.named_parameters(), stage)) for stage in stages]
