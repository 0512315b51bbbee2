"""How fast the loader is: end to end and for each core, beside decoding alone and beside OpenCLIP's loader.

The contenders run in turn, several repetitions of each, so that other load on the machine affects all alike;
the figures are medians over the repetitions, each with its smallest and its largest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.errors import UserError
from clipcluster.text import counted
from tools.bench.loader_parts import CROP_SCALE
from tools.bench.process import Contender, cpu_seconds, descendants, unique_bytes

PEER_PACKAGES = "open_clip_torch==3.3.0 webdataset==0.2.86"
SYNTHETIC, SHARDS = 512, 8  # images of the set that is made where none is given, and its tars


@dataclass(frozen=True)
class Settings:
    """What is measured: each number of `workers`, in `repetitions` of `seconds`."""

    shards: Path
    index: Path | None = None
    workers: tuple[int, ...] = (1,)
    size: int = 224
    batch_size: int = 64
    seconds: float = 3.0
    repetitions: int = 5
    peer: Path | None = None
    normalise: bool = False
    context_length: int = 77

    def __post_init__(self) -> None:
        least = min([*self.workers, 1])
        if not self.workers or least < 1:
            raise UserError(
                f"--workers {','.join(map(str, self.workers))}: one or more numbers from 1, as 1,2"
            )
        for name, value, smallest in (
            ("--size", self.size, 8),
            ("--batch-size", self.batch_size, max(self.workers)),
            ("--repetitions", self.repetitions, 1),
        ):
            if value < smallest:
                raise UserError(f"{name} {value}: at least {smallest}")
        if not 0 < self.seconds <= 3600:
            raise UserError(f"--seconds {self.seconds:g}: more than 0 and at most 3600")


@dataclass
class Figure:
    """Images per second of one contender in each repetition, and what its processes used."""

    name: str
    rates: list[float] = field(default_factory=list)
    per_core: list[float] = field(default_factory=list)
    uss: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form: medians, with least and largest; worker memory in bytes."""
        return {
            "images_per_second": round(self.rate, 1),
            "least": round(min(self.rates), 1),
            "largest": round(max(self.rates), 1),
            "images_per_core_second": round(statistics.median(self.per_core), 1) if self.per_core else None,
            "worker_uss_bytes": max(self.uss) if self.uss else None,
            "worker_uss_bytes_by_turn": self.uss,
        }


def measure(settings: Settings, say: Any = lambda text: None) -> dict[str, Any]:
    """Measures every number of workers and returns the document that `--json` prints; `say` gets progress.

    Raises UserError for shards without captions, a peer that cannot run, a contender that ends early.
    """
    tars = _tars(settings)
    if settings.peer is not None:
        _check_peer(settings.peer)
    results = []
    for workers in settings.workers:
        say(f"{counted(workers, 'worker')}, {settings.repetitions} x {settings.seconds:g} s:")
        results.append(_measure(settings, workers, tars, say))
    return {
        "shards": str(settings.shards),
        "size": settings.size,
        "batch_size": settings.batch_size,
        "crop_scale": CROP_SCALE,
        "interpolation": "bicubic, antialiased",
        "batches": "float32, normalised on the CPU"
        if settings.normalise
        else "uint8, normalised on the device",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **results[-1],
        "results": results,
    }


def _measure(settings: Settings, workers: int, tars: Sequence[str], say: Any) -> dict[str, Any]:
    with ExitStack() as stack:
        groups = [
            _contenders(stack, "the loader", settings, "loader", workers, 1),
            _contenders(stack, "decoding", settings, "decode", workers, workers),
            _contenders(stack, "decoding and resizing", settings, "resize", workers, workers),
        ]
        if settings.peer is not None:
            groups.append([_peer(stack, settings, workers, tars)])
        about = [[contender.answer() for contender in group] for group in groups]
        figures = _repeated(groups, settings, say)
    return _result(workers, figures, about[-1][0] if settings.peer is not None else None)


def _repeated(groups: Sequence[Sequence[Contender]], settings: Settings, say: Any) -> list[Figure]:
    """All contenders in turn; the first repetition warms up and is not counted."""
    figures = [Figure(group[0].name) for group in groups]
    used: list[float | None] = [None] * len(groups)
    for repetition in range(settings.repetitions + 1):
        for at, (group, figure) in enumerate(zip(groups, figures, strict=True)):
            for contender in group:
                contender.start(settings.seconds if repetition else min(1.0, settings.seconds))
            answers = [contender.answer() for contender in group]
            before, used[at] = used[at], _cpu_seconds(group)
            if not repetition:
                continue
            figure.rates.append(sum(answer["images"] / answer["seconds"] for answer in answers))
            spent = (used[at] or 0) - (before or 0)
            if spent > 0:
                figure.per_core.append(sum(a["images"] + a["untimed"] for a in answers) / spent)
            figure.uss += _largest_worker(group[0])
        if repetition:
            say("  " + ", ".join(f"{figure.name} {figure.rates[-1]:.0f}" for figure in figures))
    return figures


def _cpu_seconds(group: Sequence[Contender]) -> float | None:
    spent = [cpu_seconds(contender.pid) for contender in group]
    return sum(seconds for seconds in spent if seconds is not None) if all(spent) else None


def _largest_worker(contender: Contender) -> list[int]:
    sizes = [unique_bytes(pid) for pid in descendants(contender.pid)]
    return [max(size for size in sizes if size is not None)] if any(sizes) else []


def _result(workers: int, figures: Sequence[Figure], peer: Mapping[str, Any] | None) -> dict[str, Any]:
    ours, decode, resize = figures[:3]
    result = {
        "workers": workers,
        **ours.as_dict(),
        "decode_images_per_second": round(decode.rate, 1),
        "decode_resize_images_per_second": round(resize.rate, 1),
        "share_of_decode": _ratios(ours, decode),
        "share_of_decode_resize": _ratios(ours, resize),
        "alone": {"decode": decode.as_dict(), "decode_resize": resize.as_dict()},
    }
    if peer is not None:
        result["peer"] = {**peer, **figures[3].as_dict(), "times_faster": _ratios(ours, figures[3])}
    return result


def _ratios(a: Figure, b: Figure) -> dict[str, float | None]:
    """By the clock, each repetition, and by processor time, which other load affects less."""
    clock = [one / other for one, other in zip(a.rates, b.rates, strict=True)]
    cores = [one / other for one, other in zip(a.per_core, b.per_core, strict=False)]
    return {
        "median": round(statistics.median(clock), 3),
        "least": round(min(clock), 3),
        "largest": round(max(clock), 3),
        "by_core": round(statistics.median(cores), 3) if cores else None,
    }


def _contenders(
    stack: ExitStack, name: str, settings: Settings, part: str, workers: int, processes: int
) -> list[Contender]:
    """`processes` programs that run one part of this project."""
    parameters = {
        "part": part,
        "shards": str(settings.shards.absolute()),
        "index": None if settings.index is None else str(settings.index.absolute()),
        "workers": workers,
        "lead": 2 * workers + 2,
        **{key: getattr(settings, key) for key in ("size", "batch_size", "normalise", "context_length")},
    }
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tools.bench.loader_parts", json.dumps(parameters)]
    environment = {**os.environ, "PYTHONPATH": path}
    return [_started(stack, Contender(name, command, environment)) for _ in range(processes)]


def _peer(stack: ExitStack, settings: Settings, workers: int, tars: Sequence[str]) -> Contender:
    parameters = {
        "tars": list(tars),
        "workers": workers,
        "lead": 2 * workers + 2,
        "crop_scale": CROP_SCALE,
        **{key: getattr(settings, key) for key in ("size", "batch_size", "context_length")},
    }
    program = Path(__file__).with_name("open_clip_loader.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(settings.peer), "-I", str(program), json.dumps(parameters)]
    return _started(stack, Contender("OpenCLIP's loader", command, environment))


def _started(stack: ExitStack, contender: Contender) -> Contender:
    """Leaves it to `stack` to end it."""
    stack.callback(contender.close)
    return contender


def _tars(settings: Settings) -> list[str]:
    """The tars of the folder. UserError as `open_source`."""
    from clipcluster.data.shards.open import open_folder

    shards = open_folder(settings.shards, settings.index)
    if shards.n_pairs == 0:
        raise UserError(
            f"{settings.shards}: no sample has a caption; the benchmark loads pairs of image and caption"
        )
    if shards.n_samples < settings.batch_size:
        raise UserError(
            f"{settings.shards}: {shards.n_samples} samples, less than one batch; give a smaller --batch-size"
        )
    return [str(shards.shard_path(shard).absolute()) for shard in range(len(shards))]


def _check_peer(python: Path) -> None:
    """UserError for a file that is no interpreter, or one that lacks the packages."""
    advice = f"make one with: python -m venv peer && peer/bin/pip install {PEER_PACKAGES}"
    code = "import open_clip, open_clip_train.data, webdataset"
    try:
        done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--peer {python}: no Python interpreter ({error.strerror}); {advice}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise UserError(f"--peer {python}: {lines[-1] if lines else 'OpenCLIP cannot be imported'}; {advice}")


@contextmanager
def synthetic_photographs() -> Iterator[Path]:
    """A folder of shards with synthetic images: JPEGs of 500 x 375 pixels, about 110 kB each."""
    import io
    import tarfile

    from PIL import Image

    from clipcluster.data.shards.indexing import index_folder

    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    with tempfile.TemporaryDirectory(prefix="clipcluster-bench-") as folder:
        for shard in range(SHARDS):
            with tarfile.open(Path(folder) / f"{shard:05d}.tar", "w") as tar:
                for number in range(shard, SYNTHETIC, SHARDS):
                    numbers = np.random.default_rng(number)
                    coarse = Image.fromarray(numbers.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                    pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
                    grain = numbers.normal(0, 14, (375, 500, 1))
                    file = io.BytesIO()
                    noisy = (pixels.astype(np.int16) + grain.astype(np.int16)).clip(0, 255)
                    Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG", quality=93)
                    add(tar, f"{number:05d}.jpg", file.getvalue())
                    add(tar, f"{number:05d}.txt", f"a synthetic photograph, number {number}".encode())
        index_folder(Path(folder))
        yield Path(folder)
