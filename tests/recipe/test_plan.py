import math
import re
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clipcluster.check.experience import findings
from clipcluster.errors import UserError
from clipcluster.recipe.load import Loaded
from clipcluster.recipe.plan import (
    Plan,
    memory_advice,
    micro_batches,
    plan,
    plan_for_nodes,
    samples_per_rank,
    usable_nodes,
)
from clipcluster.recipe.sections.data import Mixup
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.units import Duration

Small = Callable[..., Loaded]


def recipe_of(batch: int, duration: str = "2 epochs", warmup: str = "0 steps", **cluster: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "data": {"train": [{"shards": "shards"}], "batch_size": batch},
            "model": {"image": {"timm": "convnext_atto"}, "text": {"arch": "gpt2"}},
            "optim": {"lr": 1e-3, "warmup": warmup},
            "train": {"duration": duration},
            "cluster": {"gpus_per_node": 0, **cluster},
        }
    )


def test_the_arithmetic_of_coco() -> None:
    recipe = recipe_of(384, "26 epochs", "2200 steps")
    found = plan(recipe, 591_753, 2)
    assert (found.steps_per_epoch, found.total_steps, found.per_rank_batch) == (1541, 40_066, 192)
    assert found.total_samples == 40_066 * 384
    assert found.warmup_steps / found.total_steps == pytest.approx(0.055, abs=5e-4)
    assert found.warnings == ()
    # With one caption an image the same numbers are another experiment.
    warning = dict(findings(recipe, plan(recipe, 118_287, 2), 118_287))["long-warmup"]
    assert warning == "optim.warmup 2200 steps is 27.5% of the run's 8,008 steps; 2% to 10% is usual"


def test_percentages_are_of_the_runs_steps() -> None:
    found = plan(recipe_of(4, "100 steps", "5%"), 40, 1)
    assert (found.warmup_steps, found.total_steps) == (5, 100)
    recipe = recipe_of(4, "100 steps")
    often = recipe.model_copy(
        update={
            "evaluate": recipe.evaluate.model_copy(update={"every": Duration.parse("25%")}),
            "train": recipe.train.model_copy(update={"log_every": Duration.parse("0.1%")}),
        }
    )
    found = plan(often, 40, 1)
    assert (found.evaluate_every, found.log_every) == (25, 1)


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 10**7), st.integers(1, 40))
def test_a_plan_adds_up(batch: int, ranks: int, samples: int, epochs: int) -> None:
    recipe = recipe_of(batch, f"{epochs} epochs")
    samples = max(samples, batch)
    if batch % ranks:
        with pytest.raises(UserError):
            plan(recipe, samples, ranks)
        return
    found = plan(recipe, samples, ranks)
    assert found.per_rank_batch * ranks == batch
    assert found.accumulation == 1
    assert found.micro_batch == found.per_rank_batch
    assert found.steps_per_epoch * batch <= samples < (found.steps_per_epoch + 1) * batch
    assert found.total_steps == epochs * found.steps_per_epoch
    assert found.total_samples == found.total_steps * batch


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 300))
def test_the_ranks_change_nothing_but_the_share(batch: int, one: int, other: int) -> None:
    assume(batch % one == 0)
    assume(batch % other == 0)
    first, second = (plan(recipe_of(batch), 10**6, ranks) for ranks in (one, other))
    assert (first.steps_per_epoch, first.total_steps, first.warmup_steps) == (
        second.steps_per_epoch,
        second.total_steps,
        second.warmup_steps,
    )


@given(st.integers(1, 3000), st.integers(1, 300))
def test_what_does_not_divide_names_what_would(batch: int, ranks: int) -> None:
    assume(batch % ranks)
    with pytest.raises(UserError) as caught:
        samples_per_rank(batch, ranks)
    sizes, _, counts = str(caught.value).partition("set it to ")[2].partition(", or use ")
    for size in map(int, sizes.split(" or ")):
        assert size % ranks == 0
        assert 0 < abs(size - batch) < ranks
    for count in map(int, counts.removesuffix(" ranks").split(" or ")):
        assert batch % count == 0


def test_the_message_of_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError) as caught:
        samples_per_rank(100, 48)
    assert str(caught.value) == (
        "data.batch_size 100 does not divide by 48 ranks; set it to 96 or 144, or use 25 or 50 ranks"
    )


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_micro_batches_are_whole_and_as_few_as_can_be(per_rank: int, bound: int) -> None:
    count = micro_batches(per_rank, bound)
    assert per_rank % count == 0
    assert per_rank // count <= bound
    fewer = [n for n in range(1, count) if per_rank % n == 0 and per_rank // n <= bound]
    assert not fewer


def test_a_ranks_part_is_cut_into_the_fewest_micro_batches(small: Small) -> None:
    recipe = small("data.batch_size=384", "train.micro_batch=100").recipe
    found = {ranks: plan(recipe, 10_000, ranks) for ranks in (1, 2, 6)}
    assert {ranks: (p.accumulation, p.micro_batch) for ranks, p in found.items()} == {
        1: (4, 96),
        2: (2, 96),
        6: (1, 64),
    }
    assert {(p.batch_size, p.total_steps, p.warnings) for p in found.values()} == {(384, 52, ())}


@given(st.integers(1, 600), st.integers(1, 600) | st.none(), st.integers(2, 64), st.integers(1, 4))
def test_groups_of_batch_norms_divide_every_micro_batch(
    per_rank: int, bound: int | None, group: int, ranks: int
) -> None:
    def planned(group: int) -> Plan:
        changes = {"micro_batch": bound, "batch_norm_group": group}
        return plan(
            recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)}), 10**6, ranks
        )

    recipe = recipe_of(per_rank * ranks)
    fits = per_rank % group == 0 and group <= (bound or per_rank)
    if fits:
        found = planned(group)
        assert found.micro_batch % group == 0
        assert found.micro_batch <= (bound or per_rank)
        assert found.micro_batch * found.accumulation == per_rank
        return
    with pytest.raises(UserError, match=f"train.batch_norm_group {group} does not divide") as caught:
        planned(group)
    for value in str(caught.value).partition("set it to ")[2].split(" or "):
        assert not value or planned(int(value))


def test_the_message_of_a_group_that_does_not_divide(small: Small) -> None:
    with pytest.raises(UserError) as caught:
        plan(
            small("data.batch_size=256", "train.micro_batch=50", "train.batch_norm_group=24").recipe, 1000, 2
        )
    assert str(caught.value) == (
        "train.batch_norm_group 24 does not divide 128 samples a rank into equal micro-batches of at most 50 "
        "of whole groups; set it to 16 or 32"
    )


def test_advice_about_memory_names_what_the_recipe_does_not_do_yet(small: Small) -> None:
    given = ["data.batch_size=384"]
    assert memory_advice(small(*given).recipe, 2) == (
        "Set train.micro_batch to 96 (192 samples are processed at once); "
        "or set train.activation_checkpointing to true; then submit again."
    )
    given += ["train.activation_checkpointing=true", "train.batch_norm_group=24", "train.micro_batch=100"]
    assert memory_advice(small(*given).recipe, 2) == (
        "Set train.micro_batch to 48 (96 samples are processed at once); then submit again."
    )
    large = ("data.batch_size=32768", "cluster.gpus_per_node=0")
    advice = memory_advice(small(*large, *given[1:2], "train.micro_batch=1").recipe, 2)
    assert advice.startswith(
        "Set loss.chunk to 1024 (the logits are 2 GiB); or ask for more memory (cluster.m"
    )
    advice = memory_advice(small("data.batch_size=8", given[1], "train.micro_batch=1").recipe, 2)
    assert advice == "Use more ranks, or smaller towers or images; then submit again."


@given(st.integers(1, 600), st.integers(1, 600) | st.none(), st.integers(2, 16) | st.none(), st.booleans())
def test_the_micro_batch_to_try_next_is_smaller_and_fits(
    per_rank: int, bound: int | None, group: int | None, mixed: bool
) -> None:
    def with_bound(bound: int | None) -> Recipe:
        changes = {"micro_batch": bound, "batch_norm_group": group}
        return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})

    recipe = recipe_of(per_rank)
    data = recipe.data.model_copy(update={"mixup": Mixup() if mixed else None})
    recipe = recipe.model_copy(update={"data": data})
    whole = math.lcm(group or 1, 2 if mixed else 1)
    assume(per_rank % whole == 0 and whole <= (bound or per_rank))
    now = plan(with_bound(bound), 10**6, 1).micro_batch
    found = re.search(r"train.micro_batch to (\d+) ", memory_advice(with_bound(bound), 1))
    if found is None:
        assert now < 2 * whole
        return
    assert plan(with_bound(int(found[1])), 10**6, 1).micro_batch == int(found[1]) <= now / 2


def test_small_micro_batches_are_warned_of(small: Small) -> None:
    (warning,) = plan(small("data.batch_size=194", "train.micro_batch=64").recipe, 10_000, 2).warnings
    assert warning == (
        "train.micro_batch 64: 97 samples a rank divide into equal parts of at most 1; "
        "a data.batch_size with more divisors makes larger and faster micro-batches"
    )


@pytest.mark.parametrize(
    ("override", "samples", "message"),
    [
        ("train.duration=0 steps", 100, "got '0 steps'; should be more than zero, such as 100 steps"),
        ("evaluate.every=0 steps", 100, "got '0 steps'; should be more than zero, such as 100 steps"),
        ("train.log_every=0%", 100, "got '0%'; should be more than zero"),
        ("checkpoint.every=0 samples", 100, "got '0 samples'; should be more than zero"),
        ("checkpoint.keep.every=0 epochs", 100, "got '0 epochs'; should be more than zero"),
        ("train.duration=0.01 epochs", 100, "an epoch has 8 steps of 12 samples"),
        ("optim.warmup=16 steps", 100, r"takes the whole run of 16 steps \(2 epochs\), which"),
        ("optim.warmup=2 epochs", 100, r"optim.warmup 2 epochs \(16 steps\) takes the whole run"),
        ("optim.warmup=900 steps", 100, "set it to at most 3 steps, or train longer"),
    ],
)
def test_runs_that_cannot_be(small: Small, override: str, samples: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(small(override).recipe, samples, 2)


@given(st.integers(0, 300), st.integers(1, 300))
def test_warm_up_above_a_fifth_is_warned_of(warmup: int, total: int) -> None:
    recipe = recipe_of(4, f"{total} steps", f"{warmup} steps")
    if warmup >= total:
        if warmup:
            with pytest.raises(UserError, match="takes the whole run"):
                plan(recipe, 100, 1)
        return
    assert ("long-warmup" in dict(findings(recipe, plan(recipe, 100, 1), 100))) == (warmup > 0.2 * total)


def test_epoch_samples_set_the_epoch(small: Small) -> None:
    found = plan(
        small("data.epoch_samples=121", "evaluate.every=0.5 epochs", "checkpoint.every=1 sample").recipe,
        99,
        1,
    )
    assert found.steps_per_epoch == 10
    assert found.evaluate_every == 5
    assert found.checkpoint_every == 1


@pytest.mark.parametrize(
    ("every", "steps"),
    [("7 steps", 7), ("24 samples", 2), ("0.5 epochs", 5), ("2 epochs", 20), ("25%", 8), ("1 sample", 1)],
)
def test_evaluations_come_by_steps_samples_epochs_or_parts_of_the_run(
    small: Small, every: str, steps: int
) -> None:
    found = plan(small(f"evaluate.every={every}", "train.duration=31 steps").recipe, 120, 1)
    assert (found.steps_per_epoch, found.evaluate_every) == (10, steps)


def test_periods_are_in_steps_or_by_the_clock(small: Small) -> None:
    found = plan(small("checkpoint.keep.every=1 epoch").recipe, 120, 1)
    assert (found.log_every, found.evaluate_every, found.checkpoint_every, found.keep_every) == (
        10,
        None,
        None,
        10,
    )


@given(st.integers(1, 4096), st.integers(1, 8), st.integers(1, 12), st.integers(0, 12))
def test_the_largest_count_of_nodes_that_divides_is_used(
    batch: int, tasks: int, least: int, more: int
) -> None:
    recipe = recipe_of(batch, nodes=f"{least}-{least + 12}", tasks_per_node=tasks)
    granted = least + more
    fit = [nodes for nodes in range(least, granted + 1) if batch % (nodes * tasks) == 0]
    if not fit:
        with pytest.raises(UserError, match="does not divide"):
            usable_nodes(recipe, granted)
        return
    assert usable_nodes(recipe, granted) == max(fit)


def test_idle_nodes_are_said() -> None:
    found = plan_for_nodes(recipe_of(128, nodes="2-4", tasks_per_node=2), 1437, granted=3)
    assert (found.nodes, found.world_size, found.per_rank_batch) == (2, 4, 32)
    assert found.warnings == (
        "of 3 nodes 2 are used and 1 idle: data.batch_size 128 does not divide by 6 ranks",
    )
    assert plan_for_nodes(recipe_of(128, nodes="2-4", tasks_per_node=2), 1437, granted=4).nodes == 4


def test_nodes_that_would_cut_a_group_or_a_pair_idle() -> None:
    """128 samples are 32 a rank on 4 nodes and 64 on 2: a group of 64 fits on 2 alone."""
    recipe = recipe_of(128, nodes="2-4")
    grouped = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_norm_group": 64})})
    found = plan_for_nodes(grouped, 1437, granted=4)
    assert (found.nodes, found.per_rank_batch) == (2, 64)
    assert found.warnings == (
        "of 4 nodes 2 are used and 2 idle: data.batch_size 128 on 4 ranks makes no micro-batches of whole "
        "groups of train.batch_norm_group",
    )
    data = recipe.data.model_copy(update={"batch_size": 12, "mixup": Mixup()})
    found = plan_for_nodes(recipe.model_copy(update={"data": data}), 1437, granted=4)
    assert (found.nodes, found.per_rank_batch) == (3, 4)
    assert found.warnings[0].endswith("12 on 4 ranks makes no micro-batches of whole pairs")
    train = recipe.train.model_copy(update={"batch_norm_group": 48})
    with pytest.raises(UserError, match=r"train\.batch_norm_group 48 does not divide 32 samples a rank"):
        usable_nodes(recipe.model_copy(update={"train": train}), 4)


def test_a_plan_is_instant_for_any_size() -> None:
    found = plan(recipe_of(65_536, "12_800_000_000 samples"), 12_800_000_000, 1024)
    assert found.total_steps == math.floor(12_800_000_000 / 65_536 + 0.5)
    with pytest.raises(UserError, match=r"does not divide by 7 ranks; .* or use 5 or 8 ranks"):
        samples_per_rank(10**12, 7)


def mixed_recipe(batch: int, **train: object) -> Recipe:
    given = recipe_of(batch).model_dump()
    given["data"]["mixup"], given["task"], given["model"] = {}, "classify", {"image": given["model"]["image"]}
    given["train"] |= train
    return Recipe.model_validate(given)


def test_pairs_that_are_mixed_are_not_cut() -> None:
    assert plan(mixed_recipe(12), 100, 3).micro_batch == 4
    assert plan(mixed_recipe(90, micro_batch=50), 100, 1).micro_batch == 30  # not 45
    assert memory_advice(mixed_recipe(6), 1).startswith("Set train.micro_batch to 2 (6 samples")
    for ranks, recipe, said in (
        (4, mixed_recipe(12), "on 4 ranks makes micro-batches of 3 samples; .* twice the ranks, .* least 2$"),
        (1, mixed_recipe(12, micro_batch=1), "micro-batches of 1 sample; .* at least 2$"),
        (2, mixed_recipe(12, micro_batch=5, batch_norm_group=3), "of 3 samples; .* 6 times the ranks, .* 6$"),
        (1, mixed_recipe(10, micro_batch=5, batch_norm_group=3), "batch_norm_group 3 does not divide"),
    ):
        with pytest.raises(UserError, match=said):
            plan(recipe, 100, ranks)
