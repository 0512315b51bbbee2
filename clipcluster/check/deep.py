"""The deep check: towers, weights, tokenizer, samples, a step of a few samples, the memory of a whole one.

It needs torch and so runs in a process of its own (``python -m clipcluster.check.deep``): the command itself
never loads torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from copy import copy
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from clipcluster.check.names import store_names
from clipcluster.check.plain import Findings, open_indexed
from clipcluster.errors import UserError
from clipcluster.recipe.plan import accumulation_of
from clipcluster.recipe.sections.data import Source
from clipcluster.recipe.sections.evaluate import folders_of
from clipcluster.recipe.sections.model import ClipTextTower, Dual, HfImageTower, HfTextTower, TimmImageTower
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.checkpoints import step_of
from clipcluster.runs.folder import Run
from clipcluster.text import counted

MEASURED_SAMPLES, LONGEST = 128, 4096  # samples whose captions are measured, in tokens up to a bound
CUT_CAPTIONS = 0.1  # the fraction of captions longer than the context from which on there is a warning
DEEP_SECONDS = 900  # large towers take minutes to build on a busy login node


def check(recipe: Recipe, *, world_size: int = 1, assets: Path | None = None) -> Findings:
    """The findings of the deep check, made in a process of its own.

    Args:
        recipe: with absolute paths (`plain.Checked.recipe`).
        world_size: ranks the run will have.
        assets: folder of tokenizers and configurations fetched at submission.
    """
    question = {
        "recipe": recipe.model_dump(mode="json"),
        "world_size": world_size,
        "assets": str(assets) if assets else None,
    }
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        process = subprocess.run(
            [sys.executable, "-m", "clipcluster.check.deep"],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=DEEP_SECONDS,
            env={**os.environ, "PYTHONPATH": search},
        )
    except subprocess.TimeoutExpired:
        return Findings(errors=[f"the deep check took longer than {DEEP_SECONDS} s; submit --quick omits it"])
    if process.returncode != 0:
        output = process.stderr.strip()
        return Findings(errors=[f"the deep check itself failed (code {process.returncode}):\n{output}"])
    return Findings(**json.loads(process.stdout))


def main() -> None:
    """Read the question from stdin, write the findings as JSON to stdout; libraries print to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    assets = Path(question["assets"]) if question["assets"] else None
    recipe, world_size = Recipe.model_validate(question["recipe"]), question["world_size"]
    findings = examine(recipe, world_size, assets)
    if not findings.errors:
        measure(recipe, world_size, assets, findings)
    with answer:
        json.dump(vars(findings), answer)


def examine(recipe: Recipe, world_size: int, assets: Path | None) -> Findings:
    """Build the model of a recipe, read samples of its data, and try a training step; loads torch."""
    from clipcluster.data.tokenizer import load_tokenizer

    findings = Findings()
    attempt = partial(findings.attempt, foreign=True)
    needed, tokenizer = TASKS[recipe.task], None
    if needed.captions:
        tokenizer = attempt("data.text.tokenizer", load_tokenizer, recipe.data.text, assets)
    if recipe.model.image is not None:
        attempt("model.image", _check_image_tower, recipe, world_size, assets, findings)
    if tokenizer is not None and recipe.model.text is not None:
        attempt("model.text", _check_text_tower, recipe, tokenizer, assets, findings)
    if not findings.errors and (recipe.model.weights or recipe.model.dual):
        attempt("model", _check_whole, recipe, tokenizer, assets, findings)
    for place, own in {"data.image": recipe, **_teachers(recipe)}.items():
        attempt(place, _check_pixels, place, own, assets, findings)
    prepare = None
    if needed.preparation is not None and not findings.errors:
        prepare = attempt("data.train", _preparation, needed.preparation, recipe, tokenizer, assets)
    members = needed.members(recipe)
    for number, source in enumerate(recipe.data.train):
        key, text = f"data.train.{number}", needed.captions
        attempt(key, check_sample, key, source, text, members, tokenizer, findings, prepare)
    for kind in needed.evaluations:
        for number, entry in enumerate(getattr(recipe.evaluate, kind)):
            key, text = f"evaluate.{kind}.{number}", kind == "retrieval"
            for folder in folders_of(entry):
                source = Source(shards=folder)
                attempt(key, check_sample, key, source, text, {}, tokenizer, findings)
    if findings.errors:  # what follows would fail for a reason that is known
        return findings
    for number, source in enumerate(recipe.data.train if tokenizer is not None else ()):
        key = f"data.train.{number}"
        attempt(key, _check_lengths, key, source, tokenizer, recipe, findings)
    if recipe.freeze:
        attempt("freeze", _check_stages, recipe, world_size, assets, findings)
    attempt("a training step of a few samples", _check_step, recipe, world_size, assets, findings)
    return findings


def measure(recipe: Recipe, world_size: int, assets: Path | None, findings: Findings) -> None:
    """Estimate what a training step takes of a device's memory, and what a checkpoint takes of the disk."""
    from clipcluster.build.memory import estimate

    try:
        found = estimate(recipe, assets, world_size)
    except Exception as error:  # of any tower
        reason, what = " ".join(str(error).split())[:200], "parameters, memory, checkpoint size"
        findings.unchecked.append(f"{what} (a step cannot be traced: {type(error).__name__}: {reason})")
        return
    fewer = f", {found.trainable:,} of them trained" if found.trainable < found.parameters else ""
    findings.summary.append(f"parameters: {found.parameters:,}{fewer}")
    findings.figures |= {
        "parameters": found.parameters,
        "trained_parameters": found.trainable,
        "checkpoint_bytes": found.checkpoint,
        "memory_bytes": found.bytes,
    }


def _check_image_tower(recipe: Recipe, world_size: int, assets: Path | None, findings: Findings) -> None:
    import torch

    from clipcluster.model.hugging_face import refusing
    from clipcluster.model.towers import build_image_tower

    try:
        store_names()
    except OSError as error:
        findings.warnings.append(f"the names of towers cannot be stored for the plain check: {error}")
    size, section = recipe.data.image.size, recipe.model.image
    assert section is not None
    tower, coverage = build_image_tower(
        section, image_size=size, assets=assets, weights_from=recipe.model.weights_from
    )
    name = section.timm if isinstance(section, TimmImageTower) else section.hf
    with refusing(f"{name} cannot take images of {size} pixels (data.image.size)"), torch.no_grad():
        features = tower.eval()(torch.zeros(1, 3, size, size))
        if features.shape != (1, tower.width):
            raise ValueError(f"it gives {tuple(features.shape)} for one, and not one vector of {tower.width}")
    findings.summary += _described(f"image tower: {name}", tower, coverage)
    if not _has_batch_norms(tower):
        findings.warnings += _idle_norms(recipe, "image", name)
        return
    micro_batch = recipe.data.batch_size // world_size // accumulation_of(recipe, world_size)
    together = recipe.train.sync_batch_norm
    samples = micro_batch * world_size if together else micro_batch
    if samples < recipe.data.batch_size and not recipe.train.batch_norm_group:
        whose = "all ranks' micro-batches" if together else "a rank's micro-batch"
        findings.warnings.append(
            f"model.image: {name} has batch norms, whose statistics are over {samples} samples, {whose}: "
            "with other ranks or micro-batches the weights differ; train.batch_norm_group "
            f"{micro_batch}, or a divisor of it, makes them the same"
        )
    if recipe.train.precision in ("bf16", "fp16"):
        findings.summary.append(f"batch norms of {name}: kept in fp32 under {recipe.train.precision}")


def _has_batch_norms(tower: Any) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in tower.modules())


def _idle_norms(recipe: Recipe, tower: str, called: str) -> list[str]:
    """A warning where the recipe has keys for batch norms and a tower has none."""
    keys = [
        f"freeze.{number}.batch_norm"
        for number, entry in enumerate(recipe.freeze)
        if entry.tower == tower and entry.batch_norm == "moving"
    ]
    if tower == "image":  # no text tower has any
        keys += [
            f"train.{key}" for key in ("batch_norm_group", "sync_batch_norm") if getattr(recipe.train, key)
        ]
    said = f"{called} has no batch norms, so that this changes nothing but the run's name; remove it"
    return [f"{', '.join(keys)}: {said}"] if keys else []


def _check_text_tower(recipe: Recipe, tokenizer: Any, assets: Path | None, findings: Findings) -> None:
    from clipcluster.model.towers import build_text_tower, foreign_tokenizer

    text = recipe.model.text
    assert text is not None
    tower, coverage = build_text_tower(
        text, tokenizer=tokenizer, assets=assets, weights_from=recipe.model.weights_from
    )
    if isinstance(text, ClipTextTower):
        name = f"clip, {text.clip.layers} layers of width {text.clip.width}"
    else:
        name = text.hf if isinstance(text, HfTextTower) else text.arch
    findings.summary += _described(f"text tower: {name}", tower, coverage, f", pool {tower.pool}")
    if not _has_batch_norms(tower):
        findings.warnings += _idle_norms(recipe, "text", name)
    foreign = foreign_tokenizer(tower, tokenizer) if coverage else ""
    findings.warnings += [f"data.text.tokenizer: {foreign}"] if foreign else []


def _check_whole(recipe: Recipe, tokenizer: Any, assets: Path | None, findings: Findings) -> None:
    """A whole dual encoder, or weights of a whole model."""
    from clipcluster.build.model import build_model
    from clipcluster.model.towers import foreign_tokenizer

    model = build_model(recipe, tokenizer, assets)
    if recipe.model.dual:
        findings.summary += _described(f"dual encoder: {recipe.model.dual.hf}", model, None)
        for name in ("image", "text"):
            if not _has_batch_norms(getattr(model, name)):
                findings.warnings += _idle_norms(recipe, name, recipe.model.dual.hf)
    findings.summary += [str(coverage) for coverage in model.starting_weights]
    if not TASKS[recipe.task].captions or not any(own.tower == "model" for own in model.starting_weights):
        return
    foreign = foreign_tokenizer(model.text, tokenizer)
    findings.warnings += [f"data.text.tokenizer: {foreign}"] if foreign else []
    scale, bound = model.logit_scale.exp().item(), model.max_scale
    if bound is not None and scale > 1.01 * bound:
        findings.warnings.append(
            f"model.logit_scale.max: the weights' scale is {scale:.4g}, and the first step lowers it to "
            f"{bound:g}; set it to null for no bound"
        )


def _teachers(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe for each teacher that is given by its model, by the key of its `image`."""
    return {f"distill.teachers.{number}.image": own for number, own in recipe.teachers().items()}


def _check_pixels(place: str, recipe: Recipe, assets: Path | None, findings: Findings) -> None:
    """A warning where weights expect other pixels: mean and std of their run, or their published folder."""
    from clipcluster.model.hugging_face import pixels_of

    image, model = recipe.data.image, recipe.model
    for tower in (model.image, model.dual):
        weights = (tower.weights if tower else None) or model.weights
        if tower is None or weights is None:
            continue
        whose, theirs = weights, _pixels_of_run(Path(weights))
        if theirs is None and isinstance(tower, HfImageTower | Dual):
            whose, theirs = tower.hf, pixels_of(tower.hf, assets)
        ours = [*image.mean, *image.std]
        if theirs and any(abs(own - other) > 0.01 for own, other in zip(ours, theirs, strict=True)):
            mean, std = ([round(value, 4) for value in part] for part in (theirs[:3], theirs[3:]))
            findings.warnings.append(
                f"{place}: {whose} was trained with pixels of mean {mean} and std {std}; set mean and std to "
                "these"
            )


def _pixels_of_run(weights: Path) -> list[float] | None:
    """Mean and std of the run of these weights (its folder, a checkpoint, or a file of one); else None."""
    step = next((each for each in (weights, weights.parent) if step_of(each.name) is not None), None)
    run = Run(step.parent.parent if step else weights)
    if not run.recipe_file.is_file():
        return None
    image = run.recipe()["data"]["image"]
    return [*image["mean"], *image["std"]]


def _described(name: str, tower: Any, coverage: Any, more: str = "") -> list[str]:
    """A line on a tower, and one on its starting weights if it has any."""
    count = sum(parameter.numel() for parameter in tower.parameters())
    size = f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"
    return [f"{name}, {size} parameters{more}", *([str(coverage)] if coverage else [])]


def _preparation(name: str, recipe: Recipe, tokenizer: Any, assets: Path | None) -> Any:
    """The preparation of the task (`TaskSpec.preparation`)."""
    from clipcluster.data.images.transforms import train_transform

    return resolve_name(name)(recipe, train_transform(recipe.data.image), tokenizer, assets)


def check_sample(
    key: str,
    source: Source,
    text: bool,
    members: Mapping[str, str],
    tokenizer: Any,
    findings: Findings,
    prepare: Any = None,
) -> None:
    """Compare shards with their index, decode the first sample that can be, and tokenize its captions.

    members: further members that the task needs, name -> dotted name of the decoder. prepare: the task's
    preparation, which checks whether the members fit each other. UserError where no sample can be used.
    """
    from clipcluster.data.images.decode import BadImage, decode
    from clipcluster.data.loading.extras import BadExtra, decode_extras, decoders_of
    from clipcluster.data.shards.opened import CHECKED_SHARDS

    decoders = decoders_of(members)
    shards = open_indexed(source, text)
    shards.check_unchanged()
    for shard in range(min(len(shards), CHECKED_SHARDS)):
        if shards.folder_of(shard).remote_index is None:  # a remote one would be fetched
            shards.columns(shard)
    reasons = []
    for position in range(min(8, shards.n_samples)):
        sample = shards.read(position, text=text)
        try:
            image = decode(sample.image)
            values = decode_extras(decoders, shards.read_members(position, decoders)) if decoders else {}
            if prepare is not None:
                prepare.check(sample, image, values)
        except (BadImage, BadExtra) as error:
            reasons.append(f"{sample.shard} {sample.key}: {error}")
            continue
        if text and tokenizer is not None:
            tokenizer(sample.captions or [""])
        height, width = image.shape[-2:]
        caption = f", {sample.captions[0].strip()[:60]!r}" if sample.captions else ""
        findings.summary.append(f"{key}: {sample.shard} {sample.key}, {width} x {height} pixels{caption}")
        if reasons:
            findings.warnings.append(f"{key}: samples that cannot be decoded: {'; '.join(reasons)}")
        return
    raise UserError(f"none of the first {len(reasons)} samples can be decoded: {'; '.join(reasons)}")


def _check_lengths(key: str, source: Source, tokenizer: Any, recipe: Recipe, findings: Findings) -> None:
    """The length of captions in tokens, on samples spread over a source (of a remote one, its first)."""
    shards = open_indexed(source, True)
    remote = any(shards.folder_of(shard).remote_index is not None for shard in range(len(shards)))
    count = min(shards.n_samples, MEASURED_SAMPLES)
    stride = 1 if remote else shards.n_samples // count
    captions = [shards.read(position * stride, text=True).captions for position in range(count)]
    texts = [text for of_one in captions for text in of_one or ()]
    if not texts:
        return
    uncut = copy(tokenizer)
    uncut.context_length = LONGEST
    lengths = uncut(texts)[1].sum(dim=1)
    context = recipe.data.text.context_length
    cut = float((lengths > context).float().mean())
    text = (
        f"{key}: of {counted(len(texts), 'caption')} {cut:.0%} have more than the "
        f"{counted(context, 'token')} of data.text.context_length (median {int(lengths.median())}, "
        f"longest {int(lengths.max())})"
    )
    if cut > CUT_CAPTIONS:
        findings.advise(recipe.checks, "long-captions", f"{text}, and are truncated")
    else:
        findings.summary.append(text)


def _check_stages(recipe: Recipe, world_size: int, assets: Path | None, findings: Findings) -> None:
    """Build the stages: the layers exist, each entry changes something, what begins frozen has weights."""
    from clipcluster.build.stages import try_stages

    findings.summary += try_stages(recipe, assets, world_size)


def _check_step(recipe: Recipe, world_size: int, assets: Path | None, findings: Findings) -> None:
    """One forward and backward pass of the task, which finds shapes that do not fit."""
    from clipcluster.build.training import try_task

    unused = try_task(recipe, assets, world_size)
    if not unused:
        return
    named = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
    if world_size > 1:
        raise UserError(
            f"parameters without a gradient: {named}. Nothing of the loss depends on them, and several ranks "
            "cannot train such a model; choose a tower that uses all of its parameters, or train on one rank"
        )
    findings.warnings.append(f"parameters that the loss does not depend on are never trained: {named}")


if __name__ == "__main__":
    main()
