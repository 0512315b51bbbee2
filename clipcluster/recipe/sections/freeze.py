"""The section `freeze`: which layers of the towers train, and from which step on. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, WithJsonSchema, model_validator

from clipcluster.recipe.sections.base import KeyProblem, Section, key
from clipcluster.recipe.sections.values import Float
from clipcluster.recipe.units import Duration

_LAST = re.compile(r"\s*last\s+([1-9][0-9]*)\s*")


def _trainable(value: object) -> str:
    match = _LAST.fullmatch(value) if isinstance(value, str) else None
    if match:
        return f"last {int(match[1])}"
    if value not in ("none", "all"):
        raise ValueError("should be none, all or 'last N' (the last N layers of the tower, such as last 6)")
    return str(value)


Trainable = Annotated[
    str,
    BeforeValidator(_trainable),
    WithJsonSchema({"anyOf": [{"enum": ["none", "all"]}, {"type": "string", "pattern": _LAST.pattern}]}),
]


class Freeze(Section):
    """Which layers of a tower train from a step on."""

    at: Duration = key(
        "result", "When the entry begins; it holds until the next entry of the tower.", "0 steps"
    )
    tower: Literal["image", "text"] = key("result", "The tower of the entry.")
    trainable: Trainable = key(
        "result",
        "The layers that train: none, all, or 'last N' (a final norm belongs to the last layer). "
        "Projections, the logit scale and a classifier's head always train.",
    )
    lr_scale: Float = key(
        "result",
        "Factor of the learning rate of what begins to train with the entry; what trained before keeps its "
        "own.",
        1.0,
        gt=0,
    )
    warmup: Duration = key(
        "result",
        "Length of the linear rise of the learning rate, from nearly zero, of what begins to train with the "
        "entry.",
        "0 steps",
    )
    batch_norm: Literal["fixed", "moving"] = key(
        "result",
        "Running statistics of batch norms in frozen layers: fixed (the layers normalise with them) or "
        "moving (as in training).",
        "fixed",
    )
    norms: Literal["frozen", "trainable"] = key(
        "result",
        "Weights and biases of norms in frozen layers: frozen (as the layers) or trainable.",
        "frozen",
    )

    @model_validator(mode="after")
    def _something_begins(self) -> Freeze:
        if self.trainable == "none" and self.norms == "frozen" and (self.lr_scale != 1 or self.warmup.count):
            name = "lr_scale" if self.lr_scale != 1 else "warmup"
            raise KeyProblem(
                name, "is for what begins to train, and with trainable: none nothing does; remove it"
            )
        return self
