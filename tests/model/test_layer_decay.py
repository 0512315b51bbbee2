"""Layer ids and scales: ConvNeXt's published rules, timm's own groups, a text tower."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
from timm.optim import param_groups_layer_decay
from torch import nn
from transformers import AutoConfig, AutoModel

from clipcluster.errors import UserError
from clipcluster.model.layer_decay import layer_scales

DECAY = 0.7
LAST = 13


def convnext(*depths: int, v2: bool = False) -> nn.Module:
    name = "convnextv2_atto" if v2 else "convnext_atto"
    return timm.create_model(name, depths=depths, dims=(4, 4, 8, 8), num_classes=5)


def published(name: str, depths: tuple[int, ...], *, single: bool) -> int:
    """The id of a timm name by the rules of ConvNeXt (14 ids) and ConvNeXt V2 (`single`)."""
    place = re.match(r"stages\.(\d)\.(downsample|blocks\.(\d+))", name)
    if name.startswith("head"):
        return sum(depths) + 1 if single else LAST
    if place is None:
        assert name.startswith("stem")
        return 1 if single else 0
    stage, block = int(place[1]), int(place[3] or 0)
    if single:
        return 1 + sum(depths[:stage]) + block
    return [1, 2, 3 + block // 3, 12][stage]


@pytest.mark.parametrize(
    ("depths", "v2"), [((3, 3, 27, 3), False), ((3, 3, 9, 3), True), ((2, 2, 6, 2), True)]
)
def test_convnext_s_ids_are_the_published_ones(depths: tuple[int, ...], v2: bool) -> None:
    tower = convnext(*depths, v2=v2)
    names = [name for name, _ in tower.named_parameters()]
    for single, last in ((False, LAST), (True, sum(depths) + 1)):
        expected = {name: DECAY ** (last - published(name, depths, single=single)) for name in names}
        assert layer_scales(tower, DECAY, groups=not single) == expected
    grouped = set(layer_scales(tower, 2.0, groups=True).values())
    used = {0, 1, 2, *range(3, 3 + -(-depths[2] // 3)), 12, 13}
    assert grouped == {2.0 ** (LAST - number) for number in used}


def timm_s(tower: nn.Module) -> dict[str, float]:
    """By timm's own groups for layer decay."""
    names = {parameter: name for name, parameter in tower.named_parameters()}
    groups: Any = param_groups_layer_decay(tower, layer_decay=DECAY)
    return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}


def test_blocks_are_timm_s_but_for_the_stem_of_a_convnext() -> None:
    tower = convnext(2, 1, 3, 1)
    ours, theirs = layer_scales(tower, DECAY), timm_s(tower)
    assert {name for name in ours if ours[name] != pytest.approx(theirs[name])} == {
        name for name in ours if name.startswith("stem")
    }
    # timm counts a ViT's final norm to the last block, BEiT to the head.
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=3, num_classes=5)
    ours, theirs = layer_scales(vit, DECAY), timm_s(vit)
    assert {name for name in ours if ours[name] != pytest.approx(theirs[name])} == {
        "norm.weight",
        "norm.bias",
    }
    assert (ours["pos_embed"], ours["norm.weight"]) == (pytest.approx(DECAY**4), 1.0)


@pytest.mark.parametrize("arch", ["gpt2", "bert"])
def test_a_text_tower_decays_block_by_block(arch: str) -> None:
    sizes = (
        {"n_layer": 2, "n_embd": 8, "n_head": 2}
        if arch == "gpt2"
        else {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    )
    tower = AutoModel.from_config(AutoConfig.for_model(arch, vocab_size=11, **sizes))
    scales = layer_scales(tower, 0.5)
    assert scales.keys() == {name for name, _ in tower.named_parameters()}
    for name, scale in scales.items():
        block = re.search(r"\.?(?:h|layer)\.(\d)\.", name)
        after = name.startswith(("ln_f", "pooler"))
        assert scale == (1.0 if after else 0.5 ** (3 - (int(block[1]) + 1 if block else 0)))


def test_what_has_no_groups_is_refused() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_classes=0)
    for tower in (vit, convnext(1, 1, 28, 1)):
        with pytest.raises(UserError, match="groups is for a ConvNeXt of four stages"):
            layer_scales(tower, DECAY, groups=True)
    with pytest.raises(UserError, match="no layers that are known"):
        layer_scales(nn.Linear(2, 2), DECAY)
