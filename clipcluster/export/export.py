"""A trained model in another program's form: the formats, and a folder that exists wholly or not at all.

No torch until a model is opened.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Literal

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
"""What marks a folder as an export: format, source, step, which weights."""


def export(
    what: str, kind: str, out: Path, *, weights: Literal["ema", "raw"] | None = None, runs: Path | None = None
) -> Opened:
    """Write a model into the folder `out` in one of `FORMATS`, with a model card.

    what, runs: as of `clipcluster.build.opened.find_model`; weights: the moving average or the weights
    themselves, by default the average where there is one. An older export at `out` is replaced. Returns the
    model that was written.

    Raises UserError where `out` is something else than an export, for what is no model, and for a model that
    the format cannot hold. Nothing is written then.
    """
    _check_replaceable(out)
    from clipcluster.build.opened import find_model

    found = find_model(what, runs)
    from clipcluster.export.card import card

    opened = found.open(weights=weights, device="cpu")
    with written_whole(out) as folder:
        place = {"final": out} if kind == "open_clip" else {}  # a part of it is looked for by its path
        resolve_name(FORMATS[kind])(opened, folder, **place)
        (folder / "README.md").write_text(card(opened, kind), encoding="utf-8")
        about = {"format": kind, "name": opened.name, "step": opened.step, "ema": opened.averaged}
        write_json(folder / EXPORT, about)
    return opened


def _check_replaceable(out: Path) -> None:
    """UserError where something lies at `out` that is no export; an empty folder may be filled."""
    if out.is_dir() and (not any(out.iterdir()) or _is_export(out)):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists and is not an export; name another folder, or delete it first.")


def _is_export(folder: Path) -> bool:
    try:
        about = json.loads((folder / EXPORT).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and isinstance(about.get("format"), str)


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place at the end; nothing stays on an error."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    before = aside.with_suffix(".old")
    aside.mkdir()
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
        for leftover in (aside, before):
            shutil.rmtree(leftover, ignore_errors=True)
    fsync_folder(out.parent)


def _flush(path: Path) -> None:
    if path.is_dir():
        fsync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
