"""Batch norms under autocast: what they compute with, and what they lose where they are not in float32."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models.levit import LinearNorm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipcluster.errors import UserError
from clipcluster.model.norms import (
    batch_norms,
    group_batch_norms,
    keep_in_float32,
    require_a_row_a_sample,
    synchronise,
)
from clipcluster.runtime.world import World

CPU = torch.device("cpu")
NORM_KERNELS = ("native_batch_norm", "_batch_norm", "batch_norm_with_update")


class Inputs(TorchDispatchMode):
    """Notes the dtype of what every batch norm's kernel gets."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(name in str(function) for name in NORM_KERNELS):
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def computed_in(model: nn.Module, images: Tensor, dtype: torch.dtype) -> set[torch.dtype]:
    with Inputs() as inputs, torch.autocast("cpu", dtype=dtype):
        model(images)
    return set(inputs.dtypes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_of_float32_values_under_autocast(dtype: torch.dtype) -> None:
    """Of every norm in a timm tower; otherwise its kernel gets the short format."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0)
    names, norms, images = list(model.state_dict()), batch_norms(model), torch.randn(2, 3, 32, 32)
    assert computed_in(model, images, dtype) == {dtype}
    assert keep_in_float32(model) == len(norms) > 2
    assert computed_in(model, images, dtype) == {torch.float32}
    assert list(model.state_dict()) == names
    assert batch_norms(model) == norms
    assert keep_in_float32(model) == len(norms)  # a second time changes nothing
    assert [type(norm).__mro__.count(type(norm)) for norm in norms] == [1] * len(norms)
    assert type(copy.deepcopy(norms[0])) is type(norms[0])


def test_the_statistics_are_those_of_float64_and_the_output_has_the_inputs_format() -> None:
    torch.manual_seed(0)
    x = (torch.randn(32, 4, 8, 8) * 0.05 + 3).bfloat16()  # a mean far above the deviation
    norm, exact = nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d(4).double()
    keep_in_float32(norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), exact(x.double()), rtol=2**-8, atol=1e-6)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(norm[0], name).double(), getattr(exact, name), rtol=1e-6, atol=1e-7
        )
    assert norm.double()(x.double()).dtype is torch.float64  # a reference in float64 stays one


def test_norms_in_bfloat16_lose_their_running_statistics() -> None:
    """What a model cast to bfloat16 does: a move of a tenth of a small difference rounds to none."""
    torch.manual_seed(0)
    exact, lossy, ours = nn.BatchNorm1d(16).double(), nn.BatchNorm1d(16).bfloat16(), nn.BatchNorm1d(16)
    kept = nn.Sequential(ours)
    keep_in_float32(kept)
    scale = torch.linspace(0.5, 4.0, 16)
    for _ in range(200):
        x = (torch.randn(256, 16) * scale + scale).bfloat16()
        exact(x.double())
        lossy(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept(x)

    def error(norm: nn.Module) -> float:
        difference = norm.get_buffer("running_var").double() - exact.running_var
        return float((difference.abs() / exact.running_var).max())

    assert error(ours) < 1e-5
    assert error(lossy) > 0.01


def test_an_activation_of_the_norm_itself_is_kept() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(BatchNormAct2d(4))
    ours = copy.deepcopy(plain)
    keep_in_float32(ours)
    x = torch.randn(8, 4, 5, 5)
    assert torch.equal(plain(x.clone()), ours(x.clone()))
    assert (ours(x) == 0).any()


def test_synchronised_norms_need_gpus() -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    before = [type(norm) for norm in batch_norms(model)]
    synchronise(model, World(0, 1, 0, CPU))
    assert [type(norm) for norm in batch_norms(model)] == before
    with pytest.raises(UserError, match=r"sync_batch_norm.*does not run on the CPU.*2 ranks"):
        synchronise(model, World(0, 2, 0, CPU))
    synchronise(nn.Linear(2, 2), World(0, 2, 0, CPU))  # without a batch norm there is nothing to do
    names = list(model.state_dict())
    synchronise(model, World(0, 2, 0, torch.device("cuda")))
    norms = batch_norms(model)
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert keep_in_float32(model) == len(norms)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(5),
        nn.BatchNorm2d(5),
        BatchNormAct2d(5, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.5)),
    ],
)
def test_groups_are_normalised_as_if_each_came_alone(norm: nn.Module) -> None:
    torch.manual_seed(2)
    norm = nn.Sequential(norm).double()
    nn.init.normal_(norm[0].weight)
    names = list(norm.state_dict())
    x = torch.randn((12, 5) if isinstance(norm[0], nn.BatchNorm1d) else (12, 5, 3, 2), dtype=torch.float64)
    dropped = getattr(norm[0], "drop", None)
    plain = copy.deepcopy(norm)
    if dropped is not None:  # of all rows at once: what the plain ones leave out is done below
        plain[0].drop = plain[0].act = nn.Identity()
    alone = [copy.deepcopy(plain) for _ in range(3)]
    group_batch_norms(norm, 4)
    given = x.clone().requires_grad_()
    torch.manual_seed(3)
    found = norm(given)
    found.square().sum().backward()
    also = x.clone().requires_grad_()
    parts = torch.cat([one(part) for one, part in zip(alone, also.split(4), strict=True)])
    torch.manual_seed(3)
    expected = parts if dropped is None else norm[0].act(norm[0].drop(parts))
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given.grad, also.grad, rtol=1e-10, atol=1e-12)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(one[0], name) for one in alone]).mean(dim=0)
        torch.testing.assert_close(getattr(norm[0], name), mean, rtol=1e-12, atol=0)
    assert norm[0].num_batches_tracked == 1
    assert list(norm.state_dict()) == names
    norm.eval(), plain.eval()
    plain.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), norm[0].act(plain(x)) if dropped is not None else plain(x))
    assert keep_in_float32(norm) == 1  # around it
    assert norm.float().train()(x.bfloat16()).dtype == torch.bfloat16


def test_a_norm_over_tokens_is_refused() -> None:
    """Its groups would be parts of one image."""
    images = torch.rand(2, 3, 4, 4)
    tower = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(2), LinearNorm(16, 5))
    tower[1].eval()
    with pytest.raises(UserError, match=r"batch_norm_group: the batch norm 3\.bn sees 6 rows for 2 images"):
        require_a_row_a_sample(tower, images)
    assert [module.training for module in tower] == [True, False, True, True]
    assert tower[0].num_batches_tracked == 0
    require_a_row_a_sample(tower[:3], images)


def test_a_norm_that_cannot_group_is_refused() -> None:
    for norm in (nn.BatchNorm2d(3, track_running_stats=False), nn.SyncBatchNorm(3)):
        with pytest.raises(UserError, match=r"train.batch_norm_group: .*BatchNorm"):
            group_batch_norms(nn.Sequential(norm), 4)
