"""The arithmetic of a run: ranks, their part of the batch, steps per epoch and in total, warm-up. No torch.

The batch is global, and the plan says how the ranks divide it, or why they cannot, with values that work.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass, replace
from math import isqrt, lcm

from clipcluster.errors import UserError
from clipcluster.recipe.rates import rates
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.stages import Freezing, freezings
from clipcluster.recipe.tasks import TASKS
from clipcluster.recipe.units import Duration
from clipcluster.text import counted

LARGE_LOGITS = 2**30  # bytes of one copy, from which on the advice about memory names loss.chunk
LONG_WARMUP = 0.2  # of the run; above it the check warns


@dataclass(frozen=True)
class Plan:
    """The numbers of a run for given ranks and samples. Periods are in steps."""

    world_size: int
    nodes: int
    batch_size: int
    per_rank_batch: int
    micro_batch: int
    accumulation: int
    epoch_samples: int
    steps_per_epoch: int
    total_steps: int
    total_samples: int
    lr: float  # after the warm-up
    warmup_steps: int
    cooldown_steps: int
    log_every: int
    evaluate_every: int | None
    checkpoint_every: int | None  # None: by the clock
    keep_every: int | None
    warnings: tuple[str, ...]
    freezings: tuple[Freezing, ...] = ()


def plan(recipe: Recipe, source_samples: int, world_size: int) -> Plan:
    """Divide a recipe's work among `world_size` ranks.

    Args:
        recipe: the validated recipe.
        source_samples: samples (with captions: all, pairs) of all sources, repeats included, as the sampler
            counts them: at least one batch.
        world_size: ranks in all.

    Raises:
        UserError: the batch does not divide, by the ranks or into groups of batch norms, or cuts pairs that
            are mixed, the run has no step, the schedule does not fit into it, min_lr is not below lr, or an
            entry of `freeze` has no effect; with the arithmetic and values that work.
    """
    batch = recipe.data.batch_size
    per_rank = samples_per_rank(batch, world_size)
    accumulation = accumulation_of(recipe, world_size)
    epoch_samples = recipe.data.epoch_samples or source_samples
    steps_per_epoch = epoch_samples // batch
    total = recipe.train.duration.steps(steps_per_epoch, batch, 0)
    if total == 0:
        raise UserError(
            f"train.duration {recipe.train.duration.shown} rounds to zero steps: an epoch has "
            f"{counted(steps_per_epoch, 'step')} of {counted(batch, 'sample')}"
        )

    def period(every: Duration) -> int:
        return max(1, every.steps(steps_per_epoch, batch, total))

    warmup = recipe.optim.warmup.steps(steps_per_epoch, batch, total)
    cooldown = recipe.optim.cooldown.steps(steps_per_epoch, batch, total) if recipe.optim.cooldown else 0
    _check_schedule(recipe, warmup, cooldown, total)
    every, keep, measure = recipe.checkpoint.every, recipe.checkpoint.keep.every, recipe.evaluate.every
    return Plan(
        world_size=world_size,
        nodes=max(1, world_size // recipe.cluster.ranks_per_node),
        batch_size=batch,
        per_rank_batch=per_rank,
        micro_batch=per_rank // accumulation,
        accumulation=accumulation,
        epoch_samples=epoch_samples,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        total_samples=total * batch,
        lr=rates(recipe).peak,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        log_every=period(recipe.train.log_every),
        evaluate_every=period(measure) if measure else None,
        checkpoint_every=period(every) if isinstance(every, Duration) else None,
        keep_every=period(keep) if keep else None,
        warnings=(*_small_micro_batches(recipe, per_rank, accumulation),),
        freezings=freezings(recipe, steps_per_epoch, total),
    )


def shown_warmup(recipe: Recipe, warmup: int) -> str:
    """The warm-up in messages: ``optim.warmup 2 epochs (3,082 steps)``."""
    given = recipe.optim.warmup
    return f"optim.warmup {given.shown}" + ("" if given.unit == "steps" else f" ({counted(warmup, 'step')})")


def _shown_length(recipe: Recipe, total: int) -> str:
    """The length of the run in messages: ``936 steps (2 epochs)``."""
    given = recipe.train.duration
    return counted(total, "step") + ("" if given.unit == "steps" else f" ({given.shown})")


def _check_schedule(recipe: Recipe, warmup: int, cooldown: int, total: int) -> None:
    """UserError where training would end while still warming up, or the cooldown does not fit."""
    if warmup and warmup >= total:
        most = counted(int(total * LONG_WARMUP), "step")
        raise UserError(
            f"{shown_warmup(recipe, warmup)} takes the whole run of {_shown_length(recipe, total)}, which "
            f"would end while still warming up; set it to at most {most}, or train longer"
        )
    if warmup + cooldown > total:
        long = f"optim.cooldown {recipe.optim.cooldown} ({counted(cooldown, 'step')})"
        raise UserError(
            f"{shown_warmup(recipe, warmup)} and {long} do not fit into the run of "
            f"{_shown_length(recipe, total)}; shorten one, or train longer"
        )
    if recipe.optim.cooldown and not cooldown:
        raise UserError(
            f"optim.cooldown {recipe.optim.cooldown} rounds to zero steps; should be more, such as 20%"
        )


def _small_micro_batches(recipe: Recipe, per_rank: int, count: int) -> tuple[str, ...]:
    """A warning where equal micro-batches are less than half as large as they may be."""
    bound, size = recipe.train.micro_batch, per_rank // count
    if bound is None or 2 * size > min(bound, per_rank):
        return ()
    return (
        f"train.micro_batch {bound}: {counted(per_rank, 'sample')} a rank divide into equal parts of at most "
        f"{size}; a data.batch_size with more divisors makes larger and faster micro-batches",
    )


def _require_whole_pairs(recipe: Recipe, micro_batch: int, world_size: int) -> None:
    """UserError where data.mixup finds a pair of neighbouring samples in two micro-batches."""
    whole = _whole(recipe)
    if micro_batch % whole:
        twice = "twice" if whole == 2 else f"{whole} times"
        raise UserError(
            f"data.mixup mixes pairs of neighbouring samples, and data.batch_size {recipe.data.batch_size} "
            f"on {counted(world_size, 'rank')} makes micro-batches of {counted(micro_batch, 'sample')}; set "
            f"data.batch_size to a multiple of {twice} the ranks, and train.micro_batch, if any, to at least "
            f"{whole}"
        )


def _whole(recipe: Recipe) -> int:
    """The count of samples that divides every micro-batch: a group of batch norms, and a pair to mix."""
    return lcm(recipe.train.batch_norm_group or 1, 2 if recipe.data.mixup else 1)


def samples_per_rank(batch: int, world_size: int) -> int:
    """Each rank's part of the global batch; UserError with values that work where it does not divide."""
    if batch % world_size == 0:
        return batch // world_size
    lower, upper = batch - batch % world_size, batch + world_size - batch % world_size
    batches = " or ".join(str(value) for value in (lower, upper) if value > 0)
    raise UserError(
        f"data.batch_size {batch} does not divide by {world_size} ranks; set it to {batches}, "
        f"or use {' or '.join(map(str, _near(_divisors(batch), world_size)))} ranks"
    )


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _near(values: list[int], wanted: int) -> list[int]:
    """Of sorted values the largest not above `wanted`, and the smallest above it."""
    return values[max(0, bisect(values, wanted) - 1) :][:2]


def accumulation_of(recipe: Recipe, world_size: int) -> int:
    """The smallest number of equal micro-batches of at most train.micro_batch samples.

    They divide neither a group of train.batch_norm_group samples nor, with data.mixup, a pair. Raises
    UserError where there is no such number, with values that work.
    """
    per_rank = samples_per_rank(recipe.data.batch_size, world_size)
    bound, group = recipe.train.micro_batch, recipe.train.batch_norm_group
    count = micro_batches(per_rank, bound, _whole(recipe))
    if count is not None:
        return count
    if cutting := micro_batches(per_rank, bound, group or 1):
        _require_whole_pairs(recipe, per_rank // cutting, world_size)
    assert group is not None, "micro-batches of one sample always divide"
    fit = [size for size in _divisors(per_rank) if 2 <= size <= (bound or per_rank)]
    if not fit:
        advice = "no group of two or more does; use fewer ranks, or another data.batch_size"
    else:
        advice = f"set it to {' or '.join(map(str, _near(fit, group)))}"
    most = f" of at most {bound}" if bound else ""
    raise UserError(
        f"train.batch_norm_group {group} does not divide {counted(per_rank, 'sample')} a rank into equal "
        f"micro-batches{most} of whole groups; {advice}"
    )


def memory_advice(recipe: Recipe, world_size: int) -> str:
    """Advice for a recipe whose step does not fit into memory: what it can still change, with values."""
    per_rank = samples_per_rank(recipe.data.batch_size, world_size)
    size = per_rank // accumulation_of(recipe, world_size)
    count = micro_batches(per_rank, size // 2, _whole(recipe)) if size > 1 else None
    logits = 4 * per_rank * recipe.data.batch_size  # bytes
    changes = []
    if count:
        changes.append(f"set train.micro_batch to {per_rank // count} ({size} samples are processed at once)")
    if not recipe.train.activation_checkpointing:
        changes.append("set train.activation_checkpointing to true")
    if TASKS[recipe.task].loss_over == "batch" and not recipe.loss.chunk and logits >= LARGE_LOGITS:
        changes.append(f"set loss.chunk to 1024 (the logits are {logits / 2**30:.0f} GiB)")
    if not changes:
        changes = ["use more ranks, or smaller towers or images"]
    if recipe.cluster.gpus_per_node == 0:
        changes.append("ask for more memory (cluster.mem)")
    advice = "; or ".join(changes)
    return f"{advice[0].upper()}{advice[1:]}; then submit again."


def micro_batches(per_rank: int, bound: int | None, multiple: int = 1) -> int | None:
    """The smallest number of equal parts of `per_rank` samples that are no larger than `bound`.

    The size of a part is a multiple of `multiple`; None where there is no such number.
    """
    sizes = [size for size in _divisors(per_rank) if size <= (bound or per_rank) and size % multiple == 0]
    return per_rank // sizes[-1] if sizes else None


def usable_nodes(recipe: Recipe, granted: int) -> int:
    """How many of the granted nodes are used: the largest count that divides the batch; the rest idle.

    It divides where every rank has equally many samples, and they make whole micro-batches: of groups of
    batch norms, and of pairs that are mixed.

    Raises:
        UserError: none of the counts from cluster.nodes' least to `granted` divides the batch.
    """
    least, tasks = recipe.cluster.nodes.least, recipe.cluster.ranks_per_node
    for nodes in range(granted, min(least, granted) - 1, -1):
        if _divides(recipe, nodes * tasks):
            return nodes
    return accumulation_of(recipe, granted * tasks)  # raises


def _divides(recipe: Recipe, ranks: int) -> bool:
    per_rank, rest = divmod(recipe.data.batch_size, ranks)
    return not rest and micro_batches(per_rank, recipe.train.micro_batch, _whole(recipe)) is not None


def plan_for_nodes(recipe: Recipe, source_samples: int, granted: int) -> Plan:
    """The plan for `granted` nodes; its warnings name idle nodes. UserError as `plan` and `usable_nodes`."""
    nodes = usable_nodes(recipe, granted)
    found = plan(recipe, source_samples, nodes * recipe.cluster.ranks_per_node)
    if nodes == granted:
        return found
    batch, ranks = recipe.data.batch_size, granted * recipe.cluster.ranks_per_node
    why = f"does not divide by {ranks} ranks"
    if batch % ranks == 0:
        parts = {
            "groups of train.batch_norm_group": recipe.train.batch_norm_group,
            "pairs": recipe.data.mixup,
        }
        named = " and ".join(part for part, wanted in parts.items() if wanted)
        why = f"on {ranks} ranks makes no micro-batches of whole {named}"
    idle = f"of {granted} nodes {nodes} are used and {granted - nodes} idle: data.batch_size {batch} {why}"
    return replace(found, warnings=(*found.warnings, idle))
