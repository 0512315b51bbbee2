"""Randomness is a function of (seed, step, slot); the CPU is taken where no GPU is."""

import io
import logging
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.errors import UserError
from clipcluster.runtime import logs
from clipcluster.runtime.devices import pick_device, seed_step, set_threads, step_seed
from clipcluster.runtime.stateful import Stateful

numbers = st.integers(0, 2**62)


@given(seed=numbers, step=numbers, slot=numbers)
def test_every_step_seeds_anew(seed, step, slot):
    seed_step(seed, step, slot)
    first = torch.rand(4)
    seed_step(seed, step, slot)
    assert torch.equal(torch.rand(4), first)
    seed_step(seed, step + 1, slot)
    assert not torch.equal(torch.rand(4), first)


@given(first=st.tuples(numbers, numbers, numbers), second=st.tuples(numbers, numbers, numbers))
def test_other_numbers_other_seed(first, second):
    assert (step_seed(*first) == step_seed(*second)) == (first == second)


def test_the_seed_is_the_same_on_every_machine():
    assert step_seed(0, 1, 2) == 603432347784401458


@pytest.mark.parametrize(
    ("count", "local_rank", "expected"), [(0, 3, "cpu"), (1, 3, "cuda:0"), (4, 3, "cuda:3")]
)
def test_devices(monkeypatch, count, local_rank, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device = pick_device(local_rank)
    assert str(device) == expected
    assert chosen == ([device] if count else [])


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"finds 2 GPUs.*tasks_per_node to 2"):
        pick_device(2)


def test_threads():
    before = torch.get_num_threads()
    try:
        set_threads(0)
        assert torch.get_num_threads() == 1
        set_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        set_threads(before)


def test_modules_and_optimizers_are_stateful():
    model = torch.nn.Linear(1, 1)
    assert isinstance(model, Stateful)
    assert isinstance(torch.optim.AdamW(model.parameters()), Stateful)
    assert not isinstance(object(), Stateful)


def test_one_line_a_message():
    first, second = io.StringIO(), io.StringIO()
    logs.setup(0, first)
    logger = logs.setup(3, second)
    logger.info("step %d", 7)
    logging.getLogger("clipcluster").warning("slow")
    assert first.getvalue() == ""
    lines = second.getvalue().splitlines()
    assert [re.sub(r"^\S+ \S+ ", "", line) for line in lines] == ["rank 3 step 7", "rank 3 slow"]
