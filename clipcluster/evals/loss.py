"""The loss of a dual encoder on a set: of fixed groups of pairs, whatever the training batch was."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipcluster.evals.features import Tick
from clipcluster.model.losses import contrastive, siglip
from clipcluster.model.protocols import DualEncoder
from clipcluster.runtime.world import World

GROUP = 1024
"""Pairs of a group at most."""


def loss_of_groups(
    model: DualEncoder, images: Tensor, texts: Tensor, world: World, tick: Tick, size: int = GROUP
) -> float:
    """The mean over pairs of the loss that the model is trained with, each pair among those of its group.

    images, texts: (n, E), row i a pair, the same on every rank. There are ceil(n / size) groups, pair i in
    group i mod their number, so that groups differ by one pair at most and a set in order of its classes is
    spread over them. In float64, without label smoothing; a model with a bias has the sigmoid loss, any other
    the contrastive one. The ranks share the groups; memory grows with size x size. Collective.
    """
    count = math.ceil(len(images) / size)
    losses = torch.zeros(count, dtype=torch.float64, device=images.device)
    alone = World(0, 1, 0, images.device)
    scale, bias = model.logit_scale.double().exp().squeeze(), model.logit_bias
    for turn in range(math.ceil(count / world.size)):
        group = turn * world.size + world.rank
        if group < count:
            image, text = images[group::count].double(), texts[group::count].double()
            if bias is None:
                loss, _ = contrastive(image, text, scale, alone)
            else:
                loss, _ = siglip(image, text, scale, bias.double().squeeze(), alone)
            losses[group] = loss * len(image)
        tick()
    return math.fsum(world.all_reduce_sum(losses).tolist()) / len(images)
