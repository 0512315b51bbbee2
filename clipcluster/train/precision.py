"""Number formats of a step: float32, TF32, bfloat16 or float16 under autocast, float16 with a loss scale."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipcluster.errors import UserError
from clipcluster.model.norms import keep_in_float32
from clipcluster.runtime.devices import choose_float32
from clipcluster.text import counted

logger = logging.getLogger("clipcluster")

PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast, and for float16 the loss scale, which is the part of it that a checkpoint holds.

    The scale follows Micikevicius et al. 2018, section 3.2, as torch's GradScaler has it (65,536 at first,
    halved at an overflow, doubled after 2,000 steps without one), bounded to `SMALLEST` and `LARGEST`: at
    `SMALLEST` an overflow has another cause. Everything stays on the device.
    """

    START, SMALLEST, LARGEST, GROWTH_INTERVAL = 65536.0, 1.0, 2.0**24, 2000

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        """Raises UserError where the device cannot compute in this format."""
        self.name, self.device, self.dtype = name, device, DTYPES[name]
        self._check_device()
        self.scales = name == "fp16"
        self.scale = torch.tensor(self.START if self.scales else 1.0, dtype=torch.float32, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def _check_device(self) -> None:
        if self.dtype is torch.float32:
            return
        try:
            with self.autocast(), torch.no_grad():
                x = torch.ones(8, 8, device=self.device)
                torch.nn.functional.conv2d(x[None, None], x[None, None, :3, :3])
                works = (x @ x).dtype is self.dtype
        except RuntimeError:
            works = False
        if not works:
            raise UserError(
                f"train.precision: {self.name} does not work on {self.device.type} with torch "
                f"{torch.__version__}; use fp32 (always works) or bf16."
            )

    def prepare(self, model: nn.Module) -> None:
        """Set this process and a model to compute in this format, and log it; call it before any computation.

        It decides whether float32 products on an accelerator use TF32, and keeps batch norms in float32
        under autocast.
        """
        used = choose_float32(self.device, tf32=self.name == "tf32")
        norms = 0 if self.dtype is torch.float32 else keep_in_float32(model)
        kept = f", {counted(norms, 'batch norm')} kept in fp32" if norms else ""
        other = f" (fp32: {self.device.type} has no TF32)" if self.name == "tf32" and used != "tf32" else ""
        logger.info("precision: %s%s%s", self.name, other, kept)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for forward passes."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def seed_gradient(self, loss: Tensor) -> Tensor:
        """The gradient that `loss.backward` starts from: the scale, or NaN where the loss is not finite. ().

        A product with NaN is NaN, so a loss that is not finite on one rank shows in the gradients of all.
        """
        return torch.where(torch.isfinite(loss), self.scale, torch.nan).to(loss.dtype)

    def counts(self) -> Tensor:
        """Whether a non-finite step counts towards the limit, () bool: not while the scale can still fall."""
        return self.scale <= self.SMALLEST

    def update(self, found_inf: Tensor) -> None:
        """Change the scale after a step; found_inf, (), is 1 where a gradient was not finite, else 0."""
        if self.scales:
            tracker, interval = self._good_steps, self.GROWTH_INTERVAL
            torch._amp_update_scale_(self.scale, tracker, found_inf, 2.0, 0.5, interval)
            self.scale.clamp_(self.SMALLEST, self.LARGEST)

    def state_dict(self) -> dict[str, Any]:
        """`scale` and `good_steps` with float16, else nothing."""
        return {"scale": self.scale.item(), "good_steps": int(self._good_steps)} if self.scales else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved scale. Raises KeyError where float16 has none."""
        if self.scales:
            self.scale.fill_(state["scale"])
            self._good_steps.fill_(state["good_steps"])
