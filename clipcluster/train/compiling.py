"""Towers compiled by torch.compile, in place: parameters, checkpoints and wrappers see no difference."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from clipcluster.errors import UserError

GRAPHS = 64  # of one function: one for each shape, stage and mode; torch stops compiling at 8
logger = logging.getLogger("clipcluster")


class _TellingLimit(logging.Filter):
    """Says once what torch's own warning about its limit means here; the records themselves pass."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not self.told and "torch._dynamo hit config." in record.getMessage():
            self.told = True
            logger.warning(
                "train.compile: a tower has more than %d compiled graphs, one for each shape and stage; "
                "torch compiles no more of it: further ones run uncompiled and slower, equal to rounding. "
                "Fewer entries of freeze, or train.compile: false, avoid it",
                GRAPHS,
            )
        return True


_telling_limit = _TellingLimit()


def compile_towers(model: nn.Module, device: torch.device) -> None:
    """Compile the direct children of a model in place, for training; parameter names stay.

    Each shape gets a graph of its own, so that a resume computes with the same graphs as before the stop,
    whichever shape came first. Dropout draws from torch's own generators, as without compilation.
    Raises UserError where torch cannot compile for the device here, with the reason.
    """
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = GRAPHS
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_telling_limit)  # added once
    inductor.fallback_random = True
    _try(device)
    for tower in model.children():
        if any(True for _ in tower.parameters()):
            tower.compile(dynamic=False)


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, compiled towers run eagerly: for passes with shapes that training does not have."""
    return torch.compiler.set_stance("force_eager")


def _try(device: torch.device) -> None:
    """Compile the smallest function: a missing C++ compiler or Triton is found before the first step."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        torch.compile(double, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # the compiler's backends raise classes of their own
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"train.compile: torch {torch.__version__} cannot compile for {device.type} here "
            f"({type(error).__name__}: {reason}). Install what is missing (on the CPU a C++ compiler, such "
            "as g++), or set train.compile to false."
        ) from error
