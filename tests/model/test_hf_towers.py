"""Towers of transformers beside the networks as transformers runs them."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tiny_model import SIZE, Tokens, image_section, text_section, tiny_recipe
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    CLIPVisionModel,
    VisionTextDualEncoderModel,
)

from clipcluster.errors import UserError
from clipcluster.model.clip import build_clip
from clipcluster.model.towers import build_image_tower, build_text_tower
from clipcluster.recipe.sections import model as sections
from tests.tiny_sizes import LAYERS

LENGTH = Tokens.context_length
# model type -> what a tower is made of; where its published vector is.
TEXT = {
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, "last"),
    "bert": (LAYERS, "first"),
    "roberta": (LAYERS, "first"),
    "distilbert": ({"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}, "first"),
    "modernbert": (LAYERS | {"local_attention": 8}, "first"),
}
VISION = {
    "clip_vision_model": LAYERS | {"patch_size": 8},
    "chinese_clip_vision_model": LAYERS | {"patch_size": 8},
    "siglip_vision_model": LAYERS | {"patch_size": 8},
    "vit": LAYERS | {"patch_size": 8},
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8},
    "convnextv2": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
}
MASKED = ("clip_vision_model", "siglip_vision_model", "vit", "dinov2")


def text_tower(kind: str, **keys: object):
    torch.manual_seed(0)
    section = text_section(kind, config=TEXT[kind][0], **keys)
    return build_text_tower(section, tokenizer=Tokens())[0].eval()


TOWERS = {kind: text_tower(kind) for kind in TEXT}
POOLERS = {kind: text_tower(kind, pool="pooler") for kind in ("bert", "roberta")}


def vision_folder(kind: str, folder: Path) -> Path:
    torch.manual_seed(3)
    sizes = VISION[kind]
    AutoModel.from_config(AutoConfig.for_model(kind, **sizes, image_size=SIZE)).save_pretrained(folder)
    return folder


def image_tower(folder: Path, **keys: object):
    section = TypeAdapter(sections.ImageTower).validate_python(
        {"hf": str(folder), "weights": "pretrained", **keys}
    )
    return build_image_tower(section, image_size=SIZE)[0]


@pytest.mark.parametrize("kind", TEXT)
@settings(max_examples=25)
@given(lengths=st.lists(st.integers(0, LENGTH), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_captions_vector_is_the_networks_own_and_padding_changes_nothing(
    kind: str, lengths: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, Tokens.vocab_size, (len(lengths), LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    tokens = tokens.where(mask, Tokens.pad_id)
    with torch.no_grad():
        for tower in (TOWERS[kind], POOLERS.get(kind)):
            if tower is None:
                continue
            features = tower(tokens, mask)
            assert features.isfinite().all()
            for row, length in enumerate(lengths):
                if not length:
                    continue
                alone = tower.transformer(input_ids=tokens[row : row + 1, :length])
                place = {"last": length - 1, "first": 0, "pooler": 0}[tower.pool]
                expected = alone.last_hidden_state[0, place]
                if tower.pool == "pooler":
                    expected = torch.tanh(tower.transformer.pooler.dense(expected))
                torch.testing.assert_close(features[row], expected, atol=1e-5, rtol=1e-5)


def test_pooling_is_each_towers_published_one() -> None:
    assert {kind: tower.pool for kind, tower in TOWERS.items()} == {k: pool for k, (_, pool) in TEXT.items()}
    for kind in ("gpt2", "distilbert", "modernbert"):
        with pytest.raises(UserError, match=rf"{kind} has no pooler of its own; set it to last"):
            text_tower(kind, pool="pooler")


def test_chinese_roberta_wwm_is_a_bert(tmp_path: Path) -> None:
    """Its folder: BERT's architecture, 21,128 words, saved with the head of masked words under `bert.`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **LAYERS, vocab_size=21128)
    model = AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(tmp_path)
    section = text_section(None, hf=str(tmp_path), weights="pretrained")
    tower, coverage = build_text_tower(section, tokenizer=Tokens())
    assert (coverage.prefix, coverage.fraction, tower.pool) == ("bert.", 1, "first")
    tokens = torch.randint(2, 40, (2, LENGTH))
    expected = model.eval().bert(input_ids=tokens).last_hidden_state[:, 0]
    torch.testing.assert_close(tower.eval()(tokens, torch.ones_like(tokens).bool()), expected)
    pooled = text_section(None, hf=str(tmp_path), weights="pretrained", pool="pooler")
    with pytest.raises(UserError, match=r"pooler\.dense"):  # saved without one: it would be random
        build_text_tower(pooled, tokenizer=Tokens())
    allowed = pooled.model_copy(update={"missing": ("pooler.*",)})
    tower, coverage = build_text_tower(allowed, tokenizer=Tokens())
    assert coverage.missing == ("pooler.dense.weight", "pooler.dense.bias")


@pytest.mark.parametrize("kind", VISION)
def test_an_image_tower_is_the_networks_own(kind: str, tmp_path: Path) -> None:
    folder = vision_folder(kind, tmp_path)
    expected = AutoModel.from_pretrained(folder).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        output = expected(pixel_values=images)
        tower = image_tower(folder).eval()
        features = tower(images)
        assert features.shape == (2, tower.width)
        torch.testing.assert_close(features, output.pooler_output.flatten(1))
        states = output.last_hidden_state
        mean = states.mean(dim=(2, 3)) if states.ndim == 4 else states.mean(dim=1)
        torch.testing.assert_close(image_tower(folder, pool="mean").eval()(images), mean)
    tower(images).square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_the_two_towers_make_the_dual_encoder_of_transformers(tmp_path: Path) -> None:
    """A CLIP vision tower and RoBERTa, each with its own pooler: VisionTextDualEncoder's features."""
    torch.manual_seed(1)
    vision = CLIPVisionModel(AutoConfig.for_model("clip_vision_model", **VISION["vit"], image_size=SIZE))
    text = AutoModel.from_config(
        AutoConfig.for_model("roberta", **LAYERS, vocab_size=40, pad_token_id=0, max_position_embeddings=20)
    )
    both = VisionTextDualEncoderModel(vision_model=vision, text_model=text).eval()
    vision.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    clip = build_clip(
        tiny_recipe(
            image={"hf": str(tmp_path / "vision"), "weights": "pretrained"},
            text={"hf": str(tmp_path / "text"), "weights": "pretrained", "pool": "pooler"},
            embed_dim=512,
        ),
        Tokens(),
    ).eval()
    clip.image_projection.load_state_dict(both.visual_projection.state_dict())
    clip.text_projection.load_state_dict(both.text_projection.state_dict())
    images, tokens = torch.randn(3, 3, SIZE, SIZE), torch.randint(2, 40, (3, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 5, 1])[:, None]
    tokens = tokens.where(mask, 0)
    expected = both(input_ids=tokens, attention_mask=mask.long(), pixel_values=images)
    torch.testing.assert_close(clip.encode_image(images), expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.encode_text(tokens, mask), expected.text_embeds, atol=1e-5, rtol=0)


def test_the_image_tower_of_a_whole_dual_encoder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "clip",
        vision_config=VISION["clip_vision_model"] | {"image_size": SIZE},
        text_config=LAYERS | {"vocab_size": 40},
    )
    whole = AutoModel.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = whole.vision_model(pixel_values=images).pooler_output
    torch.testing.assert_close(image_tower(tmp_path).eval()(images), expected)


def test_a_text_network_is_no_image_tower(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2", **TEXT["gpt2"][0]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt2 does not take images alone"):
        image_tower(tmp_path, weights=None)


def first_norm(network: torch.nn.Module) -> torch.nn.Module:
    """What a network's embeddings go through first."""
    return next(module for module in network.modules() if isinstance(module, torch.nn.LayerNorm))


@pytest.mark.parametrize("kind", MASKED)
def test_masking_leaves_out_patches_in_training_alone(kind: str, tmp_path: Path) -> None:
    folder = vision_folder(kind, tmp_path)
    tower, whole = image_tower(folder, mask_ratio=0.5), image_tower(folder).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    seen: list[torch.Tensor] = []
    first_norm(tower.trunk).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.equal(tower.eval()(images), whole(images))
    every = seen.pop()
    prefix = every.shape[1] - 16
    tower.train()
    copied = deepcopy(tower).eval()
    assert torch.equal(copied(images), whole(images)), "a copy's mode is its own"
    seen.clear()
    torch.manual_seed(5)
    first = tower(images)
    torch.manual_seed(5)
    assert torch.equal(tower(images), first)
    torch.manual_seed(6)
    assert not torch.equal(tower(images), first)
    kept = seen[0]
    assert kept.shape[1] == prefix + 8
    assert torch.equal(kept[:, :prefix], every[:, :prefix]), "the class token stays"
    torch.manual_seed(5)
    chosen = prefix + torch.randn(2, 16).argsort(dim=-1)[:, :8]
    assert torch.equal(kept[:, prefix:], every.gather(1, chosen[..., None].expand(-1, -1, every.shape[2])))


def test_a_timm_tower_masks_by_itself_and_one_without_patches_refuses(tmp_path: Path) -> None:
    masked = image_section("test_vit").model_copy(update={"mask_ratio": 0.5})
    tower = build_image_tower(masked, image_size=SIZE)[0]
    counts: list[int] = []
    tower.trunk.blocks[0].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    images = torch.randn(1, 3, SIZE, SIZE)
    tower.train()(images)
    tower.eval()(images)
    assert counts == [1 + 2, 1 + 4]
    for name in ("resnet10t", "test_convnext"):
        other = image_section(name).model_copy(update={"mask_ratio": 0.5})
        with pytest.raises(UserError, match=rf"model.image.mask_ratio: {name} has no patch tokens"):
            build_image_tower(other, image_size=SIZE)
    with pytest.raises(UserError, match="mask_ratio: convnextv2 has no patch tokens"):
        image_tower(vision_folder("convnextv2", tmp_path), mask_ratio=0.5)
