"""Towers by name: what they give, what they refuse."""

import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tiny_model import SIZE, WORDS, Tokens, image_section, text_section
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from clipcluster.errors import UserError
from clipcluster.model.towers import build_image_tower, build_text_tower

ARCHS = ("gpt2", "bert", "roberta")


def text_tower(arch: str = "gpt2", tokens: Tokens | None = None, **keys: object):
    torch.manual_seed(0)
    return build_text_tower(text_section(arch, **keys), tokenizer=tokens or Tokens())[0].eval()


def captions(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, as many real ones as said, padded to the context length."""
    torch.manual_seed(1)
    mask = torch.arange(Tokens.context_length) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(2, Tokens.vocab_size, mask.shape)
    return tokens.where(mask, Tokens.pad_id), mask


@pytest.mark.parametrize(
    "name", ["test_vit.r160_in1k", "test_vit", "resnet10t", "test_convnext2", "mobilenetv3_small_050"]
)
def test_an_image_tower_gives_vectors_of_its_width(name: str) -> None:
    tower, coverage = build_image_tower(image_section(name), image_size=SIZE)
    assert tower.eval()(torch.randn(2, 3, SIZE, SIZE)).shape == (2, tower.width)
    assert coverage is None


def test_clips_and_siglips_towers_keep_their_own_pooling() -> None:
    vit = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    images = torch.randn(2, 3, 64, 64)

    def built(name: str, **args: object) -> torch.nn.Module:
        return build_image_tower(image_section(name, **args), image_size=64)[0].eval()

    for name in ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"):  # the class token
        clip = built(name, **vit)
        torch.testing.assert_close(clip(images), clip.trunk.forward_features(images)[:, 0])
        assert clip.width == 32
        activation = clip.trunk.blocks[0].mlp.act
        assert ("Quick" in type(activation).__name__) == ("quickgelu" in name)
    siglip = built("vit_base_patch16_siglip_224", **vit)  # attention over the patches, no class token
    tokens = siglip.trunk.forward_features(images)
    assert tokens.shape == (2, 16, 32)
    torch.testing.assert_close(siglip(images), siglip.trunk.attn_pool(tokens))
    resnet = built("resnet50_clip", width_factor=0.125)  # attention over the last map
    maps = resnet.trunk.forward_features(images)
    assert maps.shape == (2, resnet.width, 2, 2)
    torch.testing.assert_close(resnet(images), resnet.trunk.head(maps))
    assert resnet.trunk.head.pos_embed.shape == (5, resnet.width)


def test_arguments_reach_the_image_tower() -> None:
    tower, _ = build_image_tower(image_section("convnextv2_atto", depths=[1, 1, 1, 1]), image_size=SIZE)
    assert [len(stage.blocks) for stage in tower.trunk.stages] == [1, 1, 1, 1]


def test_an_unknown_image_tower_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'convnxt_tiny'.*Nearest: .*convnext_tiny"):
        build_image_tower(image_section("convnxt_tiny"), image_size=SIZE)


def test_an_argument_the_image_tower_does_not_take_is_refused() -> None:
    with pytest.raises(UserError, match="depht"):
        build_image_tower(image_section("resnet10t", depht=3), image_size=SIZE)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pool", [None, "mean", "last", "first"])
def test_padding_changes_nothing(arch: str, pool: str | None) -> None:
    tower = text_tower(arch, pool=pool)
    tokens, mask = captions(5, 12, 1)
    padded = tower(tokens, mask)
    assert padded.shape == (3, tower.width)
    torch.testing.assert_close(padded[:1], tower(tokens[:1, :5], mask[:1, :5]))
    noise = torch.where(mask, tokens, torch.full_like(tokens, Tokens.vocab_size - 1))
    if arch != "roberta":  # which counts positions over whatever is not the padding token
        torch.testing.assert_close(padded, tower(noise, mask))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pool", ["last", "first", "mean"])
def test_a_caption_of_padding_alone_is_finite_and_leaves_the_others(arch: str, pool: str) -> None:
    tower = text_tower(arch, pool=pool)
    tokens, mask = captions(5, 0)
    both = tower(tokens, mask)
    assert both.isfinite().all()
    torch.testing.assert_close(both[:1], tower(tokens[:1], mask[:1]))
    both.sum().backward()
    assert all(
        parameter.grad.isfinite().all() for parameter in tower.parameters() if parameter.grad is not None
    )


def test_pooling_takes_the_tokens_it_names() -> None:
    tower = text_tower("bert")
    tokens, mask = captions(5, 12)
    states = tower.transformer(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    tower.pool = "first"
    torch.testing.assert_close(tower(tokens, mask), states[:, 0])
    tower.pool = "last"
    torch.testing.assert_close(tower(tokens, mask), torch.stack([states[0, 4], states[1, 11]]))
    tower.pool = "mean"
    torch.testing.assert_close(tower(tokens, mask), torch.stack([states[0, :5].mean(0), states[1].mean(0)]))


def test_pooling_goes_by_the_architecture() -> None:
    assert [text_tower(arch).pool for arch in ARCHS] == ["last", "first", "first"]


def test_a_text_tower_takes_vocabulary_and_positions_from_the_tokenizer() -> None:
    for arch in ARCHS:
        embeddings = text_tower(arch).transformer.get_input_embeddings()
        assert embeddings.num_embeddings == Tokens.vocab_size, arch
    assert text_tower("gpt2").transformer.wpe.num_embeddings == Tokens.context_length
    assert (
        text_tower("bert").transformer.embeddings.position_embeddings.num_embeddings == Tokens.context_length
    )


def test_a_text_tower_has_neither_pooler_nor_cache() -> None:
    for arch in ARCHS:
        transformer = text_tower(arch).transformer
        assert not any("pooler" in name for name, _ in transformer.named_parameters())
        assert transformer.config.use_cache is False


@pytest.mark.parametrize(
    ("arch", "keys", "message"),
    [
        ("gtp2", {"config": {}}, r"'gtp2'.*Nearest: .*gpt2"),
        ("gpt2", {"config": {"n_layers": 2}}, r"'n_layers'.*n_layer"),
        ("gpt2", {"config": {"vocab_size": 39}}, "39 tokens, the tokenizer has 40"),
        ("gpt2", {"config": {"n_positions": 11}}, "12 is longer than the text tower's 11 positions"),
        ("roberta", {"config": {"max_position_embeddings": 12}}, "text tower's 11 positions"),
        ("gpt2", {"config": {"n_embd": 16, "n_head": 3}}, "cannot build gpt2.*divisible by num_heads"),
        ("nougat", {"config": {}}, r"model\.text\.arch.*nougat"),
        ("t5", {"config": {}}, "not a single text network"),
        ("vit", {"config": {"num_hidden_layers": 1}}, "does not take tokens"),
    ],
)
def test_a_text_tower_that_cannot_be_is_refused(arch: str, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        text_tower(arch, **keys)


def test_an_architecture_of_unknown_pooling_asks_for_it() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(UserError, match=r"model.text.pool.*last, first or mean"):
        text_tower("nystromformer", config=small)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as transformers saves it, in half precision."""
    torch.manual_seed(5)
    config = AutoConfig.for_model("gpt2", **WORDS["gpt2"], vocab_size=40, n_positions=12, eos_token_id=1)
    config.bos_token_id = None
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_folder_gives_the_tower_and_its_weights(folder: Path) -> None:
    section = text_section(None, hf=str(folder), weights="pretrained")
    tower, coverage = build_text_tower(section, tokenizer=Tokens())
    assert coverage is not None
    assert coverage.fraction == 1
    assert coverage.prefix == "transformer."
    from safetensors.torch import load_file

    expected = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert tower.transformer.wte.weight.dtype == torch.float32
    torch.testing.assert_close(tower.transformer.wte.weight.detach(), expected.float())


def test_a_folder_without_weights_asked_for_starts_from_scratch(folder: Path) -> None:
    tower, coverage = build_text_tower(text_section(None, hf=str(folder)), tokenizer=Tokens())
    assert coverage is None
    assert tower.transformer.wte.weight.dtype == torch.float32
    with pytest.raises(UserError, match="longer than the text tower's 12 positions"):
        build_text_tower(text_section(None, hf=str(folder)), tokenizer=replace(Tokens(), context_length=13))


def test_what_was_fetched_at_submission_comes_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    folder.rename(tmp_path / "assets" / "somebody--gpt2")
    section = text_section(None, hf="somebody/gpt2", weights="pretrained")
    _, coverage = build_text_tower(section, tokenizer=Tokens(), assets=tmp_path / "assets")
    assert coverage is not None
    assert "somebody--gpt2" in coverage.file


@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_a_name_on_the_hub_is_read_from_its_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str
) -> None:
    cached = tmp_path / "hub" / "models--somebody--gpt2"
    AutoModel.from_pretrained(folder).save_pretrained(cached / "snapshots" / "a1", max_shard_size=shard_size)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    section = text_section(None, hf="somebody/gpt2", weights="pretrained")
    # The folder fetched at submission may hold the configuration alone.
    (tmp_path / "assets" / "somebody--gpt2").mkdir(parents=True)
    shutil.copy(folder / "config.json", tmp_path / "assets" / "somebody--gpt2")
    for assets in (None, tmp_path / "assets"):
        _, coverage = build_text_tower(section, tokenizer=Tokens(), assets=assets)
        assert coverage is not None
        assert coverage.fraction == 1
    section = text_section(None, hf="somebody/other", weights="pretrained")
    with pytest.raises(UserError, match="neither a folder"):
        build_text_tower(section, tokenizer=Tokens())


def test_a_name_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(UserError, match="neither a folder"):
        build_text_tower(text_section(None, hf="nobody/has-this"), tokenizer=Tokens())
