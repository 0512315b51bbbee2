"""The folder of an export: whole or not at all, with a card; averaged and raw weights."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from models import CLIP_TEXT, CLIP_VIT, read, saved_run, sections
from transformers import AutoModel

from clipcluster.errors import UserError
from clipcluster.export import export as exports
from clipcluster.export.card import card as card_of
from clipcluster.export.export import FORMATS, export, written_whole
from clipcluster.runs.files import append_lines, write_json
from clipcluster.runs.folder import Run

SECRET = "https://user:pa55@host/train/{0..9}.tar?token=abcdef"


@pytest.fixture
def run(tmp_path: Path) -> tuple[Run, dict[str, Any]]:
    recipe = sections({"image": CLIP_VIT, "text": CLIP_TEXT})
    recipe["data"]["train"] = [{"shards": SECRET}]
    return saved_run(tmp_path / "runs" / "tiny-12345678", recipe)


def test_averaged_weights_and_raw_ones(run: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    folder, both = run
    pixels = torch.randn(2, 3, 32, 32)
    for given, part in ((None, "ema"), ("ema", "ema"), ("raw", "raw")):
        out = tmp_path / str(given)
        opened = export(str(folder.path), "hf", out, weights=given)
        assert (opened.averaged, read(out / "export.json")["ema"]) == (part == "ema",) * 2
        assert len({file.stat().st_mode for file in out.iterdir()}) == 1  # others may read the weights too
        with torch.no_grad():
            found = AutoModel.from_pretrained(out).get_image_features(pixel_values=pixels)
            expected = both[part].model.encode_image(pixels)
        found = found if isinstance(found, torch.Tensor) else found.pooler_output
        torch.testing.assert_close(torch.nn.functional.normalize(found, dim=-1), expected, atol=1e-5, rtol=0)
    (folder.checkpoints / "step-00000009" / "ema.safetensors").unlink()
    with pytest.raises(UserError):
        export(str(folder.path), "hf", tmp_path / "none", weights="ema")
    assert not (tmp_path / "none").exists()


def test_an_older_export_is_replaced_and_nothing_else(
    run: tuple[Run, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run
    out = tmp_path / "out"
    out.mkdir()  # empty: it may be filled
    export(str(folder.path), "safetensors", out)
    assert read(out / "export.json")["format"] == "safetensors"
    export(str(folder.path), "hf", out)
    assert read(out / "export.json")["format"] == "hf"
    assert not (out / "towers.json").exists()
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    with pytest.raises(UserError, match="out is the model that is to be exported"):
        export(str(out), "onnx", out)

    def broken(opened: Any, place: Path) -> None:
        (place / "half").touch()
        raise UserError("it does not fit")

    monkeypatch.setattr(exports, "resolve_name", lambda name: broken)
    with pytest.raises(UserError, match="it does not fit"):
        export(str(folder.path), "hf", out)
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for place in (other, tmp_path / "file", folder.path):
        with pytest.raises(UserError, match="exists and is not an export; name another folder"):
            export(str(folder.path), "hf", place)
    with pytest.raises(UserError, match=r"/proc/out cannot be written \(No such file .*; name another"):
        export(str(folder.path), "hf", Path("/proc/out"))
    for about in ({"format": 3}, {"format": "hf"}, {"format": "hf", "files": []}):
        (other / "export.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match="exists and is not an export"):
            export(str(folder.path), "hf", other)


def test_what_its_owner_wrote_into_an_export_is_not_deleted(
    run: tuple[Run, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run
    out, written = tmp_path / "out", []

    def write(opened: Any, place: Path) -> None:
        (place / "text").mkdir()
        (place / "text" / "config.json").write_text("{}")
        for file in written:
            file.write_text("written meanwhile")

    monkeypatch.setattr(exports, "resolve_name", lambda name: write)
    for _ in range(2):
        export(str(folder.path), "hf", out)
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card + "MIT")
    (out / "text" / "LICENSE").touch()
    (out / "link").symlink_to(out / "README.md")
    with pytest.raises(UserError, match=r"out holds files .* since: README\.md, link, text/LICENSE\. They"):
        export(str(folder.path), "hf", out)
    assert (out / "README.md").read_text().endswith("MIT")
    shutil.rmtree(out)
    out.mkdir()
    written.append(out / "notes.txt")
    with pytest.raises(UserError, match="out exists and is not an export"):
        export(str(folder.path), "hf", out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_a_full_disk_leaves_nothing_and_one_message(run: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for kind in ("hf", "safetensors"):
        with files_of_at_most(10_000), pytest.raises(UserError, match=r"out cannot be written: .*Make space"):
            export(str(run[0].path), kind, out)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_is_put_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, renamed = tmp_path / "out", exports.os.rename
    out.mkdir()
    (out / "old").touch()

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("no more names")
        renamed(source, target)

    monkeypatch.setattr(exports.os, "rename", failing)
    with pytest.raises(OSError, match="no more names"), written_whole(out) as aside:
        (aside / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["old"]


def test_every_format_has_a_writer() -> None:
    assert all(callable(exports.resolve_name(name)) for name in FORMATS.values())


def test_the_card_tells_what_the_run_knows(run: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = run
    for rank in (0, 1):
        start = {"event": "start", "rank": rank, "time": 1000.0 + rank}
        (folder.attempts_dir / "1").mkdir(exist_ok=True)
        append_lines(folder.attempts_dir / "1" / f"events-rank-{rank}.jsonl", [start])
    lines = [
        {"step": step, "time": 1000.0 + 200 * step, "samples_per_second": 90 + step} for step in (1, 5, 9)
    ]
    append_lines(folder.attempts_dir / "1" / "metrics.jsonl", lines)
    metrics = {"val/t2i_r1": 0.25, "val/paired_t2i_r1": 0.05, "pets/zero_shot_top1": 0.5, "pets/classes": 37}
    write_json(folder.evals / "step-00000009.json", {"step": 9, "ema": True, "metrics": metrics})
    write_json(folder.evals / "step-00000090.json", {"step": 90, "ema": True, "metrics": {"val/t2i_r1": 0.9}})
    opened = export(str(folder.path), "hf", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "transformers",
        "zero-shot-image-classification",
    )
    figures = {(each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results}
    assert figures == {
        ("val", "t2i_r1"): 0.25,
        ("val", "paired_t2i_r1"): 0.05,
        ("pets", "zero_shot_top1"): 0.5,
    }
    assert card.data.license is None
    for told in (
        "moving average of the weights of step 9",
        "- `https://host/train/{0..9}.tar`: 1,437 samples",
        "| steps | 9 of 90 |",
        "| samples seen | 72 |",
        "| global batch | 8 |",
        "| commit | 0123abc |",
        "At step 9, of the moving average of the weights.\n",
        "any caption of an image is a match",
        "| val | t2i_r1 | 25.00 % |",
        "| device-hours | 1 |",  # 2 ranks, 1,800 seconds
        "| samples per second | 95 (median) |",
        "timm: vit_base_patch16_clip_quickgelu_224",
    ):
        assert told in text, told
    assert "pa55" not in text
    assert "abcdef" not in text
    assert text.count("To be filled in") == 2
    # A hub shows the figures of these weights alone.
    for others in ({"averaged": False}, {"step": 8}):
        text = card_of(replace(opened, **others), "hf")
        assert ModelCard(text).data.eval_results is None
        assert "of the moving average of the weights. **Other weights than those here.**" in text
