"""img2dataset's downloads and DataComp's pools: NAME.tar (or NAME/), NAME.parquet, NAME_stats.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.parquet import column_of
from tools.convert.readers.sample_choice import all_or_once, by_uids, field_label, uid_label
from tools.convert.readers.tar_samples import TarSamples, tars_of
from tools.convert.records import InputFile, Kind, Source, Split, option


@dataclass(frozen=True)
class Options:
    """The options of `convert img2dataset`."""

    uids: Path | None = option(
        None,
        "Take only these uids (DataComp's .npy, the same as raw bytes, or text); repeats repeat.",
        metavar="FILE",
    )
    once: str | None = option(
        None, "Of samples that agree in this field of the json take the first.", metavar="FIELD"
    )
    caption_field: str | None = option(
        None, "Take the captions from this field of the json. Default: txt, else the json's.", metavar="FIELD"
    )


def open_downloads(inputs: Sequence[Path], options: Options) -> Source:
    """Opens folders of downloads as one split. UserError: none there, a broken uid file, no sample left."""
    paths = [path for folder in inputs for path in find_parts(folder)]
    if options.uids and options.once:
        raise UserError(
            "--uids takes each uid once already, or as often as its file says; do not give --once"
        )
    label = uid_label if options.uids else partial(field_label, options.once) if options.once else None
    samples = TarSamples(paths, label=label)
    chosen = by_uids(samples, options.uids) if options.uids else all_or_once(samples, options.once)
    notes = [*samples.notes, *failures(paths, samples), *chosen.notes]
    if len(chosen.numbers) == 0:
        raise UserError(
            f"{', '.join(map(str, inputs))}: no sample meets these conditions; {'; '.join(notes)}"
        )
    samples.forget()
    files = [input_of(path) for path in paths]
    files += [InputFile.of(options.uids)] if options.uids else []
    read = partial(chosen.read, caption_field=options.caption_field)
    return Source([Split("", len(chosen.numbers), chosen.sizes, read)], files, notes)


def find_parts(folder: Path) -> list[Path]:
    """The tars of a folder by name, or the folders NAME of img2dataset's output of files."""
    if folder.is_file() and folder.suffix == ".tar":
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of img2dataset's NAME.tar and NAME.parquet")
    if tars := tars_of(folder):
        return tars
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    folders = [path for path in found if path.with_name(f"{path.name}_stats.json").exists()]
    if folders:
        return folders
    below = [path for path in found if tars_of(path)]
    if len(below) == 1:
        return find_parts(below[0])
    if below:
        names = ", ".join(path.name for path in below[:5])
        raise UserError(f"{folder}: the tars lie in its folders {names}; name the folders to convert")
    raise UserError(
        f"{folder}: neither NAME.tar nor folders NAME with NAME_stats.json, as img2dataset makes them; for "
        f"parquet files that hold the images there is: clipcluster shards convert parquet {folder}"
    )


def input_of(path: Path) -> InputFile:
    """The state of a shard; of a folder of files the state of all of them."""
    if not path.is_dir():
        return InputFile.of(path)
    with os.scandir(path) as entries:
        states = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
    digest = hashlib.sha256(json.dumps(states).encode()).hexdigest()
    return InputFile(str(path), sum(s[1] for s in states), max((s[2] for s in states), default=0), digest)


def failures(paths: Sequence[Path], samples: TarSamples) -> list[str]:
    """What failed by the parquets beside the shards, and where they contradict these; a line each."""
    tables = [path.with_name(f"{path.name.removesuffix('.tar')}.parquet") for path in paths]
    missing = {table for table in tables if not table.is_file()}
    if len(missing) == len(tables):
        return []
    try:
        from pyarrow import parquet
    except ImportError:
        return ["what failed to download was not counted; that needs: pip install 'clipcluster[parquet]'"]
    notes = []
    if missing:
        notes.append(
            f"{min(missing)} does not exist ({len(missing)} of {len(paths)} shards have none): "
            "the download may be unfinished"
        )
    counts: Counter[str] = Counter()
    held = np.bincount(samples.shards, minlength=len(paths)).tolist()
    for path, table, samples_there in zip(paths, tables, held, strict=True):
        if table in missing:
            continue
        try:
            told = "status" in parquet.read_schema(table).names
            status = Counter(column_of(table, "status") if told else ())
        except ValueError:  # pyarrow's ArrowInvalid is one
            notes.append(f"{table} is truncated or not a parquet file: the download may be unfinished")
            continue
        counts += status
        if status and status["success"] != samples_there:
            notes.append(f"{path}: {samples_there:,} samples, but its parquet says {status['success']:,}")
    failed = {name or "without status": count for name, count in counts.items() if name != "success"}
    if failed:
        reasons = ", ".join(f"{count:,} {name}" for name, count in sorted(failed.items()))
        notes.append(f"{sum(failed.values()):,} of {sum(counts.values()):,} downloads failed: {reasons}")
    return notes


KIND = Kind(
    "img2dataset's downloads and DataComp's pools, all of them or the samples of a list of uids.",
    open_downloads,
    inputs="Folders of NAME.tar (or NAME/), NAME.parquet and NAME_stats.json.",
    options=Options,
)
