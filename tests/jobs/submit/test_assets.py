"""Names on a hub, and what is fetched of them."""

import hashlib
import json

import pytest

from clipcluster.errors import UserError
from clipcluster.recipe.load import load
from jobs.submit import assets

CLASSIFY = ("task=classify", "model.text=null", "model.embed_dim=512", "evaluate={}")


def loaded(recipe, *overrides):
    return load(recipe, list(overrides)).recipe


def test_the_demo_needs_nothing(recipe, tmp_path):
    assert assets.hub_names(loaded(recipe)) == {}
    assert assets.fetch(loaded(recipe), tmp_path / "assets") == []
    assert not (tmp_path / "assets").exists()


def test_names_and_folders(recipe, tmp_path):
    tower = "model.text={hf: org/tower, weights: pretrained}"
    names = assets.hub_names(loaded(recipe, "data.text.tokenizer=org/words", tower))
    assert set(names) == {"org/words", "org/tower"}
    assert "config.json" in names["org/tower"]
    assert "*.safetensors" in names["org/tower"]
    assert "*.safetensors" not in names["org/words"]
    vision = ("model.image.timm=null", "model.image.args=null", "model.image.hf=org/vit")
    names = assets.hub_names(loaded(recipe, *vision, "model.image.weights=pretrained"))
    assert names == {"org/vit": ("config.json", *assets.WEIGHTS)}
    classify = loaded(recipe, *vision, *CLASSIFY, "data.text.tokenizer=org/words")
    assert assets.hub_names(classify) == {"org/vit": ("config.json",)}
    (tmp_path / "words").mkdir()
    (tmp_path / "bpe.txt.gz").touch()
    for there in ("words", "bpe.txt.gz"):
        assert assets.hub_names(loaded(recipe, f"data.text.tokenizer={tmp_path / there}")) == {}


def test_what_is_there_is_not_fetched_again(recipe, tmp_path):
    (tmp_path / "org--words").mkdir()
    (tmp_path / "org--words" / "tokenizer.json").write_text("{}")
    assert assets.fetch(loaded(recipe, "data.text.tokenizer=org/words"), tmp_path) == []


def test_a_hub_out_of_reach_is_said(recipe, tmp_path):
    with pytest.raises(UserError, match="org/words is not a folder here"):
        assets.fetch(loaded(recipe, "data.text.tokenizer=org/words"), tmp_path / "assets")


def test_what_was_fetched_in_part_is_fetched_again(recipe, tmp_path, monkeypatch):
    def snapshot_download(name, *, local_dir, allow_patterns):
        local_dir.mkdir(exist_ok=True)
        (local_dir / "config.json").write_text("{}")
        calls.append(name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        (local_dir / "tokenizer.json").write_text("{}")

    calls = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    wanted = loaded(recipe, "data.text.tokenizer=org/words")
    with pytest.raises(KeyboardInterrupt):
        assets.fetch(wanted, tmp_path)
    assert assets.fetch(wanted, tmp_path) == ["org/words"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["org--words"]
    hashes = json.loads((tmp_path / "hashes.json").read_text())
    assert list(hashes) == ["org--words/config.json", "org--words/tokenizer.json"]
    assert hashes["org--words/config.json"] == hashlib.sha256(b"{}").hexdigest()
