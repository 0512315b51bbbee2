"""A small run for the trainer's tests: real ranks, real checkpoints, a task of two layers a tower."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from transformers import GPT2Config, GPT2Model

from clipcluster.build.stages import build_stages
from clipcluster.data.loading.batch import Batch
from clipcluster.evals.features import Measured
from clipcluster.model.losses import contrastive
from clipcluster.model.task import Features, Report, Task
from clipcluster.model.towers import ImageTower, TextTower
from clipcluster.recipe.sections.checkpoint import Best, Keep
from clipcluster.recipe.stages import Freezing
from clipcluster.runs.folder import Run
from clipcluster.runs.interruptions import interruptions
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.stop import Stop
from clipcluster.runtime.world import World
from clipcluster.train import save_interval, work
from clipcluster.train.backward import Backward, Cached, Independent, Whole
from clipcluster.train.checkpoint import CheckpointFolder
from clipcluster.train.compiling import compile_towers
from clipcluster.train.deadline import Deadline
from clipcluster.train.ema import Ema
from clipcluster.train.evaluations import Evaluations
from clipcluster.train.metrics import Metrics
from clipcluster.train.optimizer import Optimizer, StageRate
from clipcluster.train.precision import Precision
from clipcluster.train.progress import Feed, Progress
from clipcluster.train.records import Records
from clipcluster.train.save_interval import SaveInterval
from clipcluster.train.saver import Saver
from clipcluster.train.schedule import learning_rate
from clipcluster.train.stages import Stage, Stages
from clipcluster.train.statistics import RunningStatistics
from clipcluster.train.step import Guard, Step
from clipcluster.train.trainer import Trainer
from clipcluster.train.watchdog import Watchdog
from clipcluster.train.wrapping import WrappedTask

BATCH, WORDS, LENGTH = 16, 50, 6


@dataclass
class Script:
    """What a test asks of a run."""

    steps: int = 12
    save_every: int | None = 4
    auto: bool = False  # saves as often as is best, with intervals as short as these runs
    log_every: int = 1
    evaluate_every: int | None = None
    by_job: bool = False  # evaluations are left to jobs of their own
    stop_at: int | None = None  # request a stop while batch number stop_at is fetched
    stop_rank: int = 0
    stop_in_evaluation: bool = False
    poison: list[int] = field(default_factory=list)  # batches whose loss is not finite
    poison_rank: int = 0
    exhausts_at: int | None = None  # batch for which there is not enough memory
    bad: list[int] = field(default_factory=list)  # batches that bring a bad sample each
    precision: str = "fp32"
    ema: bool = True
    record: bool = True
    keep_last: int = 3
    keep_best: str | None = None
    rehearse: bool = True
    limit: int = 2
    index: str = "abc"
    weights: str = "w"
    lr: float = 0.05
    optimizer: str = "adamw"
    pause: float = 0.0
    own_part: bool = False  # a part that differs by rank
    slow_disk: float = 0.0  # seconds that reading and writing a checkpoint takes
    blind: int | None = None  # a rank that sees no evaluation yet which another node recorded
    silence: float = 60.0  # seconds after which a rank is lost
    stalled_after: float | None = None  # seconds after which a watchdog ends a rank
    sigstop_at: dict[int, int] = field(default_factory=dict)  # batch at whose loss a rank is stopped, by rank
    slow: dict[int, float] = field(default_factory=dict)  # seconds more in each step, by rank
    ends: float | None = None  # time limit, seconds since 1970
    backward: str = "whole"
    compile: bool = False
    thaw_at: int | None = None  # until this step the words do not train, then at half the learning rate
    freeze: list[dict[str, Any]] | None = (
        None  # entries of a recipe's `freeze`, for towers as recipes have them
    )
    replicas: bool = False  # a part that says each rank's weights


class Towers(nn.Module):
    """Layers registered in another order than they are used, as real towers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))
        self.last = nn.Linear(24, 16)
        self.norm = nn.BatchNorm1d(24)
        self.first = nn.Linear(3 * 4 * 4, 24)
        self.words = nn.Embedding(WORDS, 16)
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.dropout(self.norm(self.first(images.flatten(1).float() / 255)).relu())
        text = self.words(tokens).mean(1)
        return nn.functional.normalize(self.last(hidden).float()), nn.functional.normalize(text.float())


class RealTowers(nn.Module):
    """A small ResNet of timm's with batch norms, and a GPT-2 of three blocks with dropout."""

    SIZE = 32

    def __init__(self) -> None:
        super().__init__()
        words = {"n_layer": 3, "n_embd": 16, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(vocab_size=WORDS, n_positions=LENGTH, **words)
        trunk = timm.create_model("test_resnet", num_classes=0, drop_path_rate=0.2, zero_init_last=False)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))
        self.image = ImageTower(trunk, trunk.num_features)
        self.text = TextTower(GPT2Model(config), 16, "last")
        self.image_projection = nn.Linear(self.image.width, 16, bias=False)
        self.text_projection = nn.Linear(16, 16, bias=False)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        image = self.image_projection(self.image(images.float() / 255))
        text = self.text_projection(self.text(tokens, torch.ones_like(tokens, dtype=torch.bool)))
        return nn.functional.normalize(image.float()), nn.functional.normalize(text.float())


class Replica:
    """What a rank's own weights are, as a hash of their bytes."""

    per_rank = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        content = b"".join(value.numpy().tobytes() for value in self.model.state_dict().values())
        return {"sha256": torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(self.state_dict()["sha256"], state["sha256"])


class Seen:
    """Counts a rank's steps, each as its number: no two ranks have the same."""

    per_rank = True

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


class ToyTask(Task):
    def __init__(self, model: Towers | RealTowers, world: World, script: Script) -> None:
        super().__init__()
        self.model, self.world, self.script = model, world, script
        self.seen = Seen()
        self.batch = -1

    def encode(self, batch: Batch) -> Features:
        self.batch = batch.index
        time.sleep(self.script.slow.get(self.world.rank, 0.0))
        if batch.index == self.script.exhausts_at:
            torch.empty(1 << 60)
        image, text = self.model(batch.images, batch.tokens)
        poisoned = batch.index in self.script.poison and self.world.rank == self.script.poison_rank
        return {"image": image, "text": text, "poisoned": torch.full((len(batch),), poisoned)}

    def loss(self, features: Features) -> Report:
        scale = self.model.logit_scale.exp().squeeze()
        loss, accuracy = contrastive(features["image"], features["text"], scale, self.world)
        if features["poisoned"].any():
            loss = loss * torch.inf
        if self.script.sigstop_at.get(self.world.rank) == self.batch:
            signal.raise_signal(signal.SIGSTOP)
        return Report(loss, {"loss": loss.detach(), "logit_scale": scale.detach(), "accuracy": accuracy})

    def after_step(self) -> None:
        self.seen.total += self.world.rank + 1
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6)


class ToyBatches:
    """Batch t is a function of t; a rank takes its slots."""

    def __init__(self, script: Script, world: World, stop: Stop, progress: Progress) -> None:
        self.script, self.world, self.stop = script, world, stop
        self.start, self.skipped = progress.batches_drawn, progress.skipped
        self.closed = False

    def __iter__(self) -> Iterator[Batch]:
        share = BATCH // self.world.size
        own = slice(self.world.rank * share, (self.world.rank + 1) * share)
        t = self.start
        while True:
            if not any(first <= t < past for first, past in self.skipped):
                if t == self.script.stop_at and self.world.rank == self.script.stop_rank:
                    self.stop.request(f"the test's wish at batch {t}")
                if self.script.pause:
                    time.sleep(self.script.pause)
                yield self.batch(t, own)
            t += 1

    def batch(self, t: int, own: slice) -> Batch:
        generator = torch.Generator().manual_seed(1000 + t)
        size = 4 if self.script.freeze is None else RealTowers.SIZE
        images = torch.randint(0, 256, (BATCH, 3, size, size), generator=generator, dtype=torch.uint8)
        tokens = torch.randint(0, WORDS, (BATCH, LENGTH), generator=generator)
        slots = range(BATCH)[own]
        keys = [(slot, f"shard-{slot % 3}", f"{t}-{slot}") for slot in slots]
        bad = [{"shard": "shard-1", "key": f"bad-{t}", "reason": "truncated"}] if t in self.script.bad else []
        mask = torch.ones_like(tokens[own], dtype=torch.bool)
        return Batch(t, images[own], tokens[own], mask, None, keys, bad)

    def close(self) -> None:
        self.closed = True


class ToySuite:
    """Reads a number off the weights, asking between its batches whether to go on."""

    def __init__(self, script: Script, stop: Stop) -> None:
        self.script, self.stop = script, stop
        self.steps: list[int] = []

    def run(self, model: Any, progress: Progress, *, tick: Any, averaged: Any) -> Measured:
        if self.script.stop_in_evaluation:
            self.stop.request("the test's wish in an evaluation")
        for _ in range(3):
            tick()
        self.steps.append(progress.step)
        with averaged() if averaged else nullcontext():
            size = float(model.first.weight.detach().abs().sum())
        return Measured({"toy/size": size, "toy/step": float(progress.step)})


class SlowDisk(CheckpointFolder):
    seconds, blind = 0.0, False

    def evaluation(self, step: int) -> dict[str, float]:
        return {} if self.blind else super().evaluation(step)

    def newest(self, *arguments: Any) -> Path | None:
        time.sleep(self.seconds)
        return super().newest(*arguments)

    def write(self, *arguments: Any) -> Path:
        time.sleep(self.seconds)
        return super().write(*arguments)


BACKWARD: dict[str, type[Backward]] = {"whole": Whole, "independent": Independent, "cached": Cached}


def stages_of(script: Script, model: nn.Module) -> list[Stage]:
    if script.freeze is not None:
        entry = {"lr_scale": 1.0, "warmup": 0, "moving_statistics": False, "norms_train": False}
        found = [Freezing(f"freeze.{n}", **(entry | given)) for n, given in enumerate(script.freeze)]
        return build_stages(model, found)
    if script.thaw_at is None:
        return [Stage()]
    return [
        Stage(0, lambda name: None if name.startswith("words") else StageRate()),
        Stage(script.thaw_at, lambda name: StageRate(0.5) if name.startswith("words") else StageRate()),
    ]


class Unrehearsed(Step):
    needs_rehearsal = False


def saver_of(script: Script, attempt: Any, world: World, records: Records) -> Saver:
    constants = {
        "index": [{"name": "toy", "fingerprint": script.index, "shards": {"shard-0": script.index}}],
        "starting_weights": {"image": script.weights},
        "plan": {"total_steps": script.steps},
    }
    history = interruptions(Run(attempt.run), attempt.number)
    checkpoints = SlowDisk(attempt, about={"world_size": world.size})
    checkpoints.seconds, checkpoints.blind = script.slow_disk, script.blind == world.rank
    return Saver(
        checkpoints,
        records,
        keep=Keep(last=script.keep_last, best=Best(metric=script.keep_best) if script.keep_best else None),
        constants=constants,
        every_steps=None if script.auto else script.save_every,
        every=SaveInterval(history) if script.auto and world.is_main else None,
        evaluated=script.by_job,
    )


def build(run: Run, attempt: Any, world: World, stop: Stop, script: Script) -> Trainer:
    torch.manual_seed(7)
    model = Towers() if script.freeze is None else RealTowers()
    if script.compile:
        compile_towers(model, world.device)
    task = ToyTask(model, world, script)
    wrapped = WrappedTask(task, world)
    optimizer = Optimizer(
        model, lr=script.lr, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, name=script.optimizer
    )
    precision = Precision(script.precision, world.device)  # type: ignore[arg-type]
    guard = Guard(world.device, script.limit)
    ema = Ema(model, 0.9, warmup=True) if script.ema else None
    schedule = partial(learning_rate, peak=script.lr, warmup=3, total=script.steps)
    progress = Progress(steps_per_epoch=5, batch_size=BATCH)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": precision, "guard": guard}
    if ema:
        parts["ema"] = ema
    if script.own_part:
        parts["seen"] = task.seen
    if script.replicas:
        parts["replica"] = Replica(model)
    records = Records(attempt, world, samples=100, limit=0.002)
    slot = world.rank * (BATCH // world.size)
    statistics = RunningStatistics(task, world)
    strategy = BACKWARD[script.backward]
    micro_batches = 1 if strategy is Whole else 2
    backward = strategy(wrapped, precision, statistics, seed=3, slot=slot, micro_batches=micro_batches)
    stages = Stages(model, wrapped, optimizer, stages_of(script, model))
    kind = Step if script.rehearse else Unrehearsed
    step = kind(backward, stages, optimizer, schedule, guard, ema, clip_norm=1.0)
    evaluations = Evaluations(
        ToySuite(script, stop) if script.evaluate_every else None,
        model,
        every=script.evaluate_every,
        total_steps=script.steps,
        precision=precision,
        ema=ema,
        by_job=script.by_job,
    )
    if script.slow:
        work.SECONDS = 0.5
    metrics = Metrics(attempt, world, every=script.log_every, total_steps=script.steps)
    return Trainer(
        world=world,
        attempt=attempt,
        stop=stop,
        progress=progress,
        total_steps=script.steps,
        step=step,
        feed=Feed(lambda at: ToyBatches(script, world, stop, at), world.device, metrics.work),
        parts=parts,
        saver=saver_of(script, attempt, world, records),
        evaluations=evaluations,
        metrics=metrics,
        records=records,
        record_samples=script.record,
        deadline=Deadline(30.0, script.ends),
        memory_advice="Set train.micro_batch to 8; then submit again.",
    )


def new_run(path: Path) -> Run:
    return Run.create(path, {"name": "toy"}, {})


def claim(run: Run, job: str = "1") -> Any:
    return run.claim(job, host="here", still_running=lambda job_id: False)


def alone() -> World:
    return World(0, 1, 0, torch.device("cpu"))


def go(run: Run, world: World | None = None, **wishes: Any) -> Trainer:
    """Claim the next attempt and train in this process; the trainer, with its `outcome`."""
    trainer = build(run, claim(run), world or alone(), Stop(), Script(**wishes))
    trainer.outcome = trainer.run()  # type: ignore[attr-defined]
    return trainer


def watched(script: Script, attempt: Any, world: World) -> AbstractContextManager[object]:
    if not script.stalled_after:
        return nullcontext()
    return Watchdog(world.pulse, attempt, world.rank, world.size, script.stalled_after)


def rank(path: str, number: int, size: int, log: str, attempts: list[dict[str, Any]]) -> None:
    """One rank of a run, in a process of its own: a script for each attempt; leaves with the last code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(number), WORLD_SIZE=str(size), LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=str(size)
    )
    torch.set_num_threads(1)
    if any(script.get("auto") for script in attempts):
        save_interval.FIRST_SECONDS = save_interval.LEAST_SECONDS = 0.0
        save_interval.ASSUMED_SECONDS = 1e-6
    run = Run(path)
    first = run.newest()
    assert first
    world = World.join(
        Launch.from_environment(),
        publish=first.publish,
        find=first.find,
        device=torch.device("cpu"),
        timeout_s=60,
    )
    for attempt, script in enumerate(attempts, start=first.number):
        if attempt > first.number:
            if world.is_main:
                claim(run)
            world.barrier()
        silence = Script(**script).silence
        distributed_c10d._set_pg_timeout(timedelta(seconds=silence), distributed_c10d._get_default_group())
        stop = Stop()
        stop.install(interactive=False)
        with watched(Script(**script), run.attempt(attempt), world):
            outcome = build(run, run.attempt(attempt), world, stop, Script(**script)).run()
    os._exit(int(outcome))
