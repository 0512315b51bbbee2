"""The names of other programs' weights, there and back."""

import timm
import torch
from torch import Tensor
from transformers import AutoModel, CLIPTextConfig, CLIPVisionConfig, SiglipVisionConfig

from clipcluster.model import layouts
from clipcluster.model.clip_text import ClipTextTower

SIZES = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def drawn(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn(value.shape) for name, value in module.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.reshape(found[name].shape)), name


def own(network: torch.nn.Module) -> set[str]:
    """The names of a network of transformers, without the wrapper that its version 4 has."""
    return {name.removeprefix("vision_model.").removeprefix("text_model.") for name in network.state_dict()}


def test_clips_vit_of_timm() -> None:
    tower = timm.create_model("vit_base_patch16_clip_224", img_size=32, num_classes=0, **SIZES)
    state = drawn(tower)
    native = layouts.clip_vit_of_timm(state)
    assert native["class_embedding"].shape == (16,)
    assert native["positional_embedding"].shape == (17, 16)
    assert native["transformer.resblocks.1.attn.in_proj_weight"].shape == (48, 16)
    assert_same(layouts._clip_vit(native, tower), state)
    theirs = layouts.clip_in_transformers(native)
    network = AutoModel.from_config(CLIPVisionConfig(**LAYERS, image_size=32, patch_size=8))
    assert theirs.keys() == own(network)
    assert_same(layouts._hf_tower(theirs, tower), state)


def test_clips_text_transformer() -> None:
    sizes = {"vocab_size": 40, "positions": 12, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 4.0}
    tower = ClipTextTower(**sizes, quick_gelu=False)
    state = drawn(tower)
    theirs = layouts.clip_in_transformers(state)
    network = AutoModel.from_config(CLIPTextConfig(**LAYERS, vocab_size=40, max_position_embeddings=12))
    assert theirs.keys() == own(network)
    assert_same(layouts._hf_tower(theirs, tower), state)
    del theirs["encoder.layers.0.self_attn.k_proj.weight"]  # what is not there is not made up
    assert "transformer.resblocks.0.attn.in_proj_weight" not in layouts._hf_tower(theirs, tower)


def test_siglips_vit_of_timm() -> None:
    tower = timm.create_model("vit_base_patch16_siglip_224", img_size=32, num_classes=0, **SIZES)
    state = drawn(tower)
    theirs = layouts.siglip_vit_in_transformers(state)
    network = AutoModel.from_config(SiglipVisionConfig(**LAYERS, image_size=32, patch_size=8))
    assert theirs.keys() == own(network)
    assert_same(layouts._hf_tower(theirs, tower), state)
