"""The section `optim`: the optimizer and its schedule. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from clipcluster.recipe.sections.base import KeyProblem, Section, key, section
from clipcluster.recipe.sections.values import Float, Pair
from clipcluster.recipe.units import Duration
from clipcluster.text import did_you_mean

_NOT_NEGATIVE = Annotated[Float, Field(ge=0)]


@dataclass(frozen=True)
class PerBatch:
    """A learning rate for batches of `per` samples, scaled to the global batch."""

    base: float
    per: int = 256
    scaling: Literal["linear", "sqrt"] = "linear"

    def at(self, batch_size: int) -> float:
        """For batches of `batch_size` samples: `base` times the ratio, or its square root.

        Linear: Goyal et al. 2017, section 2.1; sqrt: Krizhevsky 2014, section 5.
        """
        ratio = batch_size / self.per
        return self.base * (ratio if self.scaling == "linear" else ratio**0.5)

    def arithmetic(self, batch_size: int) -> str:
        """`at` in words: ``0.0005 x 4,096 / 256``."""
        ratio = f"{batch_size:,} / {self.per:,}"
        return f"{self.base:g} x {ratio if self.scaling == 'linear' else f'sqrt({ratio})'}"

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> PerBatch:
        """Read a recipe's mapping; ValueError says what is allowed."""
        allowed = [field.name for field in fields(cls)]
        for name in value:
            if name not in allowed:
                hint = did_you_mean(name, allowed)
                raise ValueError(f"has the key {name}; should have {', '.join(allowed)}{hint}")
        found = {"base": "missing", "per": 256, "scaling": "linear", **value}
        base, per = found["base"], found["per"]
        if isinstance(base, bool) or not isinstance(base, (int, float)) or not 0 <= base < float("inf"):
            raise ValueError(
                f"base is {base}; should be a number, at least 0, as in {{base: 5e-4, per: 256}}"
            )
        if isinstance(per, bool) or not isinstance(per, int) or per < 1:
            raise ValueError(f"per is {per}; should be a whole number of samples, at least 1")
        if found["scaling"] not in ("linear", "sqrt"):
            raise ValueError(f"scaling is {found['scaling']}; should be linear or sqrt")
        return cls(float(base), per, found["scaling"])


class _NumberOrPerBatch:
    """Annotates a learning rate: a number, or a mapping that becomes a `PerBatch`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: Any, number: Any) -> Any:
            if isinstance(value, Mapping):
                return PerBatch.parse(value)
            try:
                return value if isinstance(value, PerBatch) else number(value)
            except ValidationError as error:
                if error.errors()[0]["type"] in ("float_parsing", "float_type"):
                    raise ValueError(f"should be {_PER_BATCH}") from None
                raise

        return core_schema.no_info_wrap_validator_function(
            read,
            handler.generate_schema(_NOT_NEGATIVE),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: asdict(value) if isinstance(value, PerBatch) else value
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "number", "minimum": 0}, {"type": "object"}]}


LearningRate = Annotated[float | PerBatch, _NumberOrPerBatch()]
_PER_BATCH = "a number, or {base: 5e-4, per: 256, scaling: linear | sqrt}, scaled to the global batch"


class LogitScaleOptim(Section):
    """How the scale of the logits (and SigLIP's bias) is trained."""

    lr: LearningRate | None = key("result", "Learning rate instead of optim.lr. Default: optim.lr.", None)


class TowerOptim(LogitScaleOptim):
    """How a tower is trained."""

    weight_decay: Float | None = key(
        "result", "Weight decay instead of optim.weight_decay. Default: optim.weight_decay.", None, ge=0
    )
    layer_decay: Float | None = key(
        "result",
        "Factor of the learning rate from one layer to the one before it; the projection has the whole rate. "
        "Default: all layers have it.",
        None,
        gt=0,
        le=1,
    )


class ImageTowerOptim(TowerOptim):
    """How the image tower is trained."""

    layer_ids: Literal["blocks", "groups"] = key(
        "result",
        "What layer_decay counts as a layer: every block (blocks), or ConvNeXt's groups (groups): the first, "
        "second and last stage, and every three blocks of the third.",
        "blocks",
    )

    @model_validator(mode="after")
    def _needs_layer_decay(self) -> ImageTowerOptim:
        if self.layer_ids == "groups" and self.layer_decay is None:
            raise KeyProblem("layer_ids", "has no effect without layer_decay; set it, or remove layer_ids")
        return self


class Optim(Section):
    """The optimizer and its schedule."""

    name: str = key(
        "result",
        "The optimizer: adamw, or another of timm's by name (lamb, lion, muon, …).",
        "adamw",
        min_length=1,
    )
    args: dict[str, Any] = key(
        "result", "Arguments of an optimizer of timm's, such as {betas: [0.9, 0.99]}.", {}
    )
    lr: LearningRate = key("result", f"Learning rate after the warm-up: {_PER_BATCH}.")
    min_lr: Float = key(
        "result", "Learning rate at the end of the run, for cosine, linear and wsd.", 0.0, ge=0
    )
    weight_decay: Float = key(
        "result",
        "Weight decay: decoupled with adamw, added to the gradient by sgd, adam and others; not applied to "
        "norms, biases and the logit scale.",
        0.2,
        ge=0,
    )
    weight_decay_end: Float | None = key(
        "result",
        "Weight decay at the end of the run, which every weight decay above zero reaches along half a "
        "cosine. Default: weight decay is constant.",
        None,
        ge=0,
    )
    no_decay: tuple[str, ...] = key(
        "result",
        "Patterns of names of further parameters without weight decay, such as '*.pos_embed' (* matches any "
        "text).",
        (),
    )
    betas: Pair = key("result", "AdamW's decay rates of the two moments.", (0.9, 0.98))
    eps: Float = key("result", "AdamW's epsilon, added to the square root of the second moment.", 1e-6, gt=0)
    clip_norm: Float | None = key(
        "result",
        "Upper bound of the norm of the whole gradient, which is scaled down to it. Default: no clipping.",
        None,
        gt=0,
    )
    clip_value: Float | None = key(
        "result",
        "Upper bound of the absolute value of each entry of the gradient, after clip_norm. Default: no "
        "clipping.",
        None,
        gt=0,
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = key(
        "result",
        "After the warm-up: cosine or linear (to min_lr at the end of the run), constant, or wsd (constant, "
        "then linear to min_lr over the cooldown).",
        "cosine",
    )
    cooldown: Duration | None = key("result", "Length of the linear fall to min_lr, for wsd.", None)
    warmup: Duration = key(
        "result",
        "Length of the linear rise of the learning rate from nearly zero.",
        "0 steps",
    )
    image: ImageTowerOptim = section("How the image tower is trained, where it differs.", {})
    text: TowerOptim = section("How the text tower is trained, where it differs.", {})
    logit_scale: LogitScaleOptim = section("How the scale of the logits (and SigLIP's bias) is trained.", {})

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("should be two numbers from 0 to below 1")
        return value

    @model_validator(mode="after")
    def _belongs_to_the_schedule(self) -> Optim:
        if (self.cooldown is None) == (self.schedule == "wsd"):
            if self.cooldown is None:
                raise KeyProblem("schedule", "wsd needs optim.cooldown, such as 20%")
            raise KeyProblem(
                "cooldown", f"schedule {self.schedule} has none; remove it, or set schedule to wsd"
            )
        if self.min_lr and self.schedule == "constant":
            raise KeyProblem("min_lr", "schedule constant has none; remove it, or use linear, cosine or wsd")
        if self.weight_decay_end is not None and not any(
            (self.weight_decay, self.image.weight_decay, self.text.weight_decay)
        ):
            raise KeyProblem(
                "weight_decay_end",
                "has no effect: weight_decay is 0 and stays 0; remove it, or set that above 0",
            )
        return self

    @model_validator(mode="after")
    def _belongs_to_the_optimizer(self) -> Optim:
        if self.name == "adamw" and self.args:
            raise KeyProblem("args", "not for adamw, which has optim.betas and optim.eps; remove it")
        for name in ("betas", "eps") if self.name != "adamw" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise KeyProblem(name, f"for adamw; {self.name} takes it in optim.args: {{{name}: …}}")
        return self
