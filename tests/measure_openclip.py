"""Zero-shot accuracy and speed beside OpenCLIP's at equal budget: CIFAR-10 with captions from one template.

    python tests/measure_openclip.py --cifar FOLDER --peer PYTHON [--out DIR] [--seeds 0 1 2] [--epochs 4]

FOLDER has train/CLASS/*.jpg and test/CLASS/*.jpg. PYTHON belongs to an environment with open_clip_torch
3.3.0, webdataset 0.2.86 and pandas. Both train the same towers (timm's resnet10t at 32 pixels; CLIP's text
transformer of 2 layers, width 128, 2 heads; CLIP's vocabulary, context 16; embedding 128) on the same shards
with AdamW, one process and one loader worker, in turns. Images a second are those of all epochs but the
first, by the clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics

TEMPLATE = "a photo of a {c}."
BATCH, IMAGES = 250, 50_000
PASSIVE = {
    "OMP_WAIT_POLICY": "passive"
}  # as ours: spinning threads would take a core from the loader's worker
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {
        "timm_model_name": "resnet10t",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
PEER = """
import json, sys, time
import open_clip, torch
from open_clip_train import main as trainer
from torch.utils.data import DataLoader
import webdataset

config, test, names, out, *arguments = sys.argv[1:]
open_clip.add_model_config(config)
ends, one_epoch = [], trainer.train_one_epoch
def timed(*args, **more):
    one_epoch(*args, **more)
    ends.append(time.time())
trainer.train_one_epoch = timed
trainer.main(arguments)

model, _, transform = open_clip.create_model_and_transforms("tiny")
folder = arguments[arguments.index("--logs") + 1] + "/run/checkpoints/epoch_latest.pt"
state = torch.load(folder, map_location="cpu", weights_only=True)["state_dict"]
model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
model.eval()
names = open(names).read().splitlines()
with torch.no_grad():
    tokenizer = open_clip.get_tokenizer("tiny")
    prompts = ["TEMPLATE".replace("{c}", name) for name in names]
    classes = model.encode_text(tokenizer(prompts), normalize=True)
    right = count = 0
    shards = webdataset.WebDataset(test, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    for images, labels in DataLoader(shards.map_tuple(transform, int), batch_size=500):
        found = (model.encode_image(images, normalize=True) @ classes.T).argmax(dim=1)
        right, count = right + int((found == labels).sum()), count + len(labels)
json.dump({"top1": right / count, "images": count, "ends": ends}, open(out, "w"))
""".replace("TEMPLATE", TEMPLATE)


def convert(source, out):
    """CIFAR-10's class folders as shards with one caption each, shuffled: webdataset mixes 5,000 samples."""
    for split in ("train", "test"):
        words = ("--template", TEMPLATE, "--shuffle", 0, "--out", out / split)
        command("shards", "convert", "folder", source / split, *words)


def command(*words):
    """The command `clipcluster`; SystemExit where it fails."""
    subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL
    )


def train_peer(python, out, seed, epochs):
    """OpenCLIP's own training script; top-1, and images a second."""
    folder = out / f"openclip-{seed}"
    folder.mkdir(parents=True)
    (out / "tiny.json").write_text(json.dumps(MODEL))
    asked = {
        "train-data": out / "train" / "{00000..00004}.tar",
        "train-num-samples": IMAGES,
        "dataset-type": "webdataset",
        "model": "tiny",
        "batch-size": BATCH,
        "epochs": epochs,
        "lr": 1e-3,
        "wd": 0.1,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "warmup": 50,
        "workers": 1,
        "precision": "fp32",
        "seed": seed,
        "save-frequency": epochs,
        "logs": folder,
        "name": "run",
    }
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    words += ["--save-most-recent", "--aug-cfg", "scale=(0.6, 1.0)"]
    test = [
        str(out / "test" / "00000.tar"),
        str(out / "test" / "classnames.txt"),
        str(folder / "result.json"),
    ]
    with open(folder / "log", "w") as log:
        peer = [python, "-c", PEER, str(out / "tiny.json"), *test, *words]
        subprocess.run(peer, check=True, stderr=log, stdout=log, env={**os.environ, **PASSIVE})
    result = json.loads((folder / "result.json").read_text())
    return result["top1"], speed(result["ends"][-1] - result["ends"][0], epochs)


def train_ours(vocabulary, out, seed, epochs):
    """The same by `clipcluster train`; top-1, and images a second."""
    recipe = {
        "name": f"ours-{seed}",
        "seed": seed,
        "data": {
            "train": [{"shards": str(out / "train")}],
            "batch_size": BATCH,
            "workers": 1,
            "image": {"size": 32, "crop_scale": [0.6, 1.0]},
            "text": {"tokenizer": str(vocabulary), "context_length": 16},
        },
        "model": {
            "image": {"timm": "resnet10t"},
            "text": {"clip": {"width": 128, "layers": 2, "heads": 2}},
            "embed_dim": 128,
        },
        "optim": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.98], "eps": 1e-6, "warmup": "50 steps"},
        "train": {"duration": f"{epochs} epochs"},
        "evaluate": {"zero_shot": [str(out / "test")]},
        "cluster": {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 2, "time": "2 h"},
    }
    file, runs = out / f"ours-{seed}.yaml", out / "runs"
    file.write_text(yaml.safe_dump(recipe))
    command("submit", file, "--executor", "none", "--runs", runs)
    run = next(path for path in runs.iterdir() if path.name.startswith(f"ours-{seed}-"))
    with open(out / f"ours-{seed}.log", "w") as log:
        subprocess.run(
            [sys.executable, "-m", "jobs.cli", "train", str(run)], check=True, stdout=log, stderr=log
        )
    lines = {line["step"]: line for line in merged_metrics(Run(run))}
    steps = IMAGES // BATCH
    top1 = lines[steps * epochs]["test/zero_shot_top1"]
    return top1, speed(lines[steps * epochs]["time"] - lines[steps]["time"], epochs)


def speed(seconds, epochs):
    """Images a second over all epochs but the first."""
    return (epochs - 1) * IMAGES / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--out", type=Path, default=Path("openclip-comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    asked = parser.parse_args()
    convert(asked.cifar, asked.out)
    find = "import open_clip.tokenizer as t; print(t.default_bpe())"
    vocabulary = subprocess.run(
        [asked.peer, "-c", find], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    found = {"OpenCLIP": [], "clipcluster": []}
    for seed in asked.seeds:
        found["OpenCLIP"].append(train_peer(asked.peer, asked.out, seed, asked.epochs))
        found["clipcluster"].append(train_ours(vocabulary, asked.out, seed, asked.epochs))
        for name, results in found.items():
            print(
                f"{name}, seed {seed}: top-1 {results[-1][0]:.2%}, {results[-1][1]:.0f} images a second",
                flush=True,
            )
    for name, results in found.items():
        top1, speeds = zip(*results, strict=True)
        print(
            f"{name}: mean top-1 {statistics.mean(top1):.2%}, {statistics.median(speeds):.0f} images a second"
        )


if __name__ == "__main__":
    main()
