"""DataCompDR's samples, from made-up shards in its layout into the batch."""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil
from torchvision.transforms.autoaugment import _apply_op

from clipcluster.build.teachers import build_preparation
from clipcluster.data.images.reinforcement import OPERATIONS
from clipcluster.data.images.transforms import train_transform
from clipcluster.data.loading import stored
from clipcluster.data.loading.batch import Batch
from clipcluster.data.loading.decoders import LARGEST, arrays, augmentations
from clipcluster.data.loading.extras import BadExtra
from clipcluster.data.loading.loader import Loader
from clipcluster.data.loading.stored import StoredPreparation
from clipcluster.data.sampling.sampler import sampler_of
from clipcluster.data.shards.dataset import Sample
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_source
from clipcluster.data.tokenizer import ByteTokenizer
from clipcluster.recipe.sections.data import Data
from clipcluster.recipe.sections.distill import Distill, Stored
from clipcluster.recipe.tasks import TASKS
from tests.reinforced_shards import SYN, WIDTH, embeddings, members, npz, param_aug, picture, write
from tests.shard_writer import ShardWriter

TOKENIZER = ByteTokenizer(40)
SHAPE = (10**9, 12)
MIXED = {"default": 0.5, SYN: 0.5}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dr") / "shards", 24)


def batches(folder: Path, count: int, captions: str, captions_in: Any, **options: Any) -> list[Batch]:
    section = Data.model_validate(
        {
            "train": [{"shards": str(folder), "captions_in": captions_in}],
            "batch_size": 8,
            "image": {"size": 32},
        }
    )
    settings = Distill(stored=Stored(captions=captions, widths=(WIDTH, WIDTH)))
    recipe: Any = SimpleNamespace(data=section, seed=3, distill=settings)
    dataset = open_source(section.train[0], text=True)
    loader = Loader(
        [dataset],
        sampler_of(recipe, [dataset]),
        section,
        tokenizer=TOKENIZER,
        seed=3,
        extras=TASKS["distill"].members(recipe),
        preparation=build_preparation(recipe, train_transform(section.image), TOKENIZER, None),
        **options,
    )
    with closing(loader):
        return [next(loader) for _ in range(count)]


def text_of(tokens: torch.Tensor, mask: torch.Tensor) -> str:
    return bytes(tokens[mask][1:-1].tolist()).decode()


def row_of(text: str, number: int) -> int:
    """The row of `text_emb` that belongs to a caption of sample `number`."""
    if text == f"picture {number}":
        return 0
    assert text.startswith("synthetic ")
    assert text.endswith(f" of picture {number}")
    return 1 + int(text.split()[1])


def close(found: torch.Tensor, number: int, name: str, row: int) -> bool:
    """Whether this is that embedding, exactly, or as bfloat16 where the sample is so."""
    expected = torch.from_numpy(embeddings(number)[name][row])
    expected = expected.bfloat16().float() if number % 3 == 2 else expected
    return torch.equal(found, expected)


def by_hand(number: int, augmentation: list[Any]) -> torch.Tensor:
    crop, operations = augmentation
    image = pil.resized_crop(Image.fromarray(picture(number)), *crop, [32, 32], InterpolationMode.BICUBIC)
    for operation, magnitude in operations:
        image = _apply_op(image, list(OPERATIONS)[operation], magnitude, InterpolationMode.NEAREST, None)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def drawn_of(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Of each sample its number, the row of its augmentation and that of its caption; all of it compared."""
    assert batch.tokens is not None
    assert batch.mask is not None
    for slot, (_, _, key) in enumerate(batch.keys):
        number = int(key, 16)
        image_emb = batch.tensor(stored.IMAGE)[slot]
        (row,) = [row for row in range(4) if close(image_emb, number, "image_emb", row)]
        assert torch.equal(batch.images[slot], by_hand(number, param_aug(number)[row]))
        caption = row_of(text_of(batch.tokens[slot], batch.mask[slot]), number)
        assert close(batch.tensor(stored.TEXT)[slot], number, "text_emb", caption)
        yield number, row, caption


def test_image_caption_and_embeddings_belong_together(shards: Path) -> None:
    """Each sample has one stored augmentation, applied as written, one caption, and the rows of both."""
    drawn = [sample for batch in batches(shards, 9, "drawn", MIXED) for sample in drawn_of(batch)]
    assert {row for _, row, _ in drawn} == set(range(4))
    assert {caption for _, _, caption in drawn} == set(range(6))
    assert sum(caption == 0 for _, _, caption in drawn) == pytest.approx(36, abs=15)
    passes = [{number: rest for number, *rest in drawn[24 * n : 24 * n + 24]} for n in range(3)]
    assert passes[0].keys() == passes[1].keys() == passes[2].keys()
    assert len({str(sorted(rows.items())) for rows in passes}) == 3  # each pass draws anew


def test_both_captions_of_a_sample(shards: Path) -> None:
    found = batches(shards, 6, "both", "default")
    rows = []
    for batch in found:
        assert all(caption == 0 for _, _, caption in drawn_of(batch))
        tokens, mask = batch.tensor(stored.TOKENS), batch.tensor(stored.MASK)
        for slot, (_, _, key) in enumerate(batch.keys):
            number = int(key, 16)
            rows.append(row_of(text_of(tokens[slot], mask[slot]), number))
            assert close(batch.tensor(stored.SYNTHETIC_TEXT)[slot], number, "text_emb", rows[-1])
    assert set(rows) == {1, 2, 3, 4, 5}


def test_images_are_not_turned(tmp_path: Path) -> None:
    """Crops and sizes are those of the pixels as stored: neither teachers nor img2dataset turned them."""
    with ShardWriter(tmp_path / "s") as writer:
        for number in range(0, 24, 3):
            turned, held = Image.Exif(), members(number)
            turned[0x0112] = 6  # a quarter
            file = io.BytesIO()
            Image.fromarray(picture(number)).save(file, "PNG", exif=turned)
            writer.add_members(f"{number:032x}", {**held, "png": file.getvalue()})
    index_folder(tmp_path / "s", captions_choice=SYN)
    for batch in batches(tmp_path / "s", 2, "both", "default"):
        assert len(list(drawn_of(batch))) == 8


def test_a_draw_does_not_depend_on_ranks_or_a_resume(shards: Path) -> None:
    whole = batches(shards, 5, "both", "default")
    (resumed,) = batches(shards, 1, "both", "default", start=4)
    (third,) = batches(shards, 1, "both", "default", start=4, rank=1, world_size=2)
    for other, own in ((resumed, whole[4]), (third, whole[4].cut(4, 8))):
        assert other.keys == own.keys
        assert torch.equal(other.images, own.images)
        assert other.extras.keys() == own.extras.keys()
        assert all(torch.equal(other.tensor(name), own.tensor(name)) for name in own.extras)


def test_synthetic_captions_with_arrays_of_their_own(tmp_path: Path) -> None:
    """Newer sets: lists `syn_text…`, each with its rows in `LIST_emb`; `text_emb` has the own captions."""

    def newer(number: int) -> dict[str, bytes]:
        held, found = members(number), embeddings(number)
        texts = [f"synthetic {index} of picture {number}" for index in range(5)]
        lists = {"syn_text_a": ["", *texts[:2]], "syn_text_b": texts[2:]}
        stored_arrays = {
            "image_emb": found["image_emb"],
            "text_emb": found["text_emb"][:1],
            "syn_text_a_emb": np.concatenate([np.zeros_like(found["text_emb"][:1]), found["text_emb"][1:3]]),
            "syn_text_b_emb": found["text_emb"][3:],
        }
        held.pop("pth.gz", None)
        return {**held, "syn.json": json.dumps(lists).encode(), "npz": npz(stored_arrays)}

    with ShardWriter(tmp_path / "s") as writer:
        for number in range(0, 24, 3):
            writer.add_members(f"{number:032x}", newer(number))
    index_folder(tmp_path / "s", captions_choice=["syn.json:syn_text_a", "syn.json:syn_text_b"])
    rows = []
    for batch in batches(
        tmp_path / "s", 12, "both", {"syn.json:syn_text_a": 0.5, "syn.json:syn_text_b": 0.5}
    ):
        rows += [caption for _, _, caption in drawn_of(batch)]
        tokens, mask = batch.tensor(stored.TOKENS), batch.tensor(stored.MASK)
        for slot, (_, _, key) in enumerate(batch.keys):
            row = row_of(text_of(tokens[slot], mask[slot]), int(key, 16))
            assert close(batch.tensor(stored.SYNTHETIC_TEXT)[slot], int(key, 16), "text_emb", row)
    assert set(rows) == {1, 2, 3, 4, 5}


def values(number: int = 0, **changes: Any) -> dict[str, Any]:
    held = members(number)
    found: dict[str, Any] = {
        stored.ARRAYS: arrays(held["npz"]),
        stored.AUGMENTATIONS: augmentations(held["paug.json"]),
        stored.SYNTHETIC: json.loads(held["syn.json"]),
        stored.RECORD: json.loads(held["json"]),
    }
    return {**found, **changes}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v[stored.ARRAYS].pop("text_emb"), "no array text_emb"),
        (lambda v: v[stored.AUGMENTATIONS].pop(), "4 rows of image_emb for 3 augmentations"),
        (lambda v: v[stored.ARRAYS].update(image_emb=torch.zeros(4, 7)), r"shape \(4, 7\), not \(…, 12\)"),
        (lambda v: v[stored.SYNTHETIC].update(syn_text=["", " "]), "no synthetic caption"),
        (lambda v: v[stored.SYNTHETIC].update(syn_text=["a"] * 6), "no embedding for text 0 of default"),
        (lambda v: v[stored.SYNTHETIC].update(syn_text_b=[]), "no embedding for text 0 of syn.json"),
        (
            lambda v: v[stored.AUGMENTATIONS].append(
                v[stored.AUGMENTATIONS].pop()._replace(crop=(20, 0, 21, 9))
            ),
            "not inside the image of 56 x 40 pixels; original_width and original_height of its JSON: 56 x 40",
        ),
        (lambda v: v[stored.SYNTHETIC].update(syn_text=None), "no synthetic caption"),
        (lambda v: v[stored.SYNTHETIC].update(syn_text=5), "no synthetic caption"),
        (lambda v: v[stored.ARRAYS]["text_emb"][2].fill_(math.nan), "text_emb holds values that are not"),
    ],
)
def test_members_that_do_not_fit_each_other_make_a_bad_sample(
    change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    data = Data.model_validate({"train": [{"shards": "x"}], "batch_size": 1, "image": {"size": 32}})
    prepare = StoredPreparation(train_transform(data.image), TOKENIZER, Stored(widths=(WIDTH, WIDTH)))
    sample = Sample("key", "shard", b"", ["picture 0"], -1, [("default", 0)])
    pixels = torch.from_numpy(picture(0)).permute(2, 0, 1)
    prepare.check(sample, pixels, values())
    for own in ("lines", "txt", "json:captions", "json:caption"):
        prepare.check(sample._replace(origins=[(own, 0)]), pixels, values())
    for other in ("alt.json:text", "json:blip"):  # texts that the teachers did not see
        with pytest.raises(BadExtra, match=f"no embedding for text 0 of {other}"):
            prepare.check(sample._replace(origins=[(other, 0)]), pixels, values())
    changed = values()
    change(changed)
    with pytest.raises(BadExtra, match=reason):
        prepare.check(sample, pixels, changed)


def test_nothing_but_tensors_is_unpickled() -> None:
    file = io.BytesIO()
    torch.save({"image_emb": Path("x")}, file)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        arrays(gzip.compress(file.getvalue()))


@pytest.mark.parametrize("kind", ["npz", "pth.gz", "pth"])
def test_a_member_that_unpacks_to_more_than_embeddings_is_refused(kind: str) -> None:
    """A few hundred kB of zeros would otherwise take all of a worker's memory."""
    file = io.BytesIO()
    if kind == "pth.gz":
        with gzip.open(file, "wb") as packed:
            packed.write(bytes(LARGEST + 1))
    else:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": SHAPE})
        content = header.getvalue() if kind == "npz" else bytes(LARGEST + 1)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("image_emb.npy" if kind == "npz" else "archive/data.pkl", content)
    with pytest.raises(ValueError, match="unpacks to more than"):
        arrays(file.getvalue())
    repeated = io.BytesIO()
    torch.save({"image_emb": torch.zeros(1, 12).expand(10**9, 12)}, repeated)
    with pytest.raises(ValueError, match="unpacks to more than"):
        arrays(repeated.getvalue())


def test_sizes_that_cannot_be_an_images_are_not_used() -> None:
    """A JSON with a side of 0 would end the run in a division."""
    for height, width in ((0, 640), (-4, 640), (None, 640), ("480", 640), (math.nan, 640), (math.inf, 640)):
        assert stored._original_size({"original_height": height, "original_width": width}) is None
    assert stored._original_size({"original_height": 480.0, "original_width": 640}) == (480, 640)
