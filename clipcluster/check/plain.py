"""The plain check: the recipe, its files and names, the indexes and the arithmetic. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipcluster.check import names
from clipcluster.check.findings import Findings
from clipcluster.errors import UserError
from clipcluster.evals.headline import set_names
from clipcluster.recipe.load import Loaded, load, result_keys
from clipcluster.recipe.plan import Plan, plan_for_nodes
from clipcluster.recipe.sections.data import Source
from clipcluster.recipe.sections.model import HfTextTower
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import METRICS, metric_names
from clipcluster.recipe.tree import nearest
from clipcluster.runs.folder import Run
from clipcluster.runs.names import run_name
from clipcluster.text import counted

if TYPE_CHECKING:
    from clipcluster.data.shards.dataset import Dataset


@dataclass
class Checked(Findings):
    """The plain check's findings and what it read.

    Attributes:
        plan: None where the data or the arithmetic failed.
        unchecked: keys that only the deep check or the hub can tell of, each with the reason.
    """

    unchecked: list[str] = field(default_factory=list)
    loaded: Loaded | None = None
    plan: Plan | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe, its paths absolute."""
        assert self.loaded is not None
        return self.loaded.recipe


def check(
    path: str | Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    site: str | None = None,
    runs: Path | None = None,
) -> Checked:
    """Check a recipe without torch: the recipe, files, indexes, arithmetic.

    Args:
        path, overrides, environ, site: as of `load`.
        runs: the folder of runs; what an earlier submission of the same run fetched is found there.

    Raises:
        UserError: the recipe itself cannot be read. What is found later is in the result's `errors`.
    """
    loaded = load(path, overrides, environ, site=site)
    checked = Checked(loaded=loaded)
    _check_files(loaded, checked)
    checked.unchecked = _check_names(loaded, runs, checked)
    samples = _check_sources(loaded, checked)
    _check_evaluations(loaded, checked)
    _check_best(loaded, checked)
    if samples is not None:
        checked.plan = _check_plans(loaded.recipe, samples, checked)
    if checked.plan is not None:
        checked.summary = _summary(loaded.recipe, checked.plan, samples or 0)
    workers, cores = loaded.recipe.data.workers, loaded.recipe.cluster.cpus_per_task
    if workers > cores:
        checked.warnings.append(
            f"data.workers: {workers} loader processes share cluster.cpus_per_task {cores} with the rank; "
            f"set it to at least {workers}"
        )
    return checked


def _check_files(loaded: Loaded, findings: Findings) -> None:
    """Weights, tokenizers and configurations given as paths exist."""
    for key, path in loaded.paths.items():
        if not key.startswith(("model.", "data.text.")) or os.path.exists(path):
            continue
        folder = Path(path).parent
        near = (
            nearest(Path(path).name, (entry.name for entry in folder.iterdir())) if folder.is_dir() else None
        )
        hint = f"; did you mean {folder / near}?" if near else ""
        findings.errors.append(f"{loaded.place(key)}: {path} does not exist{hint}")


def _check_names(loaded: Loaded, runs: Path | None, findings: Findings) -> list[str]:
    """The names of towers and tokenizer, as far as files here tell; returns what they do not tell."""
    image, text = loaded.recipe.model.image, loaded.recipe.model.text
    tokenizer = loaded.recipe.data.text.tokenizer
    assets = Run((runs or Path()) / run_name(loaded.recipe.name, result_keys(loaded))).assets
    checks: dict[str, Callable[[], str]] = {"model.image.timm": partial(names.check_image_tower, image.timm)}
    if isinstance(text, HfTextTower):
        checks["model.text.hf"] = partial(names.check_hub_name, text.hf, names.CONFIGURATION, assets)
    if tokenizer != "bytes":
        checks["data.text.tokenizer"] = partial(names.check_hub_name, tokenizer, names.TOKENIZER, assets)
    unchecked = []
    for key, check_name in checks.items():
        if key not in loaded.paths or os.path.exists(loaded.paths[key]):  # else said already
            reason = findings.attempt(loaded.place(key), check_name)
            if reason:
                unchecked.append(f"{key} {reason}")
    return unchecked


def _check_sources(loaded: Loaded, findings: Findings) -> int | None:
    """Samples (with captions: all, pairs) of all sources, repeats included; None if none can be drawn."""
    opened: list[Dataset] = []
    for place, source in enumerate(loaded.recipe.data.train):
        shards = findings.attempt(loaded.place(f"data.train.{place}.shards"), open_indexed, source, True)
        if shards is not None:
            opened.append(shards)
    if len(opened) < len(loaded.recipe.data.train):
        return None
    findings.attempt("data.cache", _check_cache, loaded.recipe, opened, findings)
    return findings.attempt("", _draws, loaded.recipe, opened)


def _check_cache(recipe: Recipe, opened: Sequence[Dataset], findings: Findings) -> None:
    """The cache holds the largest remote shard; a warning where not all that are read at a time."""
    size, order = recipe.data.cache.size.megabytes << 20, recipe.data.order
    needed = 0
    for shards in opened:
        shards.check_cache_size(size)
        sizes = shards.remote_sizes
        whole = shards.n_samples <= order.full_shuffle_below
        needed += int(sizes.sum() if whole else min(sizes.sum(), order.lanes * sizes.max(initial=0)))
    if needed > size:
        findings.warnings.append(
            f"data.cache.size {recipe.data.cache.size} is less than the {needed:,} bytes of remote shards "
            "that are read at a time, so shards will be fetched repeatedly; set it higher, or lower "
            "data.order.lanes (and full_shuffle_below: smaller sources are read everywhere at once)"
        )


def _draws(recipe: Recipe, opened: Sequence[Dataset]) -> int:
    """Samples of all sources, repeats included, as the sampler counts them; what it refuses is found here."""
    from clipcluster.data.sampling.sampler import sampler_of

    return sampler_of(recipe, opened).samples


def open_indexed(source: Source, text: bool) -> Dataset:
    """A source of a recipe; UserError where its index cannot be read."""
    from clipcluster.data.shards.open import open_source

    try:
        return open_source(source, text=text)
    except OSError as error:  # a server that does not answer; what lies on a disk has its own words
        raise UserError(f"the index cannot be read: {error}") from None


def _check_evaluations(loaded: Loaded, findings: Findings) -> None:
    """The evaluation sets open, and have class names and templates."""
    evaluate = loaded.recipe.evaluate
    for kind, folders in (("retrieval", evaluate.retrieval), ("zero_shot", evaluate.zero_shot)):
        for place, folder in enumerate(folders):
            key = loaded.place(f"evaluate.{kind}.{place}")
            shards = findings.attempt(key, open_indexed, Source(shards=folder), kind == "retrieval")
            if shards is not None and kind == "zero_shot":
                findings.attempt(key, _check_classes, shards, key, findings)


def _check_classes(shards: Dataset, key: str, findings: Findings) -> None:
    for words, file in (
        (shards.classnames, "classnames.txt"),
        (shards.templates, "zeroshot_classification_templates.txt"),
    ):
        if not words:
            findings.errors.append(f"{key}: zero-shot needs {file} beside the shards or in the folder above")
    if any("{c}" not in template for template in shards.templates or ()):
        findings.errors.append(f"{key}: every line of zeroshot_classification_templates.txt needs {{c}}")


def _check_best(loaded: Loaded, findings: Findings) -> None:
    """The metric that keeps checkpoints is one that the evaluations measure."""
    recipe = loaded.recipe
    best = recipe.checkpoint.keep.best
    if best is None:
        return
    folders = {kind: getattr(recipe.evaluate, kind) for kind in METRICS}
    names = set_names(folder for own in folders.values() for folder in own)
    known = metric_names(
        recipe.task, {kind: [names[folder] for folder in own] for kind, own in folders.items()}
    )
    if best.metric not in known:
        near = nearest(best.metric, known)
        hint = (
            f"did you mean {near}?" if near else f"measured: {', '.join(known) or 'nothing (see evaluate)'}"
        )
        place = loaded.place("checkpoint.keep.best.metric")
        findings.errors.append(f"{place}: nothing measures {best.metric!r}; {hint}")


def _check_plans(recipe: Recipe, samples: int, findings: Findings) -> Plan | None:
    """The plan with the most nodes; the other counts of a range are tried too."""
    nodes = recipe.cluster.nodes
    found = None
    for granted in range(nodes.least, nodes.most + 1):
        found = findings.attempt("", plan_for_nodes, recipe, samples, granted)
        if found is None:
            return None
        findings.warnings += [text for text in found.warnings if text not in findings.warnings]
    return found


def _summary(recipe: Recipe, plan: Plan, samples: int) -> list[str]:
    """What the run will do, one line per subject."""
    what = "pairs" if recipe.data.text.captions == "all" else "samples"
    sources = len(recipe.data.train)
    repeated = any(source.repeat != 1 or source.repeat_classes for source in recipe.data.train)
    ranks, nodes = plan.world_size, plan.nodes
    saves = f"{plan.checkpoint_every:,} steps" if plan.checkpoint_every else str(recipe.checkpoint.every)
    measures = f"every {plan.evaluate_every:,} steps and at the end" if plan.evaluate_every else "at the end"
    sets = len(recipe.evaluate.retrieval) + len(recipe.evaluate.zero_shot)
    return [
        f"data: {samples:,} {what} in {counted(sources, 'source')}" + ", repeats included" * repeated,
        f"steps: {plan.steps_per_epoch:,} per epoch, {plan.total_steps:,} in total ({recipe.train.duration}, "
        f"{plan.total_samples:,} {what})",
        f"warm-up: {plan.warmup_steps:,} steps ({plan.warmup_steps / plan.total_steps:.1%} of the run)",
        f"batch: {plan.batch_size:,} = {counted(ranks, 'rank')} x {plan.per_rank_batch:,} "
        f"on {counted(nodes, 'node')}",
        f"checkpoints: every {saves}; evaluations: " + (measures if sets else "none"),
    ]
