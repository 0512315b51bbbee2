"""What a checkpoint consists of: its parts, its files, and what is known without hashing them. No torch.

step-00001234/
  PART.safetensors    the tensors of a part that all ranks hold alike (model, ema, optimizer)
  state.json          format, step, samples, epoch, …, the parts' plain values, what the run is made of
  manifest.json       bytes and SHA-256 of every file above, versions, commit, recipe, …; written last
  evaluation.json     added once the step was evaluated; not in the manifest
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from clipcluster.runs.files import file_sha256, read_json

STATE, MANIFEST, EVALUATION = "state.json", "manifest.json", "evaluation.json"
WRITING, DELETING, BROKEN = ".writing-", ".deleting-", "broken-"
"""Names that checkpoints have before they are complete, while they are removed, and once set aside."""
PINNED = "pinned-"
"""A file in a checkpoint that a process is reading."""
PIN_SECONDS = 3600.0
"""A pin older than this was left by a reader that died."""
MODEL, AVERAGE = "model", "ema"
"""The parts whose tensors are the weights that others read."""
_NAME = re.compile(r"step-(\d{8,})")


@runtime_checkable
class Stateful(Protocol):
    """A part whose state a checkpoint holds; a checkpoint is a `dict[str, Stateful]` and knows no names."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


Parts = Mapping[str, Stateful]
"""What a checkpoint holds, by name."""


def is_per_rank(part: Stateful) -> bool:
    """Whether the part says, by a true attribute `per_rank`, that its state differs from rank to rank.

    Every rank writes and reads a file of its own then; all other parts are the same on all ranks.
    """
    return bool(getattr(part, "per_rank", False))


def may_be_absent(part: Stateful) -> bool:
    """Whether the part says, by a true attribute `may_be_absent`, that older checkpoints have no state of it.

    Such a one gives it {}, and it begins anew.
    """
    return bool(getattr(part, "may_be_absent", False))


def name_of(step: int) -> str:
    """`step-00001234`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name; None for another name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def steps_in(folder: Path) -> list[int]:
    """The steps that have a folder in `folder`, ascending, complete or not; none where it does not exist."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(step for name in names if (step := step_of(name)) is not None)


def tensors_file(part: str, rank: int | None = None) -> str:
    """The file with the tensors of a part that all ranks hold alike, or of one `rank`'s own."""
    return f"{part}.safetensors" if rank is None else f"{part}-rank-{rank:05d}.safetensors"


def file_entry(size: int, sha256: str) -> dict[str, Any]:
    """What the manifest says of a file: bytes, and SHA-256 in hex."""
    return {"bytes": size, "sha256": sha256}


def weights_file(checkpoint: Path, weights: Literal["ema", "raw"] | None = None) -> tuple[Path, bool]:
    """The file of the weights to measure or export, and whether they are averaged.

    weights: the moving average or the weights themselves; default the average where there is one, or should
    be by the manifest.
    """
    averaged = weights == "ema" if weights else _has_average(checkpoint)
    return checkpoint / tensors_file(AVERAGE if averaged else MODEL), averaged


def _has_average(checkpoint: Path) -> bool:
    """Whether a checkpoint was written with averaged weights: raw ones are never taken for lost ones."""
    name = tensors_file(AVERAGE)
    if (checkpoint / name).exists():
        return True
    try:
        return name in read_manifest(checkpoint)
    except (OSError, ValueError):  # what reads the checkpoint says why
        return False


def read_manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """The files that the manifest lists: name -> (bytes, SHA-256 in hex).

    Raises OSError where it cannot be read, and ValueError, with the reason, where it is not a manifest.
    """
    document = read_json(checkpoint / MANIFEST)
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{MANIFEST} lists no files")
    return {name: _entry(name, entry) for name, entry in files.items()}


def _entry(name: str, entry: Any) -> tuple[int, str]:
    size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if not isinstance(size, int) or not isinstance(sha256, str) or not _is_plain(name):
        raise ValueError(f"{MANIFEST}: the entry of {name!r} needs a plain file name, bytes and sha256")
    return size, sha256


def _is_plain(name: str) -> bool:
    """Whether it names a file of the folder itself."""
    return name == os.path.basename(name) and name not in ("", ".", "..")


def unverified(checkpoint: Path, names: Iterable[str] | None = None) -> str:
    """Why files of a checkpoint (default: all) do not match its manifest, or "" where every byte does.

    A file system that refuses to read (not: a file that is absent) raises its own OSError: such a checkpoint
    may be intact.
    """
    try:
        listed = read_manifest(checkpoint)
        for name in listed if names is None else names:
            if name not in listed:
                return f"{MANIFEST} does not list {name}"
            size, sha256 = listed[name]
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, the manifest says {size:,}"
            if file_sha256(checkpoint / name) != sha256:
                return f"the content of {name} does not match the manifest (SHA-256 differs)"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError as error:
        return str(error)
    return ""


def is_complete(checkpoint: Path) -> bool:
    """Whether the manifest can be read and every file has the size it lists; contents are not hashed."""
    try:
        listed = read_manifest(checkpoint)
        return all(os.stat(f"{checkpoint}/{name}").st_size == size for name, (size, _) in listed.items())
    except (OSError, ValueError):
        return False


def is_pinned(checkpoint: Path) -> bool:
    """Whether a process is reading this checkpoint. Raises OSError where its folder cannot be listed."""
    try:  # glob() takes a folder that it cannot read for an empty one
        names = os.listdir(checkpoint)
    except FileNotFoundError:
        return False
    for pin in (checkpoint / name for name in names if name.startswith(PINNED)):
        with suppress(FileNotFoundError):
            if time.time() - pin.stat().st_mtime < PIN_SECONDS:
                return True
    return False


def newest_complete(folder: Path) -> int | None:
    """The step of the newest checkpoint in `folder` that `is_complete`, or None."""
    try:
        newest_first = reversed(steps_in(folder))
    except OSError:
        return None
    return next((step for step in newest_first if is_complete(folder / name_of(step))), None)
