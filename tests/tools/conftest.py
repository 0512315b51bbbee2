"""Small data sets in the layouts in which they are published, with real images, and what is in them."""

import base64
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (20, 14)) -> bytes:
    """A small coloured image, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    return _picture


class Coco:
    """COCO's files for a few images: `ids` by split, made as zips as they are published, or extracted."""

    def __init__(self, year: str = "2017") -> None:
        self.year = year
        # not in order, as in the published files
        self.ids = {"train": [57, 9, 581921, 30, 25, 9000], "val": [139, 632, 285], "test": [1, 191]}
        self.images = {(split, i): _picture(i) for split, ids in self.ids.items() for i in ids}

    def file_name(self, split: str, number: int) -> str:
        return f"{number:012d}.jpg" if self.year == "2017" else f"COCO_{split}2014_{number:012d}.jpg"

    def captions(self, split: str, number: int) -> list[str]:
        """As they are to be read: five to seven an image; none of the test images."""
        return [] if split == "test" else [f"caption {c} of {split} {number}." for c in range(5 + number % 3)]

    def document(self, split: str) -> dict:
        images = [
            {
                "license": 4,
                "file_name": self.file_name(split, number),
                "coco_url": f"http://images.cocodataset.org/{split}{self.year}/{number:012d}.jpg",
                "height": 14,
                "width": 20,
                "date_captured": "2013-11-14 17:02:52",
                "flickr_url": f"http://farm7.staticflickr.com/{number}_z.jpg",
                "id": number,
            }
            for number in self.ids[split]
        ]
        document = {"info": {"year": int(self.year)}, "licenses": [], "images": images}
        if split != "test":
            # not grouped by image; spaces and line breaks at the ends
            pairs = [(c, number) for number in self.ids[split] for c in range(5 + number % 3)]
            document["annotations"] = [
                {"image_id": number, "id": 1000 + at, "caption": f" caption {c} of {split} {number}.\n"}
                for at, (c, number) in enumerate(sorted(pairs))
            ]
        return document

    def zips(self, folder: Path, method: int = zipfile.ZIP_STORED, texts: Mapping[str, dict] = {}) -> Path:
        """The five zips; `texts` replaces files of annotations by name."""
        folder.mkdir(parents=True, exist_ok=True)
        for split, ids in self.ids.items():
            with zipfile.ZipFile(folder / f"{split}{self.year}.zip", "w", method) as archive:
                archive.writestr(f"{split}{self.year}/", b"")
                for number in ids:
                    name = f"{split}{self.year}/{self.file_name(split, number)}"
                    archive.writestr(name, self.images[split, number])
        for zipped, names in {
            f"annotations_trainval{self.year}.zip": [
                f"{what}_{split}{self.year}.json"
                for split in ("train", "val")
                for what in ("captions", "instances", "person_keypoints")
            ],
            f"image_info_test{self.year}.zip": [
                f"image_info_test{self.year}.json",
                f"image_info_test-dev{self.year}.json",
            ],
        }.items():
            with zipfile.ZipFile(folder / zipped, "w", zipfile.ZIP_DEFLATED) as archive:
                for name in names:
                    split = next(split for split in self.ids if split in name)
                    archive.writestr(f"annotations/{name}", json.dumps(texts.get(name, self.document(split))))
        return folder

    def karpathy(self) -> dict:
        """dataset_coco.json over the images of train and val."""
        splits = {57: "train", 9: "restval", 581921: "train", 30: "val", 139: "test", 632: "restval"}
        return {
            "dataset": "coco",
            "images": [
                {
                    "filepath": f"{part}2014",
                    "filename": f"COCO_{part}2014_{number:012d}.jpg",
                    "cocoid": number,
                    "imgid": at,
                    "split": split,
                    "sentids": [at],
                    "sentences": [{"raw": f"Said of {number}. ", "tokens": [], "imgid": at, "sentid": at}],
                }
                for at, (number, split) in enumerate(splits.items())
                for part in ["train" if number in self.ids["train"] else "val"]
            ],
        }


@pytest.fixture(scope="session")
def coco() -> Coco:
    return Coco()


@pytest.fixture(scope="session")
def coco_of_2014() -> Coco:
    return Coco("2014")


class ChineseClip:
    """A split of Chinese-CLIP's format: images by id, texts as (text_id, text, image_ids)."""

    def __init__(self) -> None:
        kinds = {7: "JPEG", 12: "PNG", 1031: "GIF", 3: "WEBP"}
        self.images = {number: _picture(number, kind) for number, kind in kinds.items()}
        self.texts = [
            (8, "“红色”的 连衣裙 Dress", [12, 7]),
            (3, "两只猫\n在睡觉", [7]),
            (1, "没有图片", []),
            (11, "一杯咖啡 ", [1031]),
        ]

    def captions(self, image: int) -> list[tuple[int, str]]:
        """(text_id, text) of an image in file order; of image 3 there is none."""
        return [(number, text) for number, text, images in self.texts if image in images]

    def files(self, folder: Path, split: str) -> Path:
        """`{split}_imgs.tsv` and `{split}_texts.jsonl`."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = (f"{n}\t{base64.b64encode(data).decode()}\n" for n, data in self.images.items())
        (folder / f"{split}_imgs.tsv").write_text("".join(lines))
        texts = (
            json.dumps({"text_id": n, "text": text, "image_ids": images}, ensure_ascii=n == 3) + "\n"
            for n, text, images in self.texts
        )
        (folder / f"{split}_texts.jsonl").write_text("".join(texts), encoding="utf-8")
        return folder

    def lmdb(self, folder: Path, split: str) -> Path:
        """`lmdb/{split}/imgs` and `pairs`, as its build_lmdb_dataset.py writes them."""
        import lmdb

        for name in ("imgs", "pairs"):
            (folder / "lmdb" / split / name).mkdir(parents=True)
        pairs = [(image, n, text) for n, text, images in self.texts for image in images]
        with (
            lmdb.open(str(folder / "lmdb" / split / "pairs"), map_size=1 << 24) as env,
            env.begin(write=True) as txn,
        ):
            for at, pair in enumerate(pairs):
                txn.put(str(at).encode(), pickle.dumps(pair))
            txn.put(b"num_samples", str(len(pairs)).encode())
        with (
            lmdb.open(str(folder / "lmdb" / split / "imgs"), map_size=1 << 24) as env,
            env.begin(write=True) as txn,
        ):
            for number, data in self.images.items():
                txn.put(str(number).encode(), base64.b64encode(data))
            txn.put(b"num_images", str(len(self.images)).encode())
        return folder


@pytest.fixture(scope="session")
def chinese_clip() -> ChineseClip:
    return ChineseClip()
