"""Zero-shot accuracy with staged unfreezing, without it, and from scratch, at the same budget on CIFAR-10.

    python tests/measure_stages.py --cifar FOLDER [--out DIR] [--seeds 0 1 2] [--fraction 0.02] [--epochs 30]

FOLDER has train/CLASS/*.jpg and test/CLASS/*.jpg. A fraction of the training images is set aside, and an
image tower (timm's resnet10t at 32 pixels) is trained by the classification task on all the others, for 4
epochs. Then it and a text tower from scratch are trained together on the images set aside, with captions
from one template: staged (the image tower frozen for half of the steps, then its last groups at a tenth of
the learning rate), all trainable from the start, and without the image tower's weights. Accuracy is that of
the 10,000 test images, with one template.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics

TEMPLATE = "a photo of a {c}."
COMMON = {
    "optim": {"lr": 1e-3, "weight_decay": 0.1, "warmup": "5%"},
    "cluster": {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 2, "time": "2 h"},
}
FROZEN = [
    {"at": "0 steps", "tower": "image", "trainable": "none"},
    {"at": "50%", "tower": "image", "trainable": "last 2", "lr_scale": 0.1},
]


def command(*words):
    """The command `clipcluster`; raises where it fails."""
    subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL
    )


def convert(source, out, fraction):
    """The class folders as shards, and the training images in two parts by a hash of their keys."""
    for split in ("train", "test"):
        command("shards", "convert", "folder", source / split, "--template", TEMPLATE, "--out", out / split)
    command("shards", "reshard", out / "train", "--fraction", fraction, "--out", out / "small")
    names = {split: keys(out / split) for split in ("train", "small")}
    rest = out / "large.txt"
    rest.write_text("\n".join(sorted(names["train"] - names["small"])))
    command("shards", "reshard", out / "train", "--samples", rest, "--out", out / "large")


def keys(folder):
    """The keys of all samples of a folder of shards."""
    from clipcluster.data.shards.open import open_folder

    shards = open_folder(str(folder))
    return {shards.read(number, text=False).key for number in range(shards.n_samples)}


def train(out, name, recipe):
    """One run in this machine's two cores; its folder."""
    file, runs = out / f"{name}.yaml", out / "runs"
    file.write_text(yaml.safe_dump({"name": name, **COMMON, **recipe}))
    command("submit", file, "--executor", "none", "--quick", "--runs", runs)
    run = next(path for path in runs.iterdir() if path.name.startswith(f"{name}-"))
    with open(out / f"{name}.log", "w") as log:
        subprocess.run(
            [sys.executable, "-m", "jobs.cli", "train", str(run)], check=True, stdout=log, stderr=log
        )
    return run


def last(run, metric):
    """The last value of a metric."""
    return [line[metric] for line in merged_metrics(Run(run)) if metric in line][-1]


def image(out, split):
    """The section `data` without texts."""
    return {
        "train": [{"shards": str(out / split)}],
        "batch_size": 250,
        "workers": 1,
        "image": {"size": 32, "crop_scale": [0.6, 1.0], "flip": True},
    }


def pretrained(out):
    """The run of the classification task."""
    return train(
        out,
        "pretraining",
        {
            "task": "classify",
            "data": image(out, "large"),
            "model": {"image": {"timm": "resnet10t"}},
            "train": {"duration": "4 epochs"},
            "evaluate": {"classification": [str(out / "test")]},
        },
    )


def contrastive(out, seed, epochs, weights, freeze):
    """The recipe of a contrastive run on the small part."""
    return {
        "seed": seed,
        "data": {**image(out, "small"), "text": {"tokenizer": "bytes", "context_length": 32}},
        "model": {
            "image": {"timm": "resnet10t", "weights": weights},
            "text": {"clip": {"width": 128, "layers": 2, "heads": 2}},
            "embed_dim": 128,
        },
        "freeze": freeze,
        "train": {"duration": f"{epochs} epochs"},
        "evaluate": {"zero_shot": [str(out / "test")]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("stages"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fraction", type=float, default=0.02, help="of the training images, set aside")
    parser.add_argument("--epochs", type=int, default=30, help="on the images set aside")
    asked = parser.parse_args()
    convert(asked.cifar, asked.out, asked.fraction)
    tower = pretrained(asked.out)
    print(f"classification: top-1 {last(tower, 'test/top1'):.2%}", flush=True)
    ways = {"staged": (str(tower), FROZEN), "all": (str(tower), []), "scratch": (None, [])}
    for name, (weights, freeze) in ways.items():
        found = []
        for seed in asked.seeds:
            recipe = contrastive(asked.out, seed, asked.epochs, weights, freeze)
            run = train(asked.out, f"{name}-{seed}", recipe)
            found.append(last(run, "test/zero_shot_top1"))
        shown = ", ".join(f"{top1:.2%}" for top1 in found)
        print(f"{name}: mean top-1 {statistics.mean(found):.2%} ({shown})", flush=True)


if __name__ == "__main__":
    main()
