"""DataCompDR: stored embeddings, synthetic captions and augmentations, joined with the images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.img2dataset import find_parts, input_of
from tools.convert.readers.sample_choice import first_of_each, labels_of, uid_label
from tools.convert.readers.sample_members import record_of, uid_of
from tools.convert.readers.tar_samples import TarSamples
from tools.convert.records import Kind, Record, Source, option

_HASH = 8  # bytes of a sha256 that are compared
_NOT_JOINED = ("json", "url.txt")  # what the image's own json says already


@dataclass(frozen=True)
class Options:
    """The options of `convert datacompdr`."""

    same_hash: bool = option(
        False,
        "Leave out images whose sha256 is not that of the image that was reinforced (changed on the web).",
    )


class Joined:
    """Reinforcements with their images as one split, in the order of the reinforcements."""

    name = ""
    files: Mapping[str, str] = {}

    def __init__(self, images: TarSamples, reinforcements: TarSamples, pairs: np.ndarray) -> None:
        self._images, self._reinforcements, self._pairs = images, reinforcements, pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def sizes(self) -> np.ndarray:
        """Image and reinforcement together: the embeddings are the larger part."""
        image, reinforcement = self._pairs.T
        stored = self._reinforcements.ends[reinforcement] - self._reinforcements.starts[reinforcement]
        return self._images.image_bytes[image] + stored

    def read(self, number: int) -> Record:
        image, reinforcement = (int(value) for value in self._pairs[number])
        name, stored = self._reinforcements.read(reinforcement)
        uid = uid_of(name, None if "json" not in stored else lambda: stored["json"])
        record = record_of(uid.hex() if uid else name, self._images.read(image)[1])
        fields = dict(record.fields)
        if "url.txt" in stored:
            fields.setdefault("url", stored["url.txt"].decode("utf-8", "replace").strip())
        fields["uid"] = record.key
        members = {name: data for name, data in stored.items() if name not in _NOT_JOINED}
        return record._replace(fields=fields, members={**record.members, **members})


def open_joined(inputs: Sequence[Path], options: Options) -> Source:
    """Opens a folder of image tars and one of reinforcement tars, and joins them by uid.

    UserError: not two folders, no reinforcements in the second, nothing to join.
    """
    if len(inputs) != 2:
        raise UserError(
            f"datacompdr takes two folders, the images' and the reinforcements', and {len(inputs)} were given"
        )
    paths = [find_parts(folder) for folder in inputs]
    images = TarSamples(paths[0], label=_label)
    reinforcements = TarSamples(paths[1], label=_label, images=False)
    for samples, folder in ((images, inputs[0]), (reinforcements, inputs[1])):
        if len(samples) == 0:
            raise UserError(f"{folder}: no {'image' if samples is images else 'sample'} in its tars")
    if not {"npz", "pth.gz", "syn.json", "paug.json"} & set(reinforcements.read(0)[1]):
        raise UserError(
            f"{inputs[1]}: no reinforcements (npz or pth.gz, syn.json, paug.json) in its tars; give the "
            "images' folder first, the reinforcements' second"
        )
    pairs, notes = _join(images, reinforcements, options.same_hash)
    if len(pairs) == 0:
        raise UserError(f"{inputs[0]} and {inputs[1]} have no uid in common; {'; '.join(notes)}")
    files = [input_of(path) for path in (*paths[0], *paths[1])]
    notes = [*images.broken, *reinforcements.broken, *notes]
    images.forget()
    reinforcements.forget()
    return Source([Joined(images, reinforcements, pairs)], files, notes)


def _join(images: TarSamples, reinforcements: TarSamples, same_hash: bool) -> tuple[np.ndarray, list[str]]:
    """Numbers of image and reinforcement, (n, 2), and what is to be said.

    An image of the same shard number comes before one of another shard with the same uid.
    """
    image_uids, with_uid = labels_of(images)
    uid, known = labels_of(reinforcements)
    order = np.argsort(image_uids, kind="stable")
    order = order[with_uid[order]]
    ordered = image_uids[order]
    left, right = (np.searchsorted(ordered, uid, side=side) for side in ("left", "right"))
    usable = (left < right) & known
    usable[np.flatnonzero(usable)] = first_of_each(uid[usable])
    chosen = left.copy()
    numbers, wanted = _shard_numbers(images), _shard_numbers(reinforcements)
    for row in np.flatnonzero(usable & (right - left > 1)):
        same = np.flatnonzero(numbers[order[left[row] : right[row]]] == wanted[row])
        chosen[row] += same[0] if len(same) else 0
    rows = np.flatnonzero(usable)
    pairs = np.stack([order[chosen[rows]], rows], axis=1) if len(rows) else np.zeros((0, 2), np.int64)
    hashes = _hashes(images, pairs[:, 0]), _hashes(reinforcements, pairs[:, 1])
    other = (hashes[0] != hashes[1]) & (hashes[0] != b"") & (hashes[1] != b"")
    missing = int((known & (left == right)).sum())
    repeated = len(uid) - missing - len(rows)
    spare = len(images) - len(np.unique(pairs[:, 0]))
    notes = _notes(len(pairs), missing, repeated, spare, int(other.sum()), same_hash)
    return (pairs[~other] if same_hash else pairs), notes


def _notes(joined: int, missing: int, repeated: int, spare: int, other: int, same_hash: bool) -> list[str]:
    notes = [f"{joined:,} of {joined + missing + repeated:,} reinforcements have their image"]
    if missing:
        notes.append(f"{missing:,} reinforcements have no image, and are left out")
    if repeated:
        notes.append(f"{repeated:,} reinforcements have no uid, or one that came before, and are left out")
    if spare:
        notes.append(f"{spare:,} images have no reinforcement of their own, and are left out")
    if other:
        done = "are left out" if same_hash else "are taken all the same; --same-hash leaves them out"
        notes.append(f"{other:,} images have another sha256 than the one that was reinforced, and {done}")
    return notes


def _label(key: str, read_json: Any) -> bytes:
    """The label of the uid, and the beginning of the sha256 that the json gives (zeros: none)."""
    data = read_json() if read_json is not None else b"{}"
    try:
        sha256 = bytes.fromhex(json.loads(data).get("sha256") or "")[:_HASH]
    except (ValueError, AttributeError, TypeError, RecursionError):
        sha256 = b""
    return uid_label(key, None if read_json is None else lambda: data) + sha256.ljust(_HASH, b"\0")


def _hashes(samples: TarSamples, numbers: np.ndarray) -> np.ndarray:
    if samples.labels is None:
        raise ValueError("without labels")
    return np.ascontiguousarray(samples.labels[numbers, -_HASH:]).view(f"S{_HASH}").ravel()


def _shard_numbers(samples: TarSamples) -> np.ndarray:
    """The number in the name of each sample's shard, (n,); -1 if the name is no number."""
    stems = [path.name.removesuffix(".tar") for path in samples.paths]
    numbers = np.array([int(stem) if stem.isdecimal() and len(stem) < 18 else -1 for stem in stems], np.int64)
    return numbers[samples.shards]


KIND = Kind(
    "DataCompDR's reinforcements joined with the images by uid",
    open_joined,
    inputs="Two folders of tars: the images (img2dataset's or DataComp's), then the reinforcements.",
    options=Options,
)
