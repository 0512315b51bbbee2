"""Position embeddings at another size, grid or context length, beside timm's and transformers' own."""

from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from tiny_model import Tokens, image_section, text_section, tiny_recipe
from torch.nn import functional
from transformers import AutoConfig, AutoModel

from clipcluster.errors import UserError
from clipcluster.model.clip import build_clip
from clipcluster.model.positions import fit_positions
from clipcluster.model.towers import build_image_tower, build_text_tower
from clipcluster.recipe.sections import model as sections

LAYERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
# Small towers; the size of the file's images, and of the tower's.
IMAGES = [
    ("test_vit", {}, 64, 32, "pos_embed"),
    ("test_vit", {}, 32, 48, "pos_embed"),
    ("vit_tiny_patch16_224", {"depth": 1, "class_token": False, "global_pool": "avg"}, 64, 96, "pos_embed"),
    ("vit_tiny_patch16_224", {"depth": 1, "reg_tokens": 4}, 96, 64, "pos_embed"),
    ("resnet50_clip", {"width_factor": 0.125}, 96, 64, "pos_embed"),
]


@pytest.mark.parametrize(("name", "args", "before", "after", "key"), IMAGES)
def test_an_image_towers_positions_are_interpolated_and_said(
    name: str, args: dict, before: int, after: int, key: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    old = build_image_tower(image_section(name, **args), image_size=before)[0].trunk
    save_file(old.state_dict(), tmp_path / "old.safetensors")
    section = image_section(name, weights=str(tmp_path / "old.safetensors"), **args)
    tower, coverage = build_image_tower(section, image_size=after)
    (told,) = coverage.positions
    assert told.endswith(key)
    assert coverage.fraction == 1
    file, own = old.state_dict()[told], tower.trunk.state_dict()[told]
    grids = [int(len(value.flatten(0, -2)) ** 0.5) for value in (file, own)]
    prefix = len(own.flatten(0, -2)) - grids[1] ** 2
    expected = resample_abs_pos_embed(
        file.reshape(1, -1, file.shape[-1]), [grids[1], grids[1]], [grids[0], grids[0]], prefix
    )
    assert torch.equal(own.flatten(0, -2), expected[0])
    if prefix:
        assert torch.equal(own.flatten(0, -2)[:prefix], file.flatten(0, -2)[:prefix])
    assert f"interpolated from {grids[0]} x {grids[0]} to {grids[1]} x {grids[1]} patches ({told})" in str(
        coverage
    )
    for other, value in tower.trunk.state_dict().items():
        assert other == told or torch.equal(value, old.state_dict()[other])


def test_a_towers_own_resize_gives_the_same(tmp_path: Path) -> None:
    """timm's `set_input_size` after a load at the old size, windows of relative positions included."""
    torch.manual_seed(0)
    sizes = {"num_classes": 0, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    old, new = (
        timm.create_model("swin_tiny_patch4_window7_224", img_size=size, window_size=size // 8, **sizes)
        for size in (16, 32)
    )
    fitted, told = fit_positions(new, old.state_dict(), text=False)
    new.load_state_dict(fitted, strict=False)  # the windows' masks are computed
    old.set_input_size(img_size=32, window_size=4)
    tables = [key for key in told if key.endswith("relative_position_bias_table")]
    assert tables
    for key in tables:
        torch.testing.assert_close(new.state_dict()[key], old.state_dict()[key])
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(new.eval()(images), old.eval()(images))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 5))
@settings(max_examples=40)
def test_any_grid_keeps_its_prefix(before: int, after: int, prefix: int) -> None:
    class Tower(torch.nn.Module):
        def __init__(self, side: int) -> None:
            super().__init__()
            self.pos_embed = torch.nn.Parameter(torch.randn(1, prefix + side * side, 2))

    old, new = Tower(before), Tower(after)
    fitted, told = fit_positions(new, old.state_dict(), text=False)
    assert fitted["pos_embed"].shape == new.pos_embed.shape
    assert bool(told) == (before != after)
    if told and before > 1 < after:
        assert torch.equal(fitted["pos_embed"][:, :prefix], old.pos_embed[:, :prefix])


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "vit"])
def test_a_vision_network_of_transformers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = AutoModel.from_config(AutoConfig.for_model(kind, **LAYERS, image_size=32, patch_size=8))
    old.save_pretrained(tmp_path)
    section = TypeAdapter(sections.ImageTower).validate_python({"hf": str(tmp_path), "weights": "pretrained"})
    tower, coverage = build_image_tower(section, image_size=48)
    assert "interpolated from 4 x 4 to 6 x 6 patches" in str(coverage)
    (name,) = coverage.positions
    file, own = (module.state_dict()[name].reshape(1, -1, 16) for module in (old, tower.trunk))
    prefix = file.shape[1] - 16
    assert torch.equal(own, resample_abs_pos_embed(file, [6, 6], [4, 4], prefix))
    assert tower.eval()(torch.randn(1, 3, 48, 48)).isfinite().all()


@pytest.mark.parametrize(("arch", "rows"), [("gpt2", 0), ("bert", 0), ("roberta", 1), ("clip", 0)])
@pytest.mark.parametrize("length", [8, 12, 20])
def test_a_context_of_another_length(arch: str, rows: int, length: int, tmp_path: Path) -> None:
    """12 tokens before: fewer are the first rows, more are interpolated behind the rows of no position."""
    torch.manual_seed(0)
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2} if arch == "gpt2" else LAYERS
    sizes = {"clip": {"width": 16, "layers": 1, "heads": 2}} if arch == "clip" else {"config": small}
    kind = None if arch == "clip" else arch
    old, _ = build_text_tower(text_section(kind, **sizes), tokenizer=Tokens())
    network = old if arch == "clip" else old.transformer
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "old.safetensors")
    section = text_section(kind, **sizes, weights=str(tmp_path / "old.safetensors"))
    tower, coverage = build_text_tower(section, tokenizer=Tokens(context_length=length))
    tokens = torch.randint(2, 40, (2, length))
    assert tower.eval()(tokens, torch.ones_like(tokens).bool()).isfinite().all()
    if length == 12:
        assert not coverage.positions
        return
    (name,) = coverage.positions
    own = (tower if arch == "clip" else tower.transformer).state_dict()[name]
    file = network.state_dict()[name]
    if length == 8:
        assert torch.equal(own, file[: rows + 8])
        assert f"positions the first 8 of 12 positions ({name})" in str(coverage)
        short = tokens[:, :8]
        features = old.eval()(short, torch.ones_like(short).bool())
        torch.testing.assert_close(tower(short, torch.ones_like(short).bool()), features)
    else:
        expected = functional.interpolate(file[rows:].T[None], size=20, mode="linear", align_corners=False)[
            0
        ].T
        assert torch.equal(own[rows:], expected)
        assert torch.equal(own[:rows], file[:rows])
        assert "interpolated from 12 to 20 positions" in str(coverage)


def test_a_longer_context_needs_no_weights_to_be_built_again(tmp_path: Path) -> None:
    """For a checkpoint, which has its positions, and for weights of a whole model that has them."""
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=12)
    AutoModel.from_config(config).save_pretrained(tmp_path / "gpt2")
    started = {"hf": str(tmp_path / "gpt2"), "weights": "pretrained"}
    clip = build_clip(tiny_recipe(text=text_section(None, **started)), Tokens(context_length=20))
    again = build_clip(
        tiny_recipe(text=text_section(None, **started)), Tokens(context_length=20), starting_weights=False
    )
    assert again.starting_weights == ()
    assert again.load_state_dict(clip.state_dict()).missing_keys == []
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    whole = {"text": text_section(None, **started | {"weights": None})}
    other = build_clip(
        tiny_recipe(**whole, weights=str(tmp_path / "clip.safetensors")), Tokens(context_length=20)
    )
    assert torch.equal(other.text.transformer.wpe.weight, clip.text.transformer.wpe.weight)


def test_a_published_network_takes_a_longer_context_where_it_learned_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=12)
    AutoModel.from_config(config).save_pretrained(tmp_path / "gpt2")
    section = text_section(None, hf=str(tmp_path / "gpt2"), weights="pretrained")
    tower, coverage = build_text_tower(section, tokenizer=Tokens(context_length=20))
    assert "interpolated from 12 to 20 positions (wpe.weight)" in str(coverage)
    assert tower.transformer.wpe.num_embeddings == 20
    rotary = AutoConfig.for_model(
        "modernbert", **LAYERS, vocab_size=40, max_position_embeddings=12, pad_token_id=0
    )
    AutoModel.from_config(rotary).save_pretrained(tmp_path / "rotary")
    section = text_section(None, hf=str(tmp_path / "rotary"), weights="pretrained")
    with pytest.raises(UserError, match="20 is longer than the text tower's 12 positions"):
        build_text_tower(section, tokenizer=Tokens(context_length=20))
