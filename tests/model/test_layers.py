"""Every parameter has its depth: embeddings first, blocks in order, final norms with the last block."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from clipcluster.model.layers import Layer, layer_ids, layers_of
from clipcluster.model.towers import ImageTower, TextTower

SMALL = {
    "gpt2": {"n_layer": 3, "n_embd": 16, "n_head": 2},
    "distilbert": {"n_layers": 3, "dim": 16, "hidden_dim": 16, "n_heads": 2},
    "xlm": {"n_layers": 3, "emb_dim": 16, "n_heads": 2},
    "convnext": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 2, 1]},
}
REST = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 16}


def image_tower(name: str, **args: Any) -> ImageTower:
    with torch.device("meta"):
        return ImageTower(timm.create_model(name, num_classes=0, **args), 8)


def of_transformers(arch: str, **more: Any) -> TextTower:
    sizes = SMALL.get(arch, REST | ({"num_key_value_heads": 2} if arch in ("llama", "modernbert") else {}))
    with torch.device("meta"):
        return TextTower(AutoModel.from_config(AutoConfig.for_model(arch, **(sizes | more))), 16, "last")


def checked(tower: nn.Module) -> list[Layer]:
    """The layers, which hold every parameter once."""
    layers = layers_of(tower)
    names = [name for layer in layers for name in layer.parameters]
    assert sorted(names) == sorted(name for name, _ in tower.named_parameters())
    assert all(set(layer.after) <= set(layer.parameters) for layer in layers)
    assert [number for number, layer in enumerate(layers) if layer.stage is None] == [0]
    return layers


@pytest.mark.parametrize(
    ("name", "args", "blocks", "first", "after"),
    [
        ("convnextv2_atto", {}, "trunk.stages.{}.blocks.{}: 2 2 6 2", "trunk.stem.0.weight", r"head\.norm"),
        ("resnet50", {}, "trunk.layer{}.{}: 3 4 6 3", "trunk.conv1.weight", None),
        ("resnet10t", {}, "trunk.layer{}.{}: 1 1 1 1", "trunk.conv1.0.weight", None),
        ("resnet50_clip", {}, "trunk.stages.{}.{}: 3 4 6 3", "trunk.stem.conv1.conv.weight", r"head\."),
        ("vit_tiny_patch16_224", {}, "trunk.blocks.{}: 12", "trunk.cls_token", r"norm\."),
        ("vit_base_patch16_siglip_224", {"depth": 2}, "trunk.blocks.{}: 2", "trunk.pos", r"norm|attn_pool"),
        ("swin_tiny_patch4_window7_224", {}, "trunk.layers.{}.blocks.{}: 2 2 6 2", "trunk.patch", r"norm\."),
        ("efficientnet_b0", {}, "trunk.blocks.{}.{}: 1 2 2 3 3 4 1", "trunk.conv_stem", r"conv_head|bn2"),
        # without groups of timm's
        ("poolformer_s12", {}, "trunk.stages.{}.blocks.{}: 2 2 6 2", "trunk.stem", r"norm\.|head\.norm"),
    ],
)
def test_image_towers_of_timm(
    name: str, args: dict[str, Any], blocks: str, first: str, after: str | None
) -> None:
    layers = checked(image_tower(name, **args))
    path, counts = blocks.split(": ")
    of_stages = [int(count) for count in counts.split()]
    one = 1 if path.startswith("trunk.layer{}") else 0  # where torch's ResNets count stages from
    expected = [
        (path.format(*([stage + one, block] if path.count("{}") == 2 else [block])), stage, block)
        for stage, count in enumerate(of_stages)
        for block in range(count)
    ]
    assert [(layer.name, layer.stage, layer.block) for layer in layers[1:]] == expected
    assert any(name.startswith(first) for name in layers[0].parameters)
    assert bool(layers[-1].after) == bool(after)
    assert all(re.match(rf"trunk\.({after})", name) for name in layers[-1].after)


@pytest.mark.parametrize(
    ("arch", "blocks", "stem", "after"),
    [
        ("gpt2", "h", {"wte.weight", "wpe.weight"}, {"ln_f.weight", "ln_f.bias"}),
        ("llama", "layers", {"embed_tokens.weight"}, {"norm.weight"}),
        ("roberta", "encoder.layer", 5, {"pooler.dense.weight", "pooler.dense.bias"}),
        ("modernbert", "layers", {"embeddings.tok_embeddings.weight", "embeddings.norm.weight"}, 1),
        ("distilbert", "transformer.layer", 4, set()),
        ("clip_text_model", "encoder.layers", 2, {"final_layer_norm.weight", "final_layer_norm.bias"}),
        ("clip_vision_model", "encoder.layers", 5, {"post_layernorm.weight", "post_layernorm.bias"}),
        ("siglip_vision_model", "encoder.layers", 3, 13),  # a norm, and a head that pools by attention
        # registered in another order than they are used
        ("opt", "decoder.layers", 2, {"decoder.final_layer_norm.weight", "decoder.final_layer_norm.bias"}),
        ("mpnet", "encoder.layer", 5, {"pooler.dense.weight", "pooler.dense.bias"}),
        ("xlm", "ffns", 4, set()),
    ],
)
def test_towers_of_transformers(arch: str, blocks: str, stem: set[str] | int, after: set[str] | int) -> None:
    layers = checked(of_transformers(arch))

    def fits(found: tuple[str, ...], expected: set[str] | int) -> bool:
        bare = {name.removeprefix("transformer.") for name in found}
        return bare == expected if isinstance(expected, set) else len(bare) == expected

    assert [layer.name for layer in layers[1:]] == [f"transformer.{blocks}.{n}" for n in range(3)]
    assert [(layer.stage, layer.block) for layer in layers[1:]] == [(0, 0), (0, 1), (0, 2)]
    assert fits(layers[0].parameters, stem), layers[0].parameters
    assert fits(layers[-1].after, after), layers[-1].after


def test_lists_inside_stages_are_the_blocks_of_a_convolutional_network() -> None:
    layers = checked(of_transformers("convnext"))
    assert [(layer.stage, layer.block) for layer in layers[1:]] == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
    ids = layer_ids(of_transformers("convnext"))
    assert ids["transformer.encoder.stages.2.downsampling_layer.1.weight"] == 3
    assert ids["transformer.layernorm.weight"] == 5


def test_a_text_transformer_of_other_names() -> None:
    """As CLIP's own is built: parameters beside modules, a multi-layer perceptron that is a Sequential."""

    def block() -> nn.Module:
        parts = nn.Module()
        parts.attn, parts.ln_1 = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
        parts.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        return parts

    tower = nn.Module()
    tower.token_embedding, tower.positional_embedding = nn.Embedding(9, 8), nn.Parameter(torch.zeros(4, 8))
    tower.transformer = nn.Module()
    tower.transformer.resblocks = nn.ModuleList([block(), block()])
    tower.ln_final = nn.LayerNorm(8)
    layers = checked(tower)
    assert [layer.name for layer in layers] == ["stem", "transformer.resblocks.0", "transformer.resblocks.1"]
    assert set(layers[0].parameters) == {"token_embedding.weight", "positional_embedding"}
    assert layers[-1].after == ("ln_final.weight", "ln_final.bias")


def test_without_blocks_everything_is_one_layer() -> None:
    tower = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert [layer.name for layer in checked(tower)] == ["stem"]
