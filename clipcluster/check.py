"""Everything about a run that can be known before it queues, at two depths.

`plain` reads the recipe, does its arithmetic and opens the indexes; it needs no torch and is instant.
`deep` tries what needs torch (towers and their arguments, weights, tokenizer, a sample of every source) in a
process of its own, `python -m clipcluster.check`, so that the command itself never loads it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clipcluster.errors import UserError
from clipcluster.recipe.load import Loaded, load
from clipcluster.recipe.plan import Plan, plan_for_nodes
from clipcluster.recipe.sections.data import Source
from clipcluster.recipe.sections.model import HfTextTower
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tree import nearest

if TYPE_CHECKING:
    from clipcluster.data.shards.dataset import Dataset

T = TypeVar("T")

DEEP_SECONDS = 900  # large towers take minutes to build on a busy login node
_RETRIEVAL = [
    f"{prefix}{side}_{name}"
    for prefix in ("", "paired_")
    for side in ("i2t", "t2i")
    for name in ("r1", "r5", "r10", "mean_rank", "median_rank")
]
_ZERO_SHOT = ["zero_shot_top1", "zero_shot_top5"]


@dataclass
class Findings:
    """What a check found: `errors` stop a submission, `warnings` do not, `summary` is what will happen."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)

    def attempt(self, key: str, action: Callable[..., T], *args: Any) -> T | None:
        """The result of `action(*args)`, or None with its message for a person among the errors."""
        return self._attempt(key, False, action, *args)

    def attempt_foreign(self, key: str, action: Callable[..., T], *args: Any) -> T | None:
        """The same for what ends in other people's code: whatever it raises is an error of the recipe."""
        return self._attempt(key, True, action, *args)

    def _attempt(self, key: str, foreign: bool, action: Callable[..., T], *args: Any) -> T | None:
        from clipcluster.runtime.stop import Failure

        try:
            return action(*args)
        except (UserError, Failure) as error:
            text = "; ".join(filter(None, (str(error), getattr(error, "advice", ""))))
            self.errors.append(text if not key or text.startswith(key) else f"{key}: {text}")
        except Exception as error:
            if not foreign:
                raise
            self.errors.append(f"{key}: {type(error).__name__}: {error}")
        return None

    def raise_errors(self) -> None:
        """UserError with all the errors, if there is one."""
        if self.errors:
            head = "" if len(self.errors) == 1 else f"{len(self.errors)} errors\n  "
            raise UserError(head + "\n  ".join(self.errors))


@dataclass
class Checked(Findings):
    """The plain check's findings and what it read; `plan` is None where the data or the arithmetic failed."""

    loaded: Loaded | None = None
    plan: Plan | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe, its paths absolute."""
        assert self.loaded is not None
        return self.loaded.recipe


def plain(
    path: str | Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    site: str | None = None,
) -> Checked:
    """Check a recipe without torch: the recipe, files, indexes, arithmetic.

    Raises:
        UserError: the recipe itself cannot be read. What is found later is in the result's `errors`.
    """
    loaded = load(path, overrides, environ, site=site)
    checked = Checked(loaded=loaded)
    _check_files(loaded, checked)
    samples = _check_sources(loaded, checked)
    _check_evaluations(loaded, checked)
    _check_best(loaded.recipe, checked)
    if samples is not None:
        checked.plan = _check_plans(loaded.recipe, samples, checked)
    if checked.plan is not None:
        checked.summary = _summary(loaded.recipe, checked.plan, samples or 0)
    workers, cores = loaded.recipe.data.workers, loaded.recipe.cluster.cpus_per_task
    if workers > cores:
        checked.warnings.append(
            f"data.workers {workers} share cluster.cpus_per_task {cores} with the rank; give as many cores"
        )
    return checked


def _place(loaded: Loaded, key: str) -> str:
    place = loaded.place(key)
    return place if "=" in place else f"{place}: {key}"


def _check_files(loaded: Loaded, findings: Findings) -> None:
    """Weights, tokenizers and configurations that were given as paths are there."""
    for key, path in loaded.paths.items():
        if not key.startswith(("model.", "data.text.")) or os.path.exists(path):
            continue
        folder = Path(path).parent
        near = (
            nearest(Path(path).name, (entry.name for entry in folder.iterdir())) if folder.is_dir() else None
        )
        hint = f"; did you mean {folder / near}?" if near else ""
        findings.errors.append(f"{_place(loaded, key)}: {path} is not there{hint}")


def _check_sources(loaded: Loaded, findings: Findings) -> int | None:
    """Samples (with captions: all, pairs) of all sources, repeats counted; None if none can be drawn."""
    opened: list[Dataset] = []
    for place, source in enumerate(loaded.recipe.data.train):
        shards = findings.attempt(_place(loaded, f"data.train.{place}.shards"), _open, source, True)
        if shards is not None:
            opened.append(shards)
    if len(opened) < len(loaded.recipe.data.train):
        return None
    findings.attempt("data.cache", _check_cache, loaded.recipe, opened, findings)
    return findings.attempt("", _draws, loaded.recipe, opened)


def _check_cache(recipe: Recipe, opened: Sequence[Dataset], findings: Findings) -> None:
    """The cache holds any remote shard, and better all that are read at a time."""
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
            "that are read at a time, so shards will be fetched again and again; give it more, or lower "
            "data.order.lanes (and full_shuffle_below, under which a source is read all over)"
        )


def _draws(recipe: Recipe, opened: Sequence[Dataset]) -> int:
    """Samples of all sources, repeats counted, from the order itself: what it refuses is found here."""
    from clipcluster.data.sampling.sampler import sampler_of

    return sampler_of(recipe, opened).samples


def _open(source: Source, text: bool) -> Dataset:
    from clipcluster.data.shards.open import open_source

    try:
        return open_source(source, text=text)
    except OSError as error:  # a server that does not answer; what lies on a disk has its own words
        raise UserError(f"the index cannot be read: {error}") from None


def _check_evaluations(loaded: Loaded, findings: Findings) -> None:
    """The evaluation sets open, and have distinct names, class names and templates."""
    evaluate = loaded.recipe.evaluate
    for kind, folders in (("retrieval", evaluate.retrieval), ("zero_shot", evaluate.zero_shot)):
        for place, folder in enumerate(folders):
            key = _place(loaded, f"evaluate.{kind}.{place}")
            shards = findings.attempt(key, _open, Source(shards=folder), kind == "retrieval")
            if shards is not None and kind == "zero_shot":
                _check_classes(shards, key, findings)
    every = dict.fromkeys([*evaluate.retrieval, *evaluate.zero_shot])
    findings.errors += [
        f"{_place(loaded, 'evaluate')}: {count} sets are called {name!r}; the last component of each path "
        "names its metrics, so they have to differ"
        for name, count in Counter(Path(folder).name for folder in every).items()
        if count > 1
    ]


def _check_classes(shards: Dataset, key: str, findings: Findings) -> None:
    for words, file in (
        (shards.classnames, "classnames.txt"),
        (shards.templates, "zeroshot_classification_templates.txt"),
    ):
        if not words:
            findings.errors.append(f"{key}: zero-shot needs {file} beside the shards or in the folder above")
    if any("{c}" not in template for template in shards.templates or ()):
        findings.errors.append(f"{key}: every line of zeroshot_classification_templates.txt needs {{c}}")


def _check_best(recipe: Recipe, findings: Findings) -> None:
    """The metric that keeps checkpoints is one that the evaluations measure."""
    best = recipe.checkpoint.keep.best
    if best is None:
        return
    known = [
        f"{Path(folder).name}/{metric}"
        for folders, metrics in (
            (recipe.evaluate.retrieval, _RETRIEVAL),
            (recipe.evaluate.zero_shot, _ZERO_SHOT),
        )
        for folder in folders
        for metric in metrics
    ]
    if best.metric not in known:
        near = nearest(best.metric, known)
        hint = (
            f"did you mean {near}?" if near else f"measured: {', '.join(known) or 'nothing (see evaluate)'}"
        )
        findings.errors.append(f"checkpoint.keep.best.metric: nothing measures {best.metric!r}; {hint}")


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
    """What will happen, a line a subject."""
    what = "pairs" if recipe.data.text.captions == "all" else "samples"
    sources = len(recipe.data.train)
    repeated = any(source.repeat != 1 or source.repeat_classes for source in recipe.data.train)
    ranks, nodes = plan.world_size, plan.nodes
    saves = f"{plan.checkpoint_every:,} steps" if plan.checkpoint_every else str(recipe.checkpoint.every)
    measures = f"every {plan.evaluate_every:,} steps and at the end" if plan.evaluate_every else "at the end"
    sets = len(recipe.evaluate.retrieval) + len(recipe.evaluate.zero_shot)
    return [
        f"data: {samples:,} {what} in {sources} source{'s' * (sources > 1)}" + ", repeats counted" * repeated,
        f"steps: {plan.steps_per_epoch:,} an epoch, {plan.total_steps:,} in all ({recipe.train.duration}, "
        f"{plan.total_samples:,} {what})",
        f"warm-up: {plan.warmup_steps:,} steps ({plan.warmup_steps / plan.total_steps:.1%} of the run)",
        f"batch: {plan.batch_size:,} = {ranks} rank{'s' * (ranks > 1)} x {plan.per_rank_batch:,} "
        f"on {nodes} node{'s' * (nodes > 1)}",
        f"checkpoints: every {saves}; evaluations: " + (measures if sets else "none"),
    ]


# The deep check: the caller's side, then the process's.


def deep(recipe: Recipe, *, world_size: int = 1, assets: Path | None = None) -> Findings:
    """Try what needs torch, in a process of its own.

    Args:
        recipe: with absolute paths (`Checked.recipe`).
        world_size: ranks the run will have.
        assets: folder of tokenizers and configurations fetched at submission.
    """
    question = {
        "recipe": recipe.model_dump(mode="json"),
        "world_size": world_size,
        "assets": str(assets) if assets else None,
    }
    root = str(Path(__file__).resolve().parents[1])
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        process = subprocess.run(
            [sys.executable, "-m", "clipcluster.check"],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=DEEP_SECONDS,
            env={**os.environ, "PYTHONPATH": search},
        )
    except subprocess.TimeoutExpired:
        return Findings(errors=[f"the deep check took longer than {DEEP_SECONDS} s; --quick leaves it out"])
    if process.returncode != 0:
        last = "\n".join(process.stderr.strip().splitlines()[-5:])
        return Findings(errors=[f"the deep check itself failed (code {process.returncode}):\n{last}"])
    return Findings(**json.loads(process.stdout))


def examine(recipe: Recipe, world_size: int, assets: Path | None) -> Findings:
    """What the process of the deep check does; loads torch."""
    findings = Findings()
    tokenizer = findings.attempt_foreign("data.text.tokenizer", _tokenizer, recipe, assets)
    findings.attempt_foreign("model.image", _check_image_tower, recipe, world_size, findings)
    if tokenizer is not None:
        findings.attempt_foreign("model.text", _check_text_tower, recipe, tokenizer, assets, findings)
    evaluate = recipe.evaluate
    named = [(f"data.train.{place}", source, True) for place, source in enumerate(recipe.data.train)]
    named += [
        (f"evaluate.retrieval.{i}", Source(shards=path), True) for i, path in enumerate(evaluate.retrieval)
    ]
    named += [
        (f"evaluate.zero_shot.{i}", Source(shards=path), False) for i, path in enumerate(evaluate.zero_shot)
    ]
    for key, source, text in named:
        findings.attempt_foreign(key, _check_sample, key, source, text, tokenizer, findings)
    return findings


def _tokenizer(recipe: Recipe, assets: Path | None) -> Any:
    from clipcluster.data.tokenizer import load_tokenizer

    return load_tokenizer(recipe.data.text, assets)


def _check_image_tower(recipe: Recipe, world_size: int, findings: Findings) -> None:
    from torch.nn.modules.batchnorm import _BatchNorm

    from clipcluster.model.towers import build_image_tower

    tower, coverage = build_image_tower(recipe.model.image, image_size=recipe.data.image.size)
    findings.summary.append(
        f"image tower: {recipe.model.image.timm}, {_millions(tower.parameters())} parameters"
    )
    if coverage is not None:
        findings.summary.append(str(coverage))
    if any(isinstance(module, _BatchNorm) for module in tower.modules()):
        if world_size > 1:
            findings.warnings.append(
                f"model.image: {recipe.model.image.timm} has batch norms, which see each rank's share of the "
                f"batch alone: with another number of ranks than {world_size} the run comes out differently"
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


def _millions(parameters: Iterable[Any]) -> str:
    count = sum(parameter.numel() for parameter in parameters)
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"


def _check_sample(key: str, source: Source, text: bool, tokenizer: Any, findings: Findings) -> None:
    """The shards are as indexed; the first sample that decodes is decoded, and its caption tokenized."""
    from clipcluster.data.images.decode import BadImage, decode

    shards = _open(source, text)
    shards.check_unchanged()
    reasons = []
    for position in range(min(8, shards.n_samples)):
        sample = shards.read(position, text=text)
        try:
            image = decode(sample.image)
        except BadImage as error:
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
