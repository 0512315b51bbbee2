"""The process of the deep check: towers, weights, tokenizer, a sample of every source, a tiny step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clipcluster.check.findings import Findings
from clipcluster.check.names import store_timm_names
from clipcluster.check.plain import open_indexed
from clipcluster.errors import UserError
from clipcluster.recipe.sections.data import Source
from clipcluster.recipe.sections.model import HfTextTower
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS

STEP_SECONDS = 300.0  # for a forward and backward pass of two samples on the CPU


def examine(recipe: Recipe, world_size: int, assets: Path | None) -> Findings:
    """Build and read everything of a recipe once; loads torch."""
    findings = Findings()
    tokenizer = findings.attempt("data.text.tokenizer", _tokenizer, recipe, assets, foreign=True)
    findings.attempt("model.image", _check_image_tower, recipe, world_size, findings, foreign=True)
    if tokenizer is not None:
        findings.attempt("model.text", _check_text_tower, recipe, tokenizer, assets, findings, foreign=True)
    evaluate, members = recipe.evaluate, TASKS[recipe.task].members
    named: list[tuple[str, Source, bool, Mapping[str, str]]] = [
        (f"data.train.{number}", source, True, members) for number, source in enumerate(recipe.data.train)
    ]
    named += [
        (f"evaluate.retrieval.{i}", Source(shards=path), True, {})
        for i, path in enumerate(evaluate.retrieval)
    ]
    named += [
        (f"evaluate.zero_shot.{i}", Source(shards=path), False, {})
        for i, path in enumerate(evaluate.zero_shot)
    ]
    for key, *sample in named:
        findings.attempt(key, _check_sample, key, *sample, tokenizer, findings, foreign=True)
    if not findings.errors:  # else the step would fail for a reason that is known
        findings.attempt(
            "a training step of two samples", _check_step, recipe, world_size, assets, findings, foreign=True
        )
    return findings


def _tokenizer(recipe: Recipe, assets: Path | None) -> Any:
    from clipcluster.data.tokenizer import load_tokenizer

    return load_tokenizer(recipe.data.text, assets)


def _check_image_tower(recipe: Recipe, world_size: int, findings: Findings) -> None:
    from torch.nn.modules.batchnorm import _BatchNorm

    from clipcluster.model.towers import build_image_tower

    try:
        store_timm_names()
    except OSError as error:
        findings.warnings.append(f"timm's names cannot be stored for the plain check: {error}")
    tower, coverage = build_image_tower(recipe.model.image, image_size=recipe.data.image.size)
    findings.summary.append(
        f"image tower: {recipe.model.image.timm}, {_millions(tower.parameters())} parameters"
    )
    if coverage is not None:
        findings.summary.append(str(coverage))
    if any(isinstance(module, _BatchNorm) for module in tower.modules()):
        if world_size > 1:
            findings.warnings.append(
                f"model.image: {recipe.model.image.timm} has batch norms, whose statistics are over each "
                f"rank's part of the batch: with another number of ranks than {world_size} the weights differ"
            )
        if recipe.train.precision == "bf16":
            findings.warnings.append(
                f"model.image: {recipe.model.image.timm} has batch norms, whose statistics suffer in bf16; "
                "train.precision fp16 or fp32 is safer"
            )


def _check_text_tower(recipe: Recipe, tokenizer: Any, assets: Path | None, findings: Findings) -> None:
    from clipcluster.model.towers import build_text_tower

    tower, coverage = build_text_tower(recipe.model.text, tokenizer=tokenizer, assets=assets)
    text = recipe.model.text
    name = text.hf if isinstance(text, HfTextTower) else text.arch
    findings.summary.append(
        f"text tower: {name}, {_millions(tower.parameters())} parameters, pool {tower.pool}"
    )
    if coverage is not None:
        findings.summary.append(str(coverage))


def _check_step(recipe: Recipe, world_size: int, assets: Path | None, findings: Findings) -> None:
    """One forward and backward pass of the task: what fails for its shapes fails here."""
    from clipcluster.build.training import try_task

    try:
        with _limited(STEP_SECONDS):
            unused = try_task(recipe, assets)
    except TimeoutError:
        findings.warnings.append(
            f"a training step of two samples took longer than {STEP_SECONDS:g} s and was stopped: what only "
            "it shows is not checked"
        )
        return
    if not unused:
        return
    more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
    named = f"{', '.join(unused[:5])}{more}"
    if world_size > 1:
        raise UserError(
            f"parameters without a gradient: {named}. Nothing of the loss depends on them, and several ranks "
            "cannot train such a model; choose a tower that uses all of its parameters, or train on one rank"
        )
    findings.warnings.append(f"parameters that the loss does not depend on are never trained: {named}")


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """TimeoutError in what runs longer, between two of its operations."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _millions(parameters: Iterable[Any]) -> str:
    count = sum(parameter.numel() for parameter in parameters)
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"


def _check_sample(
    key: str, source: Source, text: bool, members: Mapping[str, str], tokenizer: Any, findings: Findings
) -> None:
    """The shards match their index; the first sample that decodes is decoded, and its caption tokenized.

    members: what the task needs of a sample besides, extension -> dotted name of the decoder.
    """
    from clipcluster.data.images.decode import BadImage, decode
    from clipcluster.data.loading.extras import BadExtra, decode_extras, decoders_of

    decoders = decoders_of(members)
    shards = open_indexed(source, text)
    shards.check_unchanged()
    reasons = []
    for position in range(min(8, shards.n_samples)):
        sample = shards.read(position, text=text)
        try:
            image = decode(sample.image)
            if decoders:
                decode_extras(decoders, shards.read_members(position, decoders))
        except (BadImage, BadExtra) as error:
            reasons.append(f"{sample.shard} {sample.key}: {error}")
            continue
        if text and tokenizer is not None:
            tokenizer(sample.captions or [""])
        height, width = image.shape[-2:]
        findings.summary.append(
            f"{key}: {sample.shard} {sample.key}, {width} x {height} pixels" + _first(sample)
        )
        if reasons:
            findings.warnings.append(f"{key}: samples that cannot be decoded: {'; '.join(reasons)}")
        return
    raise UserError(f"none of the first {len(reasons)} samples can be decoded: {'; '.join(reasons)}")


def _first(sample: Any) -> str:
    if not sample.captions:
        return ""
    caption = sample.captions[0].strip()
    return f", {caption if len(caption) <= 60 else caption[:57] + '…'!r}"


def main() -> None:
    """Read the question on stdin, answer in JSON on what was stdout; libraries that print get stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    assets = Path(question["assets"]) if question["assets"] else None
    findings = examine(Recipe.model_validate(question["recipe"]), question["world_size"], assets)
    with answer:
        json.dump(vars(findings), answer)


if __name__ == "__main__":
    main()
