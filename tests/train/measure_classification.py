"""The classification task beside a training loop made of timm's own parts, by one recipe and several seeds.

    python tests/train/measure_classification.py --train DIR/train --test DIR/test --seeds 3

timm's parts are its folder reader, transforms, loader, Mixup, loss, optimizer, scheduler and ModelEmaV3; its
training script is in no package. Both train the same tower with the same settings on the same samples; their
random numbers differ. Prints the top-1 accuracy of the averaged and the raw weights, for each seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageDataset, Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from clipcluster.data.shards.open import open_folder
from clipcluster.recipe.load import load, recipe_keys, settings_keys
from clipcluster.run import train
from clipcluster.runs.files import read_json
from clipcluster.runs.folder import Run
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop

SIZE, BATCH, LR, DECAY, WARMUP, EMA, SMOOTHING, ALPHA = 32, 64, 3e-3, 0.05, 20, 0.98, 0.1, 0.2
CROP, MEAN, STD = (0.8, 1.0), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARGS = {"depths": [1, 1, 2, 1], "dims": [32, 64, 128, 160], "patch_size": 2, "drop_path_rate": 0.0}


def ours(folder: Path, asked: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Top-1 of the averaged and of the raw weights after a run."""
    recipe = {
        "name": f"seed-{seed}",
        "task": "classify",
        "seed": seed,
        "data": {
            "train": [{"shards": str(asked.train)}],
            "batch_size": BATCH,
            "workers": 1,
            "image": {"size": SIZE, "crop_scale": list(CROP), "mean": "imagenet", "std": "imagenet"},
            "mixup": {"alpha": ALPHA, "cutmix": 0.0},
        },
        "model": {"image": {"timm": "convnext_atto", "args": ARGS}},
        "loss": {"label_smoothing": SMOOTHING},
        "optim": {
            "lr": LR,
            "weight_decay": DECAY,
            "betas": [0.9, 0.999],
            "clip_norm": 1.0,
            "warmup": f"{WARMUP} steps",
        },
        "train": {"duration": f"{asked.epochs} epochs", "ema": {"decay": EMA}},
        "evaluate": {"classification": [str(asked.test)]},
        "cluster": {"gpus_per_node": 0, "cpus_per_task": torch.get_num_threads()},
    }
    file = folder / f"seed-{seed}.yaml"
    file.write_text(json.dumps(recipe))
    loaded = load(file, [], {})
    run = Run.create(folder / f"run-{seed}", recipe_keys(loaded), settings_keys(loaded))
    attempt = run.claim("measure", host="here", still_running=lambda job: False)
    assert train(run, attempt, Launch(0, 1, 0, 1, 0, 1, "test", "single"), Stop()) is Outcome.FINISHED
    (file,) = run.evals.glob("step-*.json")
    found = read_json(file)["metrics"]
    name = asked.test.name
    return found[f"{name}/top1"], found[f"{name}/raw_top1"]


def theirs(folder: Path, asked: argparse.Namespace, seed: int) -> tuple[float, float]:
    """The same by timm's parts."""
    torch.manual_seed(seed)
    classes = len(open_folder(asked.train).classnames or ())
    model = timm.create_model("convnext_atto", num_classes=classes, **ARGS)
    loader = _loader(folder / "train", training=True)
    mixup = Mixup(ALPHA, 0.0, label_smoothing=SMOOTHING, num_classes=classes)
    optimizer = create_optimizer_v2(model, "adamw", lr=LR, weight_decay=DECAY, betas=(0.9, 0.999), eps=1e-6)
    total = asked.epochs * len(loader)
    scheduler = CosineLRScheduler(optimizer, t_initial=total, warmup_t=WARMUP, t_in_epochs=False)
    average, loss, step = ModelEmaV3(model, decay=EMA), SoftTargetCrossEntropy(), 0
    for _ in range(asked.epochs):
        model.train()
        for images, labels in loader:
            scheduler.step_update(step)
            images, targets = mixup(images, labels)
            optimizer.zero_grad()
            loss(model(images), targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model, step=step)
            step += 1
    test = _loader(folder / "test", training=False)
    return _top1(average.module, test), _top1(model, test)


def _loader(folder: Path, *, training: bool) -> Any:
    return create_loader(
        ImageDataset(str(folder)),
        (3, SIZE, SIZE),
        BATCH,
        is_training=training,
        scale=CROP,
        hflip=0.0,
        color_jitter=None,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        crop_pct=1.0,
        num_workers=1,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )


@torch.no_grad()
def _top1(model: torch.nn.Module, loader: Any) -> float:
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return float(torch.cat(right).mean())


def _as_files(shards: Path, folder: Path) -> None:
    """The images of shards as FOLDER/CLASS/NUMBER.png, which timm reads."""
    source = open_folder(shards)
    for position in range(source.n_samples):
        sample = source.read(position, text=False)
        (folder / f"{sample.cls:05d}").mkdir(parents=True, exist_ok=True)
        (folder / f"{sample.cls:05d}" / f"{position:08d}.png").write_bytes(sample.image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train", "test"):
            _as_files(getattr(asked, name), Path(folder) / name)
        for seed in range(asked.seeds):
            for who, measure in (("clipcluster", ours), (f"timm {timm.__version__}", theirs)):
                averaged, raw = measure(Path(folder), asked, seed)
                print(f"seed {seed}: {who}: top-1 {averaged:.2%} averaged, {raw:.2%} raw", flush=True)


if __name__ == "__main__":
    main()
