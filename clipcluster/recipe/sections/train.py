"""The section `train`: length, precision and log of the run. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from clipcluster.recipe.sections.base import KeyProblem, Section, key, section
from clipcluster.recipe.sections.values import Float, Int
from clipcluster.recipe.units import Interval, Length, Time


class Ema(Section):
    """A moving average of the weights, evaluated and saved beside them."""

    decay: Float = key("result", "Fraction of the average that is kept at each step.", 0.9999, gt=0, lt=1)
    warmup: bool = key(
        "result",
        "Begin with small decays, so that the average forgets the starting weights soon: at most "
        "1 - n^(-2/3) at the n-th step (0.99 after 1,000 steps, 0.9999 after a million).",
        False,
    )
    device: Literal["model", "cpu"] = key(
        "speed",
        "Where the average is kept: on the model's device (model), or in the host's memory (cpu), to which "
        "every step then copies all weights.",
        "model",
    )


class NonFinite(Section):
    """Steps whose loss or gradient is not finite are skipped and counted."""

    limit: Int = key(
        "result",
        "After more consecutive skipped steps than this the run goes back to the last checkpoint before them "
        "and omits their batches; the second time it stops.",
        10,
        ge=0,
    )


class Train(Section):
    """Length, precision and log of the run."""

    duration: Length = key("result", "Length of the run: steps, samples or epochs.")
    micro_batch: Int | None = key(
        "speed",
        "Upper bound of the samples that a rank processes at once: its part of the batch is divided into the "
        "smallest number of equal micro-batches that are no larger; loss and gradients stay those of the "
        "whole batch. Default: its whole part of the batch.",
        None,
        ge=1,
    )
    batch_norm_group: Int | None = key(
        "result",
        "Number of samples over which batch norms take their statistics; it divides every micro-batch, so "
        "that the weights depend on neither ranks nor micro-batches. Default: each micro-batch.",
        None,
        ge=2,
    )
    activation_checkpointing: bool = key(
        "speed",
        "Recompute the towers' activations in the backward pass: less memory, about a third more time.",
        False,
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = key(
        "result",
        "Arithmetic of the towers: fp32; tf32, with shorter products on a GPU (on the CPU it is fp32); bf16 "
        "or fp16 under autocast, fp16 with a loss scale. Batch norms stay in fp32.",
        "fp32",
    )
    channels_last: bool = key(
        "speed",
        "Keep the channels of convolutions last in memory, often faster on a GPU in bf16 or fp16.",
        False,
    )
    compile: bool = key(
        "speed", "Compile the towers by torch.compile: minutes at every start, faster steps.", False
    )
    sync_batch_norm: bool = key(
        "result",
        "Batch norms take their statistics over the micro-batches of all ranks together (GPUs only). "
        "Default: over each micro-batch.",
        False,
    )
    deterministic: bool | None = key(
        "speed",
        "Use kernels that give the same bits in every run, slower on a GPU. Default: on for the CPU, off on "
        "a GPU, where a resumed run still has the same batches, negatives and schedule.",
        None,
    )
    ema: Ema | None = section("A moving average of the weights, evaluated and saved beside them.", None)
    record_samples: bool = key("record", "Record every consumed sample: step, slot, shard and key.", False)
    log_every: Interval = key("record", "How often a line of metrics is written.", "10 steps")
    stalled_after: Time | None = key(
        "record",
        "A rank without a step for this long, and for 20 times the median step, has stalled: the stacks of "
        "all ranks go into their logs, and the run is requeued. null: never.",
        "7 min",
    )
    log_to: tuple[Literal["wandb", "trackio"], ...] = key(
        "record", "Programs that get the curves too, beside TensorBoard; their packages are optional.", ()
    )
    non_finite: NonFinite = section("Losses and gradients that are not finite.", {})

    @model_validator(mode="after")
    def _one_kind_of_statistics(self) -> Train:
        if self.sync_batch_norm and self.batch_norm_group:
            raise KeyProblem(
                "sync_batch_norm",
                "takes statistics over all ranks, and batch_norm_group over parts of each rank's samples; "
                "remove one of them",
            )
        return self
