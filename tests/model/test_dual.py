"""Whole dual encoders of transformers: the features, weights and refusals."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import Tokens, tiny_batch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    RobertaConfig,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from clipcluster.errors import UserError
from clipcluster.model.clip import Clip
from clipcluster.model.dual import build_dual
from clipcluster.model.hugging_face import pixels_of
from clipcluster.recipe.sections.image import Image
from clipcluster.recipe.sections.model import Model
from tests.tiny_sizes import LAYERS, SIZE, VISION

TEXT = {
    **LAYERS,
    "vocab_size": Tokens.vocab_size,
    "max_position_embeddings": Tokens.context_length,
    "pad_token_id": Tokens.pad_id,
    "eos_token_id": Tokens.eos_id,
    "bos_token_id": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def model_of(kind: str) -> nn.Module:
    """A random one, every parameter drawn: none is left at zero or one."""
    torch.manual_seed(0)
    if kind == "clip":
        model: nn.Module = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
    elif kind == "chinese":
        config = ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
        model = ChineseCLIPModel(config)
    elif kind == "siglip":
        text = TEXT | {"hidden_size": 32, "projection_size": 32}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    else:
        towers = CLIPVisionConfig(**VISION), RobertaConfig(**TEXT | {"max_position_embeddings": 16})
        config = VisionTextDualEncoderConfig.from_vision_text_configs(*towers, projection_dim=8)
        model = VisionTextDualEncoderModel(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    return model.eval()


def built(folder: Path, size: int = SIZE, tokens: object = None, **keys: object) -> Clip:
    dual = {"hf": str(folder), **{name: keys.pop(name) for name in ("weights",) if name in keys}}
    model = Model(dual=dual, **keys)
    recipe = SimpleNamespace(model=model, data=SimpleNamespace(image=Image(size=size)))
    return build_dual(recipe, tokens or Tokens()).eval()


def captions() -> tuple[Tensor, Tensor]:
    batch = tiny_batch(6, seed=2)
    tokens = batch.tokens.clone()
    last = batch.mask.sum(dim=1) - 1
    tokens[torch.arange(6), last] = Tokens.eos_id
    return tokens, batch.mask


def features_of(model: nn.Module, images: Tensor, tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    """transformers' own, of length one."""
    more = {} if mask is None else {"attention_mask": mask.long()}
    found = [model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens, **more)]
    tensors = [each if isinstance(each, Tensor) else each.pooler_output for each in found]
    return [functional.normalize(each, dim=-1) for each in tensors]


@pytest.mark.parametrize("kind", ["clip", "chinese", "siglip", "vision-text"])
def test_features_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    theirs = model_of(kind)
    theirs.save_pretrained(tmp_path)
    bias = {"logit_bias": {}} if kind == "siglip" else {}
    ours = built(tmp_path, weights="pretrained", **bias)
    (tokens, mask), images = captions(), torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        image, text = features_of(theirs, images, tokens, None if kind == "siglip" else mask)
        torch.testing.assert_close(ours.encode_image(images), image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.encode_text(tokens, mask), text, atol=1e-5, rtol=1e-5)
        assert (text[0] - text[1]).abs().max() > 1e-3
    assert ours.embed_dim == image.shape[1]
    assert ours.logit_scale.item() == theirs.logit_scale.item()
    if kind == "siglip":
        assert ours.logit_bias.item() == theirs.logit_bias.item()
    (coverage,) = ours.starting_weights
    assert (coverage.tower, coverage.fraction, coverage.unexpected) == ("model", 1.0, ())
    ours.train()
    (ours.encode_image(images[:2]).sum() + ours.encode_text(tokens, mask).sum()).backward()
    unused = {name for name, value in ours.named_parameters() if value.grad is None}
    assert unused == {"logit_scale", *(["logit_bias"] if kind == "siglip" else [])}
    # What follows a caption's end changes nothing, but where padding is attended to.
    changed = tokens.masked_fill(~mask, 5)
    with torch.no_grad():
        same = torch.allclose(ours.eval().encode_text(changed, mask), text, atol=1e-5)
    assert same == (kind != "siglip")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_another_image_size_interpolates_the_positions(tmp_path: Path, kind: str) -> None:
    theirs = model_of(kind)
    theirs.save_pretrained(tmp_path)
    ours, images = built(tmp_path, size=2 * SIZE, weights="pretrained"), torch.randn(2, 3, 2 * SIZE, 2 * SIZE)
    with torch.no_grad():
        found = theirs.get_image_features(pixel_values=images, interpolate_pos_encoding=True)
        expected = functional.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=-1)
        # transformers interpolates without antialiasing, whose cubic is another one in torch.
        torch.testing.assert_close(ours.encode_image(images), expected, atol=1e-2, rtol=0)
    assert list(ours.starting_weights[0].positions.values()) == ["interpolated from 4 x 4 to 8 x 8 patches"]


def test_files_of_older_versions_repeat_a_towers_name(tmp_path: Path) -> None:
    theirs = model_of("vision-text")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {key: value.clone() for key, value in load_file(file).items()}
    older = {
        key.replace("vision_model.", "vision_model.vision_model.", 1)
        if not key.startswith("vision_model.vision_model.")
        else key.replace("vision_model.vision_model.", "vision_model.", 1): value
        for key, value in state.items()
    }
    save_file(older, file)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = features_of(theirs, images, *captions())[0]
        found = built(tmp_path, weights="pretrained").encode_image(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_text_tower_without_its_pooler_is_refused_unless_listed(tmp_path: Path) -> None:
    model_of("vision-text").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v.clone() for k, v in load_file(file).items() if "pooler" not in k}, file)
    with pytest.raises(UserError, match=r"Missing from the file: text\.transformer\.pooler\.dense\.weight"):
        built(tmp_path, weights="pretrained")
    ours = built(tmp_path, weights="pretrained", missing=["text.transformer.pooler.*"])
    assert len(ours.starting_weights[0].missing) == 2


@pytest.mark.parametrize("attention", ["in_proj", "flash"])
def test_published_chinese_clip(tmp_path: Path, attention: str) -> None:
    """The publisher's own files, of the layout described with them, in transformers' model."""
    theirs = model_of("chinese")
    theirs.config.save_pretrained(tmp_path)
    state = as_published(theirs.state_dict(), flash=attention == "flash")
    torch.save({"epoch": 1, "step": 2, "name": "x", "state_dict": state}, tmp_path / "clip_cn.pt")
    ours = built(tmp_path, weights=str(tmp_path / "clip_cn.pt"))
    (tokens, mask), images = captions(), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        image, text = features_of(theirs, images, tokens, mask)
        torch.testing.assert_close(ours.encode_image(images), image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.encode_text(tokens, mask), text, atol=1e-5, rtol=1e-5)


def as_published(state: dict[str, Tensor], flash: bool) -> dict[str, Tensor]:
    """transformers' names as the publisher of Chinese-CLIP writes them, with a pooler that nothing uses."""
    found: dict[str, Tensor] = {"bert.pooler.dense.weight": torch.zeros(16, 16)}
    names = {
        "embeddings.patch_embedding.": "conv1.",
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.": "ln_pre.",
        "post_layernorm.": "ln_post.",
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm": "ln_",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for key, value in state.items():
        if key.startswith("text_model."):
            key = f"bert.{key.removeprefix('text_model.')}"
            if flash and ".attention.self." in key:
                if ".query." not in key:
                    continue
                parts = [key.replace("query", name) for name in ("query", "key", "value")]
                value = torch.cat([state[part.replace("bert.", "text_model.", 1)] for part in parts])
                key = key.replace("query", "Wqkv")
            elif flash:
                key = key.replace("attention.output.dense", "attention.self.out_proj")
        elif key.startswith("vision_model."):
            key = key.removeprefix("vision_model.")
            if "q_proj" in key:
                parts = [
                    f"vision_model.{key.replace('q_proj', name)}" for name in ("q_proj", "k_proj", "v_proj")
                ]
                value = torch.cat([state[part] for part in parts])
                fused = "Wqkv." if flash else "in_proj_"
                key = key.replace("self_attn.q_proj.", f"attn.{fused}")
            elif "k_proj" in key or "v_proj" in key:
                continue
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            key = f"visual.{key}"
        elif key == "visual_projection.weight":
            key, value = "visual.proj", value.T
        elif key == "text_projection.weight":
            key, value = "text_projection", value.T
        found[key] = value.clone()
    return {f"module.{key}": value for key, value in found.items()}


def test_open_clips_model_in_transformers(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": SIZE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    text = {"context_length": 12, "vocab_size": Tokens.vocab_size, "width": 16, "heads": 2, "layers": 2}
    theirs = CLIP(8, vision, text, quick_gelu=True).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    # The file ends a caption with its largest token.
    sizes = TEXT | {"intermediate_size": 64, "eos_token_id": 39}
    CLIPConfig(
        text_config=sizes, vision_config=VISION | {"intermediate_size": 128}, projection_dim=8
    ).save_pretrained(tmp_path)
    ours = built(tmp_path, tokens=Tokens(eos_id=39), weights=str(tmp_path / "w.pt"))
    tokens, mask = captions()
    tokens = tokens.clamp(max=38)
    tokens[torch.arange(6), mask.sum(dim=1) - 1] = 39
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = theirs.encode_image(images, normalize=True), theirs.encode_text(tokens, normalize=True)
        torch.testing.assert_close(ours.encode_image(images), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.encode_text(tokens, mask), expected[1], atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model_of("siglip").config.save_pretrained(tmp_path / "siglip")
    shorter = SimpleNamespace(vocab_size=40, pad_id=0, eos_id=1, context_length=10)
    with pytest.raises(UserError, match=r"data\.text\.context_length: 10, but SigLIP.* 12 positions"):
        built(tmp_path / "siglip", tokens=shorter)
    larger = SimpleNamespace(vocab_size=50, pad_id=0, eos_id=1, context_length=12)
    with pytest.raises(UserError, match=r"the tower's vocabulary has 40 tokens"):
        built(tmp_path / "siglip", tokens=larger)
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(
        UserError, match=r"model\.dual\.hf: bert is none of the dual encoders known here: clip"
    ):
        built(tmp_path / "bert")
    with pytest.raises(UserError, match=r"model\.dual\.hf: .* is neither a folder"):
        built(tmp_path / "nothing")
    model_of("clip").config.save_pretrained(tmp_path / "clip")
    for end, eos in ((39, 39), (2, 39)):
        CLIPConfig(text_config=TEXT | {"eos_token_id": end}, vision_config=VISION).save_pretrained(
            tmp_path / "end"
        )
        with pytest.raises(UserError, match=rf"ends captions with token 1, .* pools at token {eos}"):
            built(tmp_path / "end")
        assert built(tmp_path / "end", tokens=Tokens(eos_id=eos))
    with pytest.raises(UserError, match=r"model\.embed_dim: 16, but the embedding of .* has 8 dimensions"):
        built(tmp_path / "clip", embed_dim=16)


@pytest.mark.parametrize(
    ("written", "pixels"),
    [
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1]}, [0.5, 0.4, 0.3, 1, 1, 1]),
        ({"image_processor": {"image_mean": [0] * 3, "image_std": [1] * 3}}, [0, 0, 0, 1, 1, 1]),
        ({"image_mean": [0.5], "image_std": [0.5]}, None),  # of grey images
        ({"image_mean": 0.5, "image_std": 0.5}, None),
        ({"image_mean": ["a", "b", "c"], "image_std": [0.5] * 3}, None),
        ({"image_processor": None}, None),
        ([], None),
    ],
)
def test_what_a_folder_says_of_pixels(written: object, pixels: list[float] | None, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    assert pixels_of(str(tmp_path), None) == pixels
