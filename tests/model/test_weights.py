"""Starting weights: what was loaded is proven, or refused."""

import shutil
from argparse import Namespace
from pathlib import Path
from random import Random

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_model import SIZE, image_section, text_section, tiny_clip
from torch import nn

from clipcluster.build.model import hash_of
from clipcluster.errors import UserError
from clipcluster.model import weight_files
from clipcluster.model.weight_files import read_weights
from clipcluster.model.weights import load_weights
from clipcluster.runs.checkpoints import file_entry
from clipcluster.runs.files import file_sha256, write_json

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


def test_a_file_that_holds_the_tower_twice_is_refused(tmp_path: Path) -> None:
    """A student and its average, say: nothing tells which is meant."""
    state = {
        f"{prefix}.{k}": v for prefix in ("encoder", "backbone") for k, v in trunk().state_dict().items()
    }
    torch.save(state, tmp_path / "w.pth")
    assert load_weights(trunk(1), tmp_path / "w.pth", name="image").prefix == "encoder."
    other = {key: value + key.startswith("backbone.") for key, value in state.items()}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=r"image tower twice, under the prefixes 'encoder\.' and 'backbone\.'"
    ):
        load_weights(trunk(1), tmp_path / "other.pth", name="image")


@settings(max_examples=25, deadline=None)
@given(
    wrappers=st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "base_model."]), max_size=3),
    place=st.sampled_from([*PREFIXES, "image.trunk.", "vision_model."]),
    noise=st.sampled_from(["text.", "teacher."]),
)
def test_any_wrappers_around_a_place_are_found_beside_other_parts(
    tmp_path_factory: pytest.TempPathFactory, wrappers: list[str], place: str, noise: str
) -> None:
    prefix = "".join(wrappers) + place
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
    assert set(coverage.unexpected) == {"head.fc.weight", "head.fc.bias"}
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
        UserError,
        match=r"has 0 of the image tower's 99 (?s:.*)99 names would match without 'some\.wrapper\.', "
        r"which is none of (?s:.*)The file holds: some\.wrapper\.",
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
    with pytest.raises(UserError, match=r"\(16, 3, 4, 4\) in the file, \(24, 3, 4, 4\) in the image tower"):
        load_weights(trunk(), tmp_path / "w.safetensors", name="image")


def test_a_deeper_tower_than_the_one_built_is_refused(tmp_path: Path) -> None:
    save_file(contiguous(trunk(1, depths=(1, 2, 4, 3)).state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"larger tower.*stages\.3\.blocks"):
        load_weights(trunk(depths=(1, 2, 4, 2)), tmp_path / "w.safetensors", name="image")


def test_one_missing_norm_is_refused_unless_the_recipe_lists_it(tmp_path: Path) -> None:
    state, file = contiguous(trunk(1).state_dict()), tmp_path / "w.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith("head.norm")}, file)
    with pytest.raises(
        UserError, match=r"has 97 of (?s:.*)head\.norm\.weight, head\.norm\.bias\n(?s:.*)image\.missing"
    ):
        load_weights(trunk(), file, name="image")
    with pytest.raises(UserError, match=r"Missing from the file: head\.norm\.bias\n"):
        load_weights(trunk(), file, name="image", missing=["head.norm.weight"])
    coverage = load_weights(trunk(), file, name="image", missing=["head.norm.*"])
    assert set(coverage.missing) == {"head.norm.weight", "head.norm.bias"}
    assert "randomly initialised: head.norm" in str(coverage)


def test_a_listed_tensor_may_have_another_shape(tmp_path: Path) -> None:
    state = contiguous(trunk(1).state_dict()) | {"stem.0.weight": torch.zeros(24, 1, 4, 4)}
    save_file(state, tmp_path / "w.safetensors")
    tower = trunk()
    drawn = tower.state_dict()["stem.0.weight"].clone()
    coverage = load_weights(tower, tmp_path / "w.safetensors", name="image", missing=["stem.0.weight"])
    assert coverage.missing == ("stem.0.weight",)
    assert torch.equal(tower.state_dict()["stem.0.weight"], drawn)


def test_a_listed_name_that_the_tower_does_not_have_is_refused(tmp_path: Path) -> None:
    save_file(contiguous(trunk(1).state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"model\.image\.missing: haed\.\* is no tensor"):
        load_weights(trunk(), tmp_path / "w.safetensors", name="image", missing=["haed.*", "head.norm.*"])


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = contiguous(trunk(1).state_dict())
    state["stem.0.bias"][3] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"not finite, in stem\.0\.bias"):
        load_weights(trunk(), tmp_path / "w.safetensors", name="image")


def test_old_names_of_layer_norms_are_understood(tmp_path: Path) -> None:
    clip = tiny_clip(text=text_section("bert"))
    state = clip.text.transformer.state_dict()
    old = {"bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in state.items()}
    torch.save(old | {"cls.predictions.bias": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    coverage = load_weights(clip.text.transformer, tmp_path, name="text")
    assert coverage.fraction == 1


def test_the_name_that_transformers_puts_before_a_network_is_a_prefix(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertForMaskedLM, AlbertModel

    sizes = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 32}
    config = AlbertConfig(vocab_size=40, **sizes)
    source, tower = AlbertForMaskedLM(config), AlbertModel(config, add_pooling_layer=False)
    source.save_pretrained(tmp_path)
    coverage = load_weights(tower, tmp_path, name="text")
    assert (coverage.prefix, coverage.fraction) == ("albert.", 1.0)
    assert all(torch.equal(value, source.albert.state_dict()[k]) for k, value in tower.state_dict().items())


def test_a_sharded_folder_is_read_whole(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert read_weights(tmp_path).state.keys() == dict(model.named_parameters()).keys()
    with pytest.raises(UserError, match=r"index\.json holds no averaged \(EMA\) weights"):
        read_weights(tmp_path, "ema")


@pytest.mark.parametrize(
    "name", ["nothing.safetensors", "broken.safetensors", "broken.pth", "list.pth", "empty.pth"]
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "broken.pth").write_bytes(b"no pickle")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=name):
        read_weights(tmp_path / name)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected one of .*model\.safetensors"):
        read_weights(tmp_path)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Code()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"cannot be read \(it holds \S*getattr") as refusal:
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(refusal.value)


def test_a_clip_says_what_its_files_brought(tmp_path: Path) -> None:
    torch.save(trunk(7).state_dict(), tmp_path / "w.pth")
    section = image_section("test_convnext", weights=str(tmp_path / "w.pth"))
    clip = tiny_clip(image=section)
    assert [coverage.tower for coverage in clip.starting_weights] == ["image"]
    assert torch.equal(clip.image.trunk.state_dict()["stem.0.weight"], trunk(7).state_dict()["stem.0.weight"])
    assert clip.encode_image(torch.randn(1, 3, SIZE, SIZE)).shape == (1, 8)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_files_whose_names_all_differ_by_a_prefix_never_pass_for_loaded(tmp_path: Path, tower: str) -> None:
    """A load that skips what it does not know takes nothing of such a file, and says it was loaded."""
    source, built = tiny_clip(seed=1), tiny_clip(seed=2)
    module = {"image": source.image.trunk, "text": source.text.transformer}[tower]
    target = {"image": built.image.trunk, "text": built.text.transformer}[tower]
    wrapped = {f"wrapped.{tower}_tower.{key}": value for key, value in module.state_dict().items()}
    torch.save(wrapped, tmp_path / "w.pth")
    assert len(target.load_state_dict(wrapped, strict=False).missing_keys) == len(target.state_dict())
    with pytest.raises(UserError, match=rf"has 0 of the {tower} tower's"):
        load_weights(target, tmp_path / "w.pth", name=tower)
    torch.save(
        {f"module.model.{key}": value for key, value in module.state_dict().items()}, tmp_path / "w.pth"
    )
    assert load_weights(target, tmp_path / "w.pth", name=tower).fraction == 1
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in module.state_dict().items())


def test_the_average_is_taken_where_a_file_has_one(tmp_path: Path) -> None:
    raw, average, file = trunk(1).state_dict(), trunk(2).state_dict(), tmp_path / "w.pth"
    torch.save({"state_dict": raw, "state_dict_ema": average, "args": Namespace(lr=1)}, file)
    for prefer, part, expected in ((None, "ema", average), ("ema", "ema", average), ("raw", "raw", raw)):
        weights = read_weights(file, prefer)
        assert (weights.part, len(weights.state)) == (part, len(raw))
        assert torch.equal(weights.state["stem.0.weight"], expected["stem.0.weight"])
    assert "the averaged (EMA) weights" in str(load_weights(trunk(), file, name="image"))
    torch.save({"model": raw}, file)
    assert read_weights(file).part == ""
    with pytest.raises(UserError, match=r"no averaged \(EMA\) weights: set model\.weights_from: raw"):
        read_weights(file, "ema")


def test_values_in_a_code_are_refused(tmp_path: Path) -> None:
    state = trunk(1).state_dict()
    weight = state["stem.0.weight"]
    for other in (
        (100 * weight).to(torch.int8),
        weight.to(torch.float8_e4m3fn),
        weight.to_sparse(),
        weight.to("meta"),
    ):
        torch.save(state | {"stem.0.weight": other}, tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"stem\.0\.weight as torch\.|cannot be read"):
            load_weights(trunk(), tmp_path / "w.pth", name="image")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_damaged_and_hostile_files_are_one_message_each(tmp_path: Path) -> None:
    state = trunk(1).state_dict()
    torch.save(state, tmp_path / "whole.pth")
    save_file(contiguous(state), tmp_path / "whole.safetensors")
    flipped = bytearray((tmp_path / "whole.pth").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "jit.pt")
    (tmp_path / "outside.safetensors.index.json").write_text('{"weight_map": {"a": "../whole.safetensors"}}')
    (tmp_path / "list.safetensors.index.json").write_text("[]")
    (tmp_path / "shard.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "flipped.pth").write_bytes(flipped)
    for name in ("whole.pth", "whole.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(whole[: len(whole) * 2 // 3])
    for name, reason in {
        "cut-whole.pth": "cannot be read",
        "cut-whole.safetensors": "cannot be read",
        "flipped.pth": "checksum",
        "jit.pt": "TorchScript",
        "outside.safetensors.index.json": "names no files beside it",
        "list.safetensors.index.json": "cannot be read as an index",
        "shard.safetensors.index.json": r"No weights at .*gone\.safetensors",
        "pointer.bin": "Git LFS pointer",
    }.items():
        with pytest.raises(UserError, match=reason):
            read_weights(tmp_path / name)


def test_checkpoints_of_a_run_are_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step, seeds in ((3, (1, 2)), (7, (3, 4))):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        listed = {}
        for file, seed in zip(("model.safetensors", "ema.safetensors"), seeds, strict=True):
            state = {
                f"image.trunk.{key}": value for key, value in contiguous(trunk(seed).state_dict()).items()
            }
            save_file(state, folder / file)
            listed[file] = file_entry((folder / file).stat().st_size, file_sha256(folder / file))
        write_json(folder / "manifest.json", {"files": listed})
    run, newest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000007"

    def first_of(source: Path, prefer: str | None = None) -> tuple[str, str]:
        tower = trunk()
        coverage = load_weights(tower, source, name="image", weights_from=prefer)
        seeds = [s for s in (1, 2, 3, 4) if torch.equal(trunk(s).stem[0].weight, tower.stem[0].weight)]
        return f"{coverage.part} {seeds}", coverage.file

    assert first_of(run) == ("ema [4]", str(newest / "ema.safetensors"))
    assert f"{run} has not finished" in caplog.text
    assert first_of(run, "raw") == ("raw [3]", str(newest / "model.safetensors"))
    assert first_of(run / "checkpoints" / "step-00000003")[0] == "ema [2]"
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert first_of(run)[0] == "ema [2]"
    assert first_of(newest)[0] == "ema [4]"
    with pytest.raises(UserError, match=r"step-00000007 does not verify: the content of model\.safetensors"):
        first_of(newest, "raw")
    (newest / "ema.safetensors").unlink()
    for prefer in ("ema", None):  # its manifest says that there was an average
        with pytest.raises(UserError, match=r"holds no averaged weights; set model\.weights_from: raw"):
            first_of(newest, prefer)


@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_that_its_run_deletes_meanwhile_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    run = tmp_path / "run"
    for step in (3, 7):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        entry = file_entry(
            (folder / "model.safetensors").stat().st_size, file_sha256(folder / "model.safetensors")
        )
        write_json(folder / "manifest.json", {"files": {"model.safetensors": entry}})
    newest = run / "checkpoints" / "step-00000007"
    said = rf"The checkpoint {newest} is not there: .*checkpoint\.keep.* There are: step-00000003\. Name"
    read = weight_files._read

    def rotated(file: Path) -> object:
        shutil.rmtree(newest)
        return read(file)

    monkeypatch.setattr(weight_files, "_read", rotated)
    with pytest.raises(UserError, match=said):
        read_weights(newest if named else run)
    for path in (newest, newest / "model.safetensors"):  # it was gone before
        with pytest.raises(UserError, match=said):
            read_weights(path)
        with pytest.raises(UserError, match=said):
            hash_of(path / "model.safetensors" if path == newest else path)


def test_a_parameter_with_the_name_of_a_computed_buffer_is_needed(tmp_path: Path) -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Linear(2, 2)
            self.register_buffer("position_ids", torch.arange(2))

    torch.save({"attn.weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"has 1 of the image tower's 2 (?s:.*)Missing from the file: attn\.bias\n"
    ):
        load_weights(Tower(), tmp_path / "w.pth", name="image")


@pytest.mark.long
@pytest.mark.parametrize("name", ["new.pth", "old.pth", "w.safetensors"])
def test_no_damage_ends_in_another_exception(tmp_path: Path, name: str) -> None:
    """Cut, changed and inserted bytes: refused, or (where a format has no checksums) other finite values."""
    state = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    if name == "w.safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save({"model": state}, tmp_path / name, _use_new_zipfile_serialization=name == "new.pth")
    whole, generator, refused = (tmp_path / name).read_bytes(), Random(0), 0
    for _ in range(1000):
        content = bytearray(whole)
        place = generator.randrange(len(content))
        for kind in generator.choices(
            ["cut", "change", "insert"], weights=[3, 5, 2], k=generator.choice([1, 3])
        ):
            if kind == "cut":
                del content[place:]
            elif kind == "change" and place < len(content):
                content[place] = generator.randrange(256)
            else:
                content[place:place] = generator.randbytes(5)
        (tmp_path / f"damaged{Path(name).suffix}").write_bytes(content)
        tower = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        try:
            load_weights(tower, tmp_path / f"damaged{Path(name).suffix}", name="image")
        except UserError:
            refused += 1
        else:
            same = all(torch.equal(value, state[key]) for key, value in tower.state_dict().items())
            assert same or name != "new.pth"
            assert all(value.isfinite().all() for value in tower.state_dict().values())
    assert refused > 800
