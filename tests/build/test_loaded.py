"""A model in Python: its features are those that evaluations compute, whatever form an image has."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clipcluster
from clipcluster.data.images.decode import BadImage, decode
from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from clipcluster.evals.features import encode_images, encode_texts
from clipcluster.evals.suite import build_suite
from clipcluster.evals.zero_shot import class_vectors
from clipcluster.runs.folder import Run
from clipcluster.runtime.world import World
from tests.tiny_run import NAMES, captions, picture, write_run, write_shards


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("loaded")
    return write_run(folder / "runs" / "tiny-00000000", write_shards(folder / "pairs"))


def test_features_are_those_of_the_evaluations(run: Run, tmp_path: Path) -> None:
    model = clipcluster.load("tiny", runs=run.path.parent, device="cpu")
    assert (model.embed_dim, model.opened.step, model.logit_bias) == (16, 8, None)
    assert model.logit_scale == pytest.approx(1 / 0.07)
    assert "'tiny-00000000', step 8, 16 dimensions" in repr(model)
    recipe = model.opened.recipe
    suite = build_suite(recipe, world=World(0, 1, 0, torch.device("cpu")), tokenizer=model.tokenizer)
    (_, images), context = suite.evaluations[0], suite.context
    with torch.no_grad():
        known = encode_images(model.model, images, context, lambda: None)
        texts = [text for number in range(10) for text in captions(number)]
        expected = encode_texts(model.model, texts, context, lambda: None)
        classes = class_vectors(model.model, images, context, lambda: None)
    shards = open_folder(recipe.evaluate.retrieval[0])
    files = [shards.read(position).image for position in range(10)]
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    forms = {
        "bytes": files,
        "paths": paths,
        "names": map(str, paths),
        "pillow": [Image.open(path) for path in paths],
        "pixels": [decode(data) for data in files],
        "batch": torch.stack([model.transform(path) for path in paths]),
    }
    for name, form in forms.items():
        found = model.encode_image(form, batch_size=4)
        assert (found.shape, found.dtype) == ((10, 16), torch.float32)
        torch.testing.assert_close(found, known.features, atol=1e-6, rtol=0, msg=name)
    for one in (paths[3], str(paths[3]), files[3], Image.open(paths[3]), decode(files[3])):
        torch.testing.assert_close(model.encode_image(one), known.features[3:4], atol=1e-6, rtol=0)
    found = model.encode_text(texts, batch_size=3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(texts[5]), expected[5:6], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(20))
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 16)
    probable = model.classify(paths, NAMES, ["a {c}", "a photo of a {c}."])
    cosines = known.features.double() @ functional.normalize(classes, dim=-1).double().T
    torch.testing.assert_close(probable.double(), (cosines / 0.07).softmax(dim=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(probable.sum(dim=1), torch.ones(10))


class NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple's."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operator(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs, found))
        assert not any(isinstance(each, Tensor) and each.dtype is torch.float64 for each in given), operator
        return found


def test_a_device_without_float64_will_do(run: Run) -> None:
    model = clipcluster.load(run.path, device="cpu")
    batch = torch.stack([model.transform(picture(number)) for number in range(3)])
    with NoFloat64():
        images, texts = model.encode_image(batch), model.encode_text(["a cat", "a dog"])
        assert model.similarity(images, texts).shape == (3, 2)
        assert model.classify(batch, NAMES).shape == (3, 4)
    torch.testing.assert_close(model.encode_image(batch.double()), images, atol=1e-6, rtol=0)


def test_the_weights_are_chosen(run: Run) -> None:
    folder = run.checkpoints / "step-00000003"
    averaged, raw = (clipcluster.load(folder, weights=weights, device="cpu") for weights in (None, "raw"))
    assert (averaged.opened.averaged, raw.opened.averaged) == (True, False)
    assert not torch.allclose(averaged.encode_text("a cat"), raw.encode_text("a cat"), atol=1e-3)
    half = clipcluster.load(folder, device="cpu", precision="bf16")
    assert half.encode_text("a cat").dtype == torch.float32
    torch.testing.assert_close(half.encode_text("a cat"), averaged.encode_text("a cat"), atol=0.05, rtol=0)


def test_a_model_with_a_bias_asks_each_class_alone(run: Run, tmp_path: Path) -> None:
    shards = run.path.parent.parent / "pairs"
    biased = write_run(
        tmp_path / "runs" / "siglip", shards, "model.logit_bias={init: -3}", "loss.name=siglip", steps=(1,)
    )
    model = clipcluster.load(biased.path, device="cpu")
    assert model.logit_bias == -3
    image, text = model.encode_image(picture(0)), model.encode_text(["cat", "dog"])
    expected = torch.sigmoid(model.logit_scale * image.double() @ text.double().T - 3)
    torch.testing.assert_close(
        model.classify(picture(0), ["cat", "dog"]).double(), expected, atol=1e-6, rtol=0
    )


def test_a_picture_lies_as_its_file_says(run: Run) -> None:
    """Turned by EXIF, grey, with a palette, transparent: from Pillow as from the bytes."""
    model = clipcluster.load(run.path, device="cpu")
    plain = Image.open(io.BytesIO(picture(1, (40, 20))))
    turned = Image.Exif()
    turned[274] = 6  # orientation: a quarter turn
    for image, more in (
        (plain, {"exif": turned}),
        (plain.convert("L"), {}),
        (plain.convert("P"), {}),
        (plain.convert("RGBA").rotate(30), {}),
    ):
        file = io.BytesIO()
        image.save(file, "PNG", **more)
        opened = Image.open(io.BytesIO(file.getvalue()))
        assert torch.equal(model.transform(opened), model.transform(file.getvalue()))
        assert "orientation" not in opened.info or opened.getexif()[274] == 6  # left as it was


def test_what_is_no_image_is_named(run: Run, tmp_path: Path) -> None:
    model = clipcluster.load(run.path, device="cpu")
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    with pytest.raises(BadImage, match=r"page\.jpg: HTML or XML, no image"):
        model.encode_image(tmp_path / "page.jpg")
    with pytest.raises(TypeError, match=r"a tensor \(3, 5\) torch\.uint8 was given; pixels are"):
        model.encode_image([torch.zeros(3, 5, dtype=torch.uint8)])
    with pytest.raises(TypeError, match=r"a batch \(2, 3, 8, 8\) was given, not \(N, 3, 32, 32\)"):
        model.encode_image(torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match=r"classify: a template has no \{c\} for the class name: 'a photo'"):
        model.classify(picture(0), ["cat"], ["a photo"])
    classify = write_run(
        tmp_path / "runs" / "classes", tmp_path, "task=classify", "model.text=null", "model.embed_dim=512",
        "model.classes=4", "evaluate={}", steps=(1,),
    )  # fmt: skip
    with pytest.raises(UserError, match="classes is of task classify and has no text tower"):
        clipcluster.load(classify.path)


def test_importing_it_loads_neither_torch_nor_webdataset() -> None:
    code = (
        "import sys, clipcluster; print({'load', 'webdataset'} <= set(dir(clipcluster)), "
        "[name for name in ('torch', 'webdataset') if name in sys.modules], hasattr(clipcluster, 'other'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True [] False\n"
