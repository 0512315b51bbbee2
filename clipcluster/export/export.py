"""A trained model in another program's form: the formats, and a folder that exists wholly or not at all.

No torch until a model is opened.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from clipcluster.errors import UserError
from clipcluster.runs.files import fsync_folder, write_json

if TYPE_CHECKING:
    from clipcluster.build.opened import Opened

FORMATS: Mapping[str, str] = {
    "open_clip": "clipcluster.export.open_clip:export_open_clip",
    "hf": "clipcluster.export.hugging_face:write",
    "safetensors": "clipcluster.export.towers:write",
    "onnx": "clipcluster.export.onnx_files:write",
}
"""Each format's writer, by the dotted name of `(opened, folder) -> None`.

It raises UserError for a model that has no such form, and compares what it wrote with the model.
"""
EXPORT = "export.json"
"""What marks a folder as an export: format, source, step, which weights, the bytes of every other file."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def export(
    what: str, kind: str, out: Path, *, weights: Literal["ema", "raw"] | None = None, runs: Path | None = None
) -> Opened:
    """Write a model into the folder `out` in one of `FORMATS`, with a model card.

    what, runs: as of `clipcluster.build.opened.find_model`; weights: the moving average or the weights
    themselves, by default the average where there is one. An older export at `out` is replaced, unless its
    files are no longer those that were written. Returns the model that was written.

    Raises UserError where `out` is something else than such an export, or the model itself; for what is no
    model; for a model that the format cannot hold; and where there is no space. Nothing is written then.
    """
    _check_replaceable(out)
    from clipcluster.build.opened import find_model

    found = find_model(what, runs)
    if found.path.resolve() == out.resolve():
        raise UserError(f"{out} is the model that is to be exported; name another folder.")
    from clipcluster.export.card import card

    with _telling_of_space(out), written_whole(out) as folder:  # before the model, which may take minutes
        opened = found.open(weights=weights, device="cpu")
        place = {"final": out} if kind == "open_clip" else {}  # a part of it is looked for by its path
        resolve_name(FORMATS[kind])(opened, folder, **place)
        (folder / "README.md").write_text(card(opened, kind), encoding="utf-8", errors="backslashreplace")
        about = {"format": kind, "name": opened.name, "step": opened.step, "ema": opened.averaged}
        write_json(folder / EXPORT, {**about, "files": _sizes(folder)})
        _share(folder, (folder / EXPORT).stat().st_mode)
        _check_replaceable(out)  # again: what was put there since is not deleted
    return opened


def _share(folder: Path, mode: int) -> None:
    """Every file as readable as the umask says: safetensors writes files for their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def _telling_of_space(out: Path) -> Iterator[None]:
    """Inside, UserError where the disk is full, whoever writes."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has no other class, nor a number
        told = any(os.strerror(number) in str(error) for number in _NO_SPACE)
        if getattr(error, "errno", None) not in _NO_SPACE and not (
            told and isinstance(error, SafetensorError)
        ):
            raise
        raise UserError(f"{out} cannot be written: {error}. Make space, or name another folder.") from error


def _check_replaceable(out: Path) -> None:
    """UserError where something lies at `out` that is no export as it was written.

    An empty folder may be filled.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    written = _written(out)
    if written is None:
        if out.exists() or out.is_symlink():
            raise UserError(f"{out} exists and is not an export; name another folder, or delete it first.")
        return
    changed = sorted(name for name, size in _sizes(out).items() if written.get(name) != size)
    if changed:
        shown = ", ".join(changed[:6]) + (f", … ({len(changed)} in all)" if len(changed) > 6 else "")
        raise UserError(
            f"{out} holds files that the export there did not write, or that were changed since: {shown}. "
            "They would be deleted: move them away, or name another folder."
        )


def _written(folder: Path) -> dict[str, Any] | None:
    """The files of an export and their bytes, as it was written; None for any other folder."""
    try:
        about = json.loads((folder / EXPORT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    files = about.get("files") if isinstance(about, dict) else None
    return files if isinstance(files, dict) and files and isinstance(about.get("format"), str) else None


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file of a folder but `EXPORT`, by its path within; -1 for what is no plain file."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    plain = {path: path.is_file() and not path.is_symlink() for path in paths if path != folder / EXPORT}
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size if is_file else -1
        for path, is_file in plain.items()
    }


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place at the end; nothing stays on an error.

    A process that is killed may leave the folder, `.NAME.….tmp`, and between two renames what was at `out`,
    `.NAME.….old`.
    """
    out = out.resolve()
    aside = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    before = aside.with_suffix(".old")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); name another folder.") from error
    try:
        yield aside
        for path in (aside, *aside.rglob("*")):
            _flush(path)
        if out.exists():
            os.rename(out, before)
        os.rename(aside, out)
    except BaseException:
        if before.exists() and not out.exists():
            os.rename(before, out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync_folder(out.parent)
    shutil.rmtree(before, ignore_errors=True)  # not before the new one is there for good


def _flush(path: Path) -> None:
    if path.is_dir():
        fsync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
