"""Builds everything that a run folder describes, and acts: one place that knows all the parts.

Nothing here loads torch until `train` or `evaluate` is called: a rank's signal handlers come first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcluster.errors import UserError
from clipcluster.recipe.load import from_run, load
from clipcluster.recipe.plan import Plan, plan
from clipcluster.recipe.schema import Recipe
from clipcluster.recipe.units import Time
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.files import read_json
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events
from clipcluster.runtime.place import Place
from clipcluster.runtime.stop import Outcome, Stop, Wish

if TYPE_CHECKING:
    from clipcluster.data.sampling.sampler import Order
    from clipcluster.data.shards.dataset import Shards
    from clipcluster.data.tokenizer import Tokenizer
    from clipcluster.model.clip import Clip
    from clipcluster.runtime.world import World
    from clipcluster.train.saver import Saver
    from clipcluster.train.trainer import Trainer

logger = logging.getLogger("clipcluster")
SILENCE_S = 600.0
"""Seconds after which a silent rank is lost."""
GRACE_S = 30.0
"""Seconds between the request to stop and the kill, where the recipe does not say."""
NAMED_SHARDS = 1000
"""Sources of at most so many shards have their hashes in every checkpoint, so that a refusal names one."""


def train(run: Run, attempt: Attempt, place: Place, stop: Stop) -> Outcome:
    """One rank of one attempt: train from the newest checkpoint until the end or an agreed stop.

    Raises what `Trainer.run` raises, and UserError or DataError where a part cannot be built.
    """
    from clipcluster.runtime.devices import pick_device
    from clipcluster.runtime.world import World

    recipe = from_run(run.recipe(), attempt.settings())
    device = pick_device(place.local_rank)
    use_processors(recipe, place)
    world = World.join(place, publish=attempt.publish, find=attempt.find, device=device, timeout_s=SILENCE_S)
    began = time.monotonic()
    if world.agree(stop.wishes()) & Wish.STOP:
        return (
            Outcome.STOPPED
        )  # while starting up: nothing to save, and building may take longer than there is
    sources = open_sources(recipe, run.assets)
    if check_shards(sources.shards, world, stop) & Wish.STOP:
        return Outcome.STOPPED
    trainer = build_trainer(run, attempt, world, stop, recipe, sources)
    outcome = trainer.run()
    if world.is_main:
        _summarise(run, trainer, outcome, time.monotonic() - began)
    world.leave()
    return outcome


def use_processors(recipe: Recipe, place: Place) -> None:
    """Give this rank its share of the node's cores, and arithmetic that repeats."""
    import torch

    from clipcluster.runtime.devices import set_threads

    usable = min(len(os.sched_getaffinity(0)), max(1, (os.cpu_count() or 1) // place.local_size))
    set_threads(min(recipe.cluster.cpus_per_task, usable))
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@dataclass(frozen=True)
class Sources:
    """What is trained on: shards, the order of their samples, the tokenizer."""

    shards: Sequence[Shards]
    order: Order
    tokenizer: Tokenizer

    @property
    def samples(self) -> int:
        """Of all sources."""
        return sum(source.n_samples for source in self.shards)

    def index(self) -> list[dict[str, Any]]:
        """What a checkpoint remembers of them: names, fingerprints, and hashes where there are few shards."""
        return [
            {
                "name": source.name,
                "fingerprint": source.fingerprint,
                "samples": source.n_samples,
                "shards": _hashes(source),
            }
            for source in self.shards
        ]


def _hashes(source: Shards) -> dict[str, str]:
    if len(source) > NAMED_SHARDS:
        return {}
    return {source.shard_name(number): source.sha256(number) for number in range(len(source))}


def open_sources(recipe: Recipe, assets: Path) -> Sources:
    """Open the recipe's sources. Raises UserError where one cannot be opened."""
    from clipcluster.data.sampling.sampler import order_of
    from clipcluster.data.shards.open import open_source
    from clipcluster.data.storage.cache import Cache
    from clipcluster.data.tokenizer import load_tokenizer

    cache = Cache.of(recipe.data.cache)
    shards = [open_source(source, text=True, cache=cache) for source in recipe.data.train]
    tokenizer = load_tokenizer(recipe.data.text, assets)
    return Sources(shards, order_of(recipe, shards), tokenizer)


def build_model(recipe: Recipe, tokenizer: Tokenizer, assets: Path, *, starting_weights: bool = True) -> Clip:
    """The model at its start, on the CPU; fresh weights are a function of the recipe's seed."""
    import torch

    from clipcluster.model.clip import build_clip

    torch.manual_seed(recipe.seed)
    return build_clip(
        recipe.model,
        image_size=recipe.data.image.size,
        tokenizer=tokenizer,
        assets=assets,
        starting_weights=starting_weights,
    )


def check_shards(sources: Sequence[Shards], world: World, stop: Stop) -> Wish:
    """Whether the shards are as indexed: the ranks share those that only their hash can tell of.

    They speak after each, so that none is taken for lost meanwhile; returns STOP where one was asked to.
    Raises DataError on the rank that finds a changed shard.
    """
    found = world.broadcast_object([source.touched() for source in sources] if world.is_main else None)
    turns = [(source, shard) for source, shards in zip(sources, found, strict=True) for shard in shards]
    if turns and world.is_main:
        logger.warning(
            "%d shards have another time than when they were indexed: comparing their content "
            "(clipcluster shards index DIR spares later attempts that)",
            len(turns),
        )
    wishes = Wish.NONE
    for first in range(0, len(turns), world.size):
        for source, shard in turns[first + world.rank : first + world.rank + 1]:
            source.check(shard)
        wishes = world.agree(stop.wishes())
        if wishes & Wish.STOP:
            return wishes
    for source, shards in zip(sources, found, strict=True):
        source.vouch(shards)  # the loader's workers need not compare what the other ranks did
    return wishes


def build_trainer(
    run: Run, attempt: Attempt, world: World, stop: Stop, recipe: Recipe, sources: Sources
) -> Trainer:
    """All parts of a run, put together; every rank builds the same."""
    from clipcluster.evals.suite import build_suite
    from clipcluster.model.task import ContrastiveTask
    from clipcluster.train.bad_samples import BadSamples
    from clipcluster.train.checkpoint import CheckpointFolder, versions
    from clipcluster.train.ema import Ema
    from clipcluster.train.evaluations import Evaluations
    from clipcluster.train.guard import Guard
    from clipcluster.train.metrics import Metrics
    from clipcluster.train.optimizer import Optimizer
    from clipcluster.train.precision import Precision
    from clipcluster.train.progress import Progress
    from clipcluster.train.schedule import make_schedule
    from clipcluster.train.step import Step
    from clipcluster.train.trainer import Trainer

    plan_ = plan(recipe, sources.order.samples, world.size)
    precision = Precision(recipe.train.precision, world.device)
    model = build_model(recipe, sources.tokenizer, run.assets)
    weights = _describe_start(model, plan_) if world.is_main else {}
    task = ContrastiveTask(model, recipe.data.image.mean, recipe.data.image.std, world).to(world.device)
    optim = recipe.optim
    optimizer = Optimizer(
        model, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps
    )
    ema = Ema(model, recipe.train.ema.decay) if recipe.train.ema else None
    step = Step(
        _wrapped(task, world),
        task,
        optimizer,
        make_schedule(optim.schedule, peak=optim.lr, warmup=plan_.warmup_steps, total=plan_.total_steps),
        precision,
        Guard(world.device, recipe.train.non_finite.limit),
        ema,
        clip_norm=optim.clip_norm,
        seed=recipe.seed,
        slot=world.rank * plan_.per_rank_batch,
    )
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": precision}
    if ema:
        parts["ema"] = ema
    constants = {"index": sources.index(), "starting_weights": weights, "plan": asdict(plan_)}
    about = {"versions": versions(), "commit": _commit(run, attempt), "world_size": world.size}
    checkpoints = CheckpointFolder(run.checkpoints, check=attempt.check, about=about)
    return Trainer(
        world=world,
        attempt=attempt,
        stop=stop,
        progress=Progress(steps_per_epoch=plan_.steps_per_epoch, batch_size=plan_.batch_size),
        total_steps=plan_.total_steps,
        step=step,
        open_batches=lambda at: _loader(recipe, sources, world, at.batches_drawn, at.skipped),
        parts=parts,
        constants=constants,
        checkpoints=checkpoints,
        saver=_saver(run, recipe, plan_, world, attempt, checkpoints, constants),
        evaluations=Evaluations(
            build_suite(recipe, world=world, tokenizer=sources.tokenizer) or None,
            ema.model if ema else model,
            every=plan_.evaluate_every,
            total_steps=plan_.total_steps,
            run=run,
            attempt=attempt,
            world=world,
            precision=precision,
            averaged=ema is not None,
        ),
        metrics=Metrics(run, attempt, world, every=plan_.log_every, total_steps=plan_.total_steps),
        bad_samples=BadSamples(
            run, attempt, rank=world.rank, samples=sources.samples, limit=recipe.data.bad_samples.limit
        ),
        record_samples=recipe.train.record_samples,
        grace_seconds=recipe.cluster.grace.seconds if recipe.cluster.grace else GRACE_S,
    )


def evaluate(run: Run, *, overrides: Sequence[str] = (), checkpoint: Path | None = None) -> dict[str, Any]:
    """Measure a checkpoint of a run, also of one that is training, in this process; nothing is written.

    `checkpoint`: its folder, default the newest that verifies. `overrides`: `key=value` over the run's recipe
    and its settings as last submitted; the `evaluate` section says what is measured. Averaged weights where
    there are any. Returns `run`, `checkpoint`, `step`, `ema` and `metrics` (SET/METRIC -> value). Raises
    UserError where there is nothing to measure.
    """
    import torch

    from clipcluster.data.tokenizer import load_tokenizer
    from clipcluster.evals.suite import build_suite
    from clipcluster.runtime.devices import pick_device
    from clipcluster.runtime.world import World
    from clipcluster.train.precision import Precision

    recipe = _overridden(from_run(run.recipe(), run.settings()), overrides)
    world = World(0, 1, 0, pick_device(0))
    tokenizer = load_tokenizer(recipe.data.text, run.assets)
    suite = build_suite(recipe, world=world, tokenizer=tokenizer)
    if not suite:
        raise UserError(
            "There is nothing to measure: name shard folders in evaluate.retrieval or evaluate.zero_shot."
        )
    model = build_model(recipe, tokenizer, run.assets, starting_weights=False)
    found, step, averaged = _load_weights(run, model, checkpoint)
    model.to(world.device)
    with torch.no_grad(), Precision(recipe.train.precision, world.device).autocast():
        metrics = suite.run(model)
    return {"run": run.name, "checkpoint": str(found), "step": step, "ema": averaged, "metrics": metrics}


def _overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key=value` put over it, checked as a recipe from a file is."""
    if not overrides:
        return recipe
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe.model_dump_json())  # JSON is YAML
        return load(file, overrides).recipe


def _load_weights(run: Run, model: Clip, checkpoint: Path | None) -> tuple[Path, int, bool]:
    """Weights of a checkpoint, by default the newest whole one; its folder, step, and whether averaged."""
    from safetensors.torch import load_file

    from clipcluster.train.checkpoint import Broken, CheckpointFolder, reading, verify

    folder = CheckpointFolder(run.checkpoints, check=lambda: None, about={})
    newest_first = [folder.path(step) for step in reversed(folder.steps())]
    reasons = []
    for path in [checkpoint] if checkpoint else newest_first:
        try:
            with reading(path):
                step = int(verify(path)["step"])
                averaged = (path / "ema.safetensors").exists()
                model.load_state_dict(load_file(path / f"{'ema' if averaged else 'model'}.safetensors"))
        except (Broken, FileNotFoundError) as error:
            reasons.append(f"{path.name}: {error}")
            continue
        except RuntimeError as error:
            raise UserError(f"The weights of {path} do not fit the recipe: {error}") from error
        return path, step, averaged
    there = ", ".join(path.name for path in newest_first) or "none"
    raise UserError(
        f"{run.name} has no checkpoint to measure ({'; '.join(reasons) or 'none was written yet'}). "
        f"Its checkpoints: {there}."
    )


def _describe_start(model: Clip, plan_: Plan) -> dict[str, str]:
    """Rank 0's words on what a run starts from; returns the starting weights' hashes by tower."""
    logger.info(
        "%s ranks x %s samples; %s steps, %s an epoch",
        plan_.world_size,
        f"{plan_.per_rank_batch:,}",
        f"{plan_.total_steps:,}",
        f"{plan_.steps_per_epoch:,}",
    )
    for warning in plan_.warnings:
        logger.warning("%s", warning)
    for coverage in model.starting_weights:
        logger.info("%s", coverage)
    return {coverage.tower: hash_of(Path(coverage.file)) for coverage in model.starting_weights}


def hash_of(path: Path) -> str:
    """SHA-256 in hex of a file, or of a folder's weight files, names included."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))
        return hashlib.sha256(
            "".join(f"{file.name} {hash_of(file)}\n" for file in files).encode()
        ).hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(4 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _wrapped(task: Any, world: World) -> Any:
    """The task under DDP where there are peers."""
    if world.size == 1:
        return task
    import warnings

    from torch.nn.parallel import DistributedDataParallel

    # Said of 1x1 convolutions whose gradient comes with another stride: a copy, and no matter for a user.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(task)


def _loader(
    recipe: Recipe, sources: Sources, world: World, start: int, skipped: Sequence[tuple[int, int]]
) -> Any:
    from clipcluster.data.loading.loader import Loader

    return Loader(
        sources.shards,
        sources.order,
        recipe.data,
        tokenizer=sources.tokenizer,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        workers=recipe.data.workers,
        start=start,
        skipped=skipped,
    )


def _saver(
    run: Run,
    recipe: Recipe,
    plan_: Plan,
    world: World,
    attempt: Attempt,
    folder: Any,
    constants: Mapping[str, Any],
) -> Saver:
    from clipcluster.train.rotation import Keep
    from clipcluster.train.saver import Saver

    every, keep = recipe.checkpoint.every, recipe.checkpoint.keep
    best = keep.best
    return Saver(
        folder if world.is_main else None,
        keep=Keep(
            last=keep.last,
            every=plan_.keep_every,
            metric=best.metric if best else None,
            count=best.count if best else 0,
        ),
        constants=constants,
        every_steps=plan_.checkpoint_every,
        every_seconds=every.seconds if isinstance(every, Time) else None,
        last_seconds=seconds_of_a_save(run),
        event=lambda kind, **fields: attempt.event(kind, writer="rank-0", **fields),
    )


def seconds_of_a_save(run: Run) -> float:
    """How long the slowest of the run's last three saves took; 0.0 before the first."""
    saves = [event["seconds"] for event in events(run) if event["event"] == "checkpoint"]
    return max(saves[-3:], default=0.0)


def _commit(run: Run, attempt: Attempt) -> str | None:
    """The commit of the code that this attempt runs, as its snapshot knows it."""
    try:
        facts = read_json(run.path / str(attempt.settings().get("code")) / "snapshot.json")
    except (OSError, ValueError):
        return None
    return f"{facts.get('commit')}{' and changes' if facts.get('dirty') else ''}"


def _summarise(run: Run, trainer: Trainer, outcome: Outcome, seconds: float) -> None:
    """What rank 0 says last."""
    done = trainer.progress
    logger.info(
        "%s at step %s of %s (%s samples, %.2f epochs) after %.1f s of this attempt",
        outcome.name.lower(),
        f"{done.step:,}",
        f"{trainer.total_steps:,}",
        f"{done.samples:,}",
        done.epoch,
        seconds,
    )
    if trainer.results:
        for name, value in trainer.results.items():
            logger.info("  %-32s %.4f", name, value)
    logger.info("run folder: %s", run.path)
