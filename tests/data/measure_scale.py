"""Measures the index at scale: `python tests/data/measure_scale.py [FOLDER]`. Prints JSON; needs 1 GB there.

- 1.28 million shards with 12.8 billion samples, their index made up (the captions' column is a hole in the
  file): opened and planned by 8 ranks with 2 loader workers each, in real processes, with and without torch;
- the first batch of a resume in the middle of 12.8 million samples against that of a start, through the
  training's loader, on 1,280 sparse shards whose rows all point at one photograph;
- the header scan, and the whole indexing, of a tar of 30,000 members.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.data.shards.columns import MAGIC
from clipcluster.data.shards.folder_index import COLUMNS_FILE, write_folder_index
from clipcluster.data.shards.indexing import index_shard, write_entry
from clipcluster.data.shards.shard_index import FORMAT
from clipcluster.data.shards.tar import END, header, padded, scan

SHARDS, PER_SHARD = 1_280_000, 10_000
RANKS, WORKERS, BATCH = 8, 2, 384
RECIPE: dict[str, Any] = {
    "name": "scale",
    "seed": 0,
    "data": {"batch_size": BATCH, "image": {"size": 224, "crop_scale": [0.9, 1.0]}},
    "model": {"image": {"timm": "unused"}, "text": {"arch": "gpt2"}},
    "optim": {"lr": 1e-3},
    "train": {"duration": "1 epoch"},
}


def table_of(folder: Path, shards: int, per_shard: int) -> None:
    """An index.bin of format 2 with one caption a sample, whose columns by sample are holes."""
    names = b"".join(b"%07d.tar" % number for number in range(shards))
    counts = np.full(shards, per_shard, np.int64)
    columns: dict[str, tuple[str, list[int], bytes]] = {
        name: (array.dtype.str, list(array.shape), array.tobytes())
        for name, array in {
            "samples": counts,
            "sample_ends": np.cumsum(counts),
            "bytes": counts,
            "mtime_ns": counts,
            "sha256": np.random.default_rng(0).integers(0, 256, (shards, 32)).astype(np.uint8),
            "name_ends": np.arange(1, shards + 1) * 11,
            "names": np.frombuffer(names, np.uint8),
            "more_than/default": np.full((1, shards), per_shard, np.int32),
        }.items()
    }
    columns["captions/default"] = ("|u1", [shards * per_shard], b"")
    at, layout = 0, {}
    for name, (dtype, shape, _) in columns.items():
        layout[name] = {"dtype": dtype, "shape": shape, "offset": at}
        at += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64
    total = shards * per_shard
    meta = {"format": FORMAT, "fingerprint": "0" * 64, "samples": total, "captions": {"default": total}}
    head = json.dumps({"meta": meta, "columns": layout}).encode()
    base = -(-(16 + len(head)) // 64) * 64
    with open(folder / COLUMNS_FILE, "wb") as file:
        file.write(MAGIC + len(head).to_bytes(8, "little") + head)
        for name, (_, _, data) in columns.items():
            file.seek(base + layout[name]["offset"])
            file.write(data)
        file.truncate(base + at)


def recipe_of(folder: Path) -> Any:
    """A recipe whose one source is the folder."""
    from clipcluster.recipe.sections.recipe import Recipe

    data = {**RECIPE["data"], "train": [{"shards": str(folder), "captions_in": "default"}]}
    return Recipe.model_validate({**RECIPE, "data": data})


def planned(folder: Path) -> tuple[Any, Any, Any]:
    """The recipe, its opened source and its sampler: what a rank makes before the first batch."""
    from clipcluster.data.sampling.sampler import sampler_of
    from clipcluster.data.shards.open import open_source

    recipe = recipe_of(folder)
    shards = open_source(recipe.data.train[0], text=True)
    return recipe, shards, sampler_of(recipe, [shards])


def run_worker(pipe: Any) -> None:
    """A loader worker as far as the index is concerned: it opens the source again and finds its samples."""
    pipe.send("ready")
    shards, positions = pipe.recv()
    pipe.send(len({shards.shard_path(shards.locate(position)[0]) for position in positions}))
    with contextlib.suppress(EOFError):
        pipe.recv()  # until the rank ends


def run_rank(folder: Path, rank: int, torch_too: bool) -> None:
    """One rank, its fork server and its workers; it speaks with `a_node` through stdin and stdout."""
    importlib.import_module("clipcluster.data.sampling.sampler")
    context = get_context("forkserver")
    preload = ["numpy", "clipcluster.data.shards.open"]
    if torch_too:
        preload += importlib.import_module("clipcluster.data.loading.worker_pool")._PRELOAD
    context.set_forkserver_preload(preload)
    pipes = []
    for _ in range(WORKERS):
        ours, theirs = context.Pipe()
        context.Process(target=run_worker, args=(theirs,), daemon=True).start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    _, shards, sampler = planned(folder)
    draws = sampler.slots(16_000_000, BATCH * rank // RANKS, BATCH * (rank + 1) // RANKS)
    seconds = time.perf_counter() - began
    for pipe, positions in zip(pipes, np.array_split(draws.position, WORKERS), strict=True):
        pipe.send((shards, positions.tolist()))
    opened = [pipe.recv() for pipe in pipes]
    print(json.dumps({"seconds": seconds, "shards": sum(opened)}), flush=True)
    sys.stdin.readline()


def family(process: int) -> list[int]:
    """A process and all below it."""
    with open(f"/proc/{process}/task/{process}/children") as file:
        children = [int(child) for child in file.read().split()]
    return [process, *(one for child in children for one in family(child))]


def pss(processes: Sequence[int]) -> float:
    """Proportional set size of processes in MB, memory that several share counted once."""
    total = 0
    for process in processes:
        with open(f"/proc/{process}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total * 1024 / 1e6


def a_node(folder: Path, *, torch_too: bool) -> dict[str, float]:
    """All processes of a node open and plan the folder at once."""
    command = [sys.executable, __file__, str(folder), "--rank"]
    extra = ["--torch"] if torch_too else []
    ranks = [
        subprocess.Popen([*command, str(rank), *extra], stdin=-1, stdout=-1, text=True)
        for rank in range(RANKS)
    ]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"  # noqa: PT018
    everybody = [one for rank in ranks for one in family(rank.pid)]
    before = pss(everybody)
    began = time.perf_counter()
    for rank in ranks:
        assert rank.stdin is not None
        print(file=rank.stdin, flush=True)
    reports = [json.loads(rank.stdout.readline()) for rank in ranks if rank.stdout]
    seconds = time.perf_counter() - began
    after = pss(everybody)
    for rank in ranks:
        rank.communicate("\n")
    return {
        "processes": len(everybody),
        "seconds_until_all_have_their_first_batch": round(seconds, 2),
        "seconds_of_the_slowest_rank": round(max(report["seconds"] for report in reports), 2),
        "pss_mb_imports_alone": round(before),
        "pss_mb": round(after),
        "pss_mb_index_and_plan": round(after - before),
    }


def photograph(side: int = 512) -> bytes:
    """A JPEG of about 110 kB."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def sparse_shards(folder: Path, shards: int, per_shard: int) -> int:
    """Sparse tars that begin with one real sample, and an index in which all their rows point at it."""
    image, text = photograph(), b"a photograph of nothing at all"
    head, between = header("s.jpg", len(image)), padded(len(image)) - len(image)
    real = head + image + bytes(between) + header("s.txt", len(text)) + text
    ones = np.ones(per_shard, np.int64)
    rows = {
        "offset": 0 * ones,
        "image_offset": len(head) * ones,
        "image_size": len(image) * ones,
        "text_offset/default": (len(real) - len(text)) * ones,
        "text_size/default": len(text) * ones,
        "text_kind/default": 2 * ones,
        "captions/default": ones,
        "class": -ones,
    }
    entries = []
    for number in range(shards):
        path = folder / f"{number:05d}.tar"
        with open(path, "wb") as file:
            file.write(real)
            file.truncate(per_shard * padded(len(real)) + len(END))
        digest = hashlib.sha256(path.name.encode()).hexdigest()  # made up: nobody reads these terabytes
        entries.append(write_entry(path, folder, ("default",), digest, rows))
    write_folder_index(folder, ("default",), entries)
    return len(image)


def first_batch(folder: Path, step: int) -> float:
    """Seconds from nothing opened to the batch `step`, through the training loader with two workers."""
    from clipcluster.data.loading.loader import Loader
    from clipcluster.data.tokenizer import load_tokenizer

    began = time.perf_counter()
    recipe, shards, sampler = planned(folder)
    tokenizer = load_tokenizer(recipe.data.text, folder)
    loader = Loader([shards], sampler, recipe.data, tokenizer=tokenizer, seed=0, workers=WORKERS, start=step)
    try:
        assert next(loader).index == step
        return time.perf_counter() - began
    finally:
        loader.close()


def resume(folder: Path, shards: int = 1_280, per_shard: int = 10_000, times: int = 5) -> dict[str, float]:
    """Medians of the first batch at a start and in the middle of the epoch; the first try is thrown away."""
    size = sparse_shards(folder, shards, per_shard)
    middle = shards * per_shard // BATCH // 2
    found: dict[int, list[float]] = {0: [], middle: []}
    for number in range(times + 1):
        for step, seconds in found.items():
            taken = first_batch(folder, step)
            if number:
                seconds.append(taken)
    start, later = (statistics.median(seconds) for seconds in found.values())
    return {
        "samples": shards * per_shard,
        "step": middle,
        "photograph_bytes": size,
        "first_batch_of_a_start_s": round(start, 3),
        "first_batch_of_a_resume_s": round(later, 3),
        "later_by_s": round(later - start, 3),
    }


def small_members(folder: Path, samples: int = 10_000) -> dict[str, float]:
    """The scan and the indexing of a tar with three small members a sample; best of five."""
    path = folder / "0.tar"
    with open(path, "wb") as file:
        for number in range(samples):
            record = b'{"captions": ["a scan of the handwritten digit %d"]}' % (number % 10)
            for extension, data in (("jpg", bytes(2_500)), ("json", record), ("cls", b"%d" % (number % 10))):
                file.write(header(f"{number:06d}.{extension}", len(data)) + data)
                file.write(bytes(padded(len(data)) - len(data)))
        file.write(END)
    scans, indexings = [], []
    for _ in range(5):
        began = time.perf_counter()
        with open(path, "rb") as file:
            members = sum(1 for _ in scan(file.fileno()))
        scans.append(time.perf_counter() - began)
        began = time.perf_counter()
        index_shard(path, folder, ("default",))
        indexings.append(time.perf_counter() - began)
    return {"members": members, "scan_s": round(min(scans), 4), "index_s": round(min(indexings), 4)}


def main(folder: Path) -> None:
    """Everything, each in a folder of its own below `folder`."""
    result: dict[str, Any] = {}
    for name in ("many", "resume", "small"):
        (folder / name).mkdir()
    table_of(folder / "many", SHARDS, PER_SHARD)
    result["shards"], result["samples"] = SHARDS, SHARDS * PER_SHARD
    result["ranks"], result["workers"] = RANKS, WORKERS
    result["without_torch"] = a_node(folder / "many", torch_too=False)
    result["with_torch"] = a_node(folder / "many", torch_too=True)
    result["resume"] = resume(folder / "resume")
    result["small_members"] = small_members(folder / "small")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--torch", action="store_true")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments.folder, arguments.rank, arguments.torch)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            main(Path(place))
