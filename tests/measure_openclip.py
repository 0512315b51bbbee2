"""Zero-shot accuracy and speed beside OpenCLIP's at equal budget: CIFAR-10 with captions from one template.

    python tests/measure_openclip.py --cifar FOLDER --peer PYTHON [--out DIR] [--seeds 0 1 2] [--epochs 4]
        [--turns 10]

FOLDER has train/CLASS/*.jpg and test/CLASS/*.jpg. PYTHON belongs to an environment with open_clip_torch
3.3.0, webdataset 0.2.86 and pandas. Both train the same towers (timm's resnet10t at 32 pixels; CLIP's text
transformer of 2 layers, width 128, 2 heads; CLIP's vocabulary, context 16; embedding 128) on the same shards
with AdamW, one process and one loader worker. Accuracy: one run of each for each seed. Speed: both train side
by side, in turns of 10 s by SIGSTOP and SIGCONT, so that what else the machine does slows both; images a
second are those of the steps between the first turn and the last, by the time that a contender was running.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics

TEMPLATE = "a photo of a {c}."
BATCH, IMAGES, TURN = 250, 50_000, 10.0
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
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
import webdataset

config, test, names, out, *arguments = sys.argv[1:]
open_clip.add_model_config(config)
steps = open(out + ".steps", "w", buffering=1)
register_optimizer_step_post_hook(lambda *_: print(time.time(), file=steps))
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
json.dump({"top1": right / count, "images": count}, open(out, "w"))
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


def peer(python, out, seed, epochs):
    """The command of OpenCLIP's own training script, and the file of its result."""
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
        "seed": seed if isinstance(seed, int) else 0,
        "save-frequency": epochs,
        "logs": folder,
        "name": "run",
    }
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    words += ["--save-most-recent", "--aug-cfg", "scale=(0.6, 1.0)"]
    result = folder / "result.json"
    test = [out / "test" / "00000.tar", out / "test" / "classnames.txt", result]
    return [python, "-c", PEER, str(out / "tiny.json"), *map(str, test), *words], result


def ours(vocabulary, out, seed, epochs):
    """The command of the same training here, and its run folder."""
    recipe = {
        "name": f"ours-{seed}",
        "seed": seed if isinstance(seed, int) else 0,
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
    return [sys.executable, "-m", "jobs.cli", "train", str(run)], run


def started(words, log):
    """A contender in a process of its own, with its log in a file."""
    with open(log, "w") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env={**os.environ, **PASSIVE})


def finish(process):
    """Wait for a contender; CalledProcessError where it fails."""
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


def signal_all(process, number):
    """Send a signal to a contender's processes, and wait until all are stopped or go on."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        os.kill(pid, number)


def speeds(contenders, turns):
    """Images a second of contenders that train in turns.

    contenders: by name, the command, the file of its log, and what gives the numbers and times of its steps.
    The first turn of each, which has its start, is longer and does not count.
    """
    processes = {name: started(words, log) for name, (words, log, _) in contenders.items()}
    running = {name: [] for name in contenders}
    for process in processes.values():
        signal_all(process, signal.SIGSTOP)
    try:
        for _ in range(turns):
            for name, process in processes.items():
                signal_all(process, signal.SIGCONT)
                began = time.time()
                time.sleep(TURN if running[name] else 6 * TURN)
                if process.poll() is not None:
                    raise SystemExit(f"{name} ended too early: see its log")
                signal_all(process, signal.SIGSTOP)
                running[name].append((began, time.time()))
    finally:
        for process in processes.values():
            if process.poll() is None:
                signal_all(process, signal.SIGKILL)
                process.wait()
    found = {}
    for name, (_, _, times) in contenders.items():
        counted = running[name][1:]
        steps = [(step, at) for step, at in times() if any(begin <= at <= end for begin, end in counted)]
        (first, begin), (last, end) = steps[0], steps[-1]
        seconds = sum(max(0.0, min(end, b) - max(begin, a)) for a, b in counted)
        found[name] = BATCH * (last - first) / seconds
    return found


def logged_steps(run):
    """Number and time of the steps in a run's metrics."""
    return [(line["step"], line["time"]) for line in merged_metrics(Run(run))]


def counted_steps(file):
    """Number and time of the steps that the peer's optimizer made."""
    return list(enumerate(map(float, file.read_text().split()), start=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--out", type=Path, default=Path("openclip-comparison"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--turns", type=int, default=10, help="of each, for the speed; 0: accuracy only")
    asked = parser.parse_args()
    convert(asked.cifar, asked.out)
    find = "import open_clip.tokenizer as t; print(t.default_bpe())"
    vocabulary = subprocess.run(
        [asked.peer, "-c", find], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    names = ("OpenCLIP", "clipcluster")
    found = {name: [] for name in names}
    for seed in asked.seeds:
        words, result = peer(asked.peer, asked.out, seed, asked.epochs)
        finish(started(words, asked.out / f"openclip-{seed}.log"))
        found["OpenCLIP"].append(json.loads(result.read_text())["top1"])
        words, run = ours(vocabulary, asked.out, seed, asked.epochs)
        finish(started(words, asked.out / f"ours-{seed}.log"))
        found["clipcluster"].append(merged_metrics(Run(run))[-1]["test/zero_shot_top1"])
        print(f"seed {seed}: " + ", ".join(f"{name} {found[name][-1]:.2%}" for name in names), flush=True)
    for name, top1 in found.items():
        if top1:
            print(f"{name}: mean top-1 {statistics.mean(top1):.2%}", flush=True)
    if asked.turns:
        theirs, result = peer(asked.peer, asked.out, "speed", 1000)
        here, run = ours(vocabulary, asked.out, "speed", 1000)
        contenders = {
            "OpenCLIP": (
                theirs,
                asked.out / "openclip-speed.log",
                lambda: counted_steps(result.with_suffix(".json.steps")),
            ),
            "clipcluster": (here, asked.out / "ours-speed.log", lambda: logged_steps(run)),
        }
        for name, images in speeds(contenders, asked.turns).items():
            print(f"{name}: {images:.0f} images a second")


if __name__ == "__main__":
    main()
