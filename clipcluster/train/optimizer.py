"""AdamW over the parameters that train, its state keyed by their names, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipcluster.model.weight_files import some

Schedule = Callable[[int], float]
"""From the step to the learning rate."""


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, name: Literal["cosine", "constant"] = "cosine"
) -> float:
    """The learning rate of the update that leads from step `step` to `step + 1` (steps count from 0).

    Warm-up is linear and never zero: `peak * (step + 1) / warmup` for `step < warmup`. After it
    `constant` stays at `peak`, and `cosine` falls from `peak` (at `step == warmup`) along half a cosine,
    `peak * (1 + cos(pi * (step - warmup) / (total - warmup))) / 2`, which reaches 0 at `step == total`,
    one update past the last (Loshchilov and Hutter 2017, equation 5, one cycle with minimum 0).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if name == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * peak * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Rate:
    """How fast a parameter trains, beside the schedule.

    scale: factor of the schedule's learning rate. warmup: steps over which it rises linearly from `start`
    on, for what has just begun to train; never zero, as with the schedule.
    """

    scale: float = 1.0
    start: int = 0
    warmup: int = 0

    def factor(self, step: int) -> float:
        """Of the schedule's learning rate at the update that leads from step `step` to `step + 1`."""
        return self.scale * (min(1.0, (step - self.start + 1) / self.warmup) if self.warmup else 1.0)


def full_rate(name: str) -> Rate | None:
    """Every parameter trains, at the schedule's learning rate."""
    return Rate()


def trained_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """Name -> (parameter, whether weight decay applies) of all that train; a shared one under its first name.

    It does not apply to biases, norms, nor anything with fewer than two dimensions: the last covers
    `logit_scale` and every per-channel gain.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
            decays = parameter.ndim >= 2 and "norm" not in owner and not name.endswith("bias")
            found[name] = (parameter, decays)
    return found


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), one fused kernel a step, skippable on the device.

    The state is flat, `PARAMETER.exp_avg`, `PARAMETER.exp_avg_sq`, `PARAMETER.step`, so that it outlives a
    change of the parameters' order, and complete: every parameter that trains has one from the beginning.
    Hyperparameters come from the recipe and are not in it.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        self._model, self._weight_decay = model, weight_decay
        self._make = partial(torch.optim.AdamW, lr=lr, betas=betas, eps=eps, fused=True)
        self._named: dict[str, tuple[nn.Parameter, bool]] = {}
        self._adamw: torch.optim.AdamW
        self.regroup(full_rate)

    def regroup(self, rate_of: Callable[[str], Rate | None]) -> None:
        """Take the parameters that train now, each at its rate (not asked of what is frozen).

        Those that trained before keep their state, the others begin with none: what is frozen again and
        trains once more starts afresh.
        """
        kept = {name: self._adamw.state[parameter] for name, (parameter, _) in self._named.items()}
        self._named = trained_parameters(self._model)
        groups: dict[tuple[float, Rate], list[nn.Parameter]] = {}
        for name, (parameter, decays) in self._named.items():
            rate = rate_of(name)
            if rate is None:
                raise ValueError(f"{name} requires a gradient and has no learning rate")
            groups.setdefault((self._weight_decay if decays else 0.0, rate), []).append(parameter)
        self._adamw = self._make(
            [
                {"params": parameters, "weight_decay": decay, "rate": rate}
                for (decay, rate), parameters in groups.items()
            ]
        )
        for name, (parameter, _) in self._named.items():
            self._adamw.state[parameter] = kept.get(name) or {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def gradients(self) -> list[Tensor]:
        """The gradients there are; a parameter that took no part in the loss has None, not zero."""
        return [p.grad for p, _ in self._named.values() if p.grad is not None]

    def clear(self) -> None:
        """Drop all gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def step(self, lr: float, at: int, *, divisor: Tensor, found_inf: Tensor) -> None:
        """One update with the gradients divided by `divisor`; none at all where `found_inf` is 1.

        `lr` is the schedule's at step `at`; each group's follows from it. The tensors are 0-dimensional
        float32 on the device, so nothing waits for it.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["rate"].factor(at)
        # The two attributes a gradient scaler hands to a fused optimizer; its kernel reads them.
        self._adamw.grad_scale = divisor  # type: ignore[attr-defined]
        self._adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Flat: `PARAMETER.KEY` -> tensor."""
        return {
            f"{name}.{key}": value
            for name, (parameter, _) in self._named.items()
            for key, value in self._adamw.state[parameter].items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state from `state_dict`, all of it.

        Raises RuntimeError, naming them, for entries that are missing, belong to no parameter that trains
        here, or have another shape; nothing is changed then.
        """
        own = self.state_dict()
        # Before format 2 the scale of the logits had no dimension.
        fitting = {
            key: value.reshape(1) if value.ndim == 0 and own[key].shape == (1,) else value
            for key, value in state.items()
            if key in own
        }
        problems = {
            "no entries for": own.keys() - state.keys(),
            "entries for what does not train in this model": state.keys() - own.keys(),
            "entries of another shape": {key for key in fitting if fitting[key].shape != own[key].shape},
        }
        found = [f"{what}: {some(sorted(names))}" for what, names in problems.items() if names]
        if found:
            raise RuntimeError(f"the optimizer's state has {'; '.join(found)}")
        for key, value in fitting.items():
            own[key].copy_(value)
