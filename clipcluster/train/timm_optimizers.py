"""timm's optimizers by name: those that can be used here, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.optim import get_optimizer_info, list_optimizers
from timm.optim.muon import Muon
from torch import nn

from clipcluster.errors import UserError
from clipcluster.text import did_you_mean

Groups = list[dict[str, Any]]
OWN_ARGS = {  # arguments that other keys of the recipe decide
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "params": "the model",
    "capturable": "the trainer",
    "differentiable": "the trainer",
}


def usable_optimizers() -> list[str]:
    """The names of the optimizers whose whole state a checkpoint can hold."""
    return [name for name in _known() if not _why_not(name)]


def _known() -> list[str]:
    return [name for name in list_optimizers() if isinstance(name, str)]


def check_optimizer(name: str) -> None:
    """UserError for a name that timm does not know, and for an optimizer that cannot be used here."""
    known = _known()
    why = _why_not(name) if name in known or name.startswith("lookahead_") else ""
    if name not in known and not why:
        raise UserError(
            f"optim.name: timm has no optimizer {name!r}{did_you_mean(name, usable_optimizers())}"
        )
    if why:
        raise UserError(f"optim.name: {name} {why}; usable: {', '.join(usable_optimizers())}")


def _why_not(name: str) -> str:
    """Why an optimizer cannot be used, "" where it can."""
    if name.startswith("lookahead_"):
        return "wraps another optimizer and keeps a second copy of the weights outside its state"
    kind = get_optimizer_info(name).opt_class
    if isinstance(kind, str):
        return f"belongs to another package ({kind.partition('.')[0]}), whose state is not known here"
    if name == "adahessian":
        return "needs second derivatives, for which a step would run backward twice"
    if name.startswith("kron"):
        return "draws random numbers of its own, which a resumed run would draw again"
    return ""


def trains_matrices(name: str) -> bool:
    """Whether this is one of Muon's family, which trains matrices and leaves the rest to AdamW.

    Raises UserError as `check_optimizer`.
    """
    check_optimizer(name)
    return get_optimizer_info(name).opt_class is Muon


def timm_optimizer(
    name: str, args: Mapping[str, Any], lr: float
) -> Callable[[Groups], torch.optim.Optimizer]:
    """The function that makes the optimizer over parameter groups, each with its own `weight_decay`.

    lr: the peak of the schedule. Raises UserError for a name that cannot be used, and for arguments that the
    optimizer does not take.
    """
    check_optimizer(name)
    for given in args:
        if given in OWN_ARGS:
            raise UserError(f"optim.args.{given} is decided by {OWN_ARGS[given]}: remove it")
    info = get_optimizer_info(name)
    kind: Any = info.opt_class
    # As timm's factory has it, which would silently drop arguments that the class does not take.
    own = {**({"momentum": 0.9} if info.has_momentum else {}), **(info.defaults or {})}
    own |= {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}

    def make(groups: Groups) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = kind(groups, lr=lr, **own)
        return made

    try:  # some optimizers check their arguments only at an update
        parameter = nn.Parameter(torch.ones(8, 8))
        parameter.grad = torch.ones(8, 8)
        make([{"params": [parameter]}]).step()
    except (TypeError, ValueError, AssertionError, LookupError, RuntimeError) as error:
        raise UserError(f"optim.args: timm cannot make {name} with {dict(args)}: {error}") from None
    return make
