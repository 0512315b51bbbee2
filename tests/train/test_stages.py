"""What trains is a function of the step, and a resume at any step finds it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipcluster.model.task import Task
from clipcluster.runtime.outcome import CheckpointError, Outcome
from clipcluster.train.optimizer import Optimizer
from clipcluster.train.stages import Stage, Stages
from clipcluster.train.wrapping import WrappedTask

THAW = 6


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
