"""Tars that any program wrote in WebDataset's layout: CLIP_benchmark's folders, timm's ImageNet, others.

They can be trained on where they lie. A conversion makes shards of one size of them, takes a folder of
several splits at once, and can make captions of class names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from clipcluster.data.shards import captions
from clipcluster.data.shards.captions import CLASS_NAMES, TEMPLATES, class_names, templates
from clipcluster.errors import UserError
from tools.convert.readers.folder import class_captions
from tools.convert.readers.sample_choice import all_or_once
from tools.convert.readers.tar_samples import TarSamples, tars_of
from tools.convert.records import BadRecord, InputFile, Kind, Record, Source, Split, option

_INFO = ("_info.json", "info.json")  # timm's list of splits


@dataclass(frozen=True)
class Options:
    """The options of `convert webdataset`."""

    classnames: Path | None = option(
        None, "Names of the classes, one per line. Default: classnames.txt, if it is there.", metavar="FILE"
    )
    template: tuple[str, ...] = option(
        (),
        "A caption with {c} for the class name, for samples without a caption; may be repeated.",
        metavar="TEXT",
    )
    class_field: str | None = option(
        None,
        "Take the class from this field of the json; samples below 0 are left out. Default: cls.",
        metavar="FIELD",
    )
    caption_field: str | None = option(
        None, "Take the captions from this field of the json. Default: txt, else the json's.", metavar="FIELD"
    )


def open_tars(inputs: Sequence[Path], options: Options) -> Source:
    """Opens folders of tars. One with train, test and so on below it, or with timm's list of splits, becomes
    as many splits.

    UserError: no tars, a listed tar that is not there, templates without names of classes.
    """
    parts: dict[str, list[Path]] = {}
    for given in inputs:
        for name, paths in _splits(given).items():
            parts.setdefault(name, []).extend(paths)
    if len(parts) > 1 and "" in parts:
        raise UserError("some inputs have splits below them and some have none; convert them one by one")
    notes: list[str] = []
    splits = [_split(name, paths, options, notes) for name, paths in parts.items()]
    files = [InputFile.of(path) for paths in parts.values() for path in paths]
    files += [InputFile.of(options.classnames)] if options.classnames else []
    return Source(splits, files, notes)


def _split(name: str, paths: Sequence[Path], options: Options, notes: list[str]) -> Split:
    folder = paths[0].parent
    samples = TarSamples(paths)
    chosen = all_or_once(samples, None)
    if len(samples) == 0:
        raise UserError(f"{folder}: no sample with an image in its tars")
    samples.forget()
    notes += [f"{name}: {note}" if name else note for note in (*samples.notes, *chosen.notes)]
    names = _beside(folder, CLASS_NAMES, class_names, options.classnames)
    captions_of = class_captions(names, options.template)
    if options.template and not names:
        raise UserError(f"--template: no {CLASS_NAMES} in {folder} or above it; give --classnames FILE")
    lines = options.caption_field is None and captions.choice_for(folder, None) == captions.LINES

    def read(number: int) -> Record:
        record = chosen.read(number, options.caption_field)
        cls = record.cls if options.class_field is None else _class(record, options.class_field)
        texts = list(record.captions)
        if lines:  # each line of txt is a caption
            texts = [line for text in texts for line in text.splitlines() if line.strip()]
        if not texts and names and cls is not None:
            if cls >= len(names):
                raise BadRecord(record.key, f"class {cls}, and there are {len(names)} names of classes")
            texts = captions_of[cls]
        return record._replace(captions=texts, cls=cls)

    found = {CLASS_NAMES: names, TEMPLATES: _beside(folder, TEMPLATES, templates)}
    files = {file: "".join(f"{text}\n" for text in texts) for file, texts in found.items() if texts}
    return Split(name, len(chosen.numbers), chosen.sizes, read, files)


def _class(record: Record, field: str) -> int:
    value = record.fields.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadRecord(record.key, f"no class in its json: {field} is {value!r}")
    return value


def _beside(
    folder: Path, name: str, parse: Callable[[bytes, object], list[str]], given: Path | None = None
) -> list[str]:
    """The lines of a file beside the tars or in the folder above; none if there is no such file."""
    for path in (given,) if given else (folder / name, folder.parent / name):
        if path.is_file():
            return parse(path.read_bytes(), path)
    if given:
        raise UserError(f"{given}: no such file; give the names of the classes, one per line")
    return []


def _splits(given: Path) -> dict[str, list[Path]]:
    """The tars of an input by split, in the order of their names."""
    if given.is_file() and given.suffix == ".tar":
        return {"": [given]}
    if not given.is_dir():
        raise UserError(
            f"{given}: no such folder; give a folder of tars, or of train, test and so on with tars"
        )
    tars = tars_of(given)
    if tars:
        infos = [given / name for name in _INFO if (given / name).is_file()]
        return (_listed(infos[0]) if infos else {}) or {"": tars}
    below = {path.name: tars_of(path) for path in sorted(given.iterdir()) if path.is_dir()}
    splits = {name: paths for name, paths in below.items() if paths and not name.startswith(".")}
    if not splits:
        raise UserError(f"{given}: no .tar in this folder, nor in the folders below it")
    return splits


def _listed(info: Path) -> dict[str, list[Path]]:
    """The splits that timm's list names, as far as they are there. UserError: some tars of one are not."""
    try:
        document: Any = json.loads(info.read_bytes())
        listed = {
            str(name): [info.parent / file for file in split["filenames"]]
            for name, split in document["splits"].items()
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    there = {name: paths for name, paths in listed.items() if any(path.is_file() for path in paths)}
    for path in chain.from_iterable(there.values()):
        if not path.is_file():
            raise UserError(
                f"{path} is not there, and {info} lists it; download it, or give the tars one by one"
            )
    return there


KIND = Kind(
    "Tars of any program: CLIP_benchmark's folders, timm's ImageNet.",
    open_tars,
    inputs="Folders of tars, or of train, test and so on with tars.",
    options=Options,
    takes_all_below=True,
)
