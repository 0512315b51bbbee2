"""The plain check: the recipe, its files and names, the shard indexes and the arithmetic. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clipcluster.build.teacher_runs import run_and_recipe
from clipcluster.check import containers, experience, names
from clipcluster.errors import UserError
from clipcluster.evals import prompts
from clipcluster.evals.headline import named_sets
from clipcluster.recipe.load import Loaded, load, result_keys
from clipcluster.recipe.plan import Plan, plan_for_nodes, usable_nodes
from clipcluster.recipe.rates import describe_rates
from clipcluster.recipe.sections.checks import CheckName, Checks
from clipcluster.recipe.sections.data import Source
from clipcluster.recipe.sections.distill import RunTeacher
from clipcluster.recipe.sections.evaluate import ZeroShot, folders_of
from clipcluster.recipe.sections.model import (
    ArchTextTower,
    Dual,
    HfImageTower,
    HfTextTower,
    Model,
    TimmImageTower,
)
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.sweep import Member
from clipcluster.recipe.tasks import METRICS, RAW, TASKS
from clipcluster.recipe.units import AUTO
from clipcluster.runs.checkpoints import steps_in
from clipcluster.runs.folder import Run
from clipcluster.runs.names import run_name
from clipcluster.runtime.outcome import Failure
from clipcluster.text import counted, did_you_mean, nearest

if TYPE_CHECKING:
    from clipcluster.data.shards.dataset import Dataset

T = TypeVar("T")
NameChecks = dict[str, Callable[[], Any]]
TRIED_SAMPLES = 8  # per source, whose members are examined


@dataclass
class Findings:
    """The findings of a check: `errors` stop a submission, `warnings` do not.

    Attributes:
        summary: facts about the run, `SUBJECT: TEXT` each.
        unchecked: what could not be checked, each with the reason.
        figures: numbers behind the facts, by name; sizes in bytes.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Findings) -> None:
        """Take over the findings of another check."""
        for name in ("errors", "warnings", "summary", "unchecked"):
            getattr(self, name).extend(getattr(other, name))
        self.figures |= other.figures

    def attempt(self, key: str, action: Callable[..., T], *args: Any, foreign: bool = False) -> T | None:
        """The result of `action(*args)`, or None with the error's message among `errors`.

        foreign: the action calls other libraries, and any exception is taken for an error of the recipe.
        """
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

    def advise(self, checks: Checks, name: CheckName, text: str) -> None:
        """Add a finding of the check `name`: a warning, or part of the summary where the recipe allows it."""
        if name in checks.allow:
            self.summary.append(f"allowed ({name}): {text}")
        else:
            self.warnings.append(f"{text} (if intended: checks.allow: [{name}])")

    def raise_errors(self) -> None:
        """UserError with all the errors, if there is one."""
        if self.errors:
            head = "" if len(self.errors) == 1 else f"{len(self.errors)} errors\n  "
            raise UserError(head + "\n  ".join(self.errors))


@dataclass(kw_only=True)
class Checked(Findings):
    """The plain check's findings and what it read.

    Attributes:
        plan: None where the data or the arithmetic failed.
        awaited: what other jobs make before the run starts; what lies there is not looked at yet.
    """

    loaded: Loaded
    plan: Plan | None = None
    awaited: Sequence[Path] = ()

    def without_findings(self) -> Checked:
        """A copy without findings."""
        return replace(self, errors=[], warnings=[], summary=[], unchecked=[], figures={})

    @property
    def recipe(self) -> Recipe:
        """The recipe, its paths absolute."""
        return self.loaded.recipe

    @property
    def world_size(self) -> int:
        """The ranks of the run, with the most nodes that it may be granted."""
        if self.plan is not None:
            return self.plan.world_size
        cluster = self.recipe.cluster
        return usable_nodes(self.recipe, cluster.nodes.most) * cluster.ranks_per_node

    def is_awaited(self, path: object) -> bool:
        """Whether other jobs make this path, or the folder around it, before the run starts."""
        here = Path(os.path.abspath(str(path)))
        return any(here == made or made in here.parents for made in self.awaited)


def check(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    site: str | None = None,
    runs: Path | None = None,
    member: Member | None = None,
    awaited: Sequence[Path] = (),
) -> Checked:
    """Check a recipe without torch: the recipe, files, indexes, arithmetic.

    Args:
        path, overrides, site, member: as of `load`.
        runs: the folder of runs; what an earlier submission of the same run fetched is found there.
        awaited: what other jobs make before the run starts (absolute): not looked at. With data among it
            there is no plan.

    Raises:
        UserError: the recipe itself cannot be read. What is found later is in the result's `errors`.
    """
    checked = Checked(loaded=load(path, overrides, site=site, member=member), awaited=awaited)
    checked.unchecked += [
        f"{key} ({path} is made first)"
        for key, path in checked.loaded.paths.items()
        if checked.is_awaited(path)
    ]
    _check_files(checked)
    checked.warnings += containers.warnings(checked.loaded)
    _check_starts(checked)
    _check_names(checked, runs or Path())
    samples = _check_sources(checked)
    _check_evaluations(checked)
    _check_best(checked)
    if samples is not None:
        _check_plans(checked, samples)
    elif not checked.errors:
        checked.attempt("", usable_nodes, checked.recipe, checked.recipe.cluster.nodes.most)
    _check_optimizer(checked)
    workers, cores = checked.recipe.data.workers, checked.recipe.cluster.cpus_per_task
    if workers > cores:
        checked.warnings.append(
            f"data.workers: {workers} loader processes share cluster.cpus_per_task {cores} with the rank; "
            f"raise cluster.cpus_per_task to at least {workers}, or lower data.workers"
        )
    for package in checked.recipe.train.log_to:
        if find_spec(package) is None:
            checked.warnings.append(
                f"train.log_to: the package {package} is not installed here (pip install {package}); without "
                "it the run has its curves in metrics.jsonl and TensorBoard alone"
            )
    return checked


def _check_optimizer(checked: Checked) -> None:
    """A warning about AdamW's keys, written with their defaults for an optimizer that does not read them."""
    optim = checked.recipe.optim
    for name in ("betas", "eps") if optim.name != "adamw" else ():
        if name in optim.model_fields_set:
            checked.warnings.append(
                f"{checked.loaded.place(f'optim.{name}')}: it is adamw's, and {optim.name} does not read it; "
                f"remove it, or give args: {{{name}: …}}"
            )


def _check_files(checked: Checked) -> None:
    """Weights, tokenizers and configurations given as paths exist."""
    for key, path in checked.loaded.paths.items():
        mine = key.startswith(("model.", "data.text.", "distill."))
        if mine and not os.path.exists(path) and not checked.is_awaited(path):
            folder = Path(path).parent
            only_folders = key.endswith(".run")
            entries = (entry for entry in folder.glob("*") if entry.is_dir() or not only_folders)
            near = nearest(Path(path).name, (entry.name for entry in entries))
            hint = f"; did you mean {folder / near}?" if near else ""
            checked.errors.append(f"{checked.loaded.place(key)}: {path} does not exist{hint}")


def _check_starts(checked: Checked) -> None:
    """Keys about starting weights where there are none, teachers without any, and runs that still train."""
    loaded = checked.loaded
    models = {"model": checked.recipe.model}
    for number, teacher in checked.recipe.teachers().items():
        place = f"distill.teachers.{number}.model"
        models[place] = teacher.model
        if not (teacher.model.weights or (teacher.model.dual and teacher.model.dual.weights)):
            checked.errors.append(
                f"{loaded.place(place)}: a teacher needs weights of the whole model, its projections "
                f"included; set {place}.weights"
            )
    for place, model in models.items():
        checked.warnings += [f"{loaded.place(f'{place}.{key}')}: {said}" for key, said in _idle_keys(model)]
    for number, given in enumerate(checked.recipe.distill.teachers if checked.recipe.distill else ()):
        if not isinstance(given, RunTeacher) or checked.is_awaited(given.run):
            continue
        if os.path.exists(given.run):
            checked.attempt(loaded.place(f"distill.teachers.{number}.run"), run_and_recipe, Path(given.run))
    for key, path in loaded.paths.items():
        if not key.startswith(("model.", "distill.")) or checked.is_awaited(path):
            continue
        if _never_saved(Path(path)):
            checked.errors.append(
                f"{loaded.place(key)}: the run {path} has no checkpoint yet; wait for its first, or name "
                "another"
            )
        if _still_trains(Path(path)):
            checked.warnings.append(
                f"{loaded.place(key)}: the run {path} has not finished: once it has a newer checkpoint, a "
                "resume finds other weights and is refused; name one of its checkpoints"
            )


def _never_saved(folder: Path) -> bool:
    """Whether this is the folder of a run without a checkpoint; not where it cannot be read."""
    run = Run(folder)
    try:
        return run.exists() and not steps_in(run.checkpoints)
    except OSError:
        return False


def _still_trains(folder: Path) -> bool:
    """Whether this is the folder of a run that has not finished; not where it cannot be read."""
    run = Run(folder)
    try:
        return bool(steps_in(run.checkpoints)) and not run.finished()
    except (OSError, UserError):
        return False


def _idle_keys(model: Model) -> Iterator[tuple[str, str]]:
    """The keys of a section `model` that have no effect without weights."""
    parts = {"image": model.image, "text": model.text, "dual": model.dual}
    of = {name: part.weights for name, part in parts.items() if part is not None} | {"": model.weights}
    if model.weights_from and not any(of.values()):
        yield "weights_from", "has no effect without weights; set weights, or remove it"
    for name in ("image", "text"):
        if getattr(parts[name], "missing", ()) and not of[name]:
            yield f"{name}.missing", f"has no effect without model.{name}.weights; set these, or remove it"
    if model.missing and not (model.weights or of.get("dual")):
        yield "missing", "has no effect without weights of the whole model; set weights, or remove it"


def _check_names(checked: Checked, runs: Path) -> None:
    """Check the names of towers, tokenizer and optimizer by files on this machine; note what these lack."""
    loaded, recipe = checked.loaded, checked.recipe
    assets = Run(runs / run_name(loaded.title, result_keys(loaded))).assets
    checks: NameChecks = {
        "optim.name": partial(names.check_optimizer, recipe.optim.name),
        **_named(recipe, "", "data.text", assets),
    }
    for number, teacher in recipe.teachers().items():
        place = f"distill.teachers.{number}."
        checks |= _named(teacher, place, f"{place}text", assets)
    for key, check_name in checks.items():
        if key not in loaded.paths or os.path.exists(loaded.paths[key]):  # else an error already
            reason = checked.attempt(loaded.place(key), check_name)
            checked.unchecked += [f"{key} {reason}"] if reason else []


def _named(recipe: Recipe, place: str, text: str, assets: Path) -> NameChecks:
    """The checks of a recipe's towers and tokenizer, by key; `place` and `text` are those of a teacher."""
    checks: NameChecks = {}
    for key in ("model.image", "model.text", "model.dual"):
        tower = getattr(recipe.model, key.removeprefix("model."))
        if isinstance(tower, TimmImageTower):
            checks[f"{place}{key}.timm"] = partial(names.check_image_tower, tower.timm)
        elif isinstance(tower, ArchTextTower):
            checks[f"{place}{key}.arch"] = partial(names.check_text_tower, tower.arch)
        elif isinstance(tower, HfImageTower | HfTextTower | Dual):
            checks[f"{place}{key}.hf"] = partial(names.check_hub_name, tower.hf, names.CONFIGURATION, assets)
    tokenizer = recipe.data.text.tokenizer
    if tokenizer != "bytes" and TASKS[recipe.task].captions:
        checks[f"{text}.tokenizer"] = partial(names.check_hub_name, tokenizer, names.TOKENIZER, assets)
    return checks


def _check_sources(checked: Checked) -> int | None:
    """Samples (with captions: all, pairs) of all sources, repeats included; None if none can be drawn."""
    from clipcluster.data.sampling.sampler import sampler_of
    from clipcluster.data.shards.classes import check_classes, class_count

    opened: list[Dataset] = []
    recipe, needed = checked.recipe, TASKS[checked.recipe.task]
    for number, source in enumerate(recipe.data.train):
        if any(checked.is_awaited(path) for path in _shards_of(source)):
            continue
        place = checked.loaded.place(f"data.train.{number}.shards")
        shards = checked.attempt(place, open_indexed, source, needed.captions)
        if shards is not None:
            checked.attempt(f"data.train.{number}", _check_members, shards, recipe)
        opened += [] if shards is None else [shards]
    if len(opened) < len(recipe.data.train):
        return None
    if needed.classes:
        count = checked.attempt("", class_count, recipe.model.classes, opened)
        if count is not None:
            checked.attempt("", check_classes, count, opened)
    checked.attempt("data.cache", _check_cache, checked, opened)
    return checked.attempt("", lambda: sampler_of(checked.recipe, opened).samples)


def _shards_of(source: Source) -> Sequence[str]:
    return (source.shards,) if isinstance(source.shards, str) else source.shards


def _check_members(shards: Dataset, recipe: Recipe) -> None:
    """UserError where none of the first samples has all further members that the task needs."""
    needed = TASKS[recipe.task].members(recipe)
    if not needed or len(shards.remote_sizes):  # a remote shard would be fetched
        return
    tried = min(TRIED_SAMPLES, shards.n_samples)
    found = [shards.read_members(position, needed) for position in range(tried)]
    if all(needed.keys() - members.keys() for members in found):
        lacking = [name.replace("|", " or ") for name in needed if not any(name in own for own in found)]
        raise UserError(
            f"task: {recipe.task} needs {', '.join(lacking or needed)} of every sample, and the first "
            f"{counted(tried, 'sample')} have none; DataCompDR's are joined with their images by "
            "`clipcluster shards convert datacompdr IMAGES REINFORCEMENTS --out DIR`"
        )


def _check_cache(checked: Checked, opened: Sequence[Dataset]) -> None:
    """The cache holds the largest remote shard; a warning where it cannot hold all that are read at once."""
    cache, order = checked.recipe.data.cache, checked.recipe.data.order
    size, needed = cache.size.megabytes << 20, 0
    for shards in opened:
        shards.check_cache_size(size)
        sizes = shards.remote_sizes
        whole = shards.n_samples <= order.full_shuffle_below
        needed += int(sizes.sum() if whole else min(sizes.sum(), order.lanes * sizes.max(initial=0)))
    if needed > size:
        checked.warnings.append(
            f"data.cache.size {cache.size} is less than the {needed:,} bytes of remote shards that are read "
            "at a time, so shards will be fetched repeatedly; set it higher, or lower data.order.lanes (and "
            "full_shuffle_below: smaller sources are read everywhere at once)"
        )


def open_indexed(source: Source, text: bool) -> Dataset:
    """A source of a recipe; UserError where its index cannot be read."""
    from clipcluster.data.shards.open import open_source

    try:
        return open_source(source, text=text)
    except OSError as error:  # a server that does not answer; files on a disk raise UserError
        raise UserError(f"the index cannot be read: {error}") from None


def _check_evaluations(checked: Checked) -> None:
    """The evaluation sets open; class names and templates are there, or the classes are the trained ones."""
    from clipcluster.data.shards.classes import check_measured

    evaluate, loaded = checked.recipe.evaluate, checked.loaded
    for kind in METRICS:
        for number, entry in enumerate(getattr(evaluate, kind)):
            key = loaded.place(f"evaluate.{kind}.{number}")
            for folder in folders_of(entry):
                if checked.is_awaited(folder):
                    continue
                shards = checked.attempt(key, open_indexed, Source(shards=folder), kind == "retrieval")
                if shards is not None and kind == "zero_shot":
                    checked.attempt(key, _check_classes, shards, key, entry, checked)
                if shards is not None and kind == "classification":
                    checked.attempt(key, _check_same_classes, shards, key, checked)
                if shards is not None and kind == "probe":
                    checked.attempt(key, check_measured, None, shards)


def _check_same_classes(shards: Dataset, key: str, checked: Checked) -> None:
    """A class number is one of the model's and means the same in an evaluation, as far as both name them."""
    from clipcluster.data.shards.classes import check_measured

    first = checked.recipe.data.train[0]
    if any(checked.is_awaited(path) for path in _shards_of(first)):
        return
    trained = open_indexed(first, False).classnames
    named, count = shards.classnames, checked.recipe.model.classes or len(trained or ())
    if count:  # else it is an error of the training data
        checked.attempt(key, check_measured, count, shards)
    if not trained or not named or trained == named:
        return
    pairs = [(n, a, b) for n, (a, b) in enumerate(zip(trained, named, strict=False)) if a != b]
    where = f"class {pairs[0][0]} is {pairs[0][2]!r} there and {pairs[0][1]!r} in data.train.0"
    counts = f"it has {len(named)} classes, data.train.0 has {len(trained)}"
    checked.errors.append(
        f"{key}: its classnames.txt is not that of the training data ({where if pairs else counts}); convert "
        "both with one list of classes"
    )


def _check_classes(shards: Dataset, key: str, entry: ZeroShot, findings: Findings) -> None:
    """The classes of a set for zero-shot classification have names, and there are templates."""
    from clipcluster.data.shards.classes import check_measured

    count = prompts.count_of(entry.classnames) if entry.classnames else len(shards.classnames or ())
    if count == 0:
        findings.errors.append(
            f"{key}: zero-shot needs classnames.txt beside the shards or in the folder above, or "
            "{shards: …, classnames: FILE}"
        )
    elif entry.classnames:
        findings.attempt(key, prompts.check_count, entry.classnames, count, shards.classnames)
    if entry.templates:
        prompts.check_named(entry.templates)
    elif not shards.templates:
        findings.errors.append(
            f"{key}: zero-shot needs zeroshot_classification_templates.txt beside the shards or in the "
            "folder above, or {shards: …, templates: FILE}"
        )
    elif any(prompts.PLACEHOLDER not in template for template in shards.templates):
        findings.errors.append(
            f"{key}: every line of zeroshot_classification_templates.txt needs {prompts.PLACEHOLDER}"
        )
    if count != 0:
        findings.attempt(key, check_measured, count, shards)


def _check_best(checked: Checked) -> None:
    """The metric that keeps checkpoints is one that the evaluations measure."""
    recipe, best = checked.recipe, checked.recipe.checkpoint.keep.best
    known = [
        f"{name}/{metric}"
        for kind, _, name in checked.attempt("", named_sets, recipe.evaluate) or ()
        for metric in METRICS[kind]
        if recipe.train.ema or not metric.startswith(RAW)
    ]
    if best is not None and best.metric not in known:
        measured = f"; measured: {', '.join(known) or 'nothing (see evaluate)'}"
        hint = did_you_mean(best.metric, known) or measured
        place = checked.loaded.place("checkpoint.keep.best.metric")
        checked.errors.append(f"{place}: nothing measures {best.metric!r}{hint}")


def _check_plans(checked: Checked, samples: int) -> None:
    """The plan with the most nodes, and what the run will do; the other counts of a range are tried too."""
    nodes, found = checked.recipe.cluster.nodes, None
    for granted in range(nodes.least, nodes.most + 1):
        found = checked.attempt("", plan_for_nodes, checked.recipe, samples, granted)
        if found is None:
            return
        checked.warnings += [text for text in found.warnings if text not in checked.warnings]
    if found is not None:
        checked.plan, checked.summary = found, _summary(checked.recipe, found, samples)
        names = ("total_steps", "steps_per_epoch", "batch_size", "world_size")
        checked.figures |= {"samples": samples, **{name: getattr(found, name) for name in names}}
        for name, text in experience.findings(checked.recipe, found, samples):
            checked.advise(checked.recipe.checks, name, text)
        _check_synchronised(checked, found)
        _check_all_learn(checked, found)


def _check_synchronised(checked: Checked, found: Plan) -> None:
    """Batch norms over several ranks need GPUs."""
    on_cpu = checked.recipe.cluster.gpus_per_node == 0
    if checked.recipe.train.sync_batch_norm and on_cpu and found.world_size > 1:
        place = checked.loaded.place("train.sync_batch_norm")
        checked.errors.append(
            f"{place}: torch's SyncBatchNorm does not run on the CPU, and cluster.gpus_per_node is 0; set it "
            "to false"
        )


def _check_all_learn(checked: Checked, found: Plan) -> None:
    """Several ranks train no model with a part that the loss does not depend on, such as the logit scale."""
    distill = checked.recipe.distill
    if distill and not (distill.weight or distill.contrastive_weight) and found.world_size > 1:
        untrained = "the logit scale" if distill.feature_mse else "the text tower and the logit scale"
        checked.errors.append(
            f"{checked.loaded.place('distill.weight')}: with weight and contrastive 0 the loss does not "
            f"depend on {untrained}, and {found.world_size:,} ranks cannot train such a model; set one of "
            "them above 0, or train on one rank"
        )


def _summary(recipe: Recipe, plan: Plan, samples: int) -> list[str]:
    """What the run will do, one line per subject."""
    what = "pair" if TASKS[recipe.task].captions and recipe.data.text.captions == "all" else "sample"
    sources = len(recipe.data.train)
    repeated = any(source.repeat != 1 or source.repeat_classes for source in recipe.data.train)
    ranks, nodes = plan.world_size, plan.nodes
    saves = counted(plan.checkpoint_every, "step") if plan.checkpoint_every else str(recipe.checkpoint.every)
    saves = "as often as measured to be best" if recipe.checkpoint.every == AUTO else f"every {saves}"
    often = f"every {counted(plan.evaluate_every, 'step')} and " if plan.evaluate_every else ""
    sets = sum(len(getattr(recipe.evaluate, kind)) for kind in METRICS)
    where = ", each a job of its own" if recipe.evaluate.where == "job" else ""
    return [
        f"data: {counted(samples, what)} in {counted(sources, 'source')}" + ", repeats included" * repeated,
        f"steps: {plan.steps_per_epoch:,} per epoch, {plan.total_steps:,} in total "
        f"({recipe.train.duration.shown}, {counted(plan.total_samples, what)})",
        f"warm-up: {counted(plan.warmup_steps, 'step')} "
        f"({plan.warmup_steps / plan.total_steps:.1%} of the run)",
        f"batch: {plan.batch_size:,} = {counted(ranks, 'rank')} x {plan.per_rank_batch:,} "
        f"on {counted(nodes, 'node')}"
        + f", in {plan.accumulation:,} micro-batches of {plan.micro_batch:,}"
        * (plan.accumulation > 1),
        f"checkpoints: {saves}; evaluations: " + (f"{often}at the end{where}" if sets else "none"),
        f"learning rate: {describe_rates(recipe)}",
        *(f"freeze: {freezing.summary}" for freezing in plan.freezings),
    ]
