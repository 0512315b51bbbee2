"""Time and memory of retrieval beside OpenCLIP's own computation on the same features. Prints lines of JSON.

    python tests/evals/measure_retrieval.py [--images 5000] [--captions 25000] [--width 512] [--threads 2]
        [--only ours|openclip]

Features are random, each caption near its image. Ours gives the grouped and the paired figures of both
directions, mean recalls and the loss; OpenCLIP 3.3.0 (`open_clip_train.train.get_clip_metrics`) the paired
ones, on images repeated for each of their captions. Each runs in a process of its own, one after the other.
Memory is the peak of the process beyond what it held with its imports and the features loaded (Linux).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional

OURS, OPENCLIP = "ours", "openclip"


def main() -> None:
    """Measure both in turns, and compare what both give."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--captions", type=int, default=25_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=[OURS, OPENCLIP])
    parser.add_argument("--of", choices=[OURS, OPENCLIP], help=argparse.SUPPRESS)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.captions < given.images:
        parser.error("every image needs a caption: give as many captions as images, or more")
    torch.set_num_threads(given.threads)
    if given.of:
        print(json.dumps(measured(given.of, given.features)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "features.pt"
        torch.manual_seed(0)
        of_image = torch.arange(given.captions) * given.images // given.captions
        images = torch.randn(given.images, given.width)
        texts = images[of_image] + 7 * torch.randn(given.captions, given.width)
        sides = [functional.normalize(side, dim=1) for side in (images, texts)]
        torch.save({"images": sides[0], "texts": sides[1], "of_image": of_image}, file)
        del images, texts, sides
        found = {}
        for of in (given.only,) if given.only else (OURS, OPENCLIP):
            command = [sys.executable, __file__, "--of", of, "--features", file]
            command += ["--threads", given.threads]
            done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
            found[of] = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(found[of]))
    if given.only:
        return
    ours, theirs = (found[of]["figures"] for of in (OURS, OPENCLIP))
    names = [("paired_i2t", "image_to_text"), ("paired_t2i", "text_to_image")]
    kinds = [("r1", "R@1"), ("r5", "R@5"), ("r10", "R@10"), ("mean_rank",) * 2, ("median_rank",) * 2]
    # Copies of an image tie: OpenCLIP 3.3 leaves their order to the sorting, here the first comes first.
    apart = {f"{a}_{k}": abs(ours[f"{a}_{k}"] - theirs[f"{b}_{i}"]) for a, b in names for k, i in kinds}
    times = {
        kind: found[OPENCLIP][kind] / found[OURS][kind] for kind in ("seconds", "processor_seconds", "mb")
    }
    print(json.dumps({"times": times, "apart": apart}))


def measured(of: str, file: Path) -> dict[str, object]:
    """What one of the two takes: seconds, and MB beyond the features."""
    features = torch.load(file, weights_only=True)
    images, texts, of_image = features["images"], features["texts"], features["of_image"]
    if of == OURS:
        from clipcluster.evals.loss import loss_of_groups
        from clipcluster.evals.ranking import Pairs, rank_pairs
        from clipcluster.evals.retrieval import figures_of
        from clipcluster.runtime.world import World

        world = World(0, 1, 0, torch.device("cpu"))
        pairs = Pairs(of_image, torch.arange(len(texts)))
        model = SimpleNamespace(logit_scale=torch.tensor([4.6]), logit_bias=None)
        firsts = torch.searchsorted(of_image, torch.arange(len(images)))

        def compute() -> dict[str, float]:
            found = figures_of(rank_pairs(images, texts, pairs, world, lambda: None))
            return {**found, "loss": loss_of_groups(model, images, texts[firsts], world, lambda: None)}
    else:
        from open_clip_train.train import get_clip_metrics

        repeated = images[of_image]

        def compute() -> dict[str, float]:
            found = get_clip_metrics(repeated, texts, torch.tensor(100.0))
            return {name: float(value) for name, value in found.items()}

    before = held("VmRSS")
    began, worked = time.perf_counter(), time.process_time()
    figures = compute()
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    peak = held("VmHWM")
    return {
        "of": of,
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "mb": round((peak - before) / 1e6),
        "figures": {name: round(value, 6) for name, value in figures.items()},
    }


def held(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most (ru_maxrss would count what its parent held, too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
