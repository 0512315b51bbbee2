"""Writing a checkpoint: a copy in memory, then its files in a temporary folder, the manifest last.

Rank 0 writes what is equal on all ranks. Where a part differs by rank, every rank writes its own file into
the same folder and a receipt with size and SHA-256; rank 0 waits for the receipts and writes the manifest of
all files. Nothing here is a collective: it runs in a thread, beside the training.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipcluster.runs.checkpoints import MANIFEST, STATE, Parts, file_entry, is_per_rank, tensors_file
from clipcluster.runs.files import fsync_folder, read_json, write_json

FORMAT = 2
PEER_SECONDS = 600.0
"""How long rank 0 waits for the files of the other ranks once its own are written."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 4 << 20

Files = dict[str, dict[str, Any]]
"""The files of a checkpoint as its manifest lists them: name -> `bytes` and `sha256`."""
Tell = Callable[[int], None]
"""Called with the bytes of every chunk written (0: still waiting for a rank); raises Dropped to give up."""


class Dropped(Exception):
    """The write was given up in favour of a newer one."""


@dataclass(frozen=True)
class Contents:
    """What one rank writes of a checkpoint, in memory on the CPU: tensors by file, and plain values.

    number: how many checkpoints this process began before; with the attempt it names the temporary folder,
        which is the same on all ranks. ranks: how many ranks write files.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    rank: int = 0
    ranks: int = 1
    number: int = 0

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


def take_copy(
    step: int, state: Mapping[str, Any], parts: Parts, *, rank: int = 0, ranks: int = 1, number: int = 0
) -> Contents:
    """Copy what `rank` writes to the CPU. Later steps do not change the copy.

    Tensors of a part go to PART.safetensors, its other values into state.json under the part's name. A part
    that differs by rank holds tensors alone, each rank's in a file of its own; raises TypeError otherwise.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Any] = {}
    own = {name for name, part in parts.items() if is_per_rank(part)}
    for name, part in parts.items():
        if rank and name not in own:
            continue
        values = part.state_dict()
        found = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        if found:
            file = tensors_file(name, rank if name in own else None)
            tensors[file] = {key: value.detach().to("cpu", copy=True) for key, value in found.items()}
        rest = {key: value for key, value in values.items() if key not in found}
        if rest and name in own:
            raise TypeError(f"{name} differs by rank and may hold tensors alone, not {', '.join(rest)}")
        if rest:
            plain[name] = rest
    ranks = ranks if own else 1
    about = {"parts": sorted(parts), "per_rank": sorted(own), "ranks": ranks}
    return Contents(step, tensors, {"format": FORMAT, **state, **plain, **about}, rank, ranks, number)


def write_complete(aside: Path, contents: Contents, about: Mapping[str, Any], tell: Tell) -> None:
    """Rank 0: write its files, wait for those of the other ranks, and write state and manifest.

    Raises OSError, also where another rank could not write its files or did not within PEER_SECONDS.
    """
    files = _write_tensors(aside, contents, tell)
    for rank in range(1, contents.ranks):
        files |= _await_receipt(aside, rank, contents.step, tell)
    files[STATE] = _write_file(aside / STATE, [_json(contents.state)], tell)
    manifest = {"format": FORMAT, "step": contents.step, "time": time.time(), **about, "files": files}
    _write_file(aside / MANIFEST, [_json(manifest)], tell)
    fsync_folder(aside)


def write_own_files(aside: Path, contents: Contents, tell: Tell) -> None:
    """Another rank: write its files and the receipt that rank 0 waits for. Raises OSError."""
    try:
        files = _write_tensors(aside, contents, tell)
    except OSError as error:
        write_json(_receipt(aside, contents.rank), {"error": str(error)})
        raise
    write_json(_receipt(aside, contents.rank), {"files": files})


def _receipt(aside: Path, rank: int) -> Path:
    return aside / f".rank-{rank}.json"


def _await_receipt(aside: Path, rank: int, step: int, tell: Tell) -> Files:
    """The files that a rank wrote, by its receipt, which is removed. Raises OSError as `write_complete`."""
    path, deadline = _receipt(aside, rank), time.monotonic() + PEER_SECONDS
    while not path.exists():
        tell(0)
        if time.monotonic() > deadline:
            reason = f"rank {rank} did not write its files of step {step} within {PEER_SECONDS:g} s"
            raise OSError(errno.ETIMEDOUT, reason)
        time.sleep(0.05)
    receipt = read_json(path)
    if "error" in receipt:
        raise OSError(errno.EIO, f"rank {rank} could not write its files: {receipt['error']}")
    path.unlink()
    return dict(receipt["files"])


def _write_tensors(aside: Path, contents: Contents, tell: Tell) -> Files:
    return {
        name: _write_file(aside / name, safetensors_bytes(tensors), tell)
        for name, tensors in contents.tensors.items()
    }


def _write_file(path: Path, chunks: Iterable[bytes | memoryview], tell: Tell) -> dict[str, Any]:
    """Write and fsync a file; its entry in the manifest."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as stream:
        for chunk in chunks:
            rest = memoryview(chunk)
            digest.update(rest)
            size += len(rest)
            while rest:
                rest = rest[stream.write(rest) :]
            tell(len(chunk))
        os.fsync(stream.fileno())
    return file_entry(size, digest.hexdigest())


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> Iterator[memoryview | bytes]:
    """The bytes of a safetensors file in chunks of at most 4 MiB; the tensors are on the CPU.

    It is streamed because the library's own writer needs a second copy of all tensors in memory.
    Format (safetensors' README): 8 bytes little-endian header length, a JSON header `{name: {dtype, shape,
    data_offsets}}` padded with spaces to a multiple of 8, the tensors' bytes without gaps. Raises KeyError
    for a dtype that is not in `DTYPES`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Widest types first keeps every tensor aligned to its own size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        if tensor.numel():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), CHUNK):
                yield data[start : start + CHUNK]


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def versions() -> dict[str, str]:
    """The versions of Python, torch and clipcluster, for the manifest."""
    try:
        own = version("clipcluster")
    except PackageNotFoundError:  # run from a folder, never installed
        own = "not installed"
    return {"python": platform.python_version(), "torch": torch.__version__, "clipcluster": own}
