"""Small datasets in the layouts in which they are published, with real images, and what is in them."""

import base64
import gzip
import hashlib
import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def _picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (20, 14)) -> bytes:
    """A small coloured image, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


_inherited: list[Any] = []


def _of_inherited(act: Callable[[Any, int], Any], number: int) -> Any:
    return act(_inherited[-1], number)


@pytest.fixture(scope="session")
def in_others() -> Callable[..., list[Any]]:
    """in_others(act, split, numbers): act(split, number) in forked processes."""

    def run(act: Callable[[Any, int], Any], split: Any, numbers: Iterable[int]) -> list[Any]:
        with get_context("fork").Pool(2, _inherited.append, (split,)) as pool:
            return pool.starmap(_of_inherited, [(act, number) for number in numbers])

    return run


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
                "flickr_url": f"http://live.staticflickr.com/{number}_z.jpg",
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


class ClipBenchmark:
    """CLIP_benchmark's WebDataset folders: `classification` (cls) and `retrieval` (txt, a caption a line)."""

    classnames = ("cat", "dog", "sea lion")
    templates = ("a photo of a {c}.", "a drawing of a {c}.")

    def captions(self, number: int) -> list[str]:
        return [f"caption {c} of {number}" for c in range(1 + number % 5)]

    def classification(self, root: Path, samples: int = 24, shards: int = 11) -> Path:
        """`train/0.tar` … `train/10.tar` and `test`, names beside them; no dataset_type.txt."""
        for split in ("train", "test"):
            self._tars(root / split, samples, shards, lambda number: {"cls": str(number % 3)})
        (root / "classnames.txt").write_text("\n".join(self.classnames))
        (root / "zeroshot_classification_templates.txt").write_text("\n".join(self.templates))
        return root

    def retrieval(self, root: Path, samples: int = 12) -> Path:
        self._tars(root / "test", samples, 2, lambda number: {"txt": "\n".join(self.captions(number))})
        (root / "dataset_type.txt").write_text("retrieval")
        return root

    def _tars(self, folder: Path, samples: int, shards: int, members: Callable[[int], dict]) -> None:
        import webdataset

        folder.mkdir(parents=True)
        for shard in range(shards):
            with webdataset.TarWriter(str(folder / f"{shard}.tar")) as tar:
                for number in range(shard * samples // shards, (shard + 1) * samples // shards):
                    tar.write(
                        {"__key__": f"s{number:07d}", "webp": _picture(number, "WEBP"), **members(number)}
                    )
        (folder / "nshards.txt").write_text(str(shards))


@pytest.fixture(scope="session")
def clip_benchmark() -> ClipBenchmark:
    return ClipBenchmark()


@pytest.fixture(scope="session")
def timm_imagenet() -> Callable[[Path], Path]:
    """timm_imagenet(folder): as timm publishes it, two shards of five to train, one of four to validate."""

    def make(folder: Path) -> Path:
        import webdataset

        folder.mkdir(parents=True)
        info: dict = {"name": "imagenet1k", "splits": {}}
        for split, shards, per_shard in (("train", 2, 5), ("validation", 1, 4)):
            names = [f"imagenet1k-{split}-{shard:04d}.tar" for shard in range(shards)]
            for shard, name in enumerate(names):
                with webdataset.TarWriter(str(folder / name)) as tar:
                    for number in range(shard * per_shard, (shard + 1) * per_shard):
                        key = (
                            f"n{number % 3:08d}_{number}"
                            if split == "train"
                            else f"ILSVRC2012_val_{number:08d}"
                        )
                        meta = {"label": number % 3, "width": 20, "height": 14, "filename": f"{key}.JPEG"}
                        tar.write({"__key__": key, "jpg": _picture(number), "cls": number % 3, "json": meta})
            info["splits"][split] = {
                "name": split,
                "num_samples": shards * per_shard,
                "filenames": names,
                "shard_lengths": [per_shard] * shards,
            }
        (folder / "_info.json").write_text(json.dumps(info))
        return folder

    return make


def _uid(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()


class Downloads:
    """What img2dataset 1.47 leaves: NAME.tar, NAME.parquet with the failures too, NAME_stats.json.

    Of eight rows the fourth and the sixth fail, and the second has no caption.
    """

    failures = {  # noqa: RUF012
        3: ("failed_to_download", "HTTP Error 404: Not Found"),
        5: ("failed_to_resize", "Image decoding error"),
    }
    picture = staticmethod(_picture)
    uid = staticmethod(_uid)

    def row(self, number: int, key: str) -> dict[str, Any]:
        """A row of the parquet; the json of a sample that was downloaded."""
        status, error = self.failures.get(number % 8, ("success", None))
        good = status == "success"
        return {
            "uid": _uid(number),
            "caption": None if number % 8 == 1 else f"caption {number}\nsecond line",
            "url": f"http://127.0.0.1/{number}.jpg",
            "key": key,
            "status": status,
            "error_message": error,
            "width": 20 if good else None,
            "height": 14 if good else None,
            "original_width": 40 if good else None,
            "original_height": 28 if good else None,
            "exif": "{}" if good else None,
            "sha256": hashlib.sha256(_picture(number)).hexdigest() if good else None,
        }

    def make(self, folder: Path, shards: int = 2, rows: int = 8, first: int = 0) -> Path:
        """Numbers `first` and on, each shard in the order in which its downloads happened to end."""
        folder.mkdir(parents=True)
        for shard in range(shards):
            records = [self.row(first + shard * rows + row, f"{shard:05d}{row:04d}") for row in range(rows)]
            random.Random(shard).shuffle(records)
            self._shard(folder / f"{shard:05d}", records)
        return folder

    def _shard(self, path: Path, records: list[dict[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        import webdataset

        with webdataset.TarWriter(f"{path}.tar") as tar:
            for record in records:
                if record["status"] == "success":
                    number = int(Path(record["url"]).stem)
                    texts = {"txt": record["caption"] or "", "json": json.dumps(record, indent=4)}
                    tar.write({"__key__": record["key"], "jpg": _picture(number), **texts})
        schema = pa.schema(
            [
                (name, pa.int32() if "width" in name or "height" in name else pa.string())
                for name in records[0]
            ]
        )
        pq.write_table(pa.Table.from_pylist(records, schema), f"{path}.parquet", row_group_size=5)
        statuses = [record["status"] for record in records]
        stats = {"count": len(records), "successes": statuses.count("success")}
        path.with_name(f"{path.name}_stats.json").write_text(json.dumps(stats))


@pytest.fixture(scope="session")
def downloads() -> Downloads:
    return Downloads()


class DataCompDR:
    """DataComp's pool of images, and the reinforcements of other numbers, joined by uid."""

    uid = staticmethod(_uid)
    picture = staticmethod(_picture)

    def sha256(self, number: int) -> str:
        return hashlib.sha256(_picture(number)).hexdigest()

    def images(self, folder: Path, shards: dict[int, list[int]], **changed: Any) -> Path:
        """As img2dataset downloads DataComp's pools: keys of 12 digits, the uid in the json."""
        import webdataset

        folder.mkdir(parents=True)
        for shard, numbers in shards.items():
            with webdataset.TarWriter(str(folder / f"{shard:08d}.tar")) as tar:
                for row, number in enumerate(numbers):
                    meta = {
                        "uid": _uid(number),
                        "caption": f"caption {number}",
                        "url": f"http://127.0.0.1/{number}",
                        "key": f"{shard:08d}{row:04d}",
                        "width": 20,
                        "sha256": self.sha256(number),
                        **changed,
                    }
                    texts = {"txt": f"caption {number}", "json": json.dumps(meta, indent=4)}
                    tar.write({"__key__": meta["key"], "jpg": _picture(number), **texts})
        return folder

    def members(self, number: int, edition: str = "npz") -> dict[str, bytes]:
        """What is stored of an image, with the teachers' embeddings in either edition's file."""
        box = [[1.5, 2.5, 8.0, 8.0], [[6, 0.27], [0, 0.0]]]
        return {
            "syn.json": json.dumps({"syn_text": [f"synthetic {i} of {number}" for i in range(5)]}).encode(),
            "paug.json": json.dumps({"param_aug": [box] * 3}).encode(),
            edition: self._embeddings(number, edition),
        }

    def _embeddings(self, number: int, edition: str) -> bytes:
        arrays = {"image_emb": np.full((3, 8), number, np.float32), "text_emb": np.ones((6, 8), np.float32)}
        file = io.BytesIO()
        if edition == "npz":
            np.savez(file, **arrays)
            return file.getvalue()
        import torch

        torch.save({name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}, file)
        return gzip.compress(file.getvalue(), mtime=0)

    def reinforcements(self, folder: Path, shards: dict[int, list[int]], edition: str = "npz") -> Path:
        """DataCompDR's tars: key = uid, neither images nor captions."""
        import webdataset

        folder.mkdir(parents=True)
        for shard, numbers in shards.items():
            with webdataset.TarWriter(str(folder / f"{shard:08d}.tar"), encoder=False) as tar:
                for number in numbers:
                    meta = {"uid": _uid(number), "sha256": self.sha256(number)}
                    tar.write(
                        {
                            "__key__": _uid(number),
                            "url.txt": f"http://elsewhere/{number}".encode(),
                            "json": json.dumps(meta).encode(),
                            **self.members(number, edition),
                        }
                    )
        return folder


@pytest.fixture(scope="session")
def datacompdr() -> DataCompDR:
    return DataCompDR()
