"""Writing a starter recipe for indexed shards; task, towers and sizes follow from their content. No torch."""

from __future__ import annotations

import io
import json
import os
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from clipcluster.check.experience import TEXT_SAMPLES
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.find import folders_of_shards
from clipcluster.data.shards.open import open_folder
from clipcluster.data.storage.urls import is_remote
from clipcluster.errors import UserError
from clipcluster.recipe.files import RECIPES, existing, with_parents
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.recipe.tree import Entry, Variable, find
from clipcluster.runtime.accelerators import count_accelerators
from clipcluster.text import counted

MEASURED = 64  # samples whose images and captions are measured
MOST_TOKENS = 256  # upper bound of the context, in bytes
STEPS = 3000  # that a run on a small set should have
TRAINING = ("train", "training")


@dataclass(frozen=True)
class Shards:
    """The content of a folder of shards, as far as a recipe depends on it."""

    folder: Path
    samples: int
    captioned: int
    classes: int
    """One more than the largest class number; 0 where a sample has none."""
    named: bool
    """Whether classnames.txt is there."""
    zero_shot: bool
    """Whether every sample has a class, and the classes have names and templates."""
    side: int
    """The median of the images' shorter sides, in pixels."""
    longest: int
    """Bytes of the longest caption."""

    @property
    def usable(self) -> int:
        """Samples that training draws."""
        return self.captioned or self.samples

    @property
    def size(self) -> int:
        """The side of the square input."""
        return 32 if self.side < 48 else 64 if self.side < 112 else 224

    @property
    def small(self) -> bool:
        """Whether small towers are enough for the images."""
        return self.size < 224

    @property
    def quoted(self) -> str:
        """The folder as a quoted YAML string."""
        return json.dumps(str(self.folder), ensure_ascii=False)


def write_starter(name: str, *, parent: Path | None, data: str | Path | None) -> tuple[Path, list[str]]:
    """Write `NAME.yaml` into the working directory. Returns the file, and a line for each folder of shards.

    Args:
        name: of the run.
        parent: a recipe that the new one extends; then only name, data and evaluations are written.
        data: a folder of shards, or one with splits (train, val, test).

    Raises:
        UserError: the file exists, the name cannot be one, or there are no indexed shards to train on.
    """
    file = Path(f"{name}.yaml")
    limits = Recipe.model_fields["name"].metadata
    pattern = next(limit.pattern for limit in limits if hasattr(limit, "pattern"))
    longest = next(limit.max_length for limit in limits if hasattr(limit, "max_length"))
    if not re.fullmatch(pattern, name) or len(name) > longest:
        raise UserError(
            f"{name!r} cannot name a run; use at most {longest} letters, digits, '.', '_' and '-' (not first)"
        )
    if file.exists():
        raise UserError(f"{file} exists and is left as it is; choose another name, or remove it")
    if parent is None and data is None:
        raise UserError("init needs --data, a folder of shards, or --from, a recipe to extend")
    splits = [] if data is None else [look_at(folder) for folder in _folders(data)]
    lines = list(_starter(name, splits) if parent is None else _extending(name, parent, splits))
    with file.open("x", encoding="utf-8") as out:
        out.write("\n".join(lines) + "\n")
    return file, [_described(split) for split in splits]


def _folders(data: str | Path) -> list[Path]:
    """The folders of shards below `data`, the training split first."""
    if is_remote(str(data)):
        raise UserError(f"--data {data}: give a folder on this machine; an address belongs in data.train")
    found = [path.resolve() for path in folders_of_shards(Path(data))]
    if len(found) > 1 and not any(path.name in TRAINING for path in found):
        raise UserError(f"--data {data}: there is no folder train; give the folder of shards to train on")
    return sorted(found, key=lambda path: path.name not in TRAINING)


def look_at(folder: Path) -> Shards:
    """The content of shards, by their index and some samples. UserError without an index."""
    shards = open_folder(folder)
    if shards.n_samples == 0:
        raise UserError(f"{folder}: the shards hold no sample with an image")
    names, classes = shards.classnames, shards.classes
    sides, longest = _measured(shards)
    return Shards(
        folder,
        shards.n_samples,
        captioned=int(shards.more_than[0].sum()) if shards.fields else 0,
        classes=int(classes[:].max()) + 1 if (classes[:] >= 0).all() else 0,
        named=bool(names),
        zero_shot=bool(names and shards.templates) and bool((classes[:] >= 0).all()),
        side=int(statistics.median(sides)) if sides else 224,
        longest=longest,
    )


def _measured(shards: Dataset) -> tuple[list[int], int]:
    """The shorter sides (pixels) of images spread over the shards, and the bytes of their longest caption."""
    count = min(shards.n_samples, MEASURED)
    sides, longest = [], 0
    for number in range(count):
        sample = shards.read(number * (shards.n_samples // count))
        longest = max([longest, *(len(text.encode()) for text in sample.captions)])
        try:
            sides.append(min(Image.open(io.BytesIO(sample.image)).size))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            continue  # the check names those that cannot be decoded
    return sides, longest


def _described(split: Shards) -> str:
    captions = f", {split.captioned:,} with captions" if split.captioned else ""
    classes = f", {counted(split.classes, 'class')}" if split.classes else ""
    return f"{split.folder}: {counted(split.samples, 'sample')}{captions}{classes}, about {split.side} pixels"


def _extending(name: str, parent: Path, splits: list[Shards]) -> Iterator[str]:
    """The lines of a recipe that extends another, with its own name, data and evaluations."""
    shipped = RECIPES / parent.name
    found = shipped if not parent.is_file() and shipped.is_file() else existing(parent)
    parents = with_parents(found, os.environ)
    tree = parents.entries
    yield f"# {name}: {found.name} with the keys below replaced."
    known = found == shipped and name != found.stem  # a file of its own name would extend itself
    yield f"extends: {found.name if known else json.dumps(str(found.resolve()))}"
    yield f"name: {json.dumps(name)}"
    if splits:
        yield "data:"
        yield "  train:"
        yield _source(splits[0].quoted, parents)
        task = str(tree["task"].value) if "task" in tree else "contrastive"
        if task not in TASKS:
            raise UserError(tree["task"].origin.problem("task", f"{task} is none of {', '.join(TASKS)}"))
        yield "evaluate:"
        yield from _evaluate(TASKS[task].evaluations, splits)
        keep = tree["checkpoint"].entries.get("keep") if "checkpoint" in tree else None
        if keep is not None and "best" in keep.entries:
            yield _line("checkpoint: {keep: {best: null}}", "it named a metric of the other data")


def _source(folder: str, parent: Entry) -> str:
    """The new source, with `captions_in` as the parent's sources have it; where they differ, the first's."""
    sources = find(parent, ("data", "train"))
    listed = sources.value if sources and isinstance(sources.value, list) else []
    given = [_plain(source.entries["captions_in"]) for source in listed if "captions_in" in source.entries]
    if not given:
        return f"    - {{shards: {folder}}}"
    line = f"    - {{shards: {folder}, captions_in: {json.dumps(given[0], ensure_ascii=False)}}}"
    same = len(given) == len(listed) and all(choice == given[0] for choice in given)
    return line if same else _line(line, "captions_in differs between the sources it had")


def _plain(entry: Entry) -> object:
    """What an entry of a recipe holds, variables as they are written."""
    if isinstance(entry.value, dict):
        return {name: _plain(inner) for name, inner in entry.value.items()}
    return entry.value.text if isinstance(entry.value, Variable) else entry.value


def _starter(name: str, splits: list[Shards]) -> Iterator[str]:
    """The lines of a recipe from scratch."""
    train = splits[0]
    if not (train.captioned or train.classes):
        raise UserError(f"{train.folder}: training needs samples with captions, or a class for each of them")
    gpus, cores = count_accelerators(), os.cpu_count() or 1
    task = "contrastive" if train.captioned else "classify"
    yield f"# {name}: a first recipe. Every key: docs/recipe.md; how to choose: docs/training.md."
    yield f"#   clipcluster check {name}.yaml --deep"
    yield f"#   clipcluster submit {name}.yaml"
    yield f"name: {json.dumps(name)}"
    yield _line(
        f"task: {task}", f"images {'and captions into one space' if train.captioned else 'into classes'}"
    )
    yield from _data(train, _batch(train.usable, max(1, gpus)), min(4, cores))
    yield from _model(train)
    yield from _training(train, _batch(train.usable, max(1, gpus)), gpus)
    yield "evaluate:"
    yield _line("  every: 10%", "of the run, and at its end")
    yield from _evaluate(TASKS[task].evaluations, splits)
    yield _line(
        f"cluster: {{gpus_per_node: {gpus}, cpus_per_task: {min(4, cores)}, time: 4 h}}", "GPUs as found here"
    )
    if train.captioned and train.usable < TEXT_SAMPLES:
        yield _line("checks: {allow: [text-from-scratch]}", "remove it once model.text.weights is set")


def _line(text: str, comment: str) -> str:
    return f"{text:<36} # {comment}"


def _batch(samples: int, ranks: int) -> int:
    """A power of two up to 1,024 and a 32nd of the samples, lowered to a multiple of the ranks."""
    batch = 1 << max(1, min(1024, samples // 32)).bit_length() - 1
    return max(ranks, batch - batch % ranks)


def _data(train: Shards, batch: int, workers: int) -> Iterator[str]:
    yield "data:"
    yield "  train:"
    yield _line(f"    - {{shards: {train.quoted}}}", "more sources: more lines")
    yield _line(f"  batch_size: {batch}", "global: samples of one step, on any number of ranks")
    yield _line(f"  workers: {workers}", "processes that decode, for each rank")
    yield "  image:"
    yield _line(f"    size: {train.size}", f"the images have about {train.side} pixels")
    yield _line(f"    crop_scale: [{0.6 if train.small else 0.4}, 1.0]", "area of the random crop")
    if train.captioned:
        context = min(MOST_TOKENS, -(-(train.longest + 2) // 8) * 8)
        yield "  text:"
        yield _line("    tokenizer: bytes", "needs no file; gpt2 or CLIP's vocabulary file: fewer tokens")
        yield _line(f"    context_length: {context}", f"longest caption measured: {train.longest} bytes")
        yield _line("    captions: random", "one of a sample's captions each time; all: a sample for each")


def _model(train: Shards) -> Iterator[str]:
    """The section `model`: towers without batch norms, so that the number of ranks does not matter."""
    width, layers = (128, 2) if train.small else (512, 12)
    yield "model:"
    yield "  image:"
    yield _line(
        f"    timm: {'convnext_atto' if train.small else 'convnext_tiny'}", "any tower that timm knows"
    )
    if train.small:
        yield "    args: {depths: [1, 1, 2, 1], dims: [32, 64, 128, 160], patch_size: 2}"
    yield _line("    # weights: FILE", "without: from scratch")
    if train.captioned:
        yield "  text:"
        yield _line(
            f"    clip: {{width: {width}, layers: {layers}, heads: {width // 64}}}", "CLIP's transformer"
        )
        yield _line("    # weights: FILE", "without: from scratch")
        yield f"  embed_dim: {width}"
    elif not train.named:
        yield _line(f"  classes: {train.classes}", "without a classnames.txt beside the shards")


def _training(train: Shards, batch: int, gpus: int) -> Iterator[str]:
    epochs = min(100, max(8, -(-STEPS * batch // train.usable)))
    yield "optim:"
    yield _line("  lr: 1.0e-3", "AdamW's; reached after the warm-up, then half a cosine to zero")
    yield "  weight_decay: 0.1"
    yield "  clip_norm: 1.0"
    yield _line("  warmup: 5%", "of the run")
    yield "train:"
    yield _line(f"  duration: {epochs} epochs", f"{epochs * (train.usable // batch):,} steps")
    yield _line(f"  precision: {'bf16' if gpus else 'fp32'}", "fp32, tf32, bf16 or fp16")
    yield _line(
        "  ema: {decay: 0.999, warmup: true}", "averaged weights, evaluated and saved beside the others"
    )
    yield "checkpoint: {every: 15 min, keep: {last: 3}}"


def _evaluate(kinds: tuple[str, ...], splits: list[Shards]) -> Iterator[str]:
    """The evaluation sets: every split but the training split, for each evaluation that it allows."""
    fits: dict[str, Callable[[Shards], object]] = {
        "retrieval": lambda split: split.captioned,
        "zero_shot": lambda split: split.zero_shot,
        "classification": lambda split: split.classes,
    }
    for kind in (kind for kind in kinds if kind in fits):
        yield f"  {kind}: [{', '.join(split.quoted for split in splits[1:] if fits[kind](split))}]"
