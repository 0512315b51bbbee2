"""Plans with some numbers of interest."""

from clipcluster.recipe.plan import Plan


def plan_of(*, total_steps: int, checkpoint_every: int | None = None, keep_every: int | None = None) -> Plan:
    """A plan of one rank with batches of one sample."""
    return Plan(
        world_size=1,
        nodes=1,
        batch_size=1,
        per_rank_batch=1,
        micro_batch=1,
        accumulation=1,
        epoch_samples=1,
        steps_per_epoch=1,
        total_steps=total_steps,
        total_samples=total_steps,
        lr=1.0,
        warmup_steps=0,
        cooldown_steps=0,
        log_every=1,
        evaluate_every=None,
        checkpoint_every=checkpoint_every,
        keep_every=keep_every,
        warnings=(),
    )
