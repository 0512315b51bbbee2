"""Reading tensors from files and folders of weights, names unchanged; a damaged file is one message.

`clipcluster.model.layouts` converts names, `clipcluster.model.weights` loads the tensors into a tower.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipcluster.errors import UserError
from clipcluster.runs.checkpoints import (
    AVERAGE,
    MANIFEST,
    MODEL,
    name_of,
    step_of,
    steps_in,
    tensors_file,
    unverified,
    weights_file,
)
from clipcluster.runs.folder import Run

logger = logging.getLogger("clipcluster")
WeightsFrom = Literal["ema", "raw"]
HF_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The weights of a folder in Hugging Face's layout, the preferred first."""
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# The keys under which training programs save the weights, and their moving average.
_NESTED: Mapping[WeightsFrom, tuple[str, ...]] = {
    "ema": ("state_dict_ema", "model_ema", "ema"),
    "raw": ("state_dict", "model", "module"),
}
PROJECTIONS = "teacher_projections"
"""A distilled student's attribute with its projections into its teachers' spaces; no other model has it."""
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Weights:
    """The tensors of a file by their names there.

    file: the file, or model's folder, that was read.
    part: `ema` or `raw` where the file (or checkpoint) holds both, else "".
    """

    file: Path
    state: dict[str, Tensor]
    part: WeightsFrom | Literal[""] = ""


def read_weights(source: Path, prefer: WeightsFrom | None = None) -> Weights:
    """The tensors of a file, of a model's folder, of a run's checkpoint, or of its newest that verifies.

    Files: `.safetensors`, or whatever `torch.load` reads with `weights_only`; from a file that a training
    program saved, the model's part. Folders: in Hugging Face's layout (index files included) or OpenCLIP's.
    prefer: the moving average (`ema`) or the weights themselves (`raw`), where both are there; default `ema`.

    Raises UserError where there is nothing to read, a file is damaged, or it lacks what is preferred.
    """
    try:
        with naming_deleted(source):
            found = _weights_at(source, prefer)
        return replace(found, state=without_projections(found.state))
    except OSError as error:
        raise UserError(f"The weights {source} cannot be read: {error}.") from error


def weights_at(source: Path, prefer: WeightsFrom | None = None) -> Path:
    """What `read_weights` reads: a file, a model's folder, or the file of a run's checkpoint.

    No tensor is read. Raises UserError where there is no such file.
    """
    if not source.is_dir():
        if not source.is_file():
            raise UserError(
                f"No weights at {source}: name a .safetensors, .pt, .pth or .bin file, a model's folder, or "
                "a run's checkpoint."
            )
        return source
    if (source / "checkpoints").is_dir():
        source = _newest(source)
    if step_of(source.name) is not None or (source / MANIFEST).is_file():
        return _file_of_checkpoint(source, prefer)
    _of_folder(source)
    return source


def _weights_at(source: Path, prefer: WeightsFrom | None) -> Weights:
    file = weights_at(source, prefer)
    if file.is_dir():
        return replace(_weights_at(_of_folder(file), prefer), file=file)
    with naming_deleted(file):
        return _of_file(file, source, prefer)


def _of_file(file: Path, source: Path, prefer: WeightsFrom | None) -> Weights:
    if source.is_dir():
        return _of_checkpoint(file)
    shards = shard_names(source)
    if shards:
        state: dict[str, Tensor] = {}
        for shard in shards:
            state |= _tensors(_read(source.parent / shard))
        return _chosen(state, source, prefer)
    return _chosen(_read(source), source, prefer)


def _of_folder(folder: Path) -> Path:
    known = (*OPEN_CLIP_FILES, *HF_FILES)
    found = [folder / name for name in known if (folder / name).is_file()]
    if not found:
        raise UserError(f"The folder {folder} holds no weights: expected one of {', '.join(known)}.")
    return found[0]


def _newest(run: Path) -> Path:
    """The newest checkpoint of a run whose files match their manifest."""
    folder, reasons = run / "checkpoints", []
    for step in reversed(steps_in(folder)):
        path = folder / name_of(step)
        files = {weights_file(path)[0].name}
        if (path / tensors_file(MODEL)).exists():
            files.add(tensors_file(MODEL))
        reason = unverified(path, sorted(files))
        if not reason:
            if not Run(run).finished():
                logger.warning(
                    "%s has not finished: once it has a newer checkpoint, a resume finds other starting "
                    "weights and is refused. Name the checkpoint: %s",
                    run,
                    path,
                )
            return path
        reasons.append(f"{path.name}: {reason}")
    raise UserError(
        f"The run {run} has no checkpoint to start from ({'; '.join(reasons) or 'none was written yet'})."
    )


def _both(checkpoint: Path) -> dict[WeightsFrom, Path]:
    """Where the averaged and the raw weights of a checkpoint of a run lie, if it has them."""
    return {"ema": checkpoint / tensors_file(AVERAGE), "raw": checkpoint / tensors_file(MODEL)}


def _file_of_checkpoint(folder: Path, prefer: WeightsFrom | None) -> Path:
    file, averaged = weights_file(folder, prefer)
    if not file.exists():
        what = "no averaged weights" if averaged else f"no {file.name}"
        hint = "; set model.weights_from: raw" if averaged and _both(folder)["raw"].exists() else ""
        with naming_deleted(folder):
            raise UserError(f"The checkpoint {folder} holds {what}{hint}.")
    return file


def _of_checkpoint(file: Path) -> Weights:
    """The averaged or raw weights of one checkpoint of a run, verified by its manifest."""
    reason = unverified(file.parent, [file.name])
    if reason:
        raise UserError(
            f"The checkpoint {file.parent} does not verify: {reason}. Restore an intact copy, or name "
            "another."
        )
    both = _both(file.parent)
    part = next(part for part, path in both.items() if path == file)
    several = all(path.exists() for path in both.values())
    return Weights(file, _tensors(_read(file)), part if several else "")


@contextmanager
def naming_deleted(path: Path) -> Iterator[None]:
    """Inside, what fails because a run deleted the checkpoint of this path, or at it, says so. UserError."""
    try:
        yield
    except (UserError, OSError):
        found = next((each for each in (path, path.parent) if step_of(each.name) is not None), None)
        if found is None or found.is_dir():
            raise
        there = ", ".join(name_of(step) for step in steps_in(found.parent)) or "none"
        raise UserError(
            f"The checkpoint {found} is not there: its run deletes what its checkpoint.keep does not keep. "
            f"There are: {there}. Name one that stays, such as the last of a finished run or one of "
            "checkpoint.keep.every, or copy a checkpoint to another folder and name the copy."
        ) from None


def without_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A distilled student's tensors without its projections into its teachers' spaces."""
    return {name: value for name, value in state.items() if not name.startswith(f"{PROJECTIONS}.")}


def shard_names(file: Path) -> list[str]:
    """The names of the files that an `….index.json` lists, in its folder; none for any other file.

    Raises UserError where it is not such an index.
    """
    if not file.name.endswith(".index.json"):
        return []
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read as an index of weights ({error!r}).") from error
    if not names or not plain:
        raise UserError(f"{file} names no files beside it: its weight_map should map tensors to file names.")
    return sorted(names)


def _read(file: Path) -> dict[str, Any]:
    """The content of a file, on the CPU. Raises UserError where it cannot be read."""
    if not file.is_file():
        raise UserError(f"No weights at {file}.")
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`.")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        return _read_pickle(file)
    except MemoryError:
        raise
    except Exception as error:  # every reader has its own exceptions for a broken file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"The weights {file} cannot be read ({reason}): is the file complete?") from error


def _read_pickle(file: Path) -> dict[str, Any]:
    """A file of `torch.save`, with `weights_only`. Raises ValueError and what torch raises."""
    zipped = zipfile.is_zipfile(file)
    if zipped:
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(
                    f"{file} is a TorchScript archive, which holds code and is not read. Where you trust it, "
                    "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), OTHER) makes a file of its weights."
                )
            damaged = archive.testzip()  # torch.load does not compare them
            if damaged:
                raise ValueError(f"the checksum of {damaged} does not match")
    try:
        # timm and the original ConvNeXt save their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:  # torch's message advises to load it without weights_only
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds {found[1]}, more than tensors" if found else "it is no file of torch.save"
        raise ValueError(what) from error
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} where a dictionary of tensors was expected")
    return content


def _chosen(content: dict[str, Any], file: Path, prefer: WeightsFrom | None) -> Weights:
    """The model's part of a training program's file: its moving average, or the weights themselves."""
    found: dict[str, Mapping[str, Any]] = {}
    for part, names in _NESTED.items():
        nested = (_inside(content.get(name)) for name in names)
        value = next((value for value in nested if value), None)
        if value is not None:
            found[part] = value
    if "raw" not in found and _inside(content):
        found["raw"] = content
    if not found:
        raise UserError(f"The file {file} holds no tensors; its keys are {some([*map(str, content)])}.")
    part = prefer or ("ema" if "ema" in found else "raw")
    if part not in found:
        other = next(iter(found))
        what = "averaged (EMA) weights" if part == "ema" else "weights besides their moving average"
        raise UserError(f"{file} holds no {what}: set model.weights_from: {other}, or leave it out.")
    return Weights(file, _tensors(found[part]), part if len(found) > 1 else "")


def _inside(value: Any) -> Mapping[str, Any] | None:
    """A dictionary with tensors, or the model's dictionary inside it; None for anything else."""
    if not isinstance(value, dict):
        return None
    value = next((value[name] for name in _NESTED["raw"] if isinstance(value.get(name), dict)), value)
    return value if any(isinstance(tensor, Tensor) for tensor in value.values()) else None


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def some(names: Sequence[str], count: int = 6) -> str:
    """For messages: the first `count` names, and how many there are where not all are shown."""
    shown = ", ".join(names[:count])
    return f"{shown}, … ({len(names)} in all)" if len(names) > count else shown or "nothing"
