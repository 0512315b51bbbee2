"""The sections `optim`, `train`, `checkpoint` and `evaluate`: how a run learns, what it saves and measures.

No torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.values import Float, Int, Pair
from clipcluster.recipe.units import Duration, Length, Period


class Optim(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw"] = key("result", "The optimizer.", "adamw")
    lr: Float = key("result", "Learning rate after the warm-up.", ge=0)
    weight_decay: Float = key(
        "result", "Decoupled weight decay, not applied to norms, biases and the logit scale.", 0.2, ge=0
    )
    betas: Pair = key("result", "Decay rates of the two moments.", (0.9, 0.98))
    eps: Float = key("result", "Added to the square root of the second moment.", 1e-6, gt=0)
    clip_norm: Float | None = key(
        "result",
        "Largest norm of the whole gradient; larger ones are scaled down. Default: no clipping.",
        None,
        gt=0,
    )
    schedule: Literal["cosine", "constant"] = key(
        "result", "After the warm-up: cosine (to zero at the end of the run) or constant.", "cosine"
    )
    warmup: Duration = key(
        "result",
        "Length of the linear rise of the learning rate from nearly zero.",
        "0 steps",
    )

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("should be two numbers from 0 to below 1")
        return value


class Ema(Section):
    """A moving average of the weights, evaluated and saved beside them."""

    decay: Float = key("result", "Part of the average that is kept at each step.", 0.9999, gt=0, lt=1)


class NonFinite(Section):
    """Steps whose loss or gradient is not finite are skipped and counted."""

    limit: Int = key(
        "result",
        "After more skipped steps in a row than this the run goes back to the last good checkpoint and omits "
        "the range; the second time it stops.",
        10,
        ge=0,
    )


class Train(Section):
    """Length, precision and log of the run."""

    duration: Length = key("result", "Length of the run: steps, samples or epochs.")
    micro_batch: Int | None = key(
        "speed",
        "Upper bound of the samples that a rank processes at once. Default: its whole part of the batch.",
        None,
        ge=1,
    )
    precision: Literal["fp32", "bf16", "fp16"] = key(
        "result", "Arithmetic of the towers: fp16 scales the loss, bf16 does not need to.", "fp32"
    )
    deterministic: bool | None = key(
        "speed",
        "Kernels that give the same bits in every run, slower on a GPU. Default: on for the CPU, off on a "
        "GPU, where a resumed run still has the same batches, negatives and schedule.",
        None,
    )
    ema: Ema | None = section("A moving average of the weights, evaluated and saved beside them.", None)
    record_samples: bool = key("record", "Record every consumed sample: step, slot, shard and key.", False)
    log_every: Duration = key("record", "How often a line of metrics is written.", "10 steps")
    non_finite: NonFinite = section("Losses and gradients that are not finite.", {})


class Best(Section):
    """Checkpoints kept for their value of a metric."""

    metric: str = key("record", "The metric, such as val/t2i_r1.", min_length=1)
    count: Int = key("record", "How many to keep.", 1, ge=1)


class Keep(Section):
    """Which checkpoints are kept; the others are deleted once a newer one is complete."""

    last: Int = key(
        "record", "How many of the newest to keep; at least 2, since the newest may be damaged.", 3
    )
    every: Duration | None = key("record", "Also keep one at each such interval, permanently.", None)
    best: Best | None = section("Also keep the best by a metric.", None)

    @field_validator("last")
    @classmethod
    def _two_at_least(cls, value: int) -> int:
        if value < 2:
            raise ValueError("should be at least 2: the newest may be damaged, or still be being written")
        return value


class Checkpoint(Section):
    """When to save, and what to keep."""

    every: Period = key("record", "How often to save: a duration or a time.", "15 min")
    keep: Keep = section("Which checkpoints are kept.", {})


class Evaluate(Section):
    """What is measured, and when."""

    every: Duration | None = key(
        "record", "How often, besides the end of the run. Default: only at the end.", None
    )
    retrieval: tuple[str, ...] = key(
        "record",
        "Shard folders for image-text retrieval; metrics are named by the last component of each.",
        (),
        path="path",
    )
    zero_shot: tuple[str, ...] = key(
        "record",
        "Shard folders for zero-shot classification (class names and templates beside the shards).",
        (),
        path="path",
    )
    batch_size: Int = key("record", "Samples of one forward pass, over all ranks.", 256, ge=1)
