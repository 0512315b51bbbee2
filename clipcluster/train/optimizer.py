"""AdamW over the parameters that train, its state keyed by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipcluster.model.weights import some


def decays(module: nn.Module, parameter_name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to biases, norms, nor anything with fewer than two dimensions.

    The last covers `logit_scale` and every per-channel gain. `parameter_name` is the name within `module`.
    """
    is_norm = "norm" in type(module).__name__.lower()
    return parameter.ndim >= 2 and not is_norm and not parameter_name.endswith("bias")


def trained_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """Name -> (parameter, whether it decays) of all that train; a shared one under its first name."""
    found: dict[str, tuple[nn.Parameter, bool]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found[f"{prefix}.{name}" if prefix else name] = (parameter, decays(module, name, parameter))
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
        self.regroup(lambda name: 1.0)

    def regroup(self, lr_scale: Callable[[str], float | None]) -> None:
        """Take the parameters that train now, each with its factor of the learning rate.

        Those that trained before keep their state, the others begin with none.
        """
        kept = {name: self._adamw.state[parameter] for name, (parameter, _) in self._named.items()}
        self._named = trained_parameters(self._model)
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, (parameter, decay) in self._named.items():
            scale = lr_scale(name)
            groups.setdefault((decay, 1.0 if scale is None else scale), []).append(parameter)
        self._adamw = self._make(
            [
                {
                    "params": parameters,
                    "lr_scale": scale,
                    "weight_decay": self._weight_decay if decay else 0.0,
                }
                for (decay, scale), parameters in sorted(groups.items(), key=lambda item: not item[0][0])
            ]
        )
        for name, (parameter, _) in self._named.items():
            self._adamw.state[parameter] = kept.get(name) or fresh_state(parameter)

    def gradients(self) -> list[Tensor]:
        """The gradients there are; a parameter that took no part in the loss has None, not zero."""
        return [p.grad for p, _ in self._named.values() if p.grad is not None]

    def clear(self) -> None:
        """Drop all gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def step(self, lr: float, *, divisor: Tensor, found_inf: Tensor) -> None:
        """One update with the gradients divided by `divisor`; none at all where `found_inf` is 1.

        Both are 0-dimensional float32 tensors on the device, so nothing waits for it.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
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
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        # Before format 2 the scale of the logits had no dimension.
        fitting = {
            key: value.reshape(1) if value.ndim == 0 and own[key].shape == (1,) else value
            for key, value in state.items()
            if key in own
        }
        misshapen = sorted(key for key, value in fitting.items() if value.shape != own[key].shape)
        problems = [
            f"{what}: {some(names)}"
            for what, names in (
                ("no entries for", missing),
                ("entries for what does not train in this model", unknown),
                ("entries of another shape", misshapen),
            )
            if names
        ]
        if problems:
            raise RuntimeError("the optimizer's state has " + "; ".join(problems))
        for key, value in fitting.items():
            own[key].copy_(value)


def fresh_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state before the first update."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
