"""Reading a checkpoint: verified byte by byte before it is trusted, then given to its parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from clipcluster.runs.checkpoints import MANIFEST, STATE, Parts, is_per_rank, read_manifest, tensors_file
from clipcluster.runs.files import file_sha256, read_json
from clipcluster.runtime.outcome import CheckpointError

FORMATS = (1, 2)
"""Those that can be read. In 1 the logit scale has no dimension, and no part differs by rank."""


class Broken(Exception):
    """This checkpoint does not verify; the message says why."""


def load_parts(
    folder: Path, state: Mapping[str, Any], parts: Parts, *, rank: int = 0, ranks: int = 1
) -> None:
    """Give every part its state from a verified checkpoint; a part that differs by rank gets its own rank's.

    Raises CheckpointError where a part and its state do not fit, and where parts that differ by rank were
    written by another number of ranks.
    """
    if set(parts) != set(state["parts"]):
        raise CheckpointError(
            f"{folder} holds {', '.join(state['parts'])}; this run has {', '.join(sorted(parts))}.",
            "Resume with the recipe and the code that wrote the checkpoint, or start another run.",
        )
    own = sorted(name for name, part in parts.items() if is_per_rank(part))
    per_rank, written_by = state.get("per_rank", []), state.get("ranks", 1)
    if own != per_rank or (own and written_by != ranks):
        raise CheckpointError(
            f"{folder} was written by {written_by} ranks, with parts of each rank's own: "
            f"{', '.join(per_rank) or 'none'}; this run has {ranks} ranks and {', '.join(own) or 'none'}.",
            f"Resume on {written_by} ranks, with the recipe and the code that wrote the checkpoint.",
        )
    for name, part in parts.items():
        file = folder / tensors_file(name, rank if name in own else None)
        try:
            values = dict(state.get(name, {}))
            if file.exists():
                values.update(load_file(file))
            part.load_state_dict(values)
        except (RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: the state of {name} does not fit: {error}",
                "Resume with the recipe and the code that wrote the checkpoint, or start another run.",
            ) from error


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and return its state.json. Raises Broken with the reason.

    A file system that refuses to read (not: a file that is absent) raises its own OSError: such a checkpoint
    may be intact.
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
    try:
        _check_state(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{STATE} is not the state of a run: {type(error).__name__}: {error}") from error
    if state["format"] not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise CheckpointError(
            f"{folder} has format {state['format']}; this version reads {known}.",
            "Resume with the version that wrote it.",
        )
    return dict(state)


def _check_state(state: dict[str, Any]) -> None:
    """Raises KeyError, TypeError, ValueError or AttributeError where a value cannot be what it must be."""
    if not isinstance(state["format"], int):
        raise TypeError("the format is not a whole number")
    if state["format"] not in FORMATS:
        return  # another version knows
    lists = [state["skipped"], state["parts"], state.get("per_rank", []), state.get("index", [])]
    names = [*state["parts"], *state.get("per_rank", []), *state.get("starting_weights", {}).keys()]
    names += [source[key] for source in state.get("index", []) for key in ("name", "fingerprint")]
    counts = [state[key] for key in ("step", "samples", "batches_drawn", "evaluated_step")]
    counts += [state.get("ranks", 1), *(count for first, past in state["skipped"] for count in (first, past))]
    for values, kind in ((lists, list), (names, str), (counts, int)):
        if not all(isinstance(value, kind) for value in values):
            raise TypeError(f"{values} are not all of type {kind.__name__}")
    if min(counts) < -1:
        raise ValueError(f"{counts} has a negative count")


def _verify_file(path: Path, size: int, sha256: str) -> None:
    found = path.stat().st_size
    if found != size:
        raise Broken(f"{path.name} has {found:,} bytes, the manifest says {size:,}")
    if file_sha256(path) != sha256:
        raise Broken(f"the content of {path.name} does not match the manifest (SHA-256 differs)")
