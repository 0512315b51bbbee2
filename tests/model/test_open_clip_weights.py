"""Weights of OpenCLIP's models, tower by tower and whole: the same features."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.models import byobnet
from tiny_model import Tokens, tiny_batch, tiny_clip
from torch import Tensor, nn

from clipcluster.errors import UserError
from clipcluster.model.clip import Clip

open_clip = pytest.importorskip("open_clip")
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402  after the guard

WIDTH, EMBED = 16, 8
TEXT = {
    "context_length": Tokens.context_length,
    "vocab_size": Tokens.vocab_size,
    "width": WIDTH,
    "heads": 2,
    "layers": 2,
}
NATIVE = {"clip": {"width": WIDTH, "heads": 2, "layers": 2}}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
OURS_VIT = {
    "timm": "vit_base_patch16_clip_quickgelu_224",
    "args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}


def resnet_args() -> dict:
    """timm's RN50 of CLIP with one block a stage and an eighth of the width."""
    cfg = byobnet.model_cfgs["resnet50_clip"]
    blocks = tuple(replace(block, d=1, c=block.c // 8, gs=None) for block in cfg.blocks)
    return {
        "blocks": blocks,
        "stem_chs": tuple(width // 8 for width in (32, 32, 64)),
        "head_hidden_size": 256,
    }


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic at random: what a network starts as hides what is exchanged."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not name.endswith(("logit_scale", "running_var", "attn_mask")):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def captions(end: int) -> tuple[Tensor, Tensor]:
    """Captions that end with the largest token, as CLIP's do, padded with 0; and their mask."""
    tokens, mask = tiny_batch(5, seed=3).tokens.clamp(max=end - 1), tiny_batch(5, seed=3).mask
    last = mask.sum(dim=1) - 1
    tokens[torch.arange(5), last] = end
    return tokens, mask


def assert_equal_features(ours: Clip, theirs: nn.Module, tokens: Tensor, mask: Tensor) -> None:
    size = theirs.visual.image_size
    images = torch.randn(3, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        expected = theirs.encode_image(images, normalize=True), theirs.encode_text(tokens, normalize=True)
        torch.testing.assert_close(ours.eval().encode_image(images), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.encode_text(tokens, mask), expected[1], atol=1e-5, rtol=1e-5)
        assert (expected[0][0] - expected[0][1]).abs().max() > 1e-3
    torch.testing.assert_close(ours.logit_scale.detach().squeeze(), theirs.logit_scale.detach())


def whole(file: Path, image: dict, text: dict, size: int = 32, **keys: object) -> Clip:
    return tiny_clip(seed=1, size=size, image=image, text=text, embed_dim=EMBED, weights=str(file), **keys)


@pytest.mark.parametrize("custom_text", [False, True])
def test_a_native_vit_and_text(tmp_path: Path, custom_text: bool) -> None:
    kind, file = CustomTextCLIP if custom_text else CLIP, tmp_path / "epoch_3.pt"
    theirs = drawn(kind(EMBED, VIT, TEXT, quick_gelu=True))
    wrapped = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {"state": {}}}, file)
    text = {"clip": NATIVE["clip"] | {"quick_gelu": True}}
    ours = whole(file, OURS_VIT, text)
    assert_equal_features(ours, theirs, *captions(Tokens.vocab_size - 1))
    (coverage,) = ours.starting_weights
    assert (coverage.tower, coverage.fraction, coverage.missing) == ("model", 1.0, ())
    assert coverage.unexpected == ()
    larger = whole(file, OURS_VIT, text, size=48).starting_weights[0]
    assert larger.positions == {"image.trunk.pos_embed": "interpolated from 4 x 4 to 6 x 6 patches"}
    # Tower by tower, from the same file.
    image, words = {**OURS_VIT, "weights": str(file)}, {**text, "weights": str(file)}
    towers = tiny_clip(seed=2, image=image, text=words, embed_dim=EMBED)
    assert [each.fraction for each in towers.starting_weights] == [1.0, 1.0]
    for name, value in ours.state_dict().items():
        if "projection" not in name and name != "logit_scale":
            assert torch.equal(value, towers.state_dict()[name]), name


def test_a_modified_resnet(tmp_path: Path) -> None:
    theirs = drawn(CLIP(EMBED, RESNET, TEXT))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    image = {"timm": "resnet50_clip", "args": resnet_args()}
    ours = whole(tmp_path / "w.pt", image, NATIVE, size=64, projection_bias=["image"])
    assert_equal_features(ours, theirs, *captions(Tokens.vocab_size - 1))
    with pytest.raises(UserError, match=r"larger model .*\(image_projection\.bias\)"):
        whole(tmp_path / "w.pt", image, NATIVE, size=64)


@pytest.mark.parametrize("proj", ["linear", ""])
def test_a_timm_trunk(tmp_path: Path, proj: str) -> None:
    vision = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": proj, "image_size": 32}
    theirs = drawn(CustomTextCLIP(EMBED, vision, TEXT, init_logit_bias=None))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    bias = [] if proj else ["image"]
    ours = whole(tmp_path, {"timm": "test_convnext"}, NATIVE, projection_bias=bias)
    assert_equal_features(ours, theirs, *captions(Tokens.vocab_size - 1))


def test_an_hf_text_tower(tmp_path: Path) -> None:
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=Tokens.vocab_size, **sizes).save_pretrained(tmp_path / "bert")
    text = {
        "hf_model_name": str(tmp_path / "bert"),
        "hf_model_pretrained": False,
        "hf_proj_type": "linear",
        "hf_pooler_type": "mean_pooler",
        "context_length": Tokens.context_length,
    }
    vision = {"timm_model_name": "test_convnext", "timm_pool": "", "image_size": 32}
    theirs = drawn(CustomTextCLIP(EMBED, vision, text))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    words = {"hf": str(tmp_path / "bert"), "pool": "mean"}
    ours = whole(tmp_path / "w.pt", {"timm": "test_convnext"}, words)
    assert_equal_features(ours, theirs, *captions(Tokens.vocab_size - 1))


def test_a_whole_model_lacks_nothing_and_holds_no_more(tmp_path: Path) -> None:
    theirs = drawn(CLIP(EMBED, VIT, TEXT, quick_gelu=True))
    state = theirs.state_dict()
    torch.save({key: value for key, value in state.items() if key != "text_projection"}, tmp_path / "less.pt")
    torch.save(state | {"visual.ln_extra.weight": torch.zeros(2)}, tmp_path / "more.pt")
    with pytest.raises(
        UserError, match=r"Missing from the file: text_projection\.weight\n(?s:.*)model\.missing"
    ):
        whole(tmp_path / "less.pt", OURS_VIT, NATIVE)
    with pytest.raises(UserError, match=r"larger model than the one built: 1 .*\.ln_extra\.weight\)"):
        whole(tmp_path / "more.pt", OURS_VIT, NATIVE)
    sizes = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | sizes, tmp_path / "openai.pt")
    quick = {"clip": NATIVE["clip"] | {"quick_gelu": True}}
    ours = whole(tmp_path / "openai.pt", OURS_VIT, quick, missing=["text_projection.*"])
    assert ours.starting_weights[0].missing == ()
    # Nor is anything missing with another activation than OpenAI's.
    exact = {**OURS_VIT, "timm": "vit_base_patch16_clip_224"}
    for image, text, named in ((OURS_VIT, NATIVE, "text.transformer"), (exact, quick, "image.trunk")):
        with pytest.raises(UserError, match=rf"trained with quick GELU, and {named}\.\S+ .*quick_gelu: true"):
            whole(tmp_path / "openai.pt", image, text)
    # A tower without the norm before the blocks would take every one of its tensors, and compute otherwise.
    plain = {**OURS_VIT, "timm": "vit_base_patch16_224", "weights": str(tmp_path / "openai.pt")}
    with pytest.raises(UserError, match=r"larger tower than the image tower built: 2 .*\(norm_pre\.weight"):
        tiny_clip(image={**plain, "missing": ["patch_embed.proj.bias"]})


def test_a_model_starts_from_another_run_of_the_same_towers(tmp_path: Path) -> None:
    source = drawn(tiny_clip(seed=4))
    distilled = {**source.state_dict(), "teacher_projections.image-0.weight": torch.zeros(3, 8)}
    torch.save(distilled, tmp_path / "w.pt")  # what only its distillation needed is none of the model
    ours = tiny_clip(seed=5, weights=str(tmp_path / "w.pt"))
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("name", ["test_convnext", "test_convnext2"])
def test_the_original_names_of_convnext(tmp_path: Path, name: str) -> None:
    tower = drawn(timm.create_model(name, num_classes=5))
    with torch.no_grad():
        original = as_published(tower.state_dict())
    torch.save({"model": original}, tmp_path / "w.pth")
    ours = tiny_clip(image={"timm": name, "weights": str(tmp_path / "w.pth")})
    for key, value in ours.image.trunk.state_dict().items():
        assert torch.equal(value, tower.state_dict()[key]), key
    assert set(ours.starting_weights[0].unexpected) == {"head.fc.weight", "head.fc.bias"}
    # FCMAE's pre-training: sparse kernels, no final norm.
    sparse = {f"encoder.{key}": value for key, value in as_sparse(original).items()}
    torch.save(
        {"model": sparse | {"mask_token": torch.zeros(1), "decoder.0.x": torch.zeros(2)}}, tmp_path / "f.pth"
    )
    image = {"timm": name, "weights": str(tmp_path / "f.pth"), "missing": ["head.norm.*"]}
    ours = tiny_clip(image=image)
    for key, value in ours.image.trunk.state_dict().items():
        assert key.startswith("head.norm") or torch.equal(value, tower.state_dict()[key]), key
    with pytest.raises(UserError, match=r"Missing from the file: head\.norm\.weight, head\.norm\.bias\n"):
        tiny_clip(image={**image, "missing": []})


def as_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names as the original code writes them."""
    found = {}
    for key, value in state.items():
        words = key.split(".")
        if words[0] == "stem":
            key = ".".join(["downsample_layers.0", *words[1:]])
        elif words[0] == "head":
            key = ".".join({"norm": ["norm"], "fc": ["head"]}[words[1]] + words[2:])
        elif words[2] == "downsample":
            key = ".".join(["downsample_layers", words[1], *words[3:]])
        else:
            own = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2", "mlp.grn": "grn"}
            inner = ".".join(words[4:])
            for ours, theirs in own.items():
                inner = inner.replace(ours, theirs)
            if inner.startswith("grn"):
                inner = {"grn.weight": "grn.gamma", "grn.bias": "grn.beta"}[inner]
                value = value.reshape(1, 1, 1, -1)
            key = ".".join(["stages", words[1], words[3], inner])
        found[key] = value.clone()
    return found


def as_sparse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original names as FCMAE's pre-training writes them, by the definition of its kernels."""
    found = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        inside = key.startswith("stages")
        if key.startswith(("norm", "head")):
            continue
        if value.ndim == 4 and kind == "weight" and not key.startswith("downsample_layers.0"):
            out, into, size, _ = value.shape
            kernel = torch.empty(size * size, into, out)
            for y in range(size):
                for x in range(size):
                    kernel[x * size + y] = value[:, :, y, x].T
            found[f"{module}.kernel"] = kernel.squeeze(1) if into == 1 else kernel
        elif inside and ".norm." in key:
            found[f"{module}.ln.{kind}"] = value
        elif inside and "pwconv" in key:
            found[f"{module}.linear.{kind}"] = value
        elif "grn" in key:
            found[key] = value.reshape(1, -1)
        else:
            found[key] = value.reshape(1, -1) if kind == "bias" and not key.startswith("down") else value
    return found
