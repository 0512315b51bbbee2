"""An optimizer over the parameters that train, its state keyed by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipcluster.errors import UserError
from clipcluster.model.weight_files import some
from clipcluster.train.timm_optimizers import timm_optimizer
from clipcluster.train.undo import Undo, Values, copied, counters

WeightDecay = Callable[[int, float], float]
"""From the step and a parameter's weight decay at step 0 to its weight decay."""


@dataclass(frozen=True)
class StageRate:
    """The learning rate of a parameter in a stage, as a multiple of the schedule's.

    scale: the factor after the warm-up. start: the step at which the parameter begins to train. warmup: steps
    over which the factor rises linearly to `scale` from `start` on; it is never zero, as in the schedule.
    """

    scale: float = 1.0
    start: int = 0
    warmup: int = 0

    def factor(self, step: int) -> float:
        """The factor at the update that leads from step `step` to `step + 1`."""
        return self.scale * (min(1.0, (step - self.start + 1) / self.warmup) if self.warmup else 1.0)


def full_rate(name: str) -> StageRate | None:
    """The rate of a stage in which every parameter trains at the schedule's learning rate."""
    return StageRate()


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one parameter, constant over the run.

    lr_factor: multiplies the schedule's learning rate. weight_decay: at step 0; None where none ever applies.
    fallback: with an optimizer of Muon's family, AdamW trains the parameter whatever its shape.
    """

    lr_factor: float = 1.0
    weight_decay: float | None = None
    fallback: bool = False

    def __str__(self) -> str:
        decay = "no weight decay" if self.weight_decay is None else f"weight decay {self.weight_decay:g}"
        return f"learning rate x {self.lr_factor:.6g}, {decay}" + ", AdamW" * self.fallback


def decaying(model: nn.Module, no_decay: Iterable[str] = ()) -> set[str]:
    """The names of the parameters to which weight decay applies.

    It applies neither to biases and norms, nor to anything with fewer than two dimensions (`logit_scale`,
    every gain per channel), nor to names that a pattern of `no_decay` matches (`*`, `?`).
    """
    found = set()
    for name, parameter in model.named_parameters():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
        by_rule = parameter.ndim >= 2 and "norm" not in owner and not name.endswith("bias")
        if by_rule and not any(fnmatchcase(name, pattern) for pattern in no_decay):
            found.add(name)
    return found


class Optimizer:
    """AdamW, or one of timm's optimizers, whose update can be skipped on the device.

    AdamW (Loshchilov and Hutter 2019, algorithm 2) is one fused kernel per step, which skips by itself; the
    others go through `Undo`.

    The state dict is flat, `PARAMETER.exp_avg`, `PARAMETER.step`, …, and so independent of the order of the
    parameters. AdamW's is complete: every parameter that trains has a state from the beginning. The others
    create a parameter's state at its first update; `PARAMETER.began` says whether there was one. What an
    optimizer counts per group (LAMB, Adan) is stored for each parameter of the group, and parameters with
    different counts are in different groups. Hyperparameters come from the recipe and are not in the state.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        name: str = "adamw",
        args: Mapping[str, Any] | None = None,
        hyperparameters: Mapping[str, Hyperparameters] | None = None,
        decay_at: WeightDecay = lambda step, start: start,
    ) -> None:
        """The optimizer `name` over the parameters that require a gradient now.

        Args:
            lr: the schedule's peak.
            weight_decay: of what `decaying` names, where `hyperparameters` is not given.
            betas, eps: AdamW's.
            args: of another optimizer than AdamW.
            hyperparameters: by parameter name, all of them; default: `weight_decay` alone.

        Raises:
            UserError: as `timm_optimizer`, and for a weight decay that the installed timm computes wrongly.
        """
        self.name = name
        self._model, self._peak, self._decay_at = model, lr, decay_at
        decays = decaying(model)
        self._hyperparameters = hyperparameters or {
            name: Hyperparameters(weight_decay=weight_decay if name in decays else None)
            for name, _ in model.named_parameters()
        }
        self._fused = name == "adamw"
        self._make: Callable[[list[Values]], torch.optim.Optimizer] = (
            partial(torch.optim.AdamW, lr=lr, betas=betas, eps=eps, fused=True)
            if self._fused
            else timm_optimizer(name, args or {}, lr)
        )
        self._undo = Undo()
        self._named: dict[str, nn.Parameter] = {}
        self._given: frozenset[str]  # the keys of a parameter group that are settings
        self._optimizer: torch.optim.Optimizer
        self.regroup(full_rate)

    def regroup(self, rate_of: Callable[[str], StageRate | None]) -> None:
        """Take the parameters that require a gradient now, each at its rate.

        Those that trained before keep their state, the others begin without one, also those that trained
        earlier and were frozen since. Raises ValueError where `rate_of` says of one that it is frozen.
        """
        kept = self._states()
        self._rate_of = rate_of
        self._named = {
            name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad
        }
        for name in self._named:
            if rate_of(name) is None:
                raise ValueError(f"{name} requires a gradient and has no learning rate")
        self._build(kept)

    def _build(self, kept: Mapping[str, tuple[Values, Values]]) -> None:
        """Make the optimizer: a group for each set of equal settings and counts, with the states in `kept`.

        kept: name -> state, and the counts of its group.
        """
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name in self._named:
            counts = kept[name][1] if name in kept else {}
            key = (self._hyperparameters[name], self._rate_of(name))
            groups.setdefault((*key, *((k, float(v)) for k, v in counts.items())), []).append(name)
        given = [self._settings(names[0]) for names in groups.values()]
        members = [[self._named[name] for name in names] for names in groups.values()]
        self._optimizer = self._make(
            [{"params": params, **own} for params, own in zip(members, given, strict=True)]
        )
        self._given = frozenset(key for group in self._optimizer.param_groups for key in group)
        for group, names in zip(self._optimizer.param_groups, groups.values(), strict=True):
            _measure_decay(group, self._peak)
            group.update(copied(kept[names[0]][1]) if names[0] in kept else {})
        for name, parameter in self._named.items():
            state = kept[name][0] if name in kept else self._fresh(parameter)
            if state:
                self._optimizer.state[parameter] = state

    def _settings(self, name: str) -> Values:
        """The settings with which the group of a parameter is made."""
        own, rate = self._hyperparameters[name], self._rate_of(name)
        settings = {"weight_decay": own.weight_decay or 0.0, "hyperparameters": own, "rate": rate}
        return {**settings, **({"use_fallback": True} if own.fallback else {})}

    def _fresh(self, parameter: nn.Parameter) -> Values:
        if not self._fused:
            return {}
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def _states(self) -> dict[str, tuple[Values, Values]]:
        """Parameter name -> its state, and the counts of its group."""
        if not self._named:
            return {}
        self._undo.settle()
        names = {parameter: name for name, parameter in self._named.items()}
        found = {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                held = {key: value for key, value in state.items() if value is not None}
                found[names[parameter]] = (held, counters(group, self._given))
        return {name: found[name] for name in self._named}

    def describe(self) -> list[str]:
        """One line for each set of hyperparameters: how many parameters (numbers) have it."""
        counts: dict[Hyperparameters, int] = {}
        for name, parameter in self._named.items():
            own = self._hyperparameters[name]
            counts[own] = counts.get(own, 0) + parameter.numel()
        return [f"{self.name}: {count:,} parameters: {own}" for own, count in counts.items()]

    @property
    def state_tensors(self) -> list[Tensor]:
        """The tensors of the state as it is now, in no order."""
        states = self._optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    @property
    def size(self) -> int:
        """How many parameters (numbers, not tensors) it updates."""
        return sum(p.numel() for group in self._optimizer.param_groups for p in group["params"])

    def gradients(self) -> list[Tensor]:
        """All gradients; a parameter that the loss does not depend on has None, not zero, and is left out."""
        return [p.grad for p in self._named.values() if p.grad is not None]

    def clear(self) -> None:
        """Drop all gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, lr: float, at: int, *, divisor: Tensor, found_inf: Tensor) -> None:
        """One update with the gradients divided by `divisor`; none at all where `found_inf` is 1.

        `lr` is the schedule's at step `at`; each group's follows from it. The tensors are 0-dimensional
        float32 on the device, so nothing waits for it.
        """
        for group in self._optimizer.param_groups:
            own: Hyperparameters = group["hyperparameters"]
            group["lr"] = lr * own.lr_factor * group["rate"].factor(at)
            if own.weight_decay is not None:
                group["weight_decay"] = self._decay_at(at, own.weight_decay)
        if self._fused:
            # The two attributes a gradient scaler hands to a fused optimizer; its kernel reads them.
            self._optimizer.grad_scale = divisor  # type: ignore[attr-defined]
            self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            self._optimizer.step()
        else:
            torch._foreach_div_(self.gradients(), divisor)
            self._undo.step(self._optimizer, self._given, found_inf)

    def state_dict(self) -> dict[str, Any]:
        """Flat: `PARAMETER.KEY` -> tensor or number."""
        return self._flat(self._states())

    def _flat(self, states: Mapping[str, tuple[Values, Values]]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, (state, counts) in states.items():
            flat.update({f"{name}.{key}": value for key, value in (state | counts).items()})
            if not self._fused:
                flat[f"{name}.began"] = bool(state)
        return flat

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state dict, all of it.

        Raises RuntimeError, naming them, for entries that are missing, belong to no parameter that trains
        here, or have another shape or type; nothing is changed then.
        """
        layout = self._layout(state)
        own = self._flat(layout)
        # Before format 2 the scale of the logits had no dimension.
        fitting = {
            key: value.reshape(1) if _has_no_dimension(value) and own[key].shape == (1,) else value
            for key, value in state.items()
            if key in own
        }
        problems = {
            "no entries for": own.keys() - state.keys(),
            "entries for what does not train in this model": state.keys() - own.keys(),
            "entries of another shape": {key for key in fitting if _kind(fitting[key]) != _kind(own[key])},
        }
        found = [f"{what}: {some(sorted(names))}" for what, names in problems.items() if names]
        if found:
            raise RuntimeError(f"the optimizer's state has {'; '.join(found)}")
        for name, parts in layout.items():
            for values in parts:
                for key, value in values.items():
                    taken = fitting[f"{name}.{key}"]
                    values[key] = value.copy_(taken) if isinstance(value, Tensor) else taken
        self._build(layout)

    def _layout(self, state: Mapping[str, Any]) -> dict[str, tuple[Values, Values]]:
        """Parameter name -> state and counts as `state` should have them, to be filled from it."""
        if self._fused:
            return self._states()
        layout: dict[str, tuple[Values, Values]] = {}
        probed: dict[tuple[Any, ...], tuple[Values, Values]] = {}
        for name, parameter in self._named.items():
            about = (parameter.shape, parameter.stride(), parameter.dtype, self._hyperparameters[name])
            if about not in probed:
                probed[about] = self._probe(name)
            held, counts = probed[about]
            if not state.get(f"{name}.began", True):
                held, counts = {}, {key: counts[key] for key in counts if f"{name}.{key}" in state}
            layout[name] = copied(held), copied(counts)
        return layout

    def _probe(self, name: str) -> tuple[Values, Values]:
        """The state of a parameter and the counts of its group after an update, tried on a copy of zeros."""
        parameter = nn.Parameter(torch.zeros_like(self._named[name]))
        parameter.grad = torch.zeros_like(parameter)
        optimizer = self._make([{"params": [parameter], **self._settings(name)}])
        given = frozenset(optimizer.param_groups[0])
        optimizer.step()
        held = {key: value for key, value in optimizer.state[parameter].items() if value is not None}
        return held, counters(optimizer.param_groups[0], given)


def _measure_decay(group: Values, peak: float) -> None:
    """Let timm's corrected weight decay compare a group's learning rate with the group's own peak.

    Raises UserError where the installed timm compares it with the schedule's peak, and the two differ.
    """
    scale = group["hyperparameters"].lr_factor * group["rate"].scale
    if "max_lr_snapshot" in group:
        group["max_lr_snapshot"] = peak * scale
    elif group.get("corrected_weight_decay") and scale != 1.0:
        raise UserError(
            "optim.name: this optimizer's corrected weight decay is wrong before timm 1.0.31 where parts, "
            "layers or stages have rates of their own; update timm, or choose another optimizer"
        )


def _has_no_dimension(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _kind(value: Any) -> tuple[Any, ...]:
    """Shape and dtype of a tensor, or the type of a number: equal where one can replace the other."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else (type(value),)
