"""The classifier and its task."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_model import SIZE, image_section
from torch.nn import functional

from clipcluster.data.loading.batch import Batch, normalise
from clipcluster.errors import UserError
from clipcluster.model.classify import ClassifyTask, ImageClassifier, build_classifier
from clipcluster.model.task import Task
from clipcluster.model.towers import build_image_tower
from clipcluster.recipe.sections.image import Image
from clipcluster.recipe.sections.model import Model
from clipcluster.runs.checkpoints import file_entry
from clipcluster.runs.files import file_sha256, write_json

CLASSES = 7


def classifier(**changes: object) -> ImageClassifier:
    model = Model(image=image_section(), classes=CLASSES).model_copy(update=changes)
    recipe = SimpleNamespace(model=model, data=SimpleNamespace(image=Image(size=SIZE)))
    torch.manual_seed(0)
    return build_classifier(recipe, None)


def batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    classes = torch.arange(size) % CLASSES
    return Batch(0, images, None, None, classes, [(slot, "shard", str(slot)) for slot in range(size)])


def test_names_of_the_tower_are_those_of_a_dual_encoder() -> None:
    model = classifier()
    tower, _ = build_image_tower(image_section(), image_size=SIZE)
    expected = {f"image.{name}" for name in tower.state_dict()} | {"head.weight", "head.bias"}
    assert set(model.state_dict()) == expected
    assert all(name.startswith(("image.trunk.", "head.")) for name in expected)
    assert model.head.out_features == CLASSES


def test_the_loss_is_the_cross_entropy_of_every_sample() -> None:
    model = classifier().double().eval()
    task = ClassifyTask(model, (0.5,) * 3, (0.25,) * 3).double()
    whole = batch()
    report = task(Task.report, whole)
    logits = model.head(model.image(normalise(whole.images, task.mean, task.std)))
    rows = [-logits[row].log_softmax(0)[cls] for row, cls in enumerate(whole.classes.tolist())]
    torch.testing.assert_close(report.loss, torch.stack(rows).mean())
    parts = [task(Task.report, part).loss for part in whole.micro_batches(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), report.loss)
    assert report.metrics["batch_accuracy"] == pytest.approx(
        functional.one_hot(logits.argmax(1), CLASSES)[range(6), whole.classes].double().mean().item()
    )


def test_many_classes_need_no_memory_but_the_head() -> None:
    model = classifier(classes=21_841)
    assert model.classify(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, 21_841)
    assert sum(value.numel() for value in model.head.parameters()) == 21_841 * (model.image.width + 1)


def test_the_head_of_a_file_is_taken_where_the_classes_are_as_many(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = timm.create_model("test_convnext", num_classes=CLASSES)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    image = image_section("test_convnext", weights=str(tmp_path / "w.pth"))
    same, other = classifier(image=image), classifier(image=image, classes=3)
    assert torch.equal(same.head.weight, source.head.fc.weight)
    assert torch.equal(same.head.bias, source.head.fc.bias)
    (loaded,), (dropped,) = same.starting_weights, other.starting_weights
    assert (loaded.head, loaded.unexpected) == ("head of 7 classes loaded", ())
    assert "head of 7 classes dropped, there are 3 here" in str(dropped)
    assert set(dropped.unexpected) == {"head.fc.weight", "head.fc.bias"}
    torch.testing.assert_close(other.image.trunk.stem[0].weight, source.stem[0].weight)
    assert other.head.weight.abs().max() < 0.05
    # A classifier's own checkpoint: tower and head, or the tower of a dual encoder.
    torch.save(same.state_dict(), tmp_path / "run.pth")
    again = classifier(image=image_section("test_convnext", weights=str(tmp_path / "run.pth")))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in same.state_dict().items())
    (folder := tmp_path / "step-00000002").mkdir()
    for name in ("model", "ema"):
        save_file(same.state_dict(), folder / f"{name}.safetensors")
    sizes = {f.name: file_entry(f.stat().st_size, file_sha256(f)) for f in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"files": sizes})
    image = image_section("test_convnext", weights=str(folder))
    averaged = classifier(image=image, weights_from="ema").starting_weights[0]
    assert (averaged.part, averaged.head) == ("ema", "head of 7 classes loaded")
    whole = classifier(image=image_section("test_convnext"), weights=str(tmp_path / "run.pth"))
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in same.state_dict().items())
    # OpenCLIP's names are of a whole dual encoder; a classifier is none.
    torch.save({f"visual.{key}": value for key, value in same.state_dict().items()}, tmp_path / "clip.pth")
    with pytest.raises(UserError, match=r"has 0 of the model's"):
        classifier(image=image_section("test_convnext"), weights=str(tmp_path / "clip.pth"))


def test_the_fresh_head_is_scaled() -> None:
    whole, small = classifier(), classifier(head_init_scale=0.001)
    assert torch.equal(small.head.weight, whole.head.weight * 0.001)
    assert not small.head.bias.any()
    assert 0.015 < whole.head.weight.std() < 0.025
