"""From images to a measured model, each step a job that starts when those before it have ended well.

    python -m jobs.examples.pipeline data/digits runs

converts images, trains a classifier on them, starts the image tower of a CLIP model from it, frozen at first,
then exports and evaluates that model. Where SLURM is set up all of it is queued at once; elsewhere it runs on
this machine, one after the other. The same call again continues what has not finished; `.cancel()` of what it
returns ends all of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from clipcluster.recipe.files import RECIPES
from jobs.api import Submission, convert, evaluate, export, submit

SHORT = {"train.duration": "6 epochs", "evaluate.every": None, "cluster.tasks_per_node": 1}


def pipeline(data: Path, runs: Path) -> Submission:
    """Queue the conversion into `data`, both trainings and what follows; returns the CLIP model's run."""
    images = convert("digits", out=data)
    shards = {"data.train.0.shards": str(data / "train")}

    classifier = submit(
        RECIPES / "digits-classify.yaml",
        {**SHORT, **shards, "evaluate.classification": [str(data / "test")]},
        after=[images],
        runs=runs,
    )
    clip = submit(
        RECIPES / "digits.yaml",
        {
            **SHORT,
            **shards,
            "name": "pipeline",
            "model.image.weights": str(classifier.path),
            "freeze": [
                {"at": "0 steps", "tower": "image", "trainable": "none"},
                {"at": "50%", "tower": "image", "trainable": "all", "lr_scale": 0.1},
            ],
            "evaluate.retrieval": [],
            "evaluate.zero_shot": [str(data / "test")],
        },
        after=[images, classifier],
        runs=runs,
    )
    export(clip, "safetensors", out=runs / "exported")
    evaluate(clip, {"evaluate.retrieval": [str(data / "test")]}, out=runs / "measured.json")
    return clip


if __name__ == "__main__":
    pipeline(Path(sys.argv[1]), Path(sys.argv[2]))
