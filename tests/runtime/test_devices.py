"""Randomness is a function of (seed, step, slot); the CPU is taken where no GPU is."""

import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.errors import UserError
from clipcluster.runs.checkpoints import Stateful
from clipcluster.runtime.devices import (
    backends,
    choose_float32,
    choose_kernels,
    describe,
    pick_device,
    seed_step,
    set_threads,
    step_seed,
    usable_cores,
)

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


@pytest.fixture
def gpus(monkeypatch):
    """Lets torch see so many GPUs; a list of those that were made current."""
    chosen = []

    def see(count, kind="cuda"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        return chosen

    return see


@pytest.mark.parametrize(
    ("count", "local_rank", "expected"), [(0, 3, "cpu"), (1, 3, "cuda:0"), (4, 3, "cuda:3")]
)
def test_devices(gpus, count, local_rank, expected):
    chosen = gpus(count)
    device = pick_device(local_rank, per_node=1)
    assert str(device) == expected
    assert chosen == ([device.index] if count else [])


def test_more_ranks_than_gpus(gpus):
    gpus(2)
    with pytest.raises(UserError, match=r"finds 2 GPUs.*tasks_per_node to 2"):
        pick_device(2)


def test_a_run_on_the_cpu_takes_no_gpu(gpus):
    gpus(4)
    assert pick_device(1, per_node=0, required=True).type == "cpu"


def test_a_required_gpu_that_is_missing_is_refused(gpus):
    gpus(0)
    with pytest.raises(UserError, match=r"gpus_per_node is 2.*finds no GPU.*gpus_per_node=0"):
        pick_device(0, per_node=2, required=True)


def test_an_accelerator_without_float64_is_not_taken(gpus):
    gpus(1, "mps")
    assert pick_device(0, per_node=1).type == "cpu"


def test_what_is_told_to_torch_distributed():
    assert backends(torch.device("cpu")) == "gloo"
    assert backends(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"


@pytest.fixture
def kernels():
    """Puts the process's kernels back."""
    yield
    choose_kernels(torch.device("cpu"), False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize(
    ("device", "wanted", "on"),
    [("cpu", None, True), ("cpu", False, False), ("cuda", None, False), ("cuda", True, True)],
)
def test_kernels(kernels, device, wanted, on):
    assert choose_kernels(torch.device(device), wanted) is on
    assert torch.are_deterministic_algorithms_enabled() is on
    assert torch.backends.cudnn.deterministic is on
    assert torch.backends.cudnn.benchmark is not on
    assert torch.backends.cuda.mem_efficient_sdp_enabled() is not on


@pytest.fixture
def float32():
    """Puts the process's float32 back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_float32_of_a_gpu_is_what_the_recipe_says(float32):
    """For products and convolutions alike; on the CPU it is float32, and nothing is set."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for tf32, name in ((True, "tf32"), (False, "fp32"), (True, "tf32")):
        assert choose_float32(gpu, tf32=tf32) == name
        assert choose_float32(cpu, tf32=not tf32) == "fp32"
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")


def test_a_busy_neighbour_does_not_change_sums(kernels):
    """Adding rows up in parallel: with atomic additions on the CPU the order, and the sum, would vary."""
    choose_kernels(torch.device("cpu"), None)
    rows, values = torch.zeros(300_000, dtype=torch.long), torch.randn(300_000)
    sums = {torch.zeros(1).index_put_((rows,), values, accumulate=True).item() for _ in range(5)}
    assert len(sums) == 1


def test_a_devices_name():
    assert re.fullmatch(r"cpu \(\d+ threads?\)", describe(torch.device("cpu")))
    assert 1 <= usable_cores(1) <= (os.cpu_count() or 1)
    assert usable_cores(1000) == 1


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
