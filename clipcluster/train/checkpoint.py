"""Checkpoints on disk: written wholly or not at all, verified before they are trusted.

`clipcluster.runs.checkpoints` has the layout. A folder is written under another name, every file fsynced,
renamed into place, and the parent fsynced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipcluster.runs.checkpoints import (
    EVALUATION,
    MANIFEST,
    STATE,
    name_of,
    read_manifest,
    steps_in,
    tensors_file,
)
from clipcluster.runs.files import fsync_folder, read_json, write_json
from clipcluster.runtime.stateful import Stateful
from clipcluster.runtime.stop import CheckpointError
from clipcluster.train.tensorfile import safetensors_bytes

FORMAT = 1
FORMATS = (1,)
WRITING, DELETING, BROKEN, PINNED = ".writing-", ".deleting-", "broken-", "pinned-"
PIN_SECONDS = 3600.0
"""A pin older than this was left by a reader that died."""
logger = logging.getLogger("clipcluster")

Parts = Mapping[str, Stateful]


class Broken(Exception):
    """This checkpoint does not verify; the message says why."""


class Dropped(Exception):
    """The write was given up because something more urgent came."""


@dataclass(frozen=True)
class Contents:
    """A checkpoint in memory, on the CPU: tensors by part, and everything else."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def take_copy(step: int, state: Mapping[str, Any], parts: Parts) -> Contents:
    """Copy all parts to the CPU. Later steps change nothing in the copy.

    Tensors of a part go to NAME.safetensors, its other values into state.json under the part's name.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Any] = {}
    for part, stateful in parts.items():
        values = stateful.state_dict()
        found = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        if found:
            tensors[part] = {key: value.detach().to("cpu", copy=True) for key, value in found.items()}
        rest = {key: value for key, value in values.items() if key not in found}
        if rest:
            plain[part] = rest
    return Contents(step, tensors, {"format": FORMAT, **state, **plain, "parts": sorted(parts)})


def load_parts(folder: Path, state: Mapping[str, Any], parts: Parts) -> None:
    """Give every part its state from a verified checkpoint.

    Raises CheckpointError where a part and its state do not fit.
    """
    missing = set(parts) ^ set(state["parts"])
    if missing:
        raise CheckpointError(
            f"{folder} holds {', '.join(state['parts'])}; this run has {', '.join(sorted(parts))}.",
            "Resume with the recipe and the code that wrote the checkpoint, or start another run.",
        )
    for name, part in parts.items():
        file = folder / tensors_file(name)
        values = dict(state.get(name, {}))
        if file.exists():
            values.update(load_file(file))
        try:
            part.load_state_dict(values)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: the state of {name} does not fit: {error}",
                "Resume with the recipe and the code that wrote the checkpoint, or start another run.",
            ) from error


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and return its state.json. Raises Broken with the reason.

    A file system that refuses to read (not: a file that is absent) raises its own OSError: such a checkpoint
    may be whole.
    """
    try:
        listed = read_manifest(folder)
        if STATE not in listed:
            raise Broken(f"{MANIFEST} does not list {STATE}")
        for name, (size, sha256) in listed.items():
            _verify_file(folder / name, size, sha256)
        return read_state(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Broken(f"{Path(error.filename).name} is missing") from error
    except ValueError as error:
        raise Broken(str(error)) from error


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises OSError, ValueError where it is not the state of a run, and CheckpointError for a newer format.
    """
    state = read_json(folder / STATE)
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise ValueError(f"{STATE} names no format")
    if state["format"] not in FORMATS:
        raise CheckpointError(
            f"{folder} has format {state['format']}; this version reads {' and '.join(map(str, FORMATS))}.",
            "Resume with the version that wrote it.",
        )
    for key, valid in _STATE.items():
        if not valid(state.get(key)):
            raise ValueError(f"{STATE}: {key} cannot be {state.get(key)!r}")
    return state


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= -1


def _are_ranges(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) for pair in value
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_sources(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(source, dict) and {"name", "fingerprint"} <= source.keys() for source in value)
    )


_STATE: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "samples", "batches_drawn", "evaluated_step"), _is_count),
    "skipped": _are_ranges,
    "parts": _are_names,
    "index": _are_sources,
    "starting_weights": lambda value: value is None or isinstance(value, dict),
}
"""What the values in state.json must be; None where a key may be absent."""


def _verify_file(path: Path, size: int, sha256: str) -> None:
    found = path.stat().st_size
    if found != size:
        raise Broken(f"{path.name} has {found:,} bytes, the manifest says {size:,}")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(4 << 20):
            digest.update(piece)
    if digest.hexdigest() != sha256:
        raise Broken(f"the content of {path.name} is not what was written (SHA-256 differs)")


class CheckpointFolder:
    """The checkpoints of one run. Every rename and deletion first calls `check`, which raises when stale.

    Args:
        folder: `checkpoints` of the run; made if absent.
        check: the attempt's question whether it still owns the run.
        about: goes into every manifest: versions, commit, world size.
    """

    def __init__(self, folder: Path, *, check: Callable[[], None], about: Mapping[str, Any]) -> None:
        self.folder, self._check, self._about = folder, check, about

    def prepare(self) -> None:
        """Make the folder and remove what kills left behind. Only the run's owner may call it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.iterdir():
            if leftover.name.startswith((WRITING, DELETING)):
                self._check()
                shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps that have a folder, ascending, verified or not."""
        return steps_in(self.folder)

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / name_of(step)

    def newest(self, usable: Callable[[Mapping[str, Any]], bool] = lambda state: True) -> Path | None:
        """The newest checkpoint that verifies and whose state.json is `usable`, or None where there is none.

        Broken ones newer than it are set aside with the reason. Where all are broken they stay where they are
        and CheckpointError says what to do: a run never starts from scratch over checkpoints.
        """
        broken: dict[int, str] = {}
        any_whole = False
        for step in reversed(self.steps()):
            try:
                state = verify(self.path(step))
            except Broken as error:
                broken[step] = str(error)
                logger.warning("%s does not verify: %s", self.path(step), error)
                continue
            any_whole = True
            if usable(state):
                for other, reason in broken.items():
                    self.set_aside(other, reason)
                return self.path(step)
        earlier = [path.name for path in self.folder.iterdir() if path.name.startswith(BROKEN)]
        if not any_whole and (broken or earlier):
            self._refuse(broken, earlier)
        return None

    def _refuse(self, broken: Mapping[int, str], earlier: Iterable[str]) -> None:
        reasons = [f"{name_of(step)}: {reason}" for step, reason in broken.items()]
        reasons += [f"{name}: set aside before" for name in sorted(earlier)]
        raise CheckpointError(
            f"No checkpoint in {self.folder} verifies ({'; '.join(reasons)}).",
            "Put back a whole copy of one of them, or, to begin from the first step, move the folder "
            f"{self.folder} away.",
        )

    def set_aside(self, step: int, reason: str) -> Path:
        """Rename a checkpoint to `broken-…`, with the reason beside it, and return the new path."""
        source, number = self.path(step), 1
        while (target := self.folder / f"{BROKEN}{source.name}-{number}").exists():
            number += 1
        self._check()
        os.rename(source, target)
        fsync_folder(self.folder)
        write_json(target / "why.json", {"reason": reason, "time": time.time()})
        logger.warning("%s set aside as %s: %s", source.name, target.name, reason)
        return target

    def write(self, contents: Contents, dropped: Callable[[], bool] = lambda: False) -> Path:
        """Write a checkpoint durably and return its folder; one that is there already and verifies stays.

        Raises OSError (nothing is left behind), Dropped where `dropped()` turned true, StaleAttempt.
        """
        final = self.path(contents.step)
        if self._keeps(final):
            return final
        aside = self.folder / f"{WRITING}{final.name}-{secrets.token_hex(4)}"
        try:
            self._check()
            aside.mkdir()
            self._write_files(aside, contents, dropped)
            self._check()
            os.rename(aside, final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        fsync_folder(self.folder)
        return final

    def _keeps(self, final: Path) -> bool:
        if not final.exists():
            return False
        try:
            verify(final)
        except Broken as error:
            self.set_aside(int(final.name.removeprefix("step-")), str(error))
            return False
        return True

    def _write_files(self, aside: Path, contents: Contents, dropped: Callable[[], bool]) -> None:
        files: dict[str, dict[str, Any]] = {}
        for part, tensors in contents.tensors.items():
            name = tensors_file(part)
            files[name] = _write_file(aside / name, safetensors_bytes(tensors), dropped)
        files[STATE] = _write_file(aside / STATE, [_json(contents.state)], dropped)
        manifest = {
            "format": FORMAT,
            "step": contents.step,
            "time": time.time(),
            **self._about,
            "files": files,
        }
        _write_file(aside / MANIFEST, [_json(manifest)], dropped)
        fsync_folder(aside)

    def record_evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Put the results of an evaluation beside the checkpoint they belong to, where there is one."""
        if self.path(step).exists():
            self._check()
            write_json(self.path(step) / EVALUATION, {"step": step, "metrics": dict(results)})

    def evaluation(self, step: int) -> dict[str, float]:
        """The recorded results of a step's evaluation; empty where it was not evaluated."""
        try:
            return dict(read_json(self.path(step) / EVALUATION)["metrics"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def pinned(self, step: int) -> bool:
        """Whether somebody is reading this checkpoint."""
        return any(time.time() - _changed(pin) < PIN_SECONDS for pin in self.path(step).glob(f"{PINNED}*"))

    def delete(self, step: int) -> None:
        """Remove a checkpoint: renamed first, so that it is never half there under its name."""
        source = self.path(step)
        aside = self.folder / f"{DELETING}{source.name}-{secrets.token_hex(4)}"
        self._check()
        os.rename(source, aside)
        fsync_folder(self.folder)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep the rotation of a running run from deleting this checkpoint meanwhile, where it can be pinned."""
    pin = folder / f"{PINNED}{secrets.token_hex(4)}"
    with suppress(OSError):  # somebody else's run, or a disk to read from only: rotation may come in between
        pin.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            pin.unlink(missing_ok=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _write_file(
    path: Path, pieces: Iterable[bytes | memoryview], dropped: Callable[[], bool]
) -> dict[str, Any]:
    """Write and fsync a file; its size and SHA-256 as the manifest lists them."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as stream:
        for piece in pieces:
            if dropped():
                raise Dropped
            rest = memoryview(piece)
            digest.update(rest)
            size += len(rest)
            while rest:
                rest = rest[stream.write(rest) :]
        os.fsync(stream.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """The versions a manifest names."""
    try:
        own = version("clipcluster")
    except PackageNotFoundError:  # run from a folder, never installed
        own = "not installed"
    return {"python": platform.python_version(), "torch": torch.__version__, "clipcluster": own}
