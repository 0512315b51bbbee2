"""The tasks that a recipe can name: their builders, what they need of the data, their evaluations. No torch.

A new task is an entry of `TASKS` and its builder; the check, the data and the training read them here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TaskSpec:
    """The properties of a task that are known without building it.

    Attributes:
        builder: dotted name, `package.module:function`, of `(recipe, model, ranks, assets) -> Task`.
        model: dotted name of `(recipe, tokenizer, assets, starting_weights) -> module`, on the CPU; the
            tokenizer is None for a task without captions; the module's attribute `starting_weights` has a
            `Coverage` for each weight file that was read.
        loss_over: `batch` where a sample's loss depends on the other samples of the global batch (negatives),
            `sample` where it is a mean over independent samples. It decides how gradients are accumulated.
        captions, classes: whether every sample needs a caption, a class.
        members: from a recipe to the further members that every sample needs, name -> dotted name of the
            decoder (`clipcluster.data.loading.extras` says how they are named).
        preparation: dotted name of `(recipe, transform, tokenizer, assets) -> Preparation`, which makes a
            sample's row of the batch; None: a random crop, the caption drawn, and all members.
        evaluations: the keys of the recipe's `evaluate` section that fit this task's model.
    """

    builder: str
    model: str
    loss_over: Literal["batch", "sample"]
    captions: bool = False
    classes: bool = False
    members: Callable[[Any], Mapping[str, str]] = lambda recipe: {}
    preparation: str | None = None
    evaluations: tuple[str, ...] = ()


def _stored_members(recipe: Any) -> Mapping[str, str]:
    """The members that DataCompDR stores with a sample, where the recipe has stored teachers."""
    if recipe.distill.stored is None:
        return {}
    decoders = "clipcluster.data.loading.decoders"
    return {
        "npz|pth.gz": f"{decoders}:arrays",
        "paug.json": f"{decoders}:augmentations",
        "syn.json": f"{decoders}:record",
        "json": f"{decoders}:record",
    }


TASKS: Mapping[str, TaskSpec] = {
    "contrastive": TaskSpec(
        builder="clipcluster.model.task:build_contrastive",
        model="clipcluster.model.dual:build_dual_encoder",
        loss_over="batch",
        captions=True,
        evaluations=("retrieval", "zero_shot", "probe"),
    ),
    "classify": TaskSpec(
        builder="clipcluster.model.classify:build_classify",
        model="clipcluster.model.classify:build_classifier",
        loss_over="sample",
        classes=True,
        evaluations=("classification", "probe"),
    ),
    "distill": TaskSpec(
        builder="clipcluster.build.teachers:build_distill",
        model="clipcluster.model.dual:build_dual_encoder",
        loss_over="batch",
        captions=True,
        members=_stored_members,
        preparation="clipcluster.build.teachers:build_preparation",
        evaluations=("retrieval", "zero_shot", "probe"),
    ),
}

KEYS: Mapping[str, tuple[str, ...]] = {
    "captions": (
        "model.text",
        "model.dual",
        "model.embed_dim",
        "model.projection_bias",
        "model.projections",
        "model.logit_scale",
        "model.logit_bias",
        "loss.name",
        "loss.chunk",
        "optim.text",
        "optim.logit_scale",
    ),
    "classes": ("model.classes", "model.head_init_scale", "data.mixup"),
}
"""Keys that are read only by tasks that need captions, or classes; other tasks refuse all but the default."""

RAW = "raw_"
METRICS: Mapping[str, tuple[str, ...]] = {
    "zero_shot": ("zero_shot_top1", "zero_shot_top5", "zero_shot_mean_per_class"),
    "retrieval": (
        *(
            f"{prefix}{direction}_{figure}"
            for prefix in ("", "paired_")
            for direction in ("i2t", "t2i")
            for figure in ("r1", "r5", "r10", "mean_rank", "median_rank")
        ),
        "mean_recall",
        "paired_mean_recall",
        "loss",
    ),
    "classification": tuple(
        f"{prefix}{figure}" for prefix in ("", RAW) for figure in ("top1", "top5", "mean_per_class", "loss")
    ),
    "probe": ("knn_top1", "linear_top1"),
}
"""The metrics of each key of the `evaluate` section, without the counts (`images`, `pairs`, ...).

With train.ema the averaged weights are measured; metrics that begin with `RAW` are those of the raw weights.
"""
