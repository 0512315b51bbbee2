"""How fast the loader is: end to end and for each core, beside decoding alone, OpenCLIP's and timm's loaders.

The contenders run in turn, several repetitions of each, so that other load on the machine affects all alike;
the figures are medians over the repetitions, each with its smallest and its largest.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from clipcluster.errors import UserError
from clipcluster.text import counted
from tools.bench import loader_parts

PEER_PACKAGES = "open_clip_torch==3.3.0 webdataset==0.2.86"
SYNTHETIC, SHARDS = 512, 8  # images of the set that is made where none is given, and its tars


@dataclass(frozen=True)
class Settings:
    """What is measured: each number of `workers`, in `repetitions` of `seconds`; `augmented`: timm's too."""

    shards: Path
    index: Path | None = None
    workers: tuple[int, ...] = (1,)
    size: int = 224
    batch_size: int = 64
    seconds: float = 3.0
    repetitions: int = 5
    peer: Path | None = None
    normalise: bool = False
    augmented: bool = False


@dataclass
class Figure:
    """Images per second of one contender in each repetition, and what its processes used."""

    rates: list[float] = field(default_factory=list)
    per_core: list[float] = field(default_factory=list)
    uss: list[int] = field(default_factory=list)
    used: float = 0.0  # processor time until the end of the last repetition, in seconds

    def as_dict(self) -> dict[str, Any]:
        """The JSON form: medians, with least and largest; worker memory in bytes."""
        return {
            "images_per_second": round(statistics.median(self.rates), 1),
            "least": round(min(self.rates), 1),
            "largest": round(max(self.rates), 1),
            "images_per_core_second": round(statistics.median(self.per_core), 1) if self.per_core else None,
            "worker_uss_bytes": max(self.uss, default=None),
            "worker_uss_bytes_by_turn": self.uss,
        }


def measure(settings: Settings, say: Any = lambda text: None) -> dict[str, Any]:
    """Measures every number of workers and returns the document that `--json` prints; `say` gets progress.

    Raises UserError for shards without captions, a peer that cannot run, a contender that ends early.
    """
    _require_pairs(settings)
    if settings.peer is not None:
        _check_peer(settings.peer)
    results = []
    for workers in settings.workers:
        say(f"{counted(workers, 'worker')}, {settings.repetitions} x {settings.seconds:g} s:")
        results.append(_measure(settings, workers, say))
    return {
        "shards": str(settings.shards),
        "size": settings.size,
        "batch_size": settings.batch_size,
        "crop_scale": loader_parts.CROP_SCALE,
        "interpolation": "bicubic, antialiased",
        "batches": "float32, normalised on the CPU"
        if settings.normalise
        else "uint8, normalised on the device",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **results[-1],
        "results": results,
    }


def _measure(settings: Settings, workers: int, say: Any) -> dict[str, Any]:
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="clipcluster-bench-"))

        def group(name: str, part: str, processes: int) -> list[Contender]:
            made = [Contender(name, part, settings, workers, scratch) for _ in range(processes)]
            for contender in made:
                stack.callback(contender.close)
            return made

        groups = [
            group("the loader", "loader", 1),
            group("decoding", "decode", workers),
            group("decoding and resizing", "resize", workers),
        ]
        if settings.augmented:
            groups.append(group("the loader, augmented", "augmented", 1))
            groups.append(group("timm's loader", "timm", 1))
        if settings.peer is not None:
            groups.append(group("OpenCLIP's loader", "open_clip", 1))
        about = [[contender.answer() for contender in group] for group in groups]
        figures = _repeated(groups, settings, say)
    ours, decode, resize = figures[:3]
    result = {
        "workers": workers,
        **ours.as_dict(),
        "decode_images_per_second": decode.as_dict()["images_per_second"],
        "decode_resize_images_per_second": resize.as_dict()["images_per_second"],
        "share_of_decode": _ratios(ours, decode),
        "share_of_decode_resize": _ratios(ours, resize),
        "alone": {"decode": decode.as_dict(), "decode_resize": resize.as_dict()},
    }
    if settings.augmented:
        augmented, timm = figures[3:5]
        result["augmented"] = {
            "augmentation": f"{loader_parts.AUGMENT}, flip, random erasing {loader_parts.ERASING}",
            **augmented.as_dict(),
            "timm": {**about[4][0], **timm.as_dict(), "times_faster": _ratios(augmented, timm)},
        }
    if settings.peer is not None:
        result["peer"] = {**about[-1][0], **figures[-1].as_dict(), "times_faster": _ratios(ours, figures[-1])}
    return result


def _repeated(groups: Sequence[Sequence[Contender]], settings: Settings, say: Any) -> list[Figure]:
    """All contenders in turn; the first repetition warms up and is not counted."""
    figures = [Figure() for _ in groups]
    for repetition in range(settings.repetitions + 1):
        for group, figure in zip(groups, figures, strict=True):
            for contender in group:
                contender.start(settings.seconds if repetition else min(1.0, settings.seconds))
            answers = [contender.answer() for contender in group]
            before, figure.used = figure.used, sum(contender.cpu_seconds() for contender in group)
            if not repetition:
                continue
            figure.rates.append(sum(answer["images"] / answer["seconds"] for answer in answers))
            images = sum(answer["images"] + answer["untimed"] for answer in answers)
            if figure.used > before:
                figure.per_core.append(images / (figure.used - before))
            figure.uss += group[0].largest_worker()
        if repetition:
            rates = zip(groups, figures, strict=True)
            say("  " + ", ".join(f"{group[0].name} {figure.rates[-1]:.0f}" for group, figure in rates))
    return figures


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


class Contender:
    """A program that runs one part of `loader_parts`: it starts once, waits, and works on request.

    So other load on the machine affects all of them alike.
    """

    def __init__(self, name: str, part: str, settings: Settings, workers: int, scratch: str) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        here = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        program = [sys.executable, "-m", loader_parts.__name__]
        if part == "open_clip":
            program = [str(settings.peer), "-I", loader_parts.__file__]
        parameters = {**asdict(settings), "part": part, "workers": workers, "scratch": scratch}
        self._process = psutil.Popen(
            [*program, json.dumps(parameters, default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            start_new_session=True,
        )

    def start(self, seconds: float) -> None:
        """Tells it to work for so many seconds."""
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says of itself once it is ready, then what it did each time it was started.

        Waits for it. UserError with its last line of output if it ended early.
        """
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self._process.wait()
        self._stderr.seek(0)
        lines = [text.strip() for text in self._stderr.read().splitlines() if text.strip()]
        raise UserError(f"{self.name} ended early: {lines[-1] if lines else 'it printed no error'}")

    def cpu_seconds(self) -> float:
        """Processor time of its processes until now, in seconds."""
        times = [process.cpu_times() for process in (self._process, *self._workers())]
        return sum(spent.user + spent.system for spent in times)

    def largest_worker(self) -> list[int]:
        """Memory that its largest worker shares with no other process (USS), in bytes; empty without any."""
        return sorted(process.memory_full_info().uss for process in self._workers())[-1:]

    def close(self) -> None:
        """Ends it and its children, and waits."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stderr.close()

    def _workers(self) -> list[psutil.Process]:
        return self._process.children(recursive=True)


def _require_pairs(settings: Settings) -> None:
    """UserError for shards that make no batch of pairs, and as `open_folder`."""
    from clipcluster.data.shards.open import open_folder

    if settings.batch_size < max(settings.workers):
        least = f"give at least {max(settings.workers)}, one sample for each of the workers"
        raise UserError(f"--batch-size {settings.batch_size}: {least}")
    shards = open_folder(settings.shards, settings.index)
    if shards.n_pairs == 0:
        raise UserError(
            f"{settings.shards}: no sample has a caption; the benchmark loads pairs of image and caption"
        )
    if shards.n_samples < settings.batch_size:
        raise UserError(
            f"{settings.shards}: {shards.n_samples} samples, less than one batch; give a smaller --batch-size"
        )


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
    from clipcluster.data.shards.indexing import index_folder
    from clipcluster.data.shards.tar import END, header, padded

    with tempfile.TemporaryDirectory(prefix="clipcluster-bench-") as folder:
        for shard in range(SHARDS):
            with open(Path(folder) / f"{shard:05d}.tar", "wb") as tar:
                for number in range(shard, SYNTHETIC, SHARDS):
                    text = f"a synthetic photograph, number {number}".encode()
                    for extension, data in (("jpg", _photograph(number)), ("txt", text)):
                        tar.write(header(f"{number:05d}.{extension}", len(data)))
                        tar.write(data.ljust(padded(len(data)), b"\0"))
                tar.write(END)
        index_folder(Path(folder))
        yield Path(folder)


def _photograph(number: int) -> bytes:
    from PIL import Image

    numbers = np.random.default_rng(number)
    coarse = Image.fromarray(numbers.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
    grain = numbers.normal(0, 14, (375, 500, 1))
    noisy = (pixels.astype(np.int16) + grain.astype(np.int16)).clip(0, 255)
    file = BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG", quality=93)
    return file.getvalue()
