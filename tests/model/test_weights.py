"""Starting weights: what was loaded is proven, or refused."""

from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_model import SIZE, image_section, text_section, tiny_clip
from torch import nn

from clipcluster.errors import UserError
from clipcluster.model.weights import load_weights, read_state_dict

PREFIXES = ["module.", "_orig_mod.", "model.", "backbone.", "trunk.", "visual.trunk.", "encoder.", ""]


def trunk(seed: int = 0, **args: object) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_convnext", **{"num_classes": 0, **args})


def contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in state.items()}


@pytest.mark.parametrize("prefix", [*PREFIXES, "module._orig_mod."])
def test_every_prefix_is_found(tmp_path: Path, prefix: str) -> None:
    source, tower = trunk(seed=1), trunk(seed=2)
    save_file({prefix + k: v for k, v in contiguous(source.state_dict()).items()}, tmp_path / "w.safetensors")
    coverage = load_weights(tower, tmp_path / "w.safetensors", name="image")
    assert coverage.prefix == prefix
    assert (coverage.loaded, coverage.fraction, coverage.missing) == (coverage.tensors, 1.0, ())
    for key, value in source.state_dict().items():
        assert torch.equal(tower.state_dict()[key], value), key


@settings(max_examples=25, deadline=None)
@given(
    words=st.lists(st.sampled_from(PREFIXES[:-1]), max_size=3), noise=st.sampled_from(["text.", "teacher."])
)
def test_any_run_of_prefixes_is_found_beside_other_parts(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], noise: str
) -> None:
    prefix = "".join(words)
    file = tmp_path_factory.mktemp("weights") / "w.pth"
    source, tower = nn.Linear(3, 2), nn.Linear(3, 2)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save(state | {noise + "other.weight": torch.zeros(4)}, file)
    assert load_weights(tower, file, name="image").prefix == prefix
    assert torch.equal(tower.weight, source.weight)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_training_checkpoints_give_their_model(tmp_path: Path, wrapper: str | None) -> None:
    state = trunk().state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.bin")
    assert load_weights(trunk(1), tmp_path / "w.bin", name="image").fraction == 1


def test_a_classifier_is_left_out_and_said(tmp_path: Path) -> None:
    save_file(contiguous(trunk(num_classes=10).state_dict()), tmp_path / "w.safetensors")
    coverage = load_weights(trunk(), tmp_path / "w.safetensors", name="image")
    assert set(coverage.left_out) == {"head.fc.weight", "head.fc.bias"}
    assert "not used: head.fc" in str(coverage)


def test_batch_norm_statistics_are_loaded(tmp_path: Path) -> None:
    source, tower = (timm.create_model("resnet10t", num_classes=0) for _ in range(2))
    with torch.no_grad():
        source.bn1.running_mean.fill_(3.0)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(tower, tmp_path / "w.pth", name="image")
    assert (tower.bn1.running_mean == 3.0).all()


def test_a_file_of_other_names_is_refused_and_nothing_loaded(tmp_path: Path) -> None:
    state = {f"some.wrapper.{key}": value for key, value in contiguous(trunk(1).state_dict()).items()}
    save_file(state, tmp_path / "w.safetensors")
    tower = trunk(2)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    with pytest.raises(
        UserError, match=r"brings 0 of the image tower's (?s:.*)The file holds: some\.wrapper\.head"
    ):
        load_weights(tower, tmp_path / "w.safetensors", name="image")
    assert all(torch.equal(before[key], value) for key, value in tower.state_dict().items())


def test_half_a_tower_is_refused(tmp_path: Path) -> None:
    state = contiguous(trunk(1).state_dict())
    save_file({key: state[key] for key in list(state)[: len(state) // 2]}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"Missing from the file: stages"):
        load_weights(trunk(), tmp_path / "w.safetensors", name="image")


def test_a_tower_of_another_size_is_refused_with_the_shapes(tmp_path: Path) -> None:
    save_file(contiguous(trunk(1, dims=(16, 32, 48, 64)).state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"\(16, 3, 4, 4\) in the file, \(24, 3, 4, 4\) in the tower"):
        load_weights(trunk(), tmp_path / "w.safetensors", name="image")


def test_a_deeper_tower_than_the_one_built_is_refused(tmp_path: Path) -> None:
    save_file(contiguous(trunk(1, depths=(1, 2, 4, 3)).state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"larger tower.*stages\.3\.blocks"):
        load_weights(trunk(depths=(1, 2, 4, 2)), tmp_path / "w.safetensors", name="image")


def test_a_missing_norm_is_loaded_around_and_said(tmp_path: Path) -> None:
    state = contiguous(trunk(1).state_dict())
    save_file({k: v for k, v in state.items() if not k.startswith("head.norm")}, tmp_path / "w.safetensors")
    coverage = load_weights(trunk(), tmp_path / "w.safetensors", name="image")
    assert set(coverage.missing) == {"head.norm.weight", "head.norm.bias"}
    assert "randomly initialised: head.norm" in str(coverage)


def test_old_names_of_layer_norms_are_understood(tmp_path: Path) -> None:
    clip = tiny_clip(text=text_section("bert"))
    state = clip.text.transformer.state_dict()
    old = {"bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in state.items()}
    torch.save(old | {"cls.predictions.bias": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    coverage = load_weights(clip.text.transformer, tmp_path, name="text")
    assert coverage.fraction == 1


def test_a_sharded_folder_is_read_whole(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert read_state_dict(tmp_path).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    "name", ["nothing.safetensors", "broken.safetensors", "broken.pth", "list.pth", "empty.pth"]
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "broken.pth").write_bytes(b"no pickle")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=name):
        read_state_dict(tmp_path / name)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected one of model\.safetensors"):
        read_state_dict(tmp_path)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Code()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot be read") as refusal:
        read_state_dict(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(refusal.value)


def test_a_clip_says_what_its_files_brought(tmp_path: Path) -> None:
    torch.save(trunk(7).state_dict(), tmp_path / "w.pth")
    section = image_section("test_convnext", weights=str(tmp_path / "w.pth"))
    clip = tiny_clip(image=section)
    assert [coverage.tower for coverage in clip.starting_weights] == ["image"]
    assert torch.equal(clip.image.trunk.state_dict()["stem.0.weight"], trunk(7).state_dict()["stem.0.weight"])
    assert clip.encode_image(torch.randn(1, 3, SIZE, SIZE)).shape == (1, 8)
