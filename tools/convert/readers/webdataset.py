"""Tars that any program wrote in WebDataset's layout: CLIP_benchmark's folders, timm's ImageNet, others.

They can be trained on where they lie. A conversion makes shards of one size of them, takes a folder of
several splits at once, and can make captions of class names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.data.shards import captions
from clipcluster.data.shards.texts import CLASS_NAMES, TEMPLATES, class_names, templates
from clipcluster.errors import UserError
from tools.convert.readers.sample_choice import Chosen, ChosenSplit, all_or_once
from tools.convert.readers.tar_samples import TarSamples
from tools.convert.records import BadRecord, InputFile, Kind, Record, Source, option

_INFO = ("_info.json", "info.json")  # timm's list of splits


@dataclass(frozen=True)
class Options:
    """The options of `convert webdataset`."""

    classnames: Path | None = option(
        None, "Names of the classes, one a line. Default: classnames.txt, if it is there.", metavar="FILE"
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


class Tars(ChosenSplit):
    """The samples of some tars, as one split. `lines`: each line of txt is a caption."""

    def __init__(
        self,
        name: str,
        files: Mapping[str, str],
        samples: TarSamples,
        chosen: Chosen,
        options: Options,
        lines: bool,
    ) -> None:
        super().__init__(samples, chosen, options.caption_field, name, files)
        self._options, self._lines = options, lines and options.caption_field is None
        names = files.get(CLASS_NAMES, "").split("\n")[:-1]
        self._captions = [[text.replace("{c}", name) for text in options.template] for name in names]

    def read(self, number: int) -> Record:
        record = super().read(number)
        cls = record.cls if self._options.class_field is None else self._class(record)
        texts = list(record.captions)
        if self._lines:
            texts = [line for text in texts for line in text.splitlines() if line.strip()]
        if not texts and self._captions and cls is not None:
            if cls >= len(self._captions):
                raise BadRecord(
                    record.key, f"class {cls}, and there are {len(self._captions)} names of classes"
                )
            texts = self._captions[cls]
        return record._replace(captions=texts, cls=cls)

    def _class(self, record: Record) -> int:
        value = record.fields.get(self._options.class_field or "")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise BadRecord(record.key, f"no class in its json: {self._options.class_field} is {value!r}")
        return value


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


def _split(name: str, paths: Sequence[Path], options: Options, notes: list[str]) -> Tars:
    samples = TarSamples(paths)
    chosen, more = all_or_once(samples, None)
    if len(samples) == 0:
        raise UserError(f"{paths[0].parent}: no sample with an image in its tars")
    samples.forget()
    where = f"{name}: " if name else ""
    notes += [where + note for note in (*samples.broken, *more)]
    if samples.without_image:
        notes.append(f"{where}{samples.without_image:,} samples without an image are left out")
    folder = paths[0].parent
    files = {
        CLASS_NAMES: _beside(folder, CLASS_NAMES, options.classnames),
        TEMPLATES: _beside(folder, TEMPLATES),
    }
    for template in options.template:
        if "{c}" not in template or "\n" in template:
            raise UserError(f"--template {template!r}: a template is one line with {{c}} for the class name")
    if options.template and not files[CLASS_NAMES]:
        raise UserError(f"--template: no {CLASS_NAMES} in {folder} or above it; give --classnames FILE")
    lines = captions.choice_for(folder, None) == captions.LINES
    return Tars(name, {file: text for file, text in files.items() if text}, samples, chosen, options, lines)


def _beside(folder: Path, name: str, given: Path | None = None) -> str:
    """The lines of a file beside the tars or in the folder above, one name a line; empty if there is none."""
    places = (given,) if given else (folder / name, folder.parent / name)
    for path in places:
        if path.is_file():
            lines = class_names if name == CLASS_NAMES else templates
            return "".join(f"{line}\n" for line in lines(path.read_bytes(), path))
    if given:
        raise UserError(f"{given}: no such file; give the names of the classes, one a line")
    return ""


def _splits(given: Path) -> dict[str, list[Path]]:
    """The tars of an input by split, in the order of their names."""
    if given.is_file() and given.suffix == ".tar":
        return {"": [given]}
    if not given.is_dir():
        raise UserError(
            f"{given}: no such folder; give a folder of tars, or of train, test and so on with tars"
        )
    tars = _tars(given)
    listed = next((_listed(given / name) for name in _INFO if (given / name).is_file()), None)
    if tars and listed:
        return listed
    if tars:
        return {"": tars}
    below = {path.name: _tars(path) for path in sorted(given.iterdir()) if path.is_dir()}
    splits = {name: paths for name, paths in below.items() if paths and not name.startswith(".")}
    if not splits:
        raise UserError(f"{given}: no .tar in this folder, nor in the folders below it")
    return splits


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _listed(info: Path) -> dict[str, list[Path]] | None:
    """The splits that timm's list names; None if it names none. UserError: a tar is not there."""
    try:
        document: Any = json.loads(info.read_bytes())
        names = {str(name): list(split["filenames"]) for name, split in document["splits"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    splits = {name: [info.parent / file for file in files] for name, files in names.items() if files}
    there = {name: paths for name, paths in splits.items() if any(path.is_file() for path in paths)}
    for paths in there.values():
        for path in paths:
            if not path.is_file():
                raise UserError(
                    f"{path} is not there, and {info} lists it; download it, or give the tars one by one"
                )
    return there or None


KIND = Kind(
    "tars of any program: CLIP_benchmark's folders, timm's ImageNet",
    open_tars,
    inputs="Folders of tars, or of train, test and so on with tars.",
    options=Options,
    takes_all_below=True,
)
