"""What trains is a function of the step, and a resume at any step finds it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clipcluster.evals.suite import Suite
from clipcluster.model.task import Task
from clipcluster.runs.files import write_json
from clipcluster.runs.merge import events
from clipcluster.runtime.outcome import CheckpointError, Outcome
from clipcluster.runtime.stop import Stop
from clipcluster.train.optimizer import Optimizer, StageRate
from clipcluster.train.stages import Stage, Stages
from clipcluster.train.wrapping import WrappedTask

THAW = 6
# Both towers frozen; text's last two blocks; image's last two; of image the norms alone; image whole.
FREEZE = [
    {"tower": "text", "step": 0, "layers": 0},
    {"tower": "text", "step": 2, "layers": 2, "lr_scale": 0.5, "warmup": 2},
    {"tower": "image", "step": 0, "layers": 0},
    {"tower": "image", "step": 4, "layers": 2, "lr_scale": 0.1, "warmup": 3},
    {"tower": "image", "step": 7, "layers": 0, "norms_train": True, "moving_statistics": True},
    {"tower": "image", "step": 9, "layers": None},
]
STARTS = [0, 2, 4, 7, 9]


def tensors(run: Any, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by part and name."""
    folder = run.checkpoints / f"step-{step:08d}"
    parts = ("model", "ema", "optimizer")
    return {
        f"{part}/{key}": value
        for part in parts
        for key, value in load_file(folder / f"{part}.safetensors").items()
    }


@pytest.mark.parametrize("backward", ["whole", "cached"])
def test_a_resume_before_at_and_after_a_stage_equals_the_uninterrupted_run(
    toy: ModuleType, tmp_path: Path, backward: str
) -> None:
    script = {"thaw_at": THAW, "backward": backward, "save_every": 1, "keep_last": 12}
    whole = toy.new_run(tmp_path / "whole")
    toy.go(whole, **script)
    expected = tensors(whole, 12)
    for stop_at in (THAW - 2, THAW - 1, THAW):
        stopped = toy.new_run(tmp_path / f"stopped-{stop_at}")
        assert toy.go(stopped, stop_at=stop_at, **script).outcome is Outcome.STOPPED
        assert toy.go(stopped, **script).outcome is Outcome.FINISHED
        found = tensors(stopped, 12)
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    # The optimizer's state at the first step of a stage is that stage's.
    assert "optimizer/words.weight.step" not in tensors(whole, THAW - 1)
    assert tensors(whole, THAW)["optimizer/words.weight.step"] == 0
    assert tensors(whole, 12)["optimizer/words.weight.step"] == 12 - THAW


def test_what_is_frozen_does_not_move(toy: ModuleType, tmp_path: Path) -> None:
    run = toy.new_run(tmp_path / "run")
    toy.go(run, thaw_at=THAW, save_every=1, keep_last=12)
    words = {step: tensors(run, step)["model/words.weight"] for step in (1, THAW, THAW + 1)}
    assert torch.equal(words[1], words[THAW])
    assert not torch.equal(words[THAW], words[THAW + 1])


def test_what_a_tower_holds_fixed_trains_in_no_stage(toy: ModuleType) -> None:
    """As RoFormer does its positions: DDP would wait for their gradient, which never comes."""
    model = toy.Towers()
    model.words.weight.requires_grad_(False)
    optimizer = Optimizer(model, lr=0.1, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    task = WrappedTask(toy.ToyTask(model, toy.alone(), toy.Script()), toy.alone())
    stages = Stages(model, task, optimizer, [Stage(), Stage(4)])
    for step in (0, 4):
        stages.enter(step)
        assert not model.words.weight.requires_grad
        assert "words.weight.exp_avg" not in optimizer.state_dict()


def test_a_checkpoint_of_other_stages_is_refused_by_name(toy: ModuleType, tmp_path: Path) -> None:
    run = toy.new_run(tmp_path / "run")
    toy.go(run, thaw_at=THAW, stop_at=3)
    with pytest.raises(CheckpointError, match=r"no entries for: words\.weight\.exp_avg, "):
        toy.go(run)


def test_stages_begin_at_rising_steps(toy: ModuleType) -> None:
    model = toy.Towers()
    task: Task = toy.ToyTask(model, toy.alone(), toy.Script())
    optimizer = Optimizer(model, lr=0.1, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    for starts in ([], [1], [0, 4, 4]):
        with pytest.raises(ValueError, match="rising steps, the first at 0"):
            Stages(model, WrappedTask(task, toy.alone()), optimizer, [Stage(start) for start in starts])


# Towers as recipes have them


def test_every_stage_resumes_bit_for_bit_on_every_rank(
    toy: ModuleType, tmp_path: Path, start_ranks: Any
) -> None:
    """Stopped in each stage and at a transition, on 3 ranks, which hold the same weights at every step."""
    whole, stopped = toy.new_run(tmp_path / "whole"), toy.new_run(tmp_path / "stopped")
    script = {"freeze": FREEZE, "replicas": True, "save_every": 1, "keep_last": 12}
    for run in (whole, stopped):
        toy.claim(run)
    start_ranks(whole, 3, script).finish(0)
    start_ranks(stopped, 3, *({**script, "stop_at": at} for at in (0, 1, 4, 7, 9)), script).finish(0)
    assert [stopped.attempt(n).outcome()["step"] for n in range(1, 7)] == [1, 2, 5, 8, 10, 12]
    for step in range(1, 13):
        expected, found = tensors(whole, step), tensors(stopped, step)
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == [], step
        folder = whole.checkpoints / f"step-{step:08d}"
        replicas = [load_file(folder / f"replica-rank-0000{rank}.safetensors")["sha256"] for rank in range(3)]
        assert torch.equal(replicas[0], replicas[1])
        assert torch.equal(replicas[0], replicas[2])
    entered = [event for event in events(whole) if event["event"] == "stage"]
    assert [event["step"] for event in entered] == STARTS
    check_moments(whole)
    check_counts(toy, entered)


def check_moments(run: Any) -> None:
    """What trains on keeps its moments, what begins has none, what is frozen again gives them up."""
    block, deep = "transformer.h.1.mlp.c_fc.weight", "trunk.layer4.0.conv1.weight"
    text, image, norm = f"text.{block}", f"image.{deep}", "image.trunk.layer4.0.bn1.weight"
    early = "image.trunk.bn1.weight"
    updates = {
        name: {
            step: int(state)
            if (state := tensors(run, step).get(f"optimizer/{name}.step")) is not None
            else None
            for step in (*STARTS[1:], 12)
        }
        for name in (text, image, norm, early)
    }
    assert updates == {
        text: {2: 0, 4: 2, 7: 5, 9: 7, 12: 10},
        image: {2: None, 4: 0, 7: None, 9: 0, 12: 3},
        norm: {2: None, 4: 0, 7: 3, 9: 5, 12: 8},
        early: {2: None, 4: None, 7: 0, 9: 2, 12: 5},
    }
    assert tensors(run, 9)[f"optimizer/{norm}.exp_avg"].abs().max() > 0
    weights = [tensors(run, step) for step in (1, 4, 7, 9)]
    moved = [
        {key for key in one if key.startswith("model/") and not torch.equal(one[key], other[key])}
        for one, other in pairwise(weights)
    ]
    assert f"model/{image}" not in moved[0] | moved[2]
    assert f"model/{image}" in moved[1]
    statistics = {key for key in weights[0] if key.startswith("model/") and "running_" in key}
    last = {key for key in statistics if "layer3" in key or "layer4" in key}
    assert [statistics & names for names in moved] == [set(), last, statistics]


def check_counts(toy: ModuleType, entered: list[dict[str, Any]]) -> None:
    model = toy.RealTowers()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    blocks = tuple(f"text.transformer.{part}." for part in ("h.1", "h.2", "ln_f"))
    deep = ("image.trunk.layer3.", "image.trunk.layer4.")
    stem = ("image.trunk.conv1.1.", "image.trunk.conv1.4.")
    norms = {name for name in sizes if ".bn" in name or ".downsample.2." in name or name.startswith(stem)}

    def trains(step: int, name: str) -> bool:
        if name.startswith("text."):
            return step >= 2 and name.startswith(blocks)
        if name.startswith("image."):
            return step >= 9 or (step >= 7 and name in norms) or (4 <= step < 7 and name.startswith(deep))
        return True

    for event in entered:
        counted = {name: trains(event["step"], name) * size for name, size in sizes.items()}
        assert (event["trainable"], event["parameters"]) == (sum(counted.values()), sum(sizes.values()))
        for part, counts in event["parts"].items():
            own = [name for name in sizes if name.partition(".")[0] == part]
            assert counts == {
                "trainable": sum(counted[name] for name in own),
                "of": sum(sizes[name] for name in own),
            }


def trainer_of(toy: ModuleType, tmp_path: Path, **script: Any) -> Any:
    run = toy.new_run(tmp_path / "run")
    return toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script))


def test_frozen_towers_run_as_in_evaluation_without_a_graph(toy: ModuleType, tmp_path: Path) -> None:
    trainer = trainer_of(toy, tmp_path, freeze=FREEZE)
    task, stages = trainer.step.backward.task.task, trainer.step.stages
    model = task.model
    batch = toy.ToyBatches(toy.Script(freeze=FREEZE), toy.alone(), Stop(), trainer.progress).batch(
        0, slice(16)
    )
    tokens = batch.tokens, torch.ones_like(batch.tokens, dtype=torch.bool)

    def features() -> tuple[torch.Tensor, torch.Tensor]:
        return model.image(batch.images.float() / 255), model.text(*tokens)

    def same_twice() -> list[bool]:
        return [torch.equal(one, other) for one, other in zip(features(), features(), strict=True)]

    stages.enter(0)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}
    assert [feature.requires_grad for feature in features()] == [False, False]
    assert same_twice() == [True, True]  # no dropout, no drop path, statistics that stay
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    # An evaluation leaves every module in its mode.
    modes = {name: module.training for name, module in model.named_modules()}
    Suite([], None).run(model)  # type: ignore[arg-type]
    assert {name: module.training for name, module in model.named_modules()} == modes
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        report = task.report(batch)
        report.loss.backward()
    assert all(len(shape) < 3 for shape in saved), "images, token states and their gradients have more"
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"logit_scale", "image_projection.weight", "text_projection.weight"}
    # The first layers stay as they are while the last train, with dropout.
    stages.enter(4)
    assert same_twice() == [False, False]
    assert [model.image.trunk.layer1.training, model.image.trunk.layer4.training] == [False, True]
    assert [model.text.transformer.h[0].training, model.text.transformer.h[1].training] == [False, True]
    assert features()[0].requires_grad
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    report = task.report(batch)
    report.loss.backward()
    assert all(
        (model.get_parameter(name).grad is None) == (name in frozen)
        for name in dict(model.named_parameters())
    )
    # Norms alone: their statistics move, drop path does not come back.
    stages.enter(7)
    assert model.image.trunk.bn1.training
    assert not model.image.trunk.layer4[0].training
    stages.enter(9)
    assert all(module.training for module in model.image.modules())


def test_going_back_before_a_transition_equals_a_run_without_the_bad_batches(
    toy: ModuleType, tmp_path: Path
) -> None:
    """What began to train in between is frozen again, without its moments, and begins once more."""
    bad, script = [6, 7, 8], {"thaw_at": 5, "save_every": 4, "steps": 12}
    back, never = toy.new_run(tmp_path / "back"), toy.new_run(tmp_path / "never")
    toy.go(back, poison=bad, **script)
    entered = [(event["step"], event["trainable"]) for event in events(back) if event["event"] == "stage"]
    assert [step for step, _ in entered] == [0, 5, 4, 5]
    assert entered[0][1] == entered[2][1] < entered[1][1] == entered[3][1]
    attempt = toy.claim(never)
    write_json(attempt.path / "roll_back.json", {"skipped": [[6, 9]]})
    toy.build(never, attempt, toy.alone(), Stop(), toy.Script(**script)).run()
    expected, found = tensors(never, 12), tensors(back, 12)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


class Rebuilt(Optimizer):
    """As trainers do that make a new optimizer at a transition."""

    def regroup(self, rate_of: Any) -> None:
        self._named = {}
        super().regroup(rate_of)


class Deaf(Optimizer):
    """As trainers do that leave the optimizer with what trained at the start."""

    calls = 0

    def regroup(self, rate_of: Any) -> None:
        self.calls += 1
        if self.calls <= 2:  # when it is made, and for the first stage
            super().regroup(rate_of)


def entered(toy: ModuleType, kind: type[Optimizer], old: nn.Module | None = None) -> Optimizer:
    """The optimizer of a model that trained for a step and then entered a stage in which more trains."""
    model = old or toy.Towers()
    optimizer = kind(model, lr=0.1, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    task = WrappedTask(toy.ToyTask(model, toy.alone(), toy.Script()), toy.alone())
    frozen = Stage(0, lambda name: None if name.startswith("words") else StageRate())
    stages = Stages(model, task, optimizer, [frozen, Stage(4)])
    stages.enter(0)
    model.last(model.first(torch.ones(2, 48))).sum().backward()
    optimizer.step(0.1, 0, divisor=torch.ones(()), found_inf=torch.zeros(()))
    stages.enter(4)
    return optimizer


def test_moments_outlive_a_transition_and_a_rebuilt_optimizer_would_be_noticed(toy: ModuleType) -> None:
    ours, old = (entered(toy, kind).state_dict() for kind in (Optimizer, Rebuilt))
    assert ours["last.weight.step"] == 1
    assert ours["last.weight.exp_avg"].abs().max() > 0
    assert old["last.weight.step"] == 0
    assert old["last.weight.exp_avg"].abs().max() == 0
    assert ours["words.weight.step"] == old["words.weight.step"] == 0


def test_unfreezing_that_does_not_unfreeze_is_an_error(toy: ModuleType) -> None:
    """The optimizer does not see what begins to train, or a tower does not let go."""
    with pytest.raises(
        RuntimeError,
        match=r"trains 2,425 parameters, but 2,425 require a gradient and the "
        r"optimizer has 1,625",
    ):
        entered(toy, Deaf)

    model = toy.Towers()
    weight = model.words.weight
    weight.requires_grad_ = lambda on=True: weight if on else nn.Parameter.requires_grad_(weight, False)
    with pytest.raises(RuntimeError, match=r"trains 2,425 parameters, but 1,625 require a gradient"):
        entered(toy, Optimizer, model)
