"""DataCompDR: stored embeddings, synthetic captions and augmentations, joined with the images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.img2dataset import find_parts, input_of
from tools.convert.readers.sample_choice import NBYTES, first_of_each, uid_label, uid_of
from tools.convert.readers.tar_samples import TarSamples, record_of
from tools.convert.records import Kind, Record, Source, Split, option

_UID = NBYTES + 1  # bytes of a uid's label
_HASH = 8  # bytes of a sha256 that are compared
_NOT_JOINED = ("json", "url.txt")  # what the image's own json says already


@dataclass(frozen=True)
class Options:
    """The options of `convert datacompdr`."""

    same_hash: bool = option(
        False,
        "Leave out images whose sha256 is not that of the image that was reinforced (changed on the web).",
    )


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
    notes = [*images.notes, *reinforcements.notes, *notes]
    images.forget()
    reinforcements.forget()

    def sizes() -> np.ndarray:
        """Image and reinforcement together: the embeddings are the larger part."""
        image, reinforcement = pairs.T
        stored = reinforcements.ends[reinforcement] - reinforcements.starts[reinforcement]
        return np.asarray(images.image_bytes[image] + stored)

    def read(number: int) -> Record:
        image, reinforcement = pairs[number].tolist()
        name, stored = reinforcements.read(reinforcement)
        uid = uid_of(name, stored.get("json"))
        record = record_of(uid.hex() if uid else name, images.read(image)[1])
        fields = dict(record.fields)
        if "url.txt" in stored:
            fields.setdefault("url", stored["url.txt"].decode("utf-8", "replace").strip())
        fields["uid"] = record.key
        members = {name: data for name, data in stored.items() if name not in _NOT_JOINED}
        return record._replace(fields=fields, members={**record.members, **members})

    files = [input_of(path) for path in (*paths[0], *paths[1])]
    return Source([Split("", len(pairs), sizes, read)], files, notes)


def _join(images: TarSamples, reinforcements: TarSamples, same_hash: bool) -> tuple[np.ndarray, list[str]]:
    """Numbers of image and reinforcement, (n, 2) in the order of these, and what is to be said.

    An image of the same shard number comes before one of another shard with the same uid.
    """
    image_uids, image_hashes = _uids_and_hashes(images)
    uids, hashes = _uids_and_hashes(reinforcements)
    order = np.argsort(image_uids, kind="stable")
    left, right = (np.searchsorted(image_uids[order], uids, side=side) for side in ("left", "right"))
    missing = int(((left == right) & (uids != b"")).sum())
    rows = np.flatnonzero((left < right) & (uids != b"") & first_of_each(uids))
    chosen = left[rows]
    numbers, wanted = _shard_numbers(images), _shard_numbers(reinforcements)
    for at in np.flatnonzero(right[rows] - chosen > 1):
        row = rows[at]
        same = np.flatnonzero(numbers[order[left[row] : right[row]]] == wanted[row])
        chosen[at] += same[0] if len(same) else 0
    pairs = np.stack([order[chosen], rows], axis=1)
    ours, theirs = image_hashes[pairs[:, 0]], hashes[rows]
    other = (ours != theirs) & (ours != b"") & (theirs != b"")
    done = "are left out" if same_hash else "are taken all the same; --same-hash leaves them out"
    repeated = len(uids) - missing - len(rows)
    spare = len(images) - len(np.unique(pairs[:, 0]))
    counted = (
        (missing, "reinforcements have no image, and are left out"),
        (repeated, "reinforcements have no uid, or one that came before, and are left out"),
        (spare, "images have no reinforcement of their own, and are left out"),
        (other.sum(), f"images have another sha256 than the one that was reinforced, and {done}"),
    )
    notes = [f"{len(pairs):,} of {len(uids):,} reinforcements have their image"]
    notes += [f"{count:,} {words}" for count, words in counted if count]
    return (pairs[~other] if same_hash else pairs), notes


def _label(key: str, data: bytes | None) -> bytes:
    """The label of the uid, and the beginning of the sha256 that the json gives; zeros: none."""
    try:
        sha256 = bytes.fromhex(json.loads(data or b"").get("sha256") or "")[:_HASH]
    except (ValueError, AttributeError, TypeError, RecursionError):
        sha256 = b""
    return uid_label(key, data).ljust(_UID, b"\0") + sha256


def _uids_and_hashes(samples: TarSamples) -> tuple[np.ndarray, np.ndarray]:
    """The two parts of the labels, (n,) each; an empty one: none."""
    table = samples.labels.astype(f"S{_UID + _HASH}").view(np.uint8).reshape(-1, _UID + _HASH)
    uids, hashes = (np.ascontiguousarray(part) for part in np.split(table, [_UID], axis=1))
    return uids.view(f"S{_UID}").ravel(), hashes.view(f"S{_HASH}").ravel()


def _shard_numbers(samples: TarSamples) -> np.ndarray:
    """The number in the name of each sample's shard, (n,); -1 if the name is no number."""
    stems = [path.name.removesuffix(".tar") for path in samples.paths]
    numbers = np.array([int(stem) if stem.isdecimal() and len(stem) < 18 else -1 for stem in stems], np.int64)
    return np.asarray(numbers[samples.shards])


KIND = Kind(
    "DataCompDR's reinforcements, joined with the images by uid.",
    open_joined,
    inputs="Two folders of tars: the images (img2dataset's or DataComp's), then the reinforcements.",
    options=Options,
)
