"""AdamW over the parameters that train, its state keyed by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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
    change of the parameters' order. Hyperparameters come from the recipe and are no part of it.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        self._named = trained_parameters(model)
        decayed = [parameter for parameter, decay in self._named.values() if decay]
        plain = [parameter for parameter, decay in self._named.values() if not decay]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=True
        )

    @property
    def names(self) -> list[str]:
        """The names of the parameters that train."""
        return list(self._named)

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
            group["lr"] = lr
        # The two attributes a gradient scaler hands to a fused optimizer; its kernel reads them.
        self._adamw.grad_scale = divisor  # type: ignore[attr-defined]
        self._adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Flat: `PARAMETER.KEY` -> tensor."""
        return {
            f"{name}.{key}": value
            for name, (parameter, _) in self._named.items()
            for key, value in self._adamw.state.get(parameter, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state from `state_dict`. Raises KeyError for a parameter that does not train here."""
        self._adamw.state.clear()
        for full_name, value in state.items():
            name, key = full_name.rsplit(".", 1)
            if name not in self._named:
                raise KeyError(f"the optimizer's state holds {name}, which does not train in this model")
            parameter = self._named[name][0]
            dtype = torch.float32 if key == "step" else parameter.dtype
            self._adamw.state[parameter][key] = value.to(device=parameter.device, dtype=dtype, copy=True)
